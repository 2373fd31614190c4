// The sum of squares, and how many numbers are not finite. Included within an unnamed namespace,
// after formats.h and the instruction set's add_exact_squares.

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
