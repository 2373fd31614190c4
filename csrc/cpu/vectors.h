// Vector types that g++ and Clang lower to whatever the instruction set has (two SSE2 or NEON
// registers where there is nothing of 32 bytes). Included within an unnamed namespace.

#define TORCHTOWER_INLINE inline __attribute__((always_inline))
#define TORCHTOWER_INLINE_LAMBDA __attribute__((always_inline))

typedef float F32 __attribute__((vector_size(32)));
typedef float F32x4 __attribute__((vector_size(16)));
typedef double F64 __attribute__((vector_size(32)));
typedef uint32_t U32 __attribute__((vector_size(32)));
typedef uint16_t U16 __attribute__((vector_size(16)));
typedef uint16_t U16x16 __attribute__((vector_size(32)));

// Two vectors worked on side by side.
struct F32Pair {
  F32 first;
  F32 second;
};

TORCHTOWER_INLINE F32Pair operator+(F32Pair a, F32Pair b) {
  return {a.first + b.first, a.second + b.second};
}
TORCHTOWER_INLINE F32Pair operator*(F32Pair a, F32Pair b) {
  return {a.first * b.first, a.second * b.second};
}
TORCHTOWER_INLINE F32Pair operator/(F32Pair a, F32Pair b) {
  return {a.first / b.first, a.second / b.second};
}

TORCHTOWER_INLINE void broadcast(double number, F32& to) {
  to = F32{} + static_cast<float>(number);
}
TORCHTOWER_INLINE void broadcast(double number, F64& to) { to = F64{} + number; }
TORCHTOWER_INLINE void broadcast(double number, F32Pair& to) {
  broadcast(number, to.first);
  to.second = to.first;
}

// Words with the low half of one and the high half of the other. As a shuffle, which g++ makes one
// instruction of where there is one.
TORCHTOWER_INLINE U32 blend_halves(U32 low, U32 high) {
  return (U32)__builtin_shufflevector((U16x16)low, (U16x16)high, 0, 17, 2, 19, 4, 21, 6, 23, 8, 25,
                                      10, 27, 12, 29, 14, 31);
}

TORCHTOWER_INLINE F32 interleave_low(F32 even, F32 odd) {
  return __builtin_shufflevector(even, odd, 0, 8, 1, 9, 2, 10, 3, 11);
}
TORCHTOWER_INLINE F32 interleave_high(F32 even, F32 odd) {
  return __builtin_shufflevector(even, odd, 4, 12, 5, 13, 6, 14, 7, 15);
}
