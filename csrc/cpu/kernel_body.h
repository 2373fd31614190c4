// The CPU kernel's body, once for every instruction set. kernel_<set>.cpp defines the few things
// that differ and includes this file, both within its own unnamed namespace.
//
// Mapping: one call works through one piece of one parameter; each step takes 64 bytes (a cache
//   line) of every tower, adds them in registers and stores the result once. 1 to 8 towers are
//   unrolled; beyond, a loop over them runs inside the step.
// Bytes: (T + 1) * n, nothing twice. With statistics the piece is worked through in blocks that fit
//   the first-level cache: read for the squares, then again, from there, for the mean.
// Alignment: none is asked for. Streaming stores, the one exception, are left out where `out` is
//   not aligned.
// Tails: the last elements go through a zero-padded vector, by the same operations.
// Numerics: float16, bfloat16 and float32 are added in float32, float64 in float64, in tower order;
//   each product and each sum is rounded by itself (-ffp-contract=off), then one division (or the
//   product with an exact reciprocal: the same bits), then one rounding to out's dtype, to nearest
//   even. Every set runs these very operations, so the bits are the same everywhere; only which NaN
//   a NaN is may differ. Squares are summed in float64 (those of float32 are exact there and
//   neither overflow nor vanish), in lanes of a fixed number and order.
//
// Nothing here may call or instantiate an inline function of another header: the linker could keep
// the copy compiled for a wider set for everybody.

// How a dtype's elements lie in memory (Raw, of Reals) and are computed with (Vector).
struct Float32 {
  using Real = float;
  using Bits = uint32_t;
  static constexpr Bits kExponent = 0x7f800000;
  using Raw = F32;
  using Vector = F32;
  static TORCHTOWER_INLINE Vector widen(Raw raw) { return raw; }
  static TORCHTOWER_INLINE Raw narrow(Vector value) { return value; }
};

struct Float64 {
  using Real = double;
  using Bits = uint64_t;
  static constexpr Bits kExponent = 0x7ff0000000000000;
  using Raw = F64;
  using Vector = F64;
  static TORCHTOWER_INLINE Vector widen(Raw raw) { return raw; }
  static TORCHTOWER_INLINE Raw narrow(Vector value) { return value; }
};

struct Float16 {
  using Real = uint16_t;
  using Bits = uint16_t;
  static constexpr Bits kExponent = 0x7c00;
  using Raw = U16;
  using Vector = F32;
  static TORCHTOWER_INLINE Vector widen(Raw raw) { return half_to_float(raw); }
  static TORCHTOWER_INLINE Raw narrow(Vector value) { return float_to_half(value); }
};

// Sixteen at once, those with even and those with odd index side by side: half of a 32-bit word is
// a float32 after one shift or one mask, where widening eight in order takes twice the work.
struct BFloat16 {
  using Real = uint16_t;
  using Bits = uint16_t;
  static constexpr Bits kExponent = 0x7f80;
  using Raw = U32;
  using Vector = F32Pair;
  static TORCHTOWER_INLINE Vector widen(Raw raw) {
    return {(F32)(raw << 16), (F32)(raw & 0xffff0000)};
  }
  static TORCHTOWER_INLINE Raw narrow(Vector value) {
    return blend_halves(rounded(value.first) >> 16, rounded(value.second));
  }

 private:
  static TORCHTOWER_INLINE U32 rounded(F32 value) {
    const U32 bits = (U32)value;
    return value == value ? bits + 0x7fff + ((bits >> 16) & 1) : 0x7fc00000 + U32{};
  }
};

// Where BFloat16's vectors are written as float32.
struct Float32InPairs {
  using Real = float;
  using Raw = F32Pair;
  using Vector = F32Pair;
  static TORCHTOWER_INLINE Raw narrow(Vector value) {
    return {interleave_low(value.first, value.second), interleave_high(value.first, value.second)};
  }
};

template <class Format>
constexpr int64_t kLanes = sizeof(typename Format::Raw) / sizeof(typename Format::Real);

constexpr int64_t kLine = 64;
template <class Format>
constexpr int64_t kStep = kLine / sizeof(typename Format::Real);

template <class Format>
TORCHTOWER_INLINE typename Format::Vector load(const typename Format::Real* from) {
  typename Format::Raw raw;
  __builtin_memcpy(&raw, from, sizeof(raw));
  return Format::widen(raw);
}

template <class Format>
TORCHTOWER_INLINE typename Format::Vector load_tail(const typename Format::Real* from, int64_t n) {
  typename Format::Real block[kLanes<Format>] = {};
  for (int64_t i = 0; i < n; ++i) block[i] = from[i];
  return load<Format>(block);
}

template <class Format>
TORCHTOWER_INLINE void store(typename Format::Real* to, typename Format::Vector value) {
  const typename Format::Raw raw = Format::narrow(value);
  __builtin_memcpy(to, &raw, sizeof(raw));
}

template <class Format>
TORCHTOWER_INLINE void store_tail(typename Format::Real* to, typename Format::Vector value,
                                  int64_t n) {
  typename Format::Real block[kLanes<Format>];
  store<Format>(block, value);
  for (int64_t i = 0; i < n; ++i) to[i] = block[i];
}

