// The device's own instructions that the kernel body uses by name beside CUDA's intrinsics. The
// body includes no CUDA header, so that a host compiler can build it over stand-ins for these few
// names.
#pragma once

#include <cstdint>

namespace torchtower::cuda {

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ __forceinline__ uint16_t float_to_half(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

}  // namespace torchtower::cuda
