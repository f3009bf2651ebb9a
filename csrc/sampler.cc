#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <limits>
#include <numeric>

namespace tt {
namespace {

// What a token removed by its probability gets; not -inf, so a likelihood search still counts it.
constexpr float kRemoved = -1000.0f;

// Moves numbers below the pivot to the front. std::partition would guess at a branch a number, and
// be wrong half of the time.
float* Partition(float* begin, float* end, float pivot) {
  float* middle = begin;
  for (float* x = begin; x != end; ++x) {
    const float number = *x;
    *x = *middle;
    *middle = number;
    middle += number < pivot;
  }
  return middle;
}

}  // namespace

Sampler::Sampler(const Ops& ops, int num_ids) : ops_(ops), num_ids_(num_ids), cumulative_(num_ids) {
  const size_t padded = RoundUp(num_ids, kPad);
  logits_.ReserveZeroed(padded);
  probs_.ReserveZeroed(padded);
  raw_.ReserveZeroed(padded);
}

void Sampler::Load(const float* logits, float temperature) {
  for (int i = 0; i < num_ids_; ++i) {
    const float x = logits[i] / temperature;
    const bool is_finite = std::abs(x) <= std::numeric_limits<float>::max();
    logits_[i] = is_finite ? x : kRemoved;
    replaced_ |= !is_finite;
  }
  has_raw_ = false;
}

const float* Sampler::RawProbs() {
  if (!has_raw_) ops_.softmax(logits_.data(), num_ids_, raw_.data());
  has_raw_ = true;
  return raw_.data();
}

void Sampler::Truncate(const Truncation& truncation) {
  only_ = -1;
  if (truncation.cdf >= 0.0f) FilterCdf(truncation.cdf);
  if (truncation.top_k == 1) {
    const float* best = std::max_element(logits_.data(), logits_.data() + num_ids_);
    if (std::count(logits_.data(), logits_.data() + num_ids_, *best) == 1) {
      only_ = static_cast<int>(best - logits_.data());
      return;
    }
  }
  if (truncation.top_k > 0) KeepTopK(truncation.top_k);
  ops_.softmax(logits_.data(), num_ids_, probs_.data());
  double sum = 0.0;
  for (int i = 0; i < num_ids_; ++i) cumulative_[i] = sum += probs_[i];
}

// With i the last index of the ascending probabilities whose cumulative sum (accumulated in double,
// compared in float, as torch does) is below cdf, or 0, every token not likelier than that one
// goes.
void Sampler::FilterCdf(float cdf) {
  const float* probs = RawProbs();
  const float threshold = LastBelow(cdf);
  for (int i = 0; i < num_ids_; ++i) {
    if (probs[i] <= threshold) logits_[i] = kRemoved;
  }
}

// That probability. Only the part around it is sorted: the rest is split like in a quickselect, by
// the mass of the lower part.
float Sampler::LastBelow(float cdf) {
  constexpr std::ptrdiff_t kSorted = 16;
  std::copy_n(RawProbs(), num_ids_, probs_.data());
  float *begin = probs_.data(), *end = begin + num_ids_;
  float last_below = *std::min_element(begin, end);
  double below = 0.0;  // mass of everything before `begin`
  while (end - begin > kSorted) {
    const float pivot = std::max(std::min(begin[0], end[-1]),
                                 std::min(std::max(begin[0], end[-1]), begin[(end - begin) / 2]));
    float* middle = Partition(begin, end, pivot);
    if (middle == begin) {  // the pivot is the smallest: split behind its equals
      middle = std::partition(begin, end, [pivot](float p) { return p <= pivot; });
      if (middle == end || middle == begin) break;  // all are equal, or the pivot is no number
    }
    const double mass = std::accumulate(begin, middle, below);
    if (static_cast<float>(mass) < cdf) {
      last_below = *std::max_element(begin, middle);
      below = mass;
      begin = middle;
    } else {
      end = middle;
    }
  }
  std::sort(begin, end);
  for (; begin != end && static_cast<float>(below += *begin) < cdf; ++begin) last_below = *begin;
  return last_below;
}

// Ties with the last one kept stay.
void Sampler::KeepTopK(int k) {
  float* scratch = probs_.data();
  std::copy(logits_.data(), logits_.data() + num_ids_, scratch);
  std::nth_element(scratch, scratch + k - 1, scratch + num_ids_, std::greater<float>());
  const float smallest_kept = scratch[k - 1];
  for (int i = 0; i < num_ids_; ++i) {
    if (logits_[i] < smallest_kept) logits_[i] = -std::numeric_limits<float>::infinity();
  }
}

int Sampler::Draw(double u) const {
  if (only_ >= 0) return only_;
  const double target = u * cumulative_.back();
  const auto first = std::upper_bound(cumulative_.begin(), cumulative_.end(), target);
  return std::min(static_cast<int>(first - cumulative_.begin()), num_ids_ - 1);
}

void Sampler::LogProbs(float* out) const {
  if (only_ >= 0) {
    std::fill(out, out + num_ids_, -std::numeric_limits<float>::infinity());
    out[only_] = 0.0f;
    return;
  }
  const float max = *std::max_element(logits_.data(), logits_.data() + num_ids_);
  double sum = 0.0;
  for (int i = 0; i < num_ids_; ++i) sum += std::exp(static_cast<double>(logits_[i] - max));
  const float log_sum = static_cast<float>(std::log(sum));
  for (int i = 0; i < num_ids_; ++i) out[i] = logits_[i] - max - log_sum;
}

float Estimator::operator()(const float* probs) const {
  const int num_bins = static_cast<int>(thresholds.size()) - 1;
  if (percentile < 0.0) {
    double low = 0.0, high = 0.0;
    for (int i = 0; i < num_bins; ++i) {
      low += probs[i] * thresholds[i];
      high += probs[i] * thresholds[i + 1];
    }
    return static_cast<float>((low + high) / 2.0);
  }
  // the midpoint of the bin before the first one past the percentile; for bin 0, or none, the
  // original's index wraps to the other end (discretization.py:124-141)
  const float q = static_cast<float>(percentile);
  float cumulative = 0.0f;
  int first = 0;
  for (int i = 0; i < num_bins; ++i) {
    cumulative += probs[i];
    if (cumulative > q) {
      first = i;
      break;
    }
  }
  const double before = first > 0 ? thresholds[first - 1] : thresholds[num_bins];
  return static_cast<float>((before + thresholds[first]) / 2.0);
}

}  // namespace tt