// Sixteen lanes, so that four chains of additions hide each other's latency.
class Squares {
 public:
  TORCHTOWER_INLINE void add(F32Pair values, int64_t) {
    add(values.first, 0);
    add(values.second, 1);
  }
  // `position`: of this vector within its step, a constant where the loop is unrolled.
  TORCHTOWER_INLINE void add(F32 value, int64_t position) {
    F32x4 halves[2];
    __builtin_memcpy(halves, &value, sizeof(value));
    F64* lanes = lanes_ + position % 2 * 2;
    lanes[0] = add_exact_squares(lanes[0], halves[0]);
    lanes[1] = add_exact_squares(lanes[1], halves[1]);
  }
  TORCHTOWER_INLINE void add(F64 value, int64_t position) { lanes_[position % 4] += value * value; }
  double sum() const {
    const F64 all = (lanes_[0] + lanes_[1]) + (lanes_[2] + lanes_[3]);
    return (all[0] + all[1]) + (all[2] + all[3]);
  }

 private:
  F64 lanes_[4] = {};
};

template <class In>
double sum_of_squares(const typename In::Real* grad, int64_t begin, int64_t end) {
  Squares squares;
  int64_t i = begin;
  for (; i + kStep<In> <= end; i += kStep<In>) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < kStep<In> / kLanes<In>; ++v) {
      squares.add(load<In>(grad + i + v * kLanes<In>), v);
    }
  }
  for (; i < end; i += kLanes<In>) {
    const int64_t n = end - i < kLanes<In> ? end - i : kLanes<In>;
    squares.add(load_tail<In>(grad + i, n), 0);
  }
  return squares.sum();
}

template <class In>
int64_t count_non_finite(const typename In::Real* grad, int64_t begin, int64_t end) {
  int64_t count = 0;
  for (int64_t i = begin; i < end; ++i) {
    typename In::Bits bits;
    __builtin_memcpy(&bits, grad + i, sizeof(bits));
    count += (bits & In::kExponent) == In::kExponent;
  }
  return count;
}

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

template <class In, class Out, int kTowers, bool kWeighted, bool kSquares>
double mean_of(const Parameter& parameter, int64_t begin, int64_t end, const Towers& towers,
               bool stream_out) {
  using Vector = typename In::Vector;
  constexpr int kVectors = kStep<In> / kLanes<In>;
  auto* const out = static_cast<typename Out::Real*>(parameter.out);
  const PerTower<kTowers, const void*> grads(parameter.grads);
  const PerTower<kTowers, double> weights(towers.weights);
  const Division<Vector> divided(towers);
  Squares squares;
  const auto finish = [&](Vector sum, int v) {
    const Vector mean = divided(sum);
    if constexpr (kSquares) squares.add(mean, v);
    return mean;
  };
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
      const Vector mean = finish(total[v], v);
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
    store_tail<Out>(out + i, finish(total[0], 0), n);
  }
  return squares.sum();
}

template <class In, class Out, bool kWeighted>
void mean_by_count(const Parameter& parameter, int64_t begin, int64_t end, const Towers& towers,
                   bool stream_out) {
  switch (towers.count) {
#define TORCHTOWER_UNROLLED(count)                                                        \
  case count:                                                                             \
    mean_of<In, Out, count, kWeighted, false>(parameter, begin, end, towers, stream_out); \
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
      mean_of<In, Out, 0, kWeighted, false>(parameter, begin, end, towers, stream_out);
  }
}

// Bytes of each tower that are read twice, the second time from the first-level cache: larger
// blocks of 8 towers measurably fall out of 32 KiB, smaller ones pay more calls.
constexpr int64_t kBlockBytes = 1024;

template <class In, class Out, bool kWeighted>
void mean_with_statistics_of(const Parameter& parameter, int64_t begin, int64_t end,
                             const Towers& towers, const PieceStatistics& statistics) {
  constexpr int64_t kBlock = kBlockBytes / sizeof(typename In::Real);
  for (; begin < end; begin += kBlock) {
    const int64_t block_end = end - begin < kBlock ? end : begin + kBlock;
    for (int64_t t = 0; t < towers.count; ++t) {
      const auto* const grad = static_cast<const typename In::Real*>(parameter.grads[t]);
      const double squares = sum_of_squares<In>(grad, begin, block_end);
      statistics.sum_of_squares[t] += squares;
      // Before the mean, which may overwrite this very gradient.
      const bool is_finite = squares - squares == 0;
      if (!is_finite) statistics.non_finite[t] += count_non_finite<In>(grad, begin, block_end);
    }
    *statistics.out_sum_of_squares +=
        mean_of<In, Out, 0, kWeighted, true>(parameter, begin, block_end, towers, false);
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

void mean_with_statistics(const Parameter& parameter, int64_t begin, int64_t end,
                          const Towers& towers, const PieceStatistics& statistics) {
  with_formats(parameter, [&](auto in, auto out) {
    using In = decltype(in);
    using Out = decltype(out);
    if (towers.rule == Rule::kWeighted) {
      mean_with_statistics_of<In, Out, true>(parameter, begin, end, towers, statistics);
    } else {
      mean_with_statistics_of<In, Out, false>(parameter, begin, end, towers, statistics);
    }
  });
}
