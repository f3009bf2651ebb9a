// GELU, dropout with what follows it, and dropout's masks as plain loops: the definitions. Included
// by ops_scalar.cc.
#include <cmath>

#include "bfloat16.h"
#include "ops.h"

namespace tt {
namespace {

void TrainGelu(const TrainGeluArgs& args) {
  for (size_t i = 0; i < args.size; ++i) {
    const float x = ReadNumber(args.bf16, args.x, i);
    const float cdf = 0.5f * (1.0f + std::erf(x * 0.70710678f));
    float value = x * cdf;
    if (args.out_grad != nullptr) {
      const float slope = cdf + x * std::exp(-0.5f * x * x) * 0.39894228f;
      value = slope * ReadNumber(args.bf16, args.out_grad, i);
    }
    WriteNumber(args.bf16, value, args.out, i);
  }
}

float KeepFactor(const TrainNormArgs& args, size_t i) {
  return args.keep == nullptr ? args.keep_scale : args.keep[i] * args.keep_scale;
}

void TrainNorm(const TrainNormArgs& args) {
  for (size_t r = 0; r < args.num_rows; ++r) {
    const size_t begin = r * args.width, end = begin + args.width;
    float mean = 0.0f, variance = 0.0f;
    for (size_t i = begin; i < end; ++i) {
      args.sum[i] = args.x[i] + ReadNumber(args.bf16, args.y, i) * KeepFactor(args, i);
      mean += args.sum[i] / static_cast<float>(args.width);
    }
    for (size_t i = begin; i < end; ++i) {
      variance += (args.sum[i] - mean) * (args.sum[i] - mean) / static_cast<float>(args.width);
    }
    const float inverse = 1.0f / std::sqrt(variance + args.eps);
    for (size_t i = begin; i < end; ++i) {
      const float normed = (args.sum[i] - mean) * inverse * args.gamma[i - begin];
      WriteNumber(args.bf16, normed + args.beta[i - begin], args.normed, i);
    }
    args.stats[2 * r] = mean;
    args.stats[2 * r + 1] = inverse;
  }
}

// u = (sum - mean) / deviation, normed = u gamma + beta, g = normed_grad gamma:
// gradient of the sum += (g - mean(g) - u mean(g u)) / deviation
void TrainNormGrad(const TrainNormArgs& args) {
  for (int i = 0; i < args.width; ++i) args.gamma_grad[i] = args.beta_grad[i] = 0.0f;
  for (size_t r = 0; r < args.num_rows; ++r) {
    const size_t begin = r * args.width;
    const float inverse = args.stats[2 * r + 1];
    float mean = 0.0f, dot = 0.0f;
    for (int i = 0; i < args.width; ++i) {
      const float unit = (args.sum[begin + i] - args.stats[2 * r]) * inverse;
      const float grad = ReadNumber(args.bf16, args.normed_grad, begin + i);
      args.gamma_grad[i] += grad * unit;
      args.beta_grad[i] += grad;
      mean += grad * args.gamma[i] / static_cast<float>(args.width);
      dot += grad * args.gamma[i] * unit / static_cast<float>(args.width);
    }
    for (int i = 0; i < args.width; ++i) {
      const float unit = (args.sum[begin + i] - args.stats[2 * r]) * inverse;
      const float grad = ReadNumber(args.bf16, args.normed_grad, begin + i) * args.gamma[i];
      args.x_grad[begin + i] = args.sum_grad[begin + i] + (grad - mean - unit * dot) * inverse;
      WriteNumber(args.bf16, args.x_grad[begin + i] * KeepFactor(args, begin + i), args.y_grad,
                  begin + i);
    }
  }
}

// A step of one lane of SFC64.
uint64_t NextWord(uint64_t* a, uint64_t* b, uint64_t* c, uint64_t step) {
  const uint64_t word = *a + *b + step;
  *a = *b ^ (*b >> 11);
  *b = *c + (*c << 3);
  *c = ((*c << 24) | (*c >> 40)) + word;
  return word;
}

void DrawKeep(const KeepArgs& args) {
  uint64_t* state = args.state;
  uint64_t words[kKeepLanes] = {};
  for (size_t i = 0; i < args.size; ++i) {
    if (i % kKeepStep == 0) {
      for (int lane = 0; lane < kKeepLanes; ++lane) {
        words[lane] = NextWord(state + lane, state + kKeepLanes + lane,
                               state + 2 * kKeepLanes + lane, args.first_step + i / kKeepStep);
      }
    }
    const uint64_t word = words[i % kKeepStep / 4];
    args.keep[i] = static_cast<int16_t>(word >> (16 * (i % 4))) >= args.first_kept ? 1 : 0;
  }
}

}  // namespace
}  // namespace tt
