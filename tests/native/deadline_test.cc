// Plans that must end in time. What is checked holds at any speed.
#include <algorithm>
#include <cmath>

#include "beam_search.h"
#include "check.h"
#include "isa.h"
#include "plan_cases.h"
#include "small_models.h"

namespace tt::test {
namespace {

// A value function that keeps what it was called with, by context.
struct Recorder {
  int num_ids;
  std::vector<std::vector<float>> calls = {};

  ValueFunction Function() {
    return [this](const float* probs, int num_rows, float* rewards, float* values) {
      calls.emplace_back(probs, probs + size_t(num_rows) * 2 * num_ids);
      for (int row = 0; row < num_rows; ++row) {
        rewards[row] = probs[size_t(row) * 2 * num_ids];
        values[row] = probs[size_t(row) * 2 * num_ids + num_ids];
      }
    };
  }
};

PlanSettings DeadlineSettings(const Shape& shape) {
  PlanSettings settings = MakeSettings(shape);
  settings.horizon = 30;
  settings.beam_width = 32;
  settings.n_expand = 4;
  return settings;
}

}  // namespace

// The last deadline has passed before the plan begins.
TEST(DeadlinesLeaveAtLeastOneStep) {
  const Shape shape = SmallShapes()[0];
  const PlanSettings settings = DeadlineSettings(shape);
  PlanRequest request = MakeRequest(shape, false);
  BeamSearch search = MakeSearch(shape, *AvailableOps().front(), false, 2);
  for (double seconds : {1e3, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 1e-9}) {
    const Context context(Text("seconds", seconds));
    request.deadline_seconds = seconds;
    for (const PlanResult& plan : search.Plan(settings, request)) {
      CHECK(plan.steps >= 1 && plan.steps <= settings.horizon);
      CHECK(plan.num_beams >= 1 && plan.num_beams <= settings.beam_width);
      CHECK_EQ(plan.tokens.size(), size_t(plan.steps) * shape.transition_dim());
      CHECK_EQ(plan.rewards.size(), size_t(plan.steps));
      CHECK_EQ(plan.values.size(), size_t(plan.steps));
      CHECK(std::isfinite(plan.score));
      for (int32_t token : plan.tokens) CHECK(token >= 0 && token <= shape.vocab_size);
      if (seconds == 1e3) CHECK_EQ(plan.steps, settings.horizon);
    }
  }
}

// Fewer candidates are the first ones of the plan without a deadline, in each context.
TEST(DeadlinesKeepTheFirstCandidates) {
  const Shape shape = SmallShapes()[4];
  PlanSettings settings = DeadlineSettings(shape);
  settings.horizon = 1;
  PlanRequest request = MakeRequest(shape, false);
  BeamSearch search = MakeSearch(shape, *AvailableOps().front(), false, 2);
  Recorder whole{shape.num_ids()};
  request.value_function = whole.Function();
  search.Plan(settings, request);
  for (int i = 0; i < 300; ++i) {
    Recorder part{shape.num_ids()};
    request.value_function = part.Function();
    request.deadline_seconds = 1e-5 * (1 + i);
    search.Plan(settings, request);
    CHECK_EQ(part.calls.size(), whole.calls.size());
    for (size_t c = 0; c < whole.calls.size(); ++c) {
      const Context context(Text("context", c, "numbers", part.calls[c].size()));
      CHECK(std::equal(part.calls[c].begin(), part.calls[c].end(), whole.calls[c].begin()));
    }
  }
}

}  // namespace tt::test
