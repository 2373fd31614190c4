// The few names of CUDA that the kernel body uses, for a host compiler. Compile with
// -ffp-contract=off, or product and sum are not rounded separately.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __forceinline__ inline

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct Index {
  uint32_t x;
};
inline Index threadIdx;
inline Index blockIdx;

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __ddiv_rn(double a, double b) { return a / b; }

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline float __uint_as_float(uint32_t bits) { return bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return bit_cast<uint32_t>(value); }
inline double __longlong_as_double(long long bits) { return bit_cast<double>(bits); }
inline long long __double_as_longlong(double value) { return bit_cast<long long>(value); }

namespace torchtower::cuda {

inline float half_to_float(uint16_t bits) { return bit_cast<_Float16>(bits); }
inline uint16_t float_to_half(float value) {
  return bit_cast<uint16_t>(static_cast<_Float16>(value));
}

}  // namespace torchtower::cuda
