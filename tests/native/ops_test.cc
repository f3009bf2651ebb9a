// Every table of kernels against double precision. A bound is the number of roundings times their
// size, 2^-24, times the magnitude of what is rounded.
#include "ops.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include "bfloat16.h"
#include "check.h"
#include "oracle.h"
#include "random.h"
#include "small_models.h"
#include "tables.h"

namespace tt::test {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kGuard = 123.25f;  // in memory that must not be written

// ---- inputs of products ----

// Bytes of a number: those that `prepare` writes.
size_t InputBytes(const Ops& ops, NumberType type) {
  constexpr unsigned char kUnwritten = 0xA5;
  std::vector<float> ones(kPad, 1.0f);
  std::vector<unsigned char> inputs(kPad * sizeof(float), kUnwritten);
  ops.prepare(ones.data(), ones.size(), type, inputs.data());
  const auto last = std::find_if(inputs.rbegin(), inputs.rend(),
                                 [](unsigned char byte) { return byte != kUnwritten; });
  const size_t bytes = inputs.rend() - last;
  CHECK(bytes == kPad * sizeof(float) || bytes == kPad * sizeof(uint16_t));
  return bytes / kPad;
}

// Types of weights that a table multiplies.
std::vector<NumberType> InputTypes(const Ops& ops) {
  std::vector<NumberType> types = {NumberType::kFloat32, ops.bf16_weights};
  if (ops.fp16_weights) types.push_back(NumberType::kFp16);
  return types;
}

bool Multiplies(const Ops& ops, NumberType type) {
  const std::vector<NumberType> types = InputTypes(ops);
  return std::find(types.begin(), types.end(), type) != types.end();
}

// ---- matrix product ----

// c = a w + bias of up to kMaxRows rows.
struct GemmCase {
  int k, n, num_cols;
  NumberType type;
  std::vector<float> a, weight, bias, old;  // (kMaxRows, k) (k, n) (n) (kMaxRows, n)
  Doubles sum, magnitude;                   // (kMaxRows, num_cols)

  GemmCase(int k, int n, int num_cols, NumberType type)
      : k(k), n(n), num_cols(num_cols), type(type) {
    Random random(k * 1000 + n);
    a = random.Normals(size_t{kMaxRows} * k);
    weight = random.Normals(size_t(k) * n);
    bias = random.Normals(n);
    old = random.Normals(size_t{kMaxRows} * n);
    for (int r = 0; r < kMaxRows; ++r) {
      for (int col = 0; col < num_cols; ++col) AddElement(r, col);
    }
  }

  void AddElement(int r, int col) {
    double total = bias[col], size = std::abs(bias[col]);
    double parts[2] = {};  // float16 sums of even rows of weights, and of odd ones
    for (int i = 0; i < k; ++i) {
      const double x = Rounded(a[size_t(r) * k + i]);
      const double product = x * RoundedWeight(weight[size_t(i) * n + col]);
      size += std::abs(product);
      if (type != NumberType::kFp16) {
        total += product;
        continue;
      }
      parts[i % 2] = RoundToFp16(parts[i % 2] + product);
      if ((i + 1) % kFp16Sum != 0 && i + 1 < k) continue;
      total += RoundToFp16(parts[0] + parts[1]);
      parts[0] = parts[1] = 0.0;
    }
    sum.push_back(total);
    magnitude.push_back(size);
  }

  double Rounded(float x) const {
    if (type == NumberType::kFp16) return RoundToFp16(x);
    return type == NumberType::kFloat32 ? x : RoundToBf16(x);
  }

  double RoundedWeight(float x) const {
    return Rounded(type == NumberType::kFp16 ? RoundToBf16(x) : x);
  }

