// The dtypes in memory and in registers: how they are loaded, widened, rounded and stored. Included
// within an unnamed namespace, after vectors.h and the instruction set's own conversions.

// How a dtype's elements lie in memory (Raw, of Reals) and are computed with (Vector).
struct Float32 {
  using Real = float;
  using Bits = uint32_t;
  static constexpr Bits kExponent = 0x7f800000;
  using Raw = F32;
  using Vector = F32;
  static TORCHTOWER_INLINE Vector widen(Raw raw) { return raw; }
  static TORCHTOWER_INLINE Raw narrow(Vector value) { return value; }
};

struct Float64 {
  using Real = double;
  using Bits = uint64_t;
  static constexpr Bits kExponent = 0x7ff0000000000000;
  using Raw = F64;
  using Vector = F64;
  static TORCHTOWER_INLINE Vector widen(Raw raw) { return raw; }
  static TORCHTOWER_INLINE Raw narrow(Vector value) { return value; }
};

struct Float16 {
  using Real = uint16_t;
  using Bits = uint16_t;
  static constexpr Bits kExponent = 0x7c00;
  using Raw = U16;
  using Vector = F32;
  static TORCHTOWER_INLINE Vector widen(Raw raw) { return half_to_float(raw); }
  static TORCHTOWER_INLINE Raw narrow(Vector value) { return float_to_half(value); }
};

// Sixteen at once, those with even and those with odd index side by side: half of a 32-bit word is
// a float32 after one shift or one mask, where widening eight in order takes twice the work.
struct BFloat16 {
  using Real = uint16_t;
  using Bits = uint16_t;
  static constexpr Bits kExponent = 0x7f80;
  using Raw = U32;
  using Vector = F32Pair;
  static TORCHTOWER_INLINE Vector widen(Raw raw) {
    return {(F32)(raw << 16), (F32)(raw & 0xffff0000)};
  }
  static TORCHTOWER_INLINE Raw narrow(Vector value) {
    return blend_halves(rounded(value.first) >> 16, rounded(value.second));
  }

 private:
  // A NaN needs no care here: it comes from numbers of 16 bits, or from the machine, with zeros in
  // its lower half, so nothing is carried out of the upper one.
  static TORCHTOWER_INLINE U32 rounded(F32 value) {
    const U32 bits = (U32)value;
    return bits + 0x7fff + ((bits >> 16) & 1);
  }
};

// Where BFloat16's vectors are written as float32.
struct Float32InPairs {
  using Real = float;
  using Raw = F32Pair;
  using Vector = F32Pair;
  static TORCHTOWER_INLINE Raw narrow(Vector value) {
    return {interleave_low(value.first, value.second), interleave_high(value.first, value.second)};
  }
};

template <class Format>
constexpr int64_t kLanes = sizeof(typename Format::Raw) / sizeof(typename Format::Real);

constexpr int64_t kLine = 64;
template <class Format>
constexpr int64_t kStep = kLine / sizeof(typename Format::Real);

template <class Format>
TORCHTOWER_INLINE typename Format::Vector load(const typename Format::Real* from) {
  typename Format::Raw raw;
  __builtin_memcpy(&raw, from, sizeof(raw));
  return Format::widen(raw);
}

template <class Format>
TORCHTOWER_INLINE typename Format::Vector load_tail(const typename Format::Real* from, int64_t n) {
  typename Format::Real block[kLanes<Format>] = {};
  for (int64_t i = 0; i < n; ++i) block[i] = from[i];
  return load<Format>(block);
}

template <class Format>
TORCHTOWER_INLINE void store(typename Format::Real* to, typename Format::Vector value) {
  const typename Format::Raw raw = Format::narrow(value);
  __builtin_memcpy(to, &raw, sizeof(raw));
}

template <class Format>
TORCHTOWER_INLINE void store_tail(typename Format::Real* to, typename Format::Vector value,
                                  int64_t n) {
  typename Format::Real block[kLanes<Format>];
  store<Format>(block, value);
  for (int64_t i = 0; i < n; ++i) to[i] = block[i];
}
