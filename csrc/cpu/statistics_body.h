// The mean with statistics, once for every instruction set: included within an unnamed namespace,
// after squares.h and kernel_body.h, whose rules hold here, too.
//
// Mapping: a piece is worked through in blocks. A block's totals stay in the first-level cache as
//   up to four towers at a time, whose sums of squares fit the registers, are added to them; only
//   then is the mean written, since it may overwrite a gradient that has to be read again.
// Bytes: (T + 1) * n, nothing twice but a block whose float32 sum cannot be trusted.
// Numerics: the mean has the bits of the plain kernel's. Squares of float16, bfloat16 and float32
//   are added in float32 within a block, where each is at most 66 roundings from the result (a
//   relative error below 4e-6 if all went one way), and blocks in float64, in their order.

constexpr int kGroupTowers = 4;

// Bytes of each tower in a block. Several groups read their towers by turns, and long turns cost
// more (the machine's prefetching) than fewer ends of blocks save.
constexpr int64_t kBlockBytes = 2048;
constexpr int64_t kBlockBytesOfSeveralGroups = 1024;

// What of one tower, or of several, lies in a block.
struct Block {
  const void* const* grads;
  const double* weights;
  int64_t begin;
  int64_t numel;

  template <class In>
  TORCHTOWER_INLINE const typename In::Real* grad(int64_t t) const {
    return static_cast<const typename In::Real*>(grads[t]) + begin;
  }
};

template <class In>
TORCHTOWER_INLINE typename In::Vector load_up_to(const typename In::Real* from, int64_t n) {
  return n < kLanes<In> ? load_tail<In>(from, n) : load<In>(from);
}

// Calls body(i, n, which) for each vector of a block: of n elements from i on, for that one of the
// sums.
template <class In, class Body>
TORCHTOWER_INLINE void for_each_vector(int64_t numel, const Body& body) {
  constexpr int kSums = Squares<typename In::Vector>::kSums;
  int64_t i = 0;
  for (; i + kSums * kLanes<In> <= numel; i += kSums * kLanes<In>) {
#pragma GCC unroll 2
    for (int which = 0; which < kSums; ++which) body(i + which * kLanes<In>, kLanes<In>, which);
  }
  for (; i < numel; i += kLanes<In>) body(i, numel - i < kLanes<In> ? numel - i : kLanes<In>, 0);
}

// Adds the gradients of a group to the totals (writes them, where it is the first), and each one's
// sum of squares to `squares`.
template <class In, int kTowers, bool kWeighted>
void add_group(const Block& block, bool is_first, typename In::Vector* totals, double* squares) {
  using Vector = typename In::Vector;
  const PerTower<kTowers, const void*> grads(block.grads);
  const PerTower<kTowers, double> weights(block.weights);
  Squares<Vector> sums[kTowers];
  for_each_vector<In>(block.numel, [&](int64_t i, int64_t n, int which) TORCHTOWER_INLINE_LAMBDA {
    Vector& total = totals[i / kLanes<In>];
    Vector sum = total;
#pragma GCC unroll 4
    for (int t = 0; t < kTowers; ++t) {
      const auto* const grad = static_cast<const typename In::Real*>(grads[t]) + block.begin + i;
      Vector term = load_up_to<In>(grad, n);
      sums[t].add(term, which);
      if constexpr (kWeighted) {
        Vector weight;
        broadcast(weights[t], weight);
        term = weight * term;
      }
      sum = is_first && t == 0 ? term : sum + term;
    }
    total = sum;
  });
#pragma GCC unroll 4
  for (int t = 0; t < kTowers; ++t) squares[t] = sums[t].sum();
}

template <class In, bool kWeighted>
void add_group_by_count(int64_t count, const Block& block, bool is_first,
                        typename In::Vector* totals, double* squares) {
  switch (count) {
    case 1:
      return add_group<In, 1, kWeighted>(block, is_first, totals, squares);
    case 2:
      return add_group<In, 2, kWeighted>(block, is_first, totals, squares);
    case 3:
      return add_group<In, 3, kWeighted>(block, is_first, totals, squares);
    default:
      return add_group<In, kGroupTowers, kWeighted>(block, is_first, totals, squares);
  }
}

// Writes the mean, and returns its own sum of squares, of before it is rounded to out's dtype.
template <class In, class Out>
double finish_block(const typename In::Vector* totals, const Division<typename In::Vector>& divided,
                    int64_t numel, typename Out::Real* out) {
  using Vector = typename In::Vector;
  Squares<Vector> squares;
  for_each_vector<In>(numel, [&](int64_t i, int64_t n, int which) TORCHTOWER_INLINE_LAMBDA {
    const Vector mean = divided(totals[i / kLanes<In>]);
    squares.add(mean, which);
    if (n < kLanes<In>) {
      store_tail<Out>(out + i, mean, n);
    } else {
      store<Out>(out + i, mean);
    }
  });
  const double sum = squares.sum();
  if (is_safe<In>(sum)) return sum;
  return sum_of_widened_squares<In>(numel,
                                    [&](int64_t i) { return divided(totals[i / kLanes<In>]); });
}

template <class In, class Out, bool kWeighted>
void mean_with_statistics_of(const Parameter& parameter, int64_t begin, int64_t end,
                             const Towers& towers, const PieceStatistics& statistics) {
  using Vector = typename In::Vector;
  constexpr int64_t kSize = sizeof(typename In::Real);
  const int64_t block_numel =
      (towers.count > kGroupTowers ? kBlockBytesOfSeveralGroups : kBlockBytes) / kSize;
  const Division<Vector> divided(towers);
  Vector totals[kBlockBytes / kSize / kLanes<In>];
  for (; begin < end; begin += block_numel) {
    const int64_t numel = end - begin < block_numel ? end - begin : block_numel;
    for (int64_t first = 0; first < towers.count; first += kGroupTowers) {
      const int64_t left = towers.count - first;
      const int64_t count = left < kGroupTowers ? left : kGroupTowers;
      const Block block{parameter.grads + first, towers.weights + first, begin, numel};
      double squares[kGroupTowers];
      add_group_by_count<In, kWeighted>(count, block, first == 0, totals, squares);
      for (int64_t t = 0; t < count; ++t) {
        if (!is_safe<In>(squares[t])) {
          const auto* const grad = block.grad<In>(t);
          squares[t] = sum_of_widened_squares<In>(
              numel, [&](int64_t i) { return load_up_to<In>(grad + i, numel - i); });
          const bool is_finite = squares[t] - squares[t] == 0;
          if (!is_finite) statistics.non_finite[first + t] += count_non_finite<In>(grad, numel);
        }
        statistics.sum_of_squares[first + t] += squares[t];
      }
    }
    *statistics.out_sum_of_squares += finish_block<In, Out>(
        totals, divided, numel, static_cast<typename Out::Real*>(parameter.out) + begin);
  }
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
