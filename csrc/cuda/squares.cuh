// The sum of squares and the count of non-finite values of the elements in one thread's registers.
//
// float32 within a thread (16 elements), float64 from there on: one conversion for 16 elements,
// because many GPUs have one float64 lane for 64 of float32. Four partial sums keep every square
// six roundings away from the result, a relative error below 6 * 2^-24 in the worst case. Where
// float32 would overflow, lose small squares or hide a NaN, the same registers are summed again in
// float64.
#pragma once

#include <cstdint>

#include "numerics.cuh"

namespace torchtower::cuda {

struct Partial {
  double sum_of_squares;
  int64_t non_finite;
};

// 2^-90: squares that float32 loses (below 2^-126) no longer matter beside it.
constexpr float kSmallestSafeSum = 8.0779357e-28f;
constexpr float kLargestFloat = 3.4028235e38f;
constexpr double kLargestDouble = 1.7976931348623157e308;

template <class Sum, int kNumel>
__device__ __forceinline__ Partial squares_in_float64(const Sum (&values)[kNumel]) {
  Partial partial{0, 0};
#pragma unroll
  for (int i = 0; i < kNumel; ++i) {
    const double value = values[i];
    partial.sum_of_squares = add(partial.sum_of_squares, multiply(value, value));
    partial.non_finite += fabs(value) <= kLargestDouble ? 0 : 1;
  }
  return partial;
}

template <int kNumel>
__device__ __forceinline__ Partial squares(const double (&values)[kNumel]) {
  return squares_in_float64(values);
}

template <int kNumel>
__device__ __forceinline__ Partial squares(const float (&values)[kNumel]) {
  float sums[4] = {};
#pragma unroll
  for (int i = 0; i < kNumel; ++i) {
    sums[i % 4] = add(sums[i % 4], multiply(values[i], values[i]));
  }
  const float sum = add(add(sums[0], sums[1]), add(sums[2], sums[3]));
  if (sum >= kSmallestSafeSum && sum <= kLargestFloat) {
    return {sum, 0};
  }
  return squares_in_float64(values);
}

}  // namespace torchtower::cuda
