// The kernels for every machine, x86-64 with nothing but SSE2 first of all. Written with the
// vectors of vectors.h alone.
#include "kernels.h"

namespace torchtower::cpu {

namespace {

#include "vectors.h"

// Adapted in method from Fabian Giesen's half_to_float_fast4 and float_to_half_fast3_rtne (public
// domain). No operation here takes or gives a float32 subnormal, so flushing them changes nothing.
__attribute__((noinline)) F32 half_to_float(U16 half) {
  const U32 wide = __builtin_convertvector(half, U32);
  const U32 magnitude = (wide & 0x7fff) << 13;
  const U32 exponent = magnitude & (0x1f << 23);
  U32 result = magnitude + ((127 - 15) << 23);
  const U32 infinite_or_nan = result + ((128 - 16) << 23);
  const U32 smallest_normal = (113 << 23) + U32{};
  const U32 subnormal = (U32)((F32)(result + (1 << 23)) - (F32)smallest_normal);
  result = exponent == (0x1f << 23) ? infinite_or_nan : result;
  result = exponent == 0 ? subnormal : result;
  return (F32)(result | ((wide & 0x8000) << 16));
}

__attribute__((noinline)) U16 float_to_half(F32 value) {
  const U32 sign = (U32)value & 0x80000000u;
  const U32 magnitude = (U32)value ^ sign;
  const U32 is_odd = (magnitude >> 13) & 1;
  const U32 normal = (magnitude - ((127 - 15) << 23) + 0xfff + is_odd) >> 13;
  const U32 one_half = (126 << 23) + U32{};  // whose last place is the half's smallest subnormal
  const U32 subnormal = (U32)((F32)magnitude + (F32)one_half) - one_half;
  const U32 infinite_or_nan = magnitude > (0xff << 23) ? 0x7e00 + U32{} : 0x7c00 + U32{};
  U32 result = magnitude < (113 << 23) ? subnormal : normal;
  result = magnitude >= ((127 + 16) << 23) ? infinite_or_nan : result;
  return __builtin_convertvector(result | (sign >> 16), U16);
}

// No way past the cache is taken here: these kernels run on machines of before 2013.
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

extern const Kernels kBaselineKernels = {"baseline", mean, mean_with_statistics};

}  // namespace torchtower::cpu
