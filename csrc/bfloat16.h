// bfloat16 as bits: the upper half of a float. For plain loops.
#ifndef TT_BFLOAT16_H_
#define TT_BFLOAT16_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace tt {

inline float FromBf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Round to nearest, ties to even.
inline uint16_t ToBf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Number i of an array that is bfloat16 or float32.
inline float ReadNumber(bool bf16, const void* x, size_t i) {
  return bf16 ? FromBf16(static_cast<const uint16_t*>(x)[i]) : static_cast<const float*>(x)[i];
}
inline void WriteNumber(bool bf16, float value, void* x, size_t i) {
  if (bf16) {
    static_cast<uint16_t*>(x)[i] = ToBf16(value);
  } else {
    static_cast<float*>(x)[i] = value;
  }
}

}  // namespace tt

#endif  // TT_BFLOAT16_H_
