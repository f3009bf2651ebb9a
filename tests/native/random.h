// Random numbers from a seed.
#ifndef TT_TESTS_RANDOM_H_
#define TT_TESTS_RANDOM_H_

#include <cmath>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

namespace tt::test {

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  // In [0, 1).
  double Uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }
  // In [0, n).
  int Below(int n) { return static_cast<int>(engine_() % static_cast<uint64_t>(n)); }

  // Mean 0 and variance 1: Box and Muller's transform.
  double Normal() {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - Uniform()));
    return radius * std::cos(6.283185307179586 * Uniform());
  }

  std::vector<float> Normals(size_t size, double scale = 1.0, double mean = 0.0) {
    std::vector<float> out(size);
    for (float& x : out) x = static_cast<float>(mean + scale * Normal());
    return out;
  }

  std::vector<int32_t> Tokens(size_t size, int num_ids) {
    std::vector<int32_t> out(size);
    for (int32_t& token : out) token = Below(num_ids);
    return out;
  }

  // 0 to n - 1 in any order.
  std::vector<int> Permutation(int n) {
    std::vector<int> out(n);
    for (int i = 0; i < n; ++i) {
      out[i] = i;
      std::swap(out[i], out[Below(i + 1)]);
    }
    return out;
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace tt::test

#endif  // TT_TESTS_RANDOM_H_
