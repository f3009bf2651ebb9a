#include "philox.h"

#include "check.h"

namespace tt::test {

// Known answers of Random123's kat_vectors, and one of tests/test_philox.py.
TEST(PhiloxKnownAnswers) {
  CHECK_EQ(PhiloxWord(0, 0, 0, 0, 0, 0), 0x6627e8d5u);
  CHECK_EQ(PhiloxWord(0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff),
           0x408f276du);
  CHECK_EQ(PhiloxWord(0xa4093822, 0x299f31d0, 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344),
           0xd16cfe09u);
  CHECK_EQ(PhiloxWord(42, 0, 5, 7, 2, 0), 0x8434339eu);
}

TEST(PhiloxUniformAddresses) {
  CHECK_EQ(PhiloxUniform(42, 5, 7, 2), (0x8434339eu >> 8) * 0x1p-24);
  const uint64_t seed = 0x299f31d0a4093822;  // low word first
  CHECK_EQ(PhiloxUniform(seed, 1, 2, 3),
           (PhiloxWord(0xa4093822, 0x299f31d0, 1, 2, 3, 0) >> 8) * 0x1p-24);
  CHECK(PhiloxUniform(7, 0, 0, 0) != PhiloxUniform(7 + (uint64_t{1} << 32), 0, 0, 0));
}

TEST(PhiloxUniformRange) {
  double sum = 0.0;
  constexpr int kCount = 10000;
  for (int row = 0; row < kCount; ++row) {
    const double u = PhiloxUniform(1, row, 0, 0);
    CHECK(u >= 0.0 && u < 1.0);
    sum += u;
  }
  // 5 standard deviations of the mean, sqrt(1 / 12 / n)
  CHECK(sum / kCount > 0.5 - 0.0145 && sum / kCount < 0.5 + 0.0145);
}

}  // namespace tt::test
