// float16 as bits: a sign, 5 bits of exponent, 10 of mantissa. For plain loops.
#ifndef TT_FLOAT16_H_
#define TT_FLOAT16_H_

#include <cmath>
#include <cstdint>
#include <cstring>

namespace tt {

// Round to nearest, ties to even. x is less than 65520, and a number.
inline uint16_t ToFp16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  // below the normal numbers, of which 2^-14 is the first, steps are of 2^-24
  if (bits < 113u << 23) return static_cast<uint16_t>(sign | std::lrint(std::fabs(x) * 0x1p24f));
  bits -= 112u << 23;  // the difference of the exponents
  return static_cast<uint16_t>(sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13);
}

inline float FromFp16(uint16_t x) {
  const int exponent = x >> 10 & 0x1f, mantissa = x & 0x3ff;
  const float size = exponent == 0
                         ? std::ldexp(static_cast<float>(mantissa), -24)
                         : std::ldexp(static_cast<float>(mantissa + 0x400), exponent - 25);
  return (x & 0x8000) != 0 ? -size : size;
}

}  // namespace tt

#endif  // TT_FLOAT16_H_
