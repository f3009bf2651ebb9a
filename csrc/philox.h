// The random numbers of a plan: philox4x32-10 (Salmon et al., SC 2011), addressed by
// (seed, row, token, plan).
#ifndef TT_PHILOX_H_
#define TT_PHILOX_H_

#include <cstdint>

namespace tt {

// Word 0 for a key of two words and a counter of four.
inline uint32_t PhiloxWord(uint32_t k0, uint32_t k1, uint32_t c0, uint32_t c1, uint32_t c2,
                           uint32_t c3) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0, product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// In [0, 1), 24 bits.
inline double PhiloxUniform(uint64_t seed, uint32_t row, uint32_t token, uint32_t plan) {
  const uint32_t word = PhiloxWord(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
                                   row, token, plan, 0);
  return (word >> 8) * 0x1p-24;
}

}  // namespace tt

#endif  // TT_PHILOX_H_
