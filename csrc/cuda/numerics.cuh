// Dtypes as the kernel sees them: bits in memory, a sum in registers, and the two conversions. Half
// types and float32 accumulate in float32, float64 in float64.
//
// Product and sum are rounded separately, by the intrinsics that no compiler contracts, so that the
// bits are the CPU kernel's.
#pragma once

#include <cstdint>

#include "tower_mean.h"

namespace torchtower::cuda {

__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ double divide(double a, double b) { return __ddiv_rn(a, b); }

template <DType kDType>
struct Numerics;

template <>
struct Numerics<DType::kFloat32> {
  using Bits = uint32_t;
  using Sum = float;
  static __device__ __forceinline__ Sum widen(Bits bits) { return __uint_as_float(bits); }
  static __device__ __forceinline__ Bits narrow(Sum sum) { return __float_as_uint(sum); }
};

template <>
struct Numerics<DType::kFloat64> {
  using Bits = uint64_t;
  using Sum = double;
  static __device__ __forceinline__ Sum widen(Bits bits) {
    return __longlong_as_double(static_cast<long long>(bits));
  }
  static __device__ __forceinline__ Bits narrow(Sum sum) {
    return static_cast<Bits>(__double_as_longlong(sum));
  }
};

template <>
struct Numerics<DType::kFloat16> {
  using Bits = uint16_t;
  using Sum = float;
  static __device__ __forceinline__ Sum widen(Bits bits) { return half_to_float(bits); }
  static __device__ __forceinline__ Bits narrow(Sum sum) { return float_to_half(sum); }
};

// Rounded by integer arithmetic on every architecture: sm_75 has no instruction for it, and a
// memory-bound kernel has the five instructions to spare.
template <>
struct Numerics<DType::kBFloat16> {
  using Bits = uint16_t;
  using Sum = float;
  static __device__ __forceinline__ Sum widen(Bits bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
  static __device__ __forceinline__ Bits narrow(Sum sum) {
    const uint32_t bits = __float_as_uint(sum);
    const uint32_t nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<Bits>(sum == sum ? nearest_even : 0x7fffu);
  }
};

}  // namespace torchtower::cuda