  PackedMatrix Pack(const Ops& ops) const {
    const NumberType first = type == NumberType::kFp16 ? ops.bf16_weights : type;
    PackedMatrix packed(k, n, ops.panel_width, first);
    for (int col = 0; col < n; ++col) {
      packed.SetBias(col, bias[col]);
      for (int i = 0; i < k; ++i) packed.Set(i, col, weight[size_t(i) * n + col]);
    }
    if (type == NumberType::kFp16) CHECK(packed.TryFp16(std::sqrt(2.0 * k)));
    return packed;
  }
};

// x as inputs of products; exactly as many bytes as they take.
std::vector<std::byte> Prepared(const Ops& ops, const std::vector<float>& x, NumberType type) {
  std::vector<std::byte> inputs(x.size() * InputBytes(ops, type));
  ops.prepare(x.data(), x.size(), type, inputs.data());
  return inputs;
}

// Rows are wider than what is read or written of them. Behind those of a is no memory, so that a
// sanitizer sees who reads it; c has more of them, as none sees what tiles write.
void CheckGemm(const Ops& ops, const GemmCase& test, const PackedMatrix& packed, int rows,
               bool add) {
  const Context context(Text(ops.name, "rows", rows, "k", test.k, "n", test.n, "cols",
                             test.num_cols, NameOf(test.type), add ? "add" : ""));
  const int lda = test.k + kPad, ldc = test.n + 5, k = test.k;
  std::vector<float> a(size_t(rows) * lda, kNaN);
  std::vector<float> c(size_t(RoundUp(rows, kPad)) * ldc, kGuard);
  for (int r = 0; r < rows; ++r) {
    std::copy_n(&test.a[size_t(r) * k], k, &a[size_t(r) * lda]);
    for (int col = 0; add && col < test.num_cols; ++col) {
      c[r * ldc + col] = test.old[r * test.n + col];
    }
  }
  const std::vector<std::byte> inputs = Prepared(ops, a, test.type);
  ops.gemm(packed.view(), test.num_cols, inputs.data(), lda, rows, c.data(), ldc, add);
  double worst = 0.0;  // error as a part of its bound
  for (int r = 0; r < rows; ++r) {
    for (int col = 0; col < test.num_cols; ++col) {
      const size_t i = size_t(r) * test.num_cols + col;
      const double old = add ? test.old[r * test.n + col] : 0.0;
      const double bound = (k + 2) * kRounding * (test.magnitude[i] + std::abs(old)) + k * kTiny;
      const double error = std::abs(c[r * ldc + col] - (test.sum[i] + old));
      worst = error <= bound ? std::max(worst, error / bound) : 2.0;  // NaN too
    }
    for (int col = test.num_cols; col < ldc; ++col) CHECK_EQ(c[r * ldc + col], kGuard);
  }
  CHECK_LE(worst, 1.0);
  for (size_t i = size_t(rows) * ldc; i < c.size(); ++i) CHECK_EQ(c[i], kGuard);
}

void CheckGemmCase(int k, int n, int num_cols, NumberType type) {
  const GemmCase test(k, n, num_cols, type);
  for (const Ops* ops : TestedOps()) {
    if (!Multiplies(*ops, type)) continue;
    const PackedMatrix packed = test.Pack(*ops);
    for (bool add : {false, true}) {
      for (int rows = 1; rows <= 13; ++rows) CheckGemm(*ops, test, packed, rows, add);
      for (int rows : {16, 17, 24, 25, 31, 32, 33, 48, 49, 64, 65, 95, kMaxRows})
        CheckGemm(*ops, test, packed, rows, add);
    }
  }
}

// ---- rows ----

Doubles ToDoubles(const float* x, int n) { return Doubles(x, x + n); }

std::vector<float> Padded(const std::vector<float>& x) {
  std::vector<float> out(x);
  out.resize(RoundUp(static_cast<int>(x.size()), kPad), 0.0f);
  return out;
}

void CheckPadding(const std::vector<float>& out, int n) {
  for (size_t i = n; i < out.size(); ++i) CHECK_EQ(out[i], 0.0f);
}

// mean and spread of the numbers that are normalised
void CheckLayerNorm(const Ops& ops, int width, double mean, double spread) {
  const Context context(Text(ops.name, "width", width, "mean", mean, "spread", spread));
  Random random(width);
  const std::vector<float> x = Padded(random.Normals(width, spread, mean));
  const std::vector<float> gamma = Padded(random.Normals(width)),
                           beta = Padded(random.Normals(width));
  std::vector<float> out(x.size(), kGuard);
  ops.layer_norm(x.data(), 1, gamma.data(), beta.data(), width, NumberType::kFloat32, out.data());
  const Doubles want = LayerNorm(ToDoubles(x.data(), width), gamma.data(), beta.data());
  double largest = 0.0, variance = 0.0, average = 0.0;
  for (int i = 0; i < width; ++i) {
    largest = std::max(largest, std::abs(double{x[i]}));
    average += x[i] / double(width);
  }
  for (int i = 0; i < width; ++i) variance += std::pow(x[i] - average, 2) / width;
  const double scale = 1.0 / std::sqrt(variance + 1e-5);
  for (int i = 0; i < width; ++i) {
    // the mean is off by its sum's roundings, the scale by half of the variance's relative error
    const double mean_error = (width + 2) * kRounding * largest;
    const double normed = std::abs(x[i] - average) * scale;
    const double relative = (width + 8) * kRounding + mean_error * scale * mean_error * scale;
    const double bound = std::abs(gamma[i]) * (mean_error * scale + normed * relative) +
                         4 * kRounding * (std::abs(want[i]) + std::abs(beta[i]));
    CHECK_LE(std::abs(out[i] - want[i]), bound);
  }
  CheckPadding(out, width);
}

void CheckSoftmax(const Ops& ops, const std::vector<float>& numbers, bool in_place = false) {
  const int n = static_cast<int>(numbers.size());
  const Context context(Text(ops.name, "n", n, in_place ? "in place" : ""));
  std::vector<float> x = Padded(numbers);
  const Doubles logits = ToDoubles(x.data(), n), want = Softmax(logits);
  std::fill(x.begin() + n, x.end(), kGuard);  // room, but no zeros
  std::vector<float> out(x.size(), kGuard);
  ops.softmax(x.data(), n, in_place ? x.data() : out.data());
  const std::vector<float>& probs = in_place ? x : out;
  const double max = *std::max_element(logits.begin(), logits.end());
  for (int i = 0; i < n; ++i) {
    // the difference to the largest and 4 of the exponential, in the numerator and, averaged, in
    // the sum: a mean difference is at most log n, as an entropy is; n - 1 additions, a division
    const double relative = kRounding * (max - logits[i] + std::log(n) + n + 8);
    CHECK_LE(std::abs(probs[i] - want[i]), want[i] * relative + kTiny);
  }
  CheckPadding(probs, n);
}

}  // namespace

