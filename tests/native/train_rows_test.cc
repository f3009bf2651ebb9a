// GELU, residual branches and masks of training, of every table of kernels: against double
// precision, and masks against SFC64 written out.
#include <cmath>

#include "aligned_buffer.h"
#include "bfloat16.h"
#include "check.h"
#include "oracle.h"
#include "random.h"
#include "tables.h"

namespace tt::test {
namespace {

// What a tensor of the kernel's type holds, in memory of exactly its size.
struct Numbers {
  bool bf16;
  std::vector<float> floats;
  std::vector<uint16_t> halves;

  Numbers(bool bf16, const std::vector<float>& x) : bf16(bf16) {
    if (!bf16) floats = x;
    for (size_t i = 0; bf16 && i < x.size(); ++i) halves.push_back(ToBf16(x[i]));
  }
  void* data() { return bf16 ? static_cast<void*>(halves.data()) : floats.data(); }
  double operator[](size_t i) const { return bf16 ? FromBf16(halves[i]) : floats[i]; }
};

// magnitude: of what was added up, each with a few roundings.
void CheckNumber(double got, double want, double magnitude, bool bf16) {
  const double rounding = bf16 ? 0x1p-8 * std::abs(want) : 0.0;
  CHECK_LE(std::abs(got - want), rounding + kRounding * magnitude + 100 * kTiny);
}

void CheckGelu(size_t size, bool bf16) {
  Random random(size);
  Numbers x(bf16, random.Normals(size, 3.0)), out_grad(bf16, random.Normals(size));
  for (const Ops* ops : TestedOps()) {
    const Context context(Text(ops->name, "size", size, bf16 ? "bf16" : "fp32"));
    Numbers out(bf16, std::vector<float>(size)), grad = out;
    TrainGeluArgs args{size, bf16, x.data(), nullptr, out.data()};
    ops->train_gelu(args);
    args.out_grad = out_grad.data();
    args.out = grad.data();
    ops->train_gelu(args);
    for (size_t i = 0; i < size; ++i) {
      const double density = std::exp(-0.5 * x[i] * x[i]) * 0.3989422804014327;
      const double slope = 0.5 * (1.0 + std::erf(x[i] * std::sqrt(0.5))) + x[i] * density;
      CheckNumber(out[i], Gelu(x[i]), 4.0 * std::abs(x[i]), bf16);
      CheckNumber(grad[i], slope * out_grad[i], 8.0 * std::abs(out_grad[i]), bf16);
    }
  }
}

struct NormCase {
  size_t rows;
  int width;
  bool bf16;
  float keep_scale;
  std::vector<float> x, gamma, beta, sum_grad;
  Numbers y, normed_grad;
  std::vector<uint8_t> keep;

  NormCase(size_t rows, int width, bool bf16, bool drops, Random random)
      : rows(rows),
        width(width),
        bf16(bf16),
        keep_scale(drops ? 1.25f : 1.0f),
        x(random.Normals(size())),
        gamma(random.Normals(width)),
        beta(random.Normals(width)),
        sum_grad(random.Normals(size())),
        y(bf16, random.Normals(size())),
        normed_grad(bf16, random.Normals(size())) {
    for (size_t i = 0; drops && i < size(); ++i) keep.push_back(random.Below(5) > 0 ? 1 : 0);
  }
  size_t size() const { return rows * width; }
  double Keep(size_t i) const { return keep.empty() ? 1.0 : keep_scale * keep[i]; }
};

// A row in double precision.
struct WantedRow {
  Doubles sum, unit;
  double inverse;

