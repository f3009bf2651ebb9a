// From logits to a token: truncate the distribution, draw from it, estimate rewards and values.
#ifndef TT_SAMPLER_H_
#define TT_SAMPLER_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "aligned_buffer.h"
#include "ops.h"

namespace tt {

// How one kind of token is drawn: first cdf, then top_k, each if set.
struct Truncation {
  int top_k = 0;      // tokens kept; 0 keeps all
  float cdf = -1.0f;  // mass removed from the bottom; negative removes none
};

// One distribution at a time; a thread has its own.
class Sampler {
 public:
  Sampler(const Ops& ops, int num_ids);

  // Logits (num_ids) divided by a temperature; everything below is of these. Those that are not
  // finite are replaced: no comparison meets a NaN, and no probability is one.
  void Load(const float* logits, float temperature);
  // Whether some were replaced since the last call.
  bool TakeReplaced() { return std::exchange(replaced_, false); }
  // (num_ids) probabilities before any filter, valid until the next Load; to be asked for before
  // Truncate.
  const float* RawProbs();
  // Filters; after it Draw may be called as often as wanted.
  void Truncate(const Truncation& truncation);
  // The first token whose cumulative probability is above u times the total; u in [0, 1).
  int Draw(double u) const;
  // (num_ids) log-probabilities after Truncate.
  void LogProbs(float* out) const;

 private:
  void FilterCdf(float cdf);
  float LastBelow(float cdf);
  void KeepTopK(int k);

  const Ops& ops_;
  int num_ids_;
  AlignedBuffer<float> logits_, probs_, raw_;
  std::vector<double> cumulative_;
  int only_ = -1;  // the one token left by top_k = 1
  bool has_raw_ = false;
  bool replaced_ = false;
};

// Expected value or percentile of a distribution over the bins of one dimension.
struct Estimator {
  std::vector<double> thresholds;  // (vocab_size + 1), ascending
  double percentile = -1.0;        // negative: the mean

  // probs (vocab_size), the stop token's dropped and its mass counted as zero.
  float operator()(const float* probs) const;
};

}  // namespace tt

#endif  // TT_SAMPLER_H_