TEST(GemmAllTypes) {
  for (NumberType type :
       {NumberType::kFloat32, NumberType::kBf16, NumberType::kRounded, NumberType::kFp16}) {
    CheckGemmCase(32, 32, 32, type);
    CheckGemmCase(64, 96, 96, type);
    CheckGemmCase(96, 160, 64, type);  // only some of the columns
    CheckGemmCase(160, 64, 64, type);
  }
}

// What kFp16Sum promises of GemmCase's sums, which GemmAllTypes compares tables with: rounded to
// float16 they are off by less than inputs rounded to bfloat16 make them.
TEST(GemmFp16IsNoWorseThanBf16) {
  constexpr int kRows = 512, kCols = 32;
  const GemmCase exact(kRows, kCols, kCols, NumberType::kFp16);
  double ours = 0.0, theirs = 0.0;
  for (int r = 0; r < kMaxRows; ++r) {
    for (int col = 0; col < kCols; ++col) {
      double want = exact.bias[col], rounded = want;
      for (int i = 0; i < kRows; ++i) {
        const float x = exact.a[size_t(r) * kRows + i];
        const double y = RoundToBf16(exact.weight[size_t(i) * kCols + col]);
        want += x * y;
        rounded += RoundToBf16(x) * y;
      }
      ours += std::pow(exact.sum[size_t(r) * kCols + col] - want, 2);
      theirs += std::pow(rounded - want, 2);
    }
  }
  CHECK_LE(ours, theirs);
}

// Inputs on both sides of, and exactly at, the middle between two bfloat16 numbers.
TEST(NumbersAreRoundedToNearestEven) {
  for (const Ops* ops : TestedOps()) {
    const Context context(ops->name);
    PackedMatrix ones(32, 32, ops->panel_width, ops->bf16_weights);
    for (int col = 0; col < 32; ++col) ones.Set(col, col, 1.0f);
    const float step = 0x1p-7f;  // of bfloat16 in [1, 2)
    std::vector<float> a(32), c(32);
    for (int i = 0; i < 32; ++i) {
      a[i] = 1.0f + step * (static_cast<float>(i / 3) + 0.5f) +
             static_cast<float>(i % 3 - 1) * 0x1p-20f;
      if (i % 2 == 1) a[i] = -a[i];
    }
    std::vector<uint16_t> rounded(32);
    const std::vector<std::byte> inputs = Prepared(*ops, a, ops->bf16_weights);
    ops->gemm(ones.view(), 32, inputs.data(), 32, 1, c.data(), 32, false);
    ops->round(a.data(), 32, NumberType::kBf16, rounded.data());
    for (int i = 0; i < 32; ++i) {
      CHECK_EQ(c[i], RoundToBf16(a[i]));
      CHECK_EQ(FromBf16(rounded[i]), RoundToBf16(a[i]));
    }
  }
}

TEST(LayerNormRows) {
  for (const Ops* ops : TestedOps()) {
    for (int width : {1, 2, 5, 16, 20, 31, 32, 33, 64, 100, 128, 257}) {
      CheckLayerNorm(*ops, width, 0.0, 1.0);
      CheckLayerNorm(*ops, width, 0.0, 1e-3);
      CheckLayerNorm(*ops, width, 0.0, 1e4);
      CheckLayerNorm(*ops, width, 1.0, 1.0);
      CheckLayerNorm(*ops, width, -10.0, 1.0);
    }
  }
}