  WantedRow(const NormCase& test, size_t r) {
    double mean = 0.0, variance = 0.0;
    for (size_t i = r * test.width; i < (r + 1) * test.width; ++i) {
      sum.push_back(test.x[i] + test.y[i] * test.Keep(i));
      mean += sum.back() / test.width;
    }
    for (double s : sum) variance += (s - mean) * (s - mean) / test.width;
    inverse = 1.0 / std::sqrt(variance + 1e-3f);
    for (double s : sum) unit.push_back((s - mean) * inverse);
  }
};

TrainNormArgs ArgsOf(NormCase& test) {
  TrainNormArgs args{};
  args.num_rows = test.rows;
  args.width = test.width;
  args.bf16 = test.bf16;
  args.x = test.x.data();
  args.y = test.y.data();
  args.keep = test.keep.empty() ? nullptr : test.keep.data();
  args.keep_scale = test.keep_scale;
  args.gamma = test.gamma.data();
  args.beta = test.beta.data();
  args.eps = 1e-3f;
  args.sum_grad = test.sum_grad.data();
  args.normed_grad = test.normed_grad.data();
  return args;
}

void CheckNorm(NormCase test) {
  for (const Ops* ops : TestedOps()) {
    const Context context(Text(ops->name, "rows", test.rows, "width", test.width,
                               test.bf16 ? "bf16" : "fp32", test.keep.empty() ? "" : "dropout"));
    std::vector<float> sum(test.size()), stats(2 * test.rows), x_grad(test.size());
    std::vector<float> gamma_grad(test.width), beta_grad(test.width);
    Numbers normed(test.bf16, sum), y_grad = normed;
    AlignedBuffer<float> scratch(2 * size_t(RoundUp(test.width, kPad)));
    TrainNormArgs args = ArgsOf(test);
    args.sum = sum.data();
    args.stats = stats.data();
    args.normed = normed.data();
    args.x_grad = x_grad.data();
    args.y_grad = y_grad.data();
    args.gamma_grad = gamma_grad.data();
    args.beta_grad = beta_grad.data();
    args.scratch = scratch.data();
    ops->train_norm(args);
    ops->train_norm_grad(args);

    // A unit's error is that of a sum of `width` numbers, times one over the deviation.
    Doubles want_gamma(test.width), want_beta(test.width), gamma_size(test.width),
        beta_size(test.width);
    const int width = test.width;
    for (size_t r = 0; r < test.rows; ++r) {
      const WantedRow want(test, r);
      double mean = 0.0, dot = 0.0, largest = 1.0, size = 1.0;
      for (int i = 0; i < width; ++i) {
        const double grad = test.normed_grad[r * width + i] * test.gamma[i];
        mean += grad / width;
        dot += grad * want.unit[i] / width;
        largest = std::fmax(largest, std::abs(want.sum[i]));
        size = std::fmax(size, std::abs(grad));
      }
      const double steps = (width + 20.0) * (1.0 + largest * want.inverse);
      for (int i = 0; i < width; ++i) {
        const size_t at = r * width + i;
        const double grad = test.normed_grad[at];
        CheckNumber(sum[at], want.sum[i], 4.0 * largest, false);
        CheckNumber(normed[at], want.unit[i] * test.gamma[i] + test.beta[i],
                    steps * (1.0 + std::abs(want.unit[i])) * std::abs(test.gamma[i]) +
                        2.0 * std::abs(test.beta[i]),
                    test.bf16);
        const double branch = (grad * test.gamma[i] - mean - want.unit[i] * dot) * want.inverse;
        const double total = test.sum_grad[at] + branch;
        const double magnitude = 4.0 * steps * size * want.inverse *
                                     (1.0 + largest * want.inverse) *
                                     (2.0 + std::abs(want.unit[i])) +
                                 4.0 * std::abs(test.sum_grad[at]);
        CheckNumber(x_grad[at], total, magnitude, false);
        CheckNumber(y_grad[at], total * test.Keep(at), 2.0 * magnitude, test.bf16);
        want_gamma[i] += grad * want.unit[i];
        want_beta[i] += grad;
        gamma_size[i] += (steps + test.rows) * (1.0 + std::abs(want.unit[i])) * std::abs(grad);
        beta_size[i] += test.rows * std::abs(grad);
      }
    }
    for (int i = 0; i < width; ++i) {
      CheckNumber(gamma_grad[i], want_gamma[i], gamma_size[i], false);
      CheckNumber(beta_grad[i], want_beta[i], beta_size[i], false);
    }
  }
}

// SFC64 as its author has it, one lane.
uint64_t Next(uint64_t (&s)[4]) {
  const uint64_t word = s[0] + s[1] + s[3]++;
  s[0] = s[1] ^ (s[1] >> 11);
  s[1] = s[2] + (s[2] << 3);
  s[2] = ((s[2] << 24) | (s[2] >> 40)) + word;
  return word;
}

void CheckKeep(size_t size, int16_t first_kept) {
  Random random(size);
  std::vector<uint64_t> start(3 * kKeepLanes);
  for (uint64_t& word : start) word = static_cast<uint64_t>(random.Uniform() * 0x1p53) << 11 | 1;
  const size_t num_steps = (size + kKeepStep - 1) / kKeepStep;
  std::vector<uint8_t> want(num_steps * kKeepStep);
  std::vector<uint64_t> end(start.size());
  for (int lane = 0; lane < kKeepLanes; ++lane) {
    uint64_t s[4] = {start[lane], start[kKeepLanes + lane], start[2 * kKeepLanes + lane], 7};
    for (size_t step = 0; step < num_steps; ++step) {
      const uint64_t word = Next(s);
      for (int i = 0; i < 4; ++i) {
        const int16_t number = static_cast<int16_t>(word >> (16 * i));
        want[step * kKeepStep + 4 * lane + i] = number >= first_kept ? 1 : 0;
      }
    }
    for (int i = 0; i < 3; ++i) end[i * kKeepLanes + lane] = s[i];
  }
  want.resize(size);
  for (const Ops* ops : TestedOps()) {
    const Context context(Text(ops->name, "size", size, "first kept", first_kept));
    std::vector<uint64_t> state = start;
    std::vector<uint8_t> keep(size);
    ops->draw_keep({size, state.data(), 7, first_kept, keep.data()});
    CHECK(keep == want);
    CHECK(state == end);
  }
}

}  // namespace

TEST(TrainGeluAllSizes) {
  for (size_t size = 0; size <= 70; ++size) CheckGelu(size, size % 2 == 0);
  for (bool bf16 : {false, true}) CheckGelu(4099, bf16);
}

TEST(TrainNormAllWidths) {
  for (int width = 1; width <= 70; ++width) {
    CheckNorm({1 + size_t(width) % 5, width, width % 2 == 0, width % 3 == 0, Random(width)});
  }
}

// Sums over more rows than are added up at a time.
TEST(TrainNormOfManyRows) {
  for (bool bf16 : {false, true}) CheckNorm({133, 128, bf16, true, Random(0)});
  CheckNorm({0, 16, false, false, Random(0)});
}

TEST(DrawKeepAllSizes) {
  for (size_t size = 0; size <= 200; ++size) CheckKeep(size, int16_t(size * 100 - 9000));
  for (int first_kept : {-32768, -32767, -1, 0, 1, 32767}) CheckKeep(1000, int16_t(first_kept));
}

}  // namespace tt::test
