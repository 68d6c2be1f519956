// Loads and stores of float32, bfloat16 and float16 as float. Branch-free, so that loops over them vectorise; rounding
// is to nearest, ties to even, the same on every instruction set.

struct f32 {
  float bits;
};
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline uint32_t as_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

inline float as_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline float load(f32 v) { return v.bits; }

inline float load(bf16 v) { return as_float(uint32_t(v.bits) << 16); }

inline float load(f16 v) {
  // Exponent and fraction moved into place, then scaled by 2^112: right for normal and subnormal numbers alike.
  const uint32_t magnitude = uint32_t(v.bits & 0x7fff) << 13;
  const uint32_t finite = as_bits(as_float(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000;
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16;
  return as_float(sign | ((v.bits & 0x7c00) == 0x7c00 ? special : finite));
}

inline void store(f32& v, float x) { v.bits = x; }

inline void store(bf16& v, float x) {
  const uint32_t u = as_bits(x);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  v.bits = uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline void store(f16& v, float x) {
  const uint32_t u = as_bits(x);
  const uint32_t magnitude = u & 0x7fffffff;
  const uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // Adding 0.5 puts the last bit of a half's subnormal at the last bit of the float: the addition rounds.
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;
  uint32_t out = magnitude < 0x38800000 ? subnormal : normal;
  out = magnitude >= 0x477ff000 ? 0x7c00 : out;
  out = magnitude > 0x7f800000 ? 0x7e00 : out;
  v.bits = uint16_t(out | ((u >> 16) & 0x8000));
}
