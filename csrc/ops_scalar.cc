// The oracle of the other tables: the definitions as plain loops, for any machine.
#include <cmath>

#include "bfloat16.h"
#include "ops.h"
#include "scalar_train_attend.h"
#include "scalar_train_rows.h"

namespace tt {
namespace {

constexpr int kPanel = 16;

float Weight(const MatrixView& w, int i, int col) {
  const size_t panel = static_cast<size_t>(col) / kPanel;
  return static_cast<const float*>(w.data)[(panel * w.k + i) * kPanel + col % kPanel];
}

void Gemm(const MatrixView& w, int num_cols, const void* a, size_t lda, int rows, float* c,
          size_t ldc, bool add) {
  const float* numbers = static_cast<const float*>(a);
  for (int r = 0; r < rows; ++r) {
    for (int col = 0; col < num_cols; ++col) {
      float sum = w.bias[col];
      for (int i = 0; i < w.k; ++i) sum += numbers[r * lda + i] * Weight(w, i, col);
      c[r * ldc + col] = add ? c[r * ldc + col] + sum : sum;
    }
  }
}

void RoundNumbers(const float* x, size_t n, NumberType, uint16_t* out) {
  for (size_t i = 0; i < n; ++i) out[i] = ToBf16(x[i]);
}

void Prepare(const float* x, size_t n, NumberType type, void* out) {
  float* numbers = static_cast<float*>(out);
  for (size_t i = 0; i < n; ++i) {
    numbers[i] = type == NumberType::kFloat32 ? x[i] : FromBf16(ToBf16(x[i]));
  }
}

void NormRow(const float* x, const float* gamma, const float* beta, int width, float* out) {
  float mean = 0.0f, variance = 0.0f;
  for (int i = 0; i < width; ++i) mean += x[i];
  mean /= static_cast<float>(width);
  for (int i = 0; i < width; ++i) variance += (x[i] - mean) * (x[i] - mean);
  variance /= static_cast<float>(width);
  const float scale = 1.0f / std::sqrt(variance + 1e-5f);
  for (int i = 0; i < width; ++i) out[i] = (x[i] - mean) * scale * gamma[i] + beta[i];
  for (int i = width; i < RoundUp(width, kPad); ++i) out[i] = 0.0f;
}

void LayerNorm(const float* x, int rows, const float* gamma, const float* beta, int width,
               NumberType type, void* out) {
  const size_t stride = RoundUp(width, kPad);
  float* numbers = static_cast<float*>(out);
  for (int r = 0; r < rows; ++r) {
    NormRow(x + r * stride, gamma, beta, width, numbers + r * stride);
  }
  Prepare(numbers, rows * stride, type, numbers);
}

void Gelu(const float* x, size_t n, NumberType type, void* out) {
  float* numbers = static_cast<float*>(out);
  for (size_t i = 0; i < n; ++i) numbers[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678f));
  Prepare(numbers, n, type, numbers);
}

void Softmax(const float* x, int n, float* probs) {
  float max = x[0], sum = 0.0f;
  for (int i = 1; i < n; ++i) max = x[i] > max ? x[i] : max;
  for (int i = 0; i < n; ++i) sum += probs[i] = std::exp(x[i] - max);
  for (int i = 0; i < n; ++i) probs[i] /= sum;
  for (int i = n; i < RoundUp(n, kPad); ++i) probs[i] = 0.0f;
}

float Number(float x) { return x; }
float Number(uint16_t x) { return FromBf16(x); }

// A bundle is one head.
template <typename Key>
void AttendRow(const AttendArgs& args, int r, int head) {
  const uint32_t* path = args.paths[r];
  const float* q = args.q + r * args.q_stride + head * args.bundle_stride;
  const Key* keys = static_cast<const Key*>(args.kv) + 2 * head * args.bundle_size;
  for (int j = 0; j < args.lens[r]; ++j) {
    float dot = 0.0f;
    for (int i = 0; i < args.bundle_stride; ++i) dot += q[i] * Number(keys[path[j] + i]);
    args.scores[j] = dot * args.scale;
  }
  Softmax(args.scores, args.lens[r], args.scores);
  for (int i = 0; i < args.bundle_stride; ++i) {
    float sum = 0.0f;
    for (int j = 0; j < args.lens[r]; ++j) {
      sum += args.scores[j] * Number(keys[args.bundle_size + path[j] + i]);
    }
    args.out[r * args.out_stride + head * args.bundle_stride + i] = sum;
  }
}

void Attend(const AttendArgs& args) {
  const auto attend = args.type == NumberType::kFloat32 ? AttendRow<float> : AttendRow<uint16_t>;
  for (int r = 0; r < args.rows; ++r) {
    for (int head = 0; head < args.num_bundles; ++head) attend(args, r, head);
  }
}

double PeakLoop(int64_t iterations, bool) {
  float sums[8] = {};
  for (int64_t i = 0; i < iterations; ++i) {
    for (float& sum : sums) sum = sum * 0.999f + 1.0f;
    asm volatile("" : : "r"(sums) : "memory");
  }
  return static_cast<double>(iterations) * 16.0;
}

constexpr Ops kOps = {.name = "scalar",
                      .panel_width = kPanel,
                      .tile_rows = 1,
                      .bf16_tile_rows = 1,
                      .bundle_heads = 1,
                      .bf16_weights = NumberType::kRounded,
                      .gemm = Gemm,
                      .prepare = Prepare,
                      .layer_norm = LayerNorm,
                      .gelu = Gelu,
                      .round = RoundNumbers,
                      .attend = Attend,
                      .train_forward = TrainForward,
                      .train_backward = TrainBackward,
                      .train_gelu = TrainGelu,
                      .train_norm = TrainNorm,
                      .train_norm_grad = TrainNormGrad,
                      .draw_keep = DrawKeep,
                      .softmax = Softmax,
                      .peak_loop = PeakLoop};

}  // namespace

const Ops* ScalarOps() { return &kOps; }

}  // namespace tt
