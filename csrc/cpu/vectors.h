// Vector types that g++ and Clang lower to whatever the instruction set has (two SSE2 or NEON
// registers where there is nothing of 32 bytes). To be included within an unnamed namespace.

#define TORCHTOWER_INLINE inline __attribute__((always_inline))

typedef float F32 __attribute__((vector_size(32)));
typedef float F32x4 __attribute__((vector_size(16)));
typedef double F64 __attribute__((vector_size(32)));
typedef int32_t I32 __attribute__((vector_size(32)));
typedef int64_t I64 __attribute__((vector_size(32)));
typedef uint32_t U32 __attribute__((vector_size(32)));
typedef uint16_t U16 __attribute__((vector_size(16)));

// Lane by lane: `mask` is all ones or all zeros.
TORCHTOWER_INLINE U32 select(I32 mask, U32 yes, U32 no) {
  return ((U32)mask & yes) | (~(U32)mask & no);
}
