// Plans that must end in time. What is checked holds at any speed.
#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

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

// A plan that is cut short, within a branch, too, is the plan of the steps that were made.
TEST(DeadlinesLeaveNoHalfStep) {
  const Shape shape = SmallShapes()[0];
  const PlanSettings settings = DeadlineSettings(shape);
  const PlanRequest whole = OneOf(MakeRequest(shape, false), 3);
  PlanRequest cut = whole;
  cut.trace = true;
  BeamSearch search = MakeSearch(shape, FindOps("auto"), false, 2);
  search.Plan(settings, whole);
  const double seconds = search.stats().seconds;
  // of the plan so far, but for the first step, which has none if there is a deadline
  const auto branches_of = [&](int horizon) {
    PlanSettings part = settings;
    part.horizon = horizon;
    search.ResetStats();
    search.Plan(part, whole);
    return search.stats().branches;
  };
  int num_cut = 0, num_late = 0;
  for (int i = 0; i < 300 && (num_cut < 20 || num_late < 3); ++i) {
    cut.deadline_seconds = seconds * (1 + i % 10) / 10.0;
    search.ResetStats();
    const PlanResult got = search.Plan(settings, cut)[0];
    const int64_t branches = search.stats().branches;
    // on a busy machine the first step may have had fewer candidates: that is another plan
    if (got.drawn[0].size() < static_cast<size_t>(settings.num_rows())) continue;
    num_cut += got.steps < settings.horizon;
    num_late += branches > branches_of(got.steps) - branches_of(1);
    PlanSettings part = settings;
    part.horizon = got.steps;
    const PlanResult want = search.Plan(part, whole)[0];
    CHECK(got.tokens == want.tokens && got.rewards == want.rewards && got.values == want.values);
    CHECK_EQ(got.score, want.score);
  }
  CHECK(num_cut > 0 && num_late > 0);
}

// What an abandoned step met, logits that are not finite, is not the next plan's.
TEST(DeadlinesForgetWhatTheyAbandon) {
  const Shape shape = SmallShapes()[0];
  PlanSettings settings = DeadlineSettings(shape);
  PlanRequest request = OneOf(MakeRequest(shape, false), 0);
  for (int32_t& token : request.contexts[0]) token = 1;
  const EditedWeights weights([&](const std::string& name, std::vector<float>& values) {
    if (name != "tok_emb.weight") return;
    for (int i = 0; i < shape.vocab_size * shape.embed_dim; ++i) {  // an observation's first token
      if (i / shape.embed_dim != 1) values[i] = INFINITY;           // but for the context's
    }
  });
  const auto model = std::make_shared<Model>(shape, weights, FindOps("auto"), false);
  BeamSearch search(model, HiddenValues(shape), 2);
  int num_refused = 0;
  for (int i = 0; i < 500; ++i) {
    settings.horizon = 30;
    request.deadline_seconds = 2e-5 * (1 + i);
    try {
      search.Plan(settings, request);
    } catch (const std::invalid_argument&) {
      ++num_refused;
    }
    settings.horizon = 1;  // none of its tokens is the first one of an observation
    request.deadline_seconds.reset();
    CHECK_EQ(search.Plan(settings, request)[0].steps, 1);
  }
  CHECK(num_refused > 0);
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
