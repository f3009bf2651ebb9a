#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "check.h"
#include "oracle.h"
#include "random.h"
#include "small_models.h"
#include "tables.h"

namespace tt::test {
namespace {

constexpr float kRemoved = -1000.0f;  // what a cdf filter leaves of a logit
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr double kJustBelow1 = 1.0 - 0x1p-53;

using Floats = std::vector<float>;

// ---- the naive twin ----

void FilterCdf(Floats& logits, const Floats& probs, float cdf) {
  Floats ascending = probs;
  std::sort(ascending.begin(), ascending.end());
  size_t last_below = 0;
  double sum = 0.0;
  for (size_t i = 0; i < ascending.size(); ++i) {
    sum += ascending[i];
    if (static_cast<float>(sum) < cdf) last_below = i;
  }
  for (size_t i = 0; i < logits.size(); ++i) {
    if (probs[i] <= ascending[last_below]) logits[i] = kRemoved;
  }
}

void KeepTopK(Floats& logits, int k) {
  Floats descending = logits;
  std::sort(descending.begin(), descending.end(), std::greater<float>());
  for (float& logit : logits) {
    if (logit < descending[k - 1]) logit = kMinusInfinity;
  }
}

// Filtered logits, of which everything else follows.
Floats Truncated(Floats logits, const Floats& raw_probs, const Truncation& truncation) {
  if (truncation.cdf >= 0.0f) FilterCdf(logits, raw_probs, truncation.cdf);
  if (truncation.top_k > 0) KeepTopK(logits, truncation.top_k);
  return logits;
}

// ---- checks ----

Doubles Scaled(const Floats& logits, float temperature) {
  Doubles out;
  for (float logit : logits) out.push_back(logit / temperature);
  return out;
}

void CheckLogProbs(const Sampler& sampler, const Floats& filtered) {
  Floats got(filtered.size());
  sampler.LogProbs(got.data());
  const Doubles probs = Softmax(Doubles(filtered.begin(), filtered.end()));
  const double max = *std::max_element(filtered.begin(), filtered.end());
  double sum = 0.0;
  for (float logit : filtered) sum += std::exp(logit - max);
  for (size_t i = 0; i < got.size(); ++i) {
    if (filtered[i] == kMinusInfinity) {
      CHECK_EQ(got[i], kMinusInfinity);
    } else {
      const double want = filtered[i] - max - std::log(sum);
      CHECK_LE(std::abs(got[i] - want), 4 * kRounding * (1.0 + std::abs(want) + std::log(sum)));
    }
  }
}

// The cumulative probability passes u at the drawn token; it may be any of those that are within
// rounding of u, but none without probability.
void CheckDraw(const Sampler& sampler, const Floats& filtered, double u) {
  const Context context(Text("u", u));
  const Doubles probs = Softmax(Doubles(filtered.begin(), filtered.end()));
  const int token = sampler.Draw(u), num_ids = static_cast<int>(filtered.size());
  CHECK(token >= 0 && token < num_ids);
  double below = 0.0, largest = 0.0;
  for (int i = 0; i < token; ++i) below += probs[i];
  for (float x : filtered) largest = std::max(largest, std::isinf(x) ? 0.0 : std::abs(double{x}));
  const double rounding = kRounding * (num_ids + 8);
  CHECK_LE(below, u + rounding);
  CHECK_LE(u, below + probs[token] + rounding);
  CHECK(probs[token] > 0.0);
}

// The first and the last token that have a probability.
void CheckEdges(const Sampler& sampler, const Floats& filtered) {
  const Doubles probs = Softmax(Doubles(filtered.begin(), filtered.end()));
  const auto likely = [](double p) { return p > kTiny; };
  const auto first = std::find_if(probs.begin(), probs.end(), likely);
  const auto last = std::find_if(probs.rbegin(), probs.rend(), likely);
  CHECK_EQ(sampler.Draw(0.0), static_cast<int>(first - probs.begin()));
  CHECK_EQ(sampler.Draw(kJustBelow1), static_cast<int>(probs.rend() - last) - 1);
}

void CheckTruncation(const Ops& ops, const Floats& logits, float temperature,
                     const Truncation& truncation) {
  const Context context(
      Text(ops.name, "ids", logits.size(), "k", truncation.top_k, "cdf", truncation.cdf));
  const int num_ids = static_cast<int>(logits.size());
  Sampler sampler(ops, num_ids);
  sampler.Load(logits.data(), temperature);
  const Floats raw(sampler.RawProbs(), sampler.RawProbs() + num_ids);
  const Doubles scaled = Scaled(logits, temperature), want = Softmax(scaled);
  for (int i = 0; i < num_ids; ++i) {
    CHECK_LE(std::abs(raw[i] - want[i]), kRounding * (num_ids + 40) * want[i] + kTiny);
  }
  sampler.Truncate(truncation);
  const Floats filtered = Truncated({scaled.begin(), scaled.end()}, raw, truncation);
  CheckLogProbs(sampler, filtered);
  for (double u = 0.0; u < 1.0; u += 1.0 / 64) CheckDraw(sampler, filtered, u);
  CheckEdges(sampler, filtered);
  for (int i = 0; i < num_ids; ++i) CHECK_EQ(sampler.RawProbs()[i], raw[i]);
}

void CheckAllTruncations(const Floats& logits, float temperature) {
  const int num_ids = static_cast<int>(logits.size());
  for (const Ops* ops : TestedOps()) {
    for (int k : {0, 1, 2, 5, num_ids - 1, num_ids}) {
      if (k > num_ids) continue;
      for (float cdf : {-1.0f, 0.0f, 0.05f, 0.6f, 0.999f, 1.0f}) {
        CheckTruncation(*ops, logits, temperature, {.top_k = k, .cdf = cdf});
      }
    }
  }
}

Sampler Loaded(const Ops& ops, const Floats& logits, const Truncation& truncation) {
  Sampler sampler(ops, static_cast<int>(logits.size()));
  sampler.Load(logits.data(), 1.0f);
  sampler.Truncate(truncation);
  return sampler;
}

}  // namespace

TEST(TruncationsEqualTheNaiveOnes) {
  for (int num_ids : {2, 3, 9, 33, 101}) {
    CheckAllTruncations(Random(num_ids).Normals(num_ids, 2.0), 1.0f);
    CheckAllTruncations(Random(num_ids + 1).Normals(num_ids, 2.0), 0.3f);
  }
}

// Few different logits, so that every cut goes through a tie.
TEST(TruncationsWithTies) {
  for (int num_ids : {3, 9, 33, 101}) {
    Random random(num_ids);
    Floats logits(num_ids);
    for (float& logit : logits) logit = static_cast<float>(random.Below(4));
    CheckAllTruncations(logits, 1.0f);
  }
  CheckAllTruncations(Floats(8, 0.5f), 1.0f);  // a cdf filter removes all of them, and so none
}

TEST(TopKKeepsTies) {
  for (const Ops* ops : TestedOps()) {
    Floats log_probs(5);
    Loaded(*ops, {3, 2, 2, 1, 2}, {.top_k = 2}).LogProbs(log_probs.data());
    for (int i : {0, 1, 2, 4}) CHECK(log_probs[i] > kMinusInfinity);
    CHECK_EQ(log_probs[3], kMinusInfinity);
  }
}

TEST(TopOneDraws) {
  for (const Ops* ops : TestedOps()) {
    const Context context(ops->name);
    const Sampler one = Loaded(*ops, {0, 3, 1, 2}, {.top_k = 1});
    for (double u : {0.0, 0.5, kJustBelow1}) CHECK_EQ(one.Draw(u), 1);
    const Sampler tie = Loaded(*ops, {0, 3, 1, 3}, {.top_k = 1});
    for (double u : {0.0, 0.25, 0.5 - 0x1p-54}) CHECK_EQ(tie.Draw(u), 1);
    for (double u : {0.5, 0.75, kJustBelow1}) CHECK_EQ(tie.Draw(u), 3);
    Floats log_probs(4);
    tie.LogProbs(log_probs.data());
    CHECK_LE(std::abs(log_probs[1] + std::log(2.0)), 2 * kRounding);
    CHECK_EQ(log_probs[0], kMinusInfinity);
  }
}

// A sampler forgets the last distribution, whatever its truncation was.
TEST(SamplersAreReused) {
  const Floats first = {0, 9, 1}, second = {2, 2, -5};
  for (const Ops* ops : TestedOps()) {
    Sampler sampler = Loaded(*ops, first, {.top_k = 1});
    CHECK_EQ(sampler.Draw(0.9), 1);
    sampler.Load(second.data(), 1.0f);
    CHECK_LE(std::abs(sampler.RawProbs()[0] - 0.49977), 1e-5);
    sampler.Truncate({});
    CHECK_EQ(sampler.Draw(0.1), 0);
    CHECK_EQ(sampler.Draw(0.9), 1);
    CHECK_EQ(sampler.Draw(kJustBelow1), 2);
  }
}

TEST(SamplerSurvivesNaNAndInfinity) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  const Floats rows[] = {{kNaN, 1, 2, 0},
                         {kNaN, kNaN, kNaN, kNaN},
                         {-kMinusInfinity, 1, kNaN, 0},
                         {-kMinusInfinity, -kMinusInfinity, kMinusInfinity, 0},
                         Floats(4, kMinusInfinity),
                         Floats(40, -kMinusInfinity)};  // more than are sorted at once
  for (const Ops* ops : TestedOps()) {
    for (const Floats& logits : rows) {
      for (int k : {0, 1, 2}) {
        for (float cdf : {-1.0f, 0.5f}) {
          Sampler sampler = Loaded(*ops, logits, {.top_k = k, .cdf = cdf});
          CHECK(sampler.TakeReplaced());
          CHECK(!sampler.TakeReplaced());
          for (double u : {0.0, 0.5, kJustBelow1}) {
            CHECK(sampler.Draw(u) >= 0 && sampler.Draw(u) < static_cast<int>(logits.size()));
          }
        }
      }
    }
    CHECK(Loaded(*ops, rows[0], {}).Draw(0.0) != 0);  // a NaN is no token
  }
}

