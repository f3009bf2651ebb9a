// Attention of training, forward and backward, of every table of kernels against double precision.
// A bound is a relative error, counted in roundings, of the sum of absolute values.
#include <algorithm>
#include <cmath>
#include <functional>
#include <stdexcept>

#include "bfloat16.h"
#include "check.h"
#include "oracle.h"
#include "random.h"
#include "tables.h"
#include "train_attention.h"

namespace tt::test {
namespace {

// (query, key) -> whether it is hidden
using Hides = std::function<bool(int, int)>;

bool HidesFuture(int query, int key) { return key > query; }
// and every fifth token, as value tokens are
bool HidesValues(int query, int key) { return key > query || key % 5 == 4; }

struct TrainCase {
  int windows, len, heads, dim;
  bool bf16;
  float keep_scale;
  std::vector<float> qkv, out_grad;
  std::vector<uint8_t> hidden, keep;

  TrainCase(int windows, int len, int heads, int dim, bool bf16, bool drops, const Hides& hides)
      : windows(windows), len(len), heads(heads), dim(dim), bf16(bf16) {
    Random random(len * 1000 + dim);
    qkv = Numbers(random, 3 * size());
    out_grad = Numbers(random, size());
    for (int i = 0; i < len * len; ++i) hidden.push_back(hides(i / len, i % len) ? 1 : 0);
    keep_scale = drops ? 1.25f : 1.0f;
    for (int i = 0; drops && i < windows * heads * len * len; ++i) {
      keep.push_back(random.Below(5) > 0 ? 1 : 0);
    }
  }

  std::vector<float> Numbers(Random& random, size_t count) const {
    std::vector<float> x = random.Normals(count);
    for (float& each : x) each = bf16 ? RoundToBf16(each) : each;
    return x;
  }

  size_t size() const { return size_t(windows) * len * heads * dim; }
  size_t At(int window, int t, int head, int i) const {
    return ((size_t(window) * len + t) * heads + head) * dim + i;
  }
  size_t AtQkv(int part, int window, int t, int head, int i) const {
    return (((size_t(window) * len + t) * 3 + part) * heads + head) * dim + i;
  }
  double Keep(int window, int head, int query, int key) const {
    if (keep.empty()) return 1.0;
    return keep_scale * keep[((size_t(window) * heads + head) * len + query) * len + key];
  }
};

// A number and what its absolute error is measured by: the sum of absolute values.
struct Sum {
  double value = 0.0, magnitude = 0.0;
  void Add(double x, double size) {
    value += x;
    magnitude += size;
  }
  void Add(double x) { Add(x, std::abs(x)); }
};

struct Wanted {
  std::vector<Sum> out, qkv_grad;
  double largest_score = 0.0;  // of sums of absolute values
  explicit Wanted(const TrainCase& test) : out(test.size()), qkv_grad(3 * test.size()) {
    for (int window = 0; window < test.windows; ++window) {
      for (int head = 0; head < test.heads; ++head) {
        for (int query = 0; query < test.len; ++query) AddQuery(test, window, head, query);
      }
    }
  }

  Doubles Weights(const TrainCase& test, int window, int head, int query) {
    Doubles scores(test.len, -1e30);
    for (int key = 0; key < test.len; ++key) {
      if (test.hidden[query * test.len + key] != 0) continue;
      Sum dot;
      for (int i = 0; i < test.dim; ++i) {
        dot.Add(double{test.qkv[test.AtQkv(0, window, query, head, i)]} *
                test.qkv[test.AtQkv(1, window, key, head, i)]);
      }
      scores[key] = dot.value / std::sqrt(double(test.dim));
      largest_score = std::max(largest_score, dot.magnitude / std::sqrt(double(test.dim)));
    }
    return Softmax(scores);
  }

  void AddQuery(const TrainCase& test, int window, int head, int query) {
    const Doubles weights = Weights(test, window, head, query);
    std::vector<Sum> grads(test.len);  // of weights
    Sum dot;
    for (int key = 0; key < test.len; ++key) {
      const double kept = test.Keep(window, head, query, key);
      for (int i = 0; i < test.dim; ++i) {
        const double value = test.qkv[test.AtQkv(2, window, key, head, i)];
        const double out_grad = test.out_grad[test.At(window, query, head, i)];
        out[test.At(window, query, head, i)].Add(weights[key] * kept * value);
        qkv_grad[test.AtQkv(2, window, key, head, i)].Add(weights[key] * kept * out_grad);
        grads[key].Add(kept * value * out_grad);
      }
      dot.Add(weights[key] * grads[key].value, weights[key] * grads[key].magnitude);
    }
    for (int key = 0; key < test.len; ++key) {
      const double weight = weights[key] / std::sqrt(double(test.dim));
      const double grad = weight * (grads[key].value - dot.value);
      const double magnitude = weight * (grads[key].magnitude + dot.magnitude);
      for (int i = 0; i < test.dim; ++i) {
        const double q = test.qkv[test.AtQkv(0, window, query, head, i)];
        const double k = test.qkv[test.AtQkv(1, window, key, head, i)];
        qkv_grad[test.AtQkv(0, window, query, head, i)].Add(grad * k, magnitude * std::abs(k));
        qkv_grad[test.AtQkv(1, window, key, head, i)].Add(grad * q, magnitude * std::abs(q));
      }
    }
  }
};

// What a tensor of the kernel's type holds, in memory of exactly its size.
struct Tensor {
  bool bf16;
  std::vector<float> floats;
  std::vector<uint16_t> halves;

