// The machine's streaming limit: read T arrays, write one past the cache, nothing else. A plain
// loop of its own, so that the kernel is not measured against itself.
//
//   g++ -O3 -march=native -fopenmp -shared -fPIC streaming_limit.cpp -o streaming_limit.so
#include <cstdint>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

// One thread's part: bytes [begin, end), multiples of 64.
void stream(char* out, const char* const* in, int64_t towers, int64_t begin, int64_t end) {
#if defined(__AVX__)
  for (int64_t i = begin; i < end; i += 64) {
    __m256 a = _mm256_load_ps(reinterpret_cast<const float*>(in[0] + i));
    __m256 b = _mm256_load_ps(reinterpret_cast<const float*>(in[0] + i + 32));
    for (int64_t t = 1; t < towers; ++t) {
      a = _mm256_add_ps(a, _mm256_load_ps(reinterpret_cast<const float*>(in[t] + i)));
      b = _mm256_add_ps(b, _mm256_load_ps(reinterpret_cast<const float*>(in[t] + i + 32)));
    }
    _mm256_stream_ps(reinterpret_cast<float*>(out + i), a);
    _mm256_stream_ps(reinterpret_cast<float*>(out + i + 32), b);
  }
  _mm_sfence();
#else
  for (int64_t i = begin; i < end; i += sizeof(float)) {
    float sum = 0;
    for (int64_t t = 0; t < towers; ++t) sum += *reinterpret_cast<const float*>(in[t] + i);
    *reinterpret_cast<float*>(out + i) = sum;
  }
#endif
}

}  // namespace

// `bytes` of each array; arrays aligned to 64.
extern "C" void streaming_limit(char* out, const char* const* in, int64_t towers, int64_t bytes,
                                int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int part = 0; part < threads; ++part) {
    const int64_t lines = bytes / 64;
    stream(out, in, towers, lines * part / threads * 64, lines * (part + 1) / threads * 64);
  }
}
