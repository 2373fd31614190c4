// The kernels for every AArch64: NEON converts float16 and multiplies into a sum in one
// instruction.
#include <arm_neon.h>

#include "kernels.h"

namespace torchtower::cpu {

namespace {

#include "vectors.h"

TORCHTOWER_INLINE F32 half_to_float(U16 half) {
  const float16x8_t halves = (float16x8_t)half;
  const float32x4_t parts[2] = {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
  F32 value;
  __builtin_memcpy(&value, parts, sizeof(value));
  return value;
}

TORCHTOWER_INLINE U16 float_to_half(F32 value) {
  float32x4_t parts[2];
  __builtin_memcpy(parts, &value, sizeof(value));
  return (U16)vcvt_high_f16_f32(vcvt_f16_f32(parts[0]), parts[1]);
}

// AArch64 writes whole lines without reading them first as it is.
template <class Vector>
TORCHTOWER_INLINE void stream(void* to, Vector value) {
  __builtin_memcpy(to, &value, sizeof(value));
}
TORCHTOWER_INLINE void end_stream() {}

// In this order: each uses what stands before it.
// clang-format off
#include "formats.h"
#include "squares.h"
#include "kernel_body.h"
#include "statistics_body.h"
// clang-format on

}  // namespace

extern const Kernels kNeonKernels = {"neon", mean, mean_with_statistics};

}  // namespace torchtower::cpu
