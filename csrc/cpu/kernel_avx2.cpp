// The kernels for x86-64 with AVX2, FMA and F16C (2013 and later): compiled with these switched on,
// run only where the machine has them.
#include <immintrin.h>

#include "kernels.h"

namespace torchtower::cpu {

namespace {

#include "vectors.h"

TORCHTOWER_INLINE F32 half_to_float(U16 half) { return (F32)_mm256_cvtph_ps((__m128i)half); }

TORCHTOWER_INLINE U16 float_to_half(F32 value) {
  return (U16)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
}

// The square of a float32 is exact in float64, so a fused sum rounds as a plain one.
TORCHTOWER_INLINE F64 add_exact_squares(F64 sum, F32x4 values) {
  const __m256d wide = _mm256_cvtps_pd((__m128)values);
  return (F64)_mm256_fmadd_pd(wide, wide, (__m256d)sum);
}

TORCHTOWER_INLINE void stream(void* to, F32 value) {
  _mm256_stream_ps(static_cast<float*>(to), (__m256)value);
}
TORCHTOWER_INLINE void stream(void* to, F64 value) {
  _mm256_stream_pd(static_cast<double*>(to), (__m256d)value);
}
TORCHTOWER_INLINE void stream(void* to, U32 value) {
  _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)value);
}
TORCHTOWER_INLINE void stream(void* to, U16 value) {
  _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)value);
}
TORCHTOWER_INLINE void stream(void* to, F32Pair value) {
  stream(to, value.first);
  stream(static_cast<float*>(to) + 8, value.second);
}
TORCHTOWER_INLINE void end_stream() { _mm_sfence(); }

// In this order: each uses what stands before it.
// clang-format off
#include "formats.h"
#include "squares.h"
#include "kernel_body.h"
// clang-format on

}  // namespace

extern const Kernels kAvx2Kernels = {"avx2", mean, mean_with_statistics};

}  // namespace torchtower::cpu
