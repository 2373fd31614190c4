// Sums of squares in vectors, and how many numbers are not finite. Included within an unnamed
// namespace, after formats.h.

TORCHTOWER_INLINE F32 square(F32 value) { return value * value; }
TORCHTOWER_INLINE F64 square(F64 value) { return value * value; }
TORCHTOWER_INLINE F32 square(F32Pair value) { return square(value.first) + square(value.second); }

TORCHTOWER_INLINE F64 widened_square(F64 value) { return square(value); }
TORCHTOWER_INLINE F64 widened_square(F32 value) {
  F32x4 halves[2];
  __builtin_memcpy(halves, &value, sizeof(value));
  return square(__builtin_convertvector(halves[0], F64)) +
         square(__builtin_convertvector(halves[1], F64));
}
TORCHTOWER_INLINE F64 widened_square(F32Pair value) {
  return widened_square(value.first) + widened_square(value.second);
}

TORCHTOWER_INLINE double across_lanes(F64 sum) { return (sum[0] + sum[1]) + (sum[2] + sum[3]); }
TORCHTOWER_INLINE double across_lanes(F32 sum) {
  F32x4 halves[2];
  __builtin_memcpy(halves, &sum, sizeof(sum));
  return across_lanes(__builtin_convertvector(halves[0], F64) +
                      __builtin_convertvector(halves[1], F64));
}

// The squares of a few hundred elements, those of float32 added in float32. Two sums side by side
// (a pair is two itself), so that one addition need not wait for the other.
template <class Vector>
struct Squares {
  using Lanes = decltype(square(Vector{}));
  static constexpr int kSums = 64 / sizeof(Vector);

  TORCHTOWER_INLINE void add(Vector value, int which) { sums[which] = sums[which] + square(value); }
  TORCHTOWER_INLINE double sum() const {
    return across_lanes(kSums == 1 ? sums[0] : sums[0] + sums[kSums - 1]);
  }

  Lanes sums[kSums] = {};
};

// Whether float32 neither overflowed, nor met a NaN, nor lost squares that matter: those below
// 2^-126, of which a block has too few to count beside 2^-90. Sums of float64 have no better road.
template <class Format>
TORCHTOWER_INLINE bool is_safe(double sum) {
  constexpr double kSmallestSafe = sizeof(typename Format::Real) < sizeof(double) ? 0x1p-90 : 0;
  return sum >= kSmallestSafe && sum - sum == 0;
}

TORCHTOWER_INLINE U32 magnitude_bits(F32 value) { return (U32)value << 1; }
TORCHTOWER_INLINE U32 magnitude_bits(F64 value) { return (U32)value; }
TORCHTOWER_INLINE U32 magnitude_bits(F32Pair value) {
  return magnitude_bits(value.first) | magnitude_bits(value.second);
}

// For a block whose sum in float32 is not safe: exact squares, added in float64, where they neither
// overflow nor vanish. load_at(i) gives the vector that begins with element i. Blocks of zeros are
// common and soon told.
template <class Format, class Load>
double sum_of_widened_squares(int64_t numel, const Load& load_at) {
  U32 bits = {};
  for (int64_t i = 0; i < numel; i += kLanes<Format>) bits = bits | magnitude_bits(load_at(i));
  const U32 none = {};
  if (__builtin_memcmp(&bits, &none, sizeof(bits)) == 0) return 0;
  F64 sum = {};
  for (int64_t i = 0; i < numel; i += kLanes<Format>) sum = sum + widened_square(load_at(i));
  return across_lanes(sum);
}

template <class Format>
int64_t count_non_finite(const typename Format::Real* grad, int64_t numel) {
  int64_t count = 0;
  for (int64_t i = 0; i < numel; ++i) {
    typename Format::Bits bits;
    __builtin_memcpy(&bits, grad + i, sizeof(bits));
    count += (bits & Format::kExponent) == Format::kExponent;
  }
  return count;
}
