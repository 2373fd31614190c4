// The CPU kernel's body, once for every instruction set. kernel_<set>.cpp defines the few things
// that differ and includes this file, both within its own unnamed namespace. Its sibling with
// statistics is in statistics_body.h.
//
// Mapping: one call works through one piece of one parameter; each step takes 64 bytes (a cache
//   line) of every tower, adds them in registers and stores the result once. 1 to 8 towers are
//   unrolled; beyond, a loop over them runs inside the step.
// Bytes: (T + 1) * n, nothing twice.
// Alignment: none is asked for. Streaming stores, the one exception, are left out where `out` is
//   not aligned.
// Tails: the last elements go through a zero-padded vector, by the same operations.
// Numerics: float16, bfloat16 and float32 are added in float32, float64 in float64, in tower order;
//   each product and each sum is rounded by itself (-ffp-contract=off), then one division (or the
//   product with an exact reciprocal: the same bits), then one rounding to out's dtype, to nearest
//   even. Every set runs these very operations, so the bits are the same everywhere; only which NaN
//   a NaN is may differ.
//
// Nothing here may call or instantiate an inline function of another header: the linker could keep
// the copy compiled for a wider set for everybody.

// What there is one of for each tower: in registers where the towers are unrolled (a copy of its
// own, which no store through `out` can change), in memory where they are not (kTowers = 0).
template <int kTowers, class T>
struct PerTower {
  explicit TORCHTOWER_INLINE PerTower(const T* from) {
    for (int t = 0; t < kTowers; ++t) values[t] = from[t];
  }
  TORCHTOWER_INLINE T operator[](int64_t t) const { return values[t]; }
  T values[kTowers];
};

template <class T>
struct PerTower<0, T> {
  explicit TORCHTOWER_INLINE PerTower(const T* from) : values(from) {}
  TORCHTOWER_INLINE T operator[](int64_t t) const { return values[t]; }
  const T* values;
};

// The division that ends a mean. By a power of two it is the product with the exact reciprocal.
template <class Vector>
struct Division {
  explicit TORCHTOWER_INLINE Division(const Towers& towers) {
    const bool is_mean = towers.rule == Rule::kMean;
    divides = is_mean && (towers.count & (towers.count - 1)) != 0;
    const double count = is_mean ? static_cast<double>(towers.count) : 1.0;
    broadcast(divides ? count : 1.0 / count, by);
  }
  TORCHTOWER_INLINE Vector operator()(Vector sum) const { return divides ? sum / by : sum * by; }

  bool divides;
  Vector by;
};

// Adds to `total`, kVectors neighbouring vectors at once; load(t, v) gives tower t's v-th.
template <int kTowers, bool kWeighted, int kVectors, class Vector, class Weights, class Load>
TORCHTOWER_INLINE void sum_towers(int64_t count, const Weights& weights, const Load& load,
                                  Vector (&total)[kVectors]) {
  const auto term = [&](int64_t t, int v) {
    if constexpr (kWeighted) {
      Vector weight;
      broadcast(weights[t], weight);
      return weight * load(t, v);
    } else {
      return load(t, v);
    }
  };
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) total[v] = term(0, v);
#pragma GCC unroll 8
  for (int64_t t = 1; t < (kTowers > 0 ? kTowers : count); ++t) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) total[v] = total[v] + term(t, v);
  }
}

template <class In, class Out, int kTowers, bool kWeighted>
void mean_of(const Parameter& parameter, int64_t begin, int64_t end, const Towers& towers,
             bool stream_out) {
  using Vector = typename In::Vector;
  constexpr int kVectors = kStep<In> / kLanes<In>;
  auto* const out = static_cast<typename Out::Real*>(parameter.out);
  const PerTower<kTowers, const void*> grads(parameter.grads);
  const PerTower<kTowers, double> weights(towers.weights);
  const Division<Vector> divided(towers);
  int64_t i = begin;
  for (; i + kStep<In> <= end; i += kStep<In>) {
    Vector total[kVectors];
    sum_towers<kTowers, kWeighted>(
        towers.count, weights,
        [&](int64_t t, int v) {
          return load<In>(static_cast<const typename In::Real*>(grads[t]) + i + v * kLanes<In>);
        },
        total);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      auto* const to = out + i + v * kLanes<In>;
      const Vector mean = divided(total[v]);
      if (stream_out) {
        stream(to, Out::narrow(mean));
      } else {
        store<Out>(to, mean);
      }
    }
  }
  for (; i < end; i += kLanes<In>) {
    const int64_t n = end - i < kLanes<In> ? end - i : kLanes<In>;
    Vector total[1];
    sum_towers<kTowers, kWeighted>(
        towers.count, weights,
        [&](int64_t t, int) {
          return load_tail<In>(static_cast<const typename In::Real*>(grads[t]) + i, n);
        },
        total);
    store_tail<Out>(out + i, divided(total[0]), n);
  }
}

template <class In, class Out, bool kWeighted>
void mean_by_count(const Parameter& parameter, int64_t begin, int64_t end, const Towers& towers,
                   bool stream_out) {
  switch (towers.count) {
#define TORCHTOWER_UNROLLED(count)                                                 \
  case count:                                                                      \
    mean_of<In, Out, count, kWeighted>(parameter, begin, end, towers, stream_out); \
    return;
    TORCHTOWER_UNROLLED(1)
    TORCHTOWER_UNROLLED(2)
    TORCHTOWER_UNROLLED(3)
    TORCHTOWER_UNROLLED(4)
    TORCHTOWER_UNROLLED(5)
    TORCHTOWER_UNROLLED(6)
    TORCHTOWER_UNROLLED(7)
    TORCHTOWER_UNROLLED(8)
#undef TORCHTOWER_UNROLLED
    default:
      mean_of<In, Out, 0, kWeighted>(parameter, begin, end, towers, stream_out);
  }
}

// Calls f(In{}, Out{}) with the parameter's formats.
template <class F>
TORCHTOWER_INLINE void with_formats(const Parameter& parameter, const F& f) {
  const bool widens = parameter.out_dtype != parameter.dtype;
  switch (parameter.dtype) {
    case DType::kFloat32:
      return f(Float32{}, Float32{});
    case DType::kFloat64:
      return f(Float64{}, Float64{});
    case DType::kFloat16:
      return widens ? f(Float16{}, Float32{}) : f(Float16{}, Float16{});
    case DType::kBFloat16:
      return widens ? f(BFloat16{}, Float32InPairs{}) : f(BFloat16{}, BFloat16{});
  }
}

void mean(const Parameter& parameter, int64_t begin, int64_t end, const Towers& towers,
          bool stream_out) {
  with_formats(parameter, [&](auto in, auto out) {
    using In = decltype(in);
    using Out = decltype(out);
    const auto address =
        reinterpret_cast<uintptr_t>(static_cast<typename Out::Real*>(parameter.out) + begin);
    const bool streams = stream_out && address % alignof(typename Out::Raw) == 0;
    if (towers.rule == Rule::kWeighted) {
      mean_by_count<In, Out, true>(parameter, begin, end, towers, streams);
    } else {
      mean_by_count<In, Out, false>(parameter, begin, end, towers, streams);
    }
    if (streams) end_stream();
  });
}