TEST(EstimatorMean) {
  const Estimator mean{.thresholds = {-1.0, 0.0, 2.0, 6.0}};
  const float probs[] = {0.25f, 0.5f, 0.125f, 0.125f};  // the last one is the stop token's
  // midpoints -0.5, 1, 4
  CHECK_EQ(mean(probs), -0.5f * 0.25f + 1.0f * 0.5f + 4.0f * 0.125f);
}

TEST(EstimatorPercentile) {
  const auto percentile = [](double q, const Floats& probs) {
    return Estimator{.thresholds = {-1.0, 0.0, 2.0, 6.0}, .percentile = q}(probs.data());
  };
  // between the thresholds of the bin before the one in which the probability passes q
  CHECK_EQ(percentile(0.5, {0.25f, 0.5f, 0.25f, 0.0f}), -0.5f);
  CHECK_EQ(percentile(0.75, {0.25f, 0.5f, 0.25f, 0.0f}), 1.0f);
  // in bin 0, or never: threshold -1 is the last one
  CHECK_EQ(percentile(0.1, {0.25f, 0.5f, 0.25f, 0.0f}), 2.5f);
  CHECK_EQ(percentile(1.0, {0.25f, 0.5f, 0.25f, 0.0f}), 2.5f);
}

}  // namespace tt::test
