// The definitions in double precision, one number after another.
#ifndef TT_TESTS_ORACLE_H_
#define TT_TESTS_ORACLE_H_

#include <cstdint>
#include <vector>

#include "model.h"

namespace tt::test {

using Doubles = std::vector<double>;

// Half a unit in the last place of 1.0f: the largest relative error of one rounding.
inline constexpr double kRounding = 0x1p-24;
// Twice the smallest normal float; tables return zero for exponentials below 0.71 of it.
inline constexpr double kTiny = 0x1p-125;

const char* NameOf(NumberType type);
// Nearest bfloat16, ties to even.
float RoundToBf16(float x);
// Nearest float16 in its range, ties to even.
double RoundToFp16(double x);
double Gelu(double x);
Doubles Softmax(const Doubles& x);
Doubles LayerNorm(const Doubles& x, const float* gamma, const float* beta);

// (num_ids) logits of the token after a window; hidden (goal_len + block_size).
Doubles WindowLogits(const Shape& shape, const WeightSource& weights,
                     const std::vector<uint8_t>& hidden, const std::vector<int32_t>& goal,
                     const std::vector<int32_t>& window);

}  // namespace tt::test

#endif  // TT_TESTS_ORACLE_H_
