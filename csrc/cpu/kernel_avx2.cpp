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
#include "statistics_body.h"
// clang-format on

}  // namespace

extern const Kernels kAvx2Kernels = {"avx2", mean, mean_with_statistics};

}  // namespace torchtower::cpu