// LayerNorm and GELU make of every row what `prepare` makes of their result in float32.
TEST(InputsAreMadeAtOnce) {
  constexpr int kRows = 5;
  for (const Ops* ops : TestedOps()) {
    for (NumberType type : InputTypes(*ops)) {
      for (int width : {1, 20, 32, 33, 100, 128}) {
        const Context context(Text(ops->name, NameOf(type), "width", width));
        const size_t padded = RoundUp(width, kPad), size = kRows * padded;
        Random random(width);
        std::vector<float> x(size, 0.0f), exact(size), gamma = Padded(random.Normals(width)),
                                                       beta = Padded(random.Normals(width));
        for (size_t i = 0; i < size; ++i) {
          if (i % padded < size_t(width)) x[i] = static_cast<float>(3.0 * random.Normal());
        }
        std::vector<std::byte> inputs(size * InputBytes(*ops, type), std::byte{0xA5});
        for (int r = 0; r < kRows; ++r) {
          ops->layer_norm(&x[r * padded], 1, gamma.data(), beta.data(), width, NumberType::kFloat32,
                          &exact[r * padded]);
        }
        ops->layer_norm(x.data(), kRows, gamma.data(), beta.data(), width, type, inputs.data());
        CHECK(inputs == Prepared(*ops, exact, type));
        std::fill(inputs.begin(), inputs.end(), std::byte{0xA5});
        ops->gelu(x.data(), size, NumberType::kFloat32, exact.data());
        ops->gelu(x.data(), size, type, inputs.data());
        CHECK(inputs == Prepared(*ops, exact, type));
      }
    }
  }
}

TEST(GeluRows) {
  std::vector<float> x = {0.0f, -0.0f, 1e-30f, -1e-30f, 1e-40f, 30.0f, -30.0f, 1e3f, -1e3f, 1e30f};
  for (int i = -8000; i <= 8000; ++i) x.push_back(static_cast<float>(i) * 1e-3f);
  x = Padded(x);
  for (const Ops* ops : TestedOps()) {
    std::vector<float> out = x;
    ops->gelu(out.data(), out.size(), NumberType::kFloat32, out.data());
    for (size_t i = 0; i < x.size(); ++i) {
      const Context context(Text(ops->name, "x", x[i]));
      // 1.3e-7 of Phi's fit, pieces are closer, and 3 roundings of numbers up to 1
      const double bound = std::abs(double{x[i]}) * (1.3e-7 + 3 * kRounding) + kTiny;
      CHECK_LE(std::abs(out[i] - Gelu(x[i])), bound);
    }
  }
}

TEST(SoftmaxRows) {
  for (const Ops* ops : TestedOps()) {
    for (int n = 1; n <= 70; ++n) CheckSoftmax(*ops, Random(n).Normals(n, 2.0), n % 2 == 0);
    for (int n : {7, 32, 101, 257}) {
      CheckSoftmax(*ops, Random(n).Normals(n, 0.0));
      CheckSoftmax(*ops, Random(n).Normals(n, 30.0));
      CheckSoftmax(*ops, Random(n).Normals(n, 300.0), true);  // most of them vanish
      for (double shift : {-500.0, 500.0}) CheckSoftmax(*ops, Random(n).Normals(n, 2.0, shift));
    }
  }
}

// Around the exponential of the smallest normal number, -87.3.
TEST(SoftmaxOfTinyNumbers) {
  std::vector<float> x = {0.0f};
  while (x.back() > -92.0f) x.push_back(x.size() == 1 ? -84.0f : x.back() - 1.0f / 32.0f);
  for (const Ops* ops : TestedOps()) CheckSoftmax(*ops, x);
}

TEST(SoftmaxOfMinusInfinity) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (const Ops* ops : TestedOps()) {
    const Context context(ops->name);
    std::vector<float> x = Padded({-kInf, 1.0f, -kInf, 1.0f, -1000.0f}), probs(x.size());
    ops->softmax(x.data(), 5, probs.data());
    const float want[] = {0.0f, 0.5f, 0.0f, 0.5f, 0.0f};
    for (int i = 0; i < 5; ++i) CHECK_EQ(probs[i], want[i]);
  }
}

TEST(PeakLoopsCount) {
  for (const Ops* ops : TestedOps()) {
    for (bool bf16 : {false, true}) {
      const double one = ops->peak_loop(1, bf16);
      CHECK(one > 0.0);
      CHECK_EQ(ops->peak_loop(100, bf16), 100.0 * one);
    }
  }
}

}  // namespace tt::test
