// What a search is asked for, and how much it can need of everything.
#ifndef TT_PLAN_LIMITS_H_
#define TT_PLAN_LIMITS_H_

#include <cstddef>

#include "model.h"
#include "sampler.h"
#include "token_tree.h"

namespace tt {

struct PlanSettings {
  int horizon = 1;
  int beam_width = 1;
  int n_expand = 1;
  double discount = 0.99;
  int max_len = 1;  // most tokens that a forward pass sees
  float temperature = 1.0f;
  Truncation observation, action, reward;  // reward: of value tokens too
  Estimator reward_estimator, value_estimator;

  int num_rows() const { return beam_width * n_expand; }
  // Tokens sampled per row in one plan.
  size_t num_draws(const Shape& shape) const {
    return size_t(horizon) * (shape.action_dim + 2) + size_t(horizon - 1) * shape.observation_dim;
  }
};

// Of plans of so many contexts side by side. Throws std::length_error if indices of nodes or tokens
// would not fit their types.
TreeLimits PlanLimits(const Model& model, const PlanSettings& settings, int num_contexts);
// The same of a likelihood search.
TreeLimits SearchLimits(const Model& model, int beam_width, int num_tokens);
// How many contexts to plan side by side.
int WaveSize(const Model& model, const PlanSettings& settings);

// Keys and values of one node in all layers.
double NodeBytes(const Model& model);
// All that a search may use at once.
double SearchBytes(const Model& model, const TreeLimits& limits);

}  // namespace tt

#endif  // TT_PLAN_LIMITS_H_
