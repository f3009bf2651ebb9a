// Plans of small models.
#ifndef TT_TESTS_PLAN_CASES_H_
#define TT_TESTS_PLAN_CASES_H_

#include <algorithm>
#include <cstddef>
#include <limits>
#include <vector>

#include "beam_search.h"
#include "random.h"
#include "small_models.h"

namespace tt::test {

inline Estimator MakeEstimator(int vocab_size, uint64_t seed, double percentile) {
  std::vector<double> thresholds(vocab_size + 1);
  Random random(seed);
  for (double& threshold : thresholds) threshold = random.Normal();
  std::sort(thresholds.begin(), thresholds.end());
  return {thresholds, percentile};
}

// Windows are 3 or 4 transitions long, so that all but the shortest contexts are cropped.
inline PlanSettings MakeSettings(const Shape& shape, double percentile = -1.0) {
  PlanSettings settings;
  settings.horizon = 4;
  settings.beam_width = 4;
  settings.n_expand = 2;
  settings.discount = 0.9;
  settings.max_len = shape.block_size();
  settings.reward_estimator = MakeEstimator(shape.vocab_size, 1, percentile);
  settings.value_estimator = MakeEstimator(shape.vocab_size, 2, percentile);
  return settings;
}

// Every kind of token truncated in its own way; windows of 2 transitions, so that every step crops.
inline PlanSettings MakeTruncatedSettings(const Shape& shape, double percentile = -1.0) {
  PlanSettings settings = MakeSettings(shape, percentile);
  settings.max_len = 2 * shape.transition_dim() - 1;
  settings.temperature = 0.7f;
  settings.observation = {.top_k = 1, .cdf = -1.0f};
  settings.action = {.top_k = 3, .cdf = 0.2f};
  settings.reward = {.top_k = 0, .cdf = 0.5f};
  return settings;
}

// Contexts of 0, 1, 2, 5 past transitions and a current observation, seeds apart.
inline PlanRequest MakeRequest(const Shape& shape, bool trace = true) {
  Random random(17);
  PlanRequest request;
  for (int past : {0, 1, 2, 5}) {
    const int len = past * shape.transition_dim() + shape.observation_dim;
    request.contexts.push_back(random.Tokens(len, shape.num_ids()));
    request.seeds.push_back(past * 1000);
    request.plan_indices.push_back(past);
  }
  request.trace = trace;
  return request;
}

// Its context i alone.
inline PlanRequest OneOf(const PlanRequest& all, size_t i) {
  PlanRequest one;
  one.contexts = {all.contexts[i]};
  one.seeds = {all.seeds[i]};
  one.plan_indices = {all.plan_indices[i]};
  one.trace = all.trace;
  return one;
}

// Branches are as small as they may be, unless there is a near cache for larger ones.
inline BeamSearch MakeSearch(const Shape& shape, const Ops& ops, bool bf16, int num_threads,
                             double scale = 0.4, size_t near_bytes = 0) {
  return BeamSearch(MakeModel(shape, ops, bf16, 0, scale), HiddenValues(shape), num_threads,
                    std::numeric_limits<double>::infinity(), near_bytes);
}

}  // namespace tt::test

#endif  // TT_TESTS_PLAN_CASES_H_