  Tensor(bool bf16, const std::vector<float>& x) : bf16(bf16) {
    if (!bf16) floats = x;
    for (size_t i = 0; bf16 && i < x.size(); ++i) halves.push_back(ToBf16(x[i]));
  }
  void* data() { return bf16 ? static_cast<void*>(halves.data()) : floats.data(); }
  double operator[](size_t i) const { return bf16 ? FromBf16(halves[i]) : floats[i]; }
};

void CheckNear(const TrainCase& test, const Tensor& got, const std::vector<Sum>& want,
               double relative) {
  double worst = 0.0;  // error as a part of its bound
  for (size_t i = 0; i < want.size(); ++i) {
    const double rounding = test.bf16 ? 0x1p-8 * std::abs(want[i].value) : 0.0;
    const double bound = relative * want[i].magnitude + rounding + 100 * kTiny;
    const double error = std::abs(got[i] - want[i].value);
    worst = error <= bound ? std::max(worst, error / bound) : 2.0;  // NaN too
    if (worst > 1.0) break;
  }
  CHECK_LE(worst, 1.0);
}

void CheckTrain(const TrainCase& test) {
  const Wanted want(test);
  // A weight's relative error is that of two scores' differences, of exp and of its sum; a gradient
  // of scores has it twice; then come the sums over numbers of a head and over tokens.
  const double relative =
      kRounding * (4.0 * (test.dim + 6) * want.largest_score + 8.0 * test.len + test.dim + 60);
  for (const Ops* ops : TestedOps()) {
    const Context context(Text(ops->name, "windows", test.windows, "len", test.len, "heads",
                               test.heads, "dim", test.dim, test.bf16 ? "bf16" : "fp32",
                               test.keep.empty() ? "" : "dropout"));
    const std::vector<float> blank(test.size(), std::nanf("")),
        blank3(3 * test.size(), std::nanf(""));
    Tensor qkv(test.bf16, test.qkv), out_grad(test.bf16, test.out_grad);
    Tensor out(test.bf16, blank), qkv_grad(test.bf16, blank3);
    std::vector<float> stats(2 * size_t(test.windows) * test.heads * test.len);
    TrainAttendArgs args{};
    args.num_windows = test.windows;
    args.len = test.len;
    args.num_heads = test.heads;
    args.head_dim = test.dim;
    args.bf16 = test.bf16;
    args.qkv = qkv.data();
    args.keep = test.keep.empty() ? nullptr : test.keep.data();
    args.keep_scale = test.keep_scale;
    args.stats = stats.data();
    args.out = out.data();
    args.out_grad = out_grad.data();
    args.qkv_grad = qkv_grad.data();
    TrainAttention(*ops, args, test.hidden.data()).Forward();
    CheckNear(test, out, want.out, relative);
    TrainAttention(*ops, args, test.hidden.data()).Backward();
    CheckNear(test, qkv_grad, want.qkv_grad, relative);
  }
}

}  // namespace

TEST(TrainAttentionAllLengths) {
  for (int len = 1; len <= 40; ++len) {
    CheckTrain({1, len, 1 + len % 3, 16, len % 2 == 0, len % 3 == 0, HidesFuture});
  }
}

TEST(TrainAttentionAllWidths) {
  for (int dim : {1, 5, 8, 16, 20, 32, 33, 48, 64, 80, 128}) {
    for (bool bf16 : {false, true}) CheckTrain({2, 29, 2, dim, bf16, true, HidesValues});
  }
}

// Rows that see keys here and there, and all keys.
TEST(TrainAttentionAnyMask) {
  Random random(0);
  std::vector<int> sees(50);
  for (int& key : sees) key = random.Below(50);
  const Hides hides = [&](int query, int key) {
    return key != sees[query] && (query * 7 + key * 3) % 11 < 8;
  };
  CheckTrain({1, 50, 2, 24, false, true, hides});
  CheckTrain({1, 50, 2, 24, false, false, [](int, int) { return false; }});
}

TEST(TrainAttentionOfLongWindows) { CheckTrain({1, 131, 1, 32, false, true, HidesValues}); }

TEST(TrainAttentionNeedsKeysInSight) {
  for (const Ops* ops : TestedOps()) {
    TrainAttendArgs args{};
    args.len = 3;
    args.head_dim = 8;
    const uint8_t hidden[] = {0, 1, 1, 1, 1, 1, 0, 0, 0};
    CHECK_THROWS(std::invalid_argument, TrainAttention(*ops, args, hidden));
  }
}

}  // namespace tt::test
