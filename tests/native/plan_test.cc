// Whole plans: against the naive search, and against themselves with other threads, tables and
// neighbours.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "beam_search.h"
#include "check.h"
#include "isa.h"
#include "naive_search.h"
#include "philox.h"
#include "plan_cases.h"
#include "small_models.h"
#include "tables.h"

namespace tt::test {
namespace {

void CheckSame(const PlanResult& got, const PlanResult& want) {
  CHECK(got.drawn == want.drawn);
  CHECK(got.tokens == want.tokens);
  CHECK(got.parents == want.parents);
  CHECK(got.rewards == want.rewards);
  CHECK(got.values == want.values);
  CHECK(got.candidate_rewards == want.candidate_rewards);
  CHECK(got.candidate_values == want.candidate_values);
  CHECK_EQ(got.steps, want.steps);
  CHECK_EQ(got.candidate_scores.size(), want.candidate_scores.size());
  for (size_t i = 0; i < want.candidate_scores.size(); ++i) {
    // compilers may fuse a product and a sum, or not
    CHECK_LE(std::abs(got.candidate_scores[i] - want.candidate_scores[i]), 1e-12);
  }
  CHECK_LE(std::abs(got.score - want.score), 1e-12);
}

void CheckSame(const std::vector<PlanResult>& got, const std::vector<PlanResult>& want) {
  CHECK_EQ(got.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) {
    const Context context(Text("context", i));
    CheckSame(got[i], want[i]);
  }
}

void CheckAgainstNaive(const Ops& ops, bool bf16, const Shape& shape,
                       const PlanSettings& settings) {
  const Context context(Text(ops.name, bf16 ? "bf16" : "fp32", "embed", shape.embed_dim));
  const auto model = MakeModel(shape, ops, bf16);
  const PlanRequest request = MakeRequest(shape);
  const auto plans = BeamSearch(model, HiddenValues(shape), 2).Plan(settings, request);
  for (size_t i = 0; i < plans.size(); ++i) {
    const Context which(Text("context", i));
    const PlanResult want =
        NaivePlan(*model, settings, request.contexts[i], request.seeds[i], request.plan_indices[i]);
    CheckSame(plans[i], want);
    CHECK_EQ(plans[i].num_beams, settings.beam_width);
    // the first beam is the plan
    const size_t length = size_t(settings.horizon) * shape.transition_dim();
    CHECK_EQ(plans[i].beams.size(), length * settings.beam_width);
    CHECK(std::equal(want.tokens.begin(), want.tokens.end(), plans[i].beams.begin()));
  }
}

// ---- near ties ----

// Whether the scalar table's own plan changes when the weights do so a little, by more than another
// table's rounding.
bool IsNearTie(const Shape& shape, const PlanSettings& settings, const PlanRequest& request) {
  RandomWeights weights(0);
  const auto plan = [&] {
    const auto model = std::make_shared<Model>(shape, weights, *ScalarOps(), false);
    return BeamSearch(model, HiddenValues(shape), 1).Plan(settings, request)[0];
  };
  const PlanResult want = plan();
  for (uint64_t seed = 0; seed < 10; ++seed) {
    weights.Perturb(1e-5, seed);
    const PlanResult other = plan();
    if (other.drawn != want.drawn || other.tokens != want.tokens) return true;
  }
  return false;
}

}  // namespace

TEST(PlansEqualTheNaiveSearch) {
  for (const Ops* ops : TestedOps()) {
    for (const Shape& shape : SmallShapes()) {
      CheckAgainstNaive(*ops, false, shape, MakeSettings(shape));
    }
    const Shape shape = SmallShapes()[1];
    CheckAgainstNaive(*ops, true, shape, MakeSettings(shape));
    CheckAgainstNaive(*ops, false, shape, MakeSettings(shape, 0.7));
    CheckAgainstNaive(*ops, false, shape, MakeTruncatedSettings(shape));
    CheckAgainstNaive(*ops, true, shape, MakeTruncatedSettings(shape, 0.3));
    PlanSettings wide = MakeSettings(SmallShapes()[0]);
    wide.beam_width = 20;
    CheckAgainstNaive(*ops, false, SmallShapes()[0], wide);
  }
}

TEST(PlansDoNotDependOnThreads) {
  const auto check = [](const Ops& ops, const Shape& shape, bool bf16) {
    const Context context(Text(ops.name, bf16 ? "bf16" : "fp32", "embed", shape.embed_dim));
    const PlanSettings settings = MakeSettings(shape);
    const PlanRequest request = MakeRequest(shape);
    const auto want = MakeSearch(shape, ops, bf16, 1).Plan(settings, request);
    for (int num_threads : {2, 7}) {
      BeamSearch search = MakeSearch(shape, ops, bf16, num_threads);
      CheckSame(search.Plan(settings, request), want);
      CHECK(search.stats().branches > 0);
    }
  };
  for (const Ops* ops : TestedOps()) {
    for (const Shape& shape : SmallShapes()) check(*ops, shape, false);
    for (int i : {1, 5, 6}) check(*ops, SmallShapes()[i], true);
  }
}

// In float32; a plan may differ where a draw or a choice is within rounding of another one.
TEST(PlansOfAllTablesAreEqual) {
  int num_plans = 0, num_near_ties = 0;
  for (const Shape& shape : SmallShapes()) {
    for (const PlanSettings& settings : {MakeSettings(shape), MakeTruncatedSettings(shape)}) {
      const PlanRequest request = MakeRequest(shape);
      const auto want = MakeSearch(shape, *ScalarOps(), false, 1).Plan(settings, request);
      for (const Ops* ops : TestedOps()) {
        const auto got = MakeSearch(shape, *ops, false, 2).Plan(settings, request);
        for (size_t i = 0; i < want.size(); ++i) {
          const Context context(Text(ops->name, "embed", shape.embed_dim, "context", i));
          ++num_plans;
          if (got[i].drawn == want[i].drawn && got[i].tokens == want[i].tokens) {
            CHECK_LE(std::abs(got[i].score - want[i].score), 1e-4);
          } else {
            ++num_near_ties;
            CHECK(IsNearTie(shape, settings, OneOf(request, i)));
          }
        }
      }
    }
  }
  CHECK_LE(20 * num_near_ties, num_plans);  // more would be no accident
}

TEST(ContextsTogetherEqualOneByOne) {
  for (const Ops* ops : TestedOps()) {
    for (const Shape& shape : SmallShapes()) {
      const Context context(Text(ops->name, "embed", shape.embed_dim));
      const PlanSettings settings = MakeSettings(shape);
      const PlanRequest all = MakeRequest(shape);
      BeamSearch search = MakeSearch(shape, *ops, false, 2);
      const auto together = search.Plan(settings, all);
      for (size_t i = 0; i < all.contexts.size(); ++i) {
        CheckSame(search.Plan(settings, OneOf(all, i))[0], together[i]);
      }
    }
  }
}

// So many nodes that only two contexts fit a wave.
TEST(WavesEqualOneByOne) {
  Shape shape = SmallShapes()[1];
  shape.num_transitions = 64;
  shape.num_heads = 8;
  PlanSettings settings = MakeSettings(shape);
  settings.horizon = 2;
  settings.beam_width = 200;
  settings.n_expand = 1;
  PlanRequest all;
  for (int i = 0; i < 3; ++i) {
    all.contexts.push_back({i});
    all.seeds.push_back(7 * i);
    all.plan_indices.push_back(i);
  }
  BeamSearch search = MakeSearch(shape, *AvailableOps().front(), false, 2);
  const auto together = search.Plan(settings, all);
  for (int i = 0; i < 3; ++i) {
    CheckSame(search.Plan(settings, OneOf(all, i))[0], together[i]);
  }
}

TEST(GivenUniformsReplaceTheGenerator) {
  const Shape shape = SmallShapes()[0];
  const PlanSettings settings = MakeSettings(shape);
  PlanRequest request = MakeRequest(shape);
  BeamSearch search = MakeSearch(shape, *AvailableOps().front(), false, 2);
  const auto want = search.Plan(settings, request);
  const int num_draws =
      settings.horizon * (shape.action_dim + 2) + (settings.horizon - 1) * shape.observation_dim;
  std::vector<double> uniforms;
  for (size_t i = 0; i < request.contexts.size(); ++i) {
    for (int token = 0; token < num_draws; ++token) {
      for (int row = 0; row < settings.num_rows(); ++row) {
        uniforms.push_back(PhiloxUniform(request.seeds[i], row, token, request.plan_indices[i]));
      }
    }
  }
  request.uniforms = uniforms.data();
  request.seeds.assign(request.seeds.size(), 12345);  // of no effect
  CheckSame(search.Plan(settings, request), want);
}

TEST(ValueFunctionsReplaceTheEstimators) {
  const Shape shape = SmallShapes()[0];
  const PlanSettings settings = MakeSettings(shape);
  PlanRequest request = MakeRequest(shape);
  BeamSearch search = MakeSearch(shape, *AvailableOps().front(), false, 2);
  const auto want = search.Plan(settings, request);
  int num_calls = 0;
  request.value_function = [&](const float* probs, int num_rows, float* rewards, float* values) {
    ++num_calls;
    CHECK_EQ(num_rows, settings.num_rows());
    for (int row = 0; row < num_rows; ++row) {
      const float* reward_probs = probs + size_t(row) * 2 * shape.num_ids();
      rewards[row] = settings.reward_estimator(reward_probs);
      values[row] = settings.value_estimator(reward_probs + shape.num_ids());
    }
  };
  CheckSame(search.Plan(settings, request), want);
  CHECK_EQ(num_calls, settings.horizon * static_cast<int>(request.contexts.size()));
}

// An interrupt, or a value function, may throw; the next plan is as if nothing had happened.
TEST(PlansCanBeInterrupted) {
  const Shape shape = SmallShapes()[0];
  const PlanSettings settings = MakeSettings(shape);
  const PlanRequest request = MakeRequest(shape);
  BeamSearch search = MakeSearch(shape, *AvailableOps().front(), false, 2);
  const auto want = search.Plan(settings, request);
  PlanRequest interrupted = request, failing = request;
  int num_calls = 0;
  interrupted.interrupt = [&num_calls] {
    if (++num_calls == 3) throw std::runtime_error("enough");
  };
  failing.value_function = [](const float*, int, float*, float*) { throw std::domain_error("no"); };
  CHECK_THROWS(std::runtime_error, search.Plan(settings, interrupted));
  CHECK_EQ(num_calls, 3);
  CheckSame(search.Plan(settings, request), want);
  CHECK_THROWS(std::domain_error, search.Plan(settings, failing));
  CheckSame(search.Plan(settings, request), want);
}

// One search serves plans and searches of different sizes, one after another.
TEST(SearchesAreReused) {
  const Shape shape = SmallShapes()[0];
  const PlanRequest request = MakeRequest(shape);
  PlanSettings small = MakeSettings(shape), large = small;
  small.horizon = small.beam_width = small.n_expand = 1;
  SearchRequest likely;
  likely.context = {1, 2};
  likely.num_tokens = likely.beam_width = 3;
  large.beam_width = 10;
  BeamSearch search = MakeSearch(shape, *AvailableOps().front(), false, 2);
  for (const PlanSettings& settings : {small, large, small, large}) {
    BeamSearch fresh = MakeSearch(shape, *AvailableOps().front(), false, 2);
    CheckSame(search.Plan(settings, request), fresh.Plan(settings, request));
    search.Search(likely);
  }
}

TEST(StatsCount) {
  const Shape shape = SmallShapes()[0];
  const PlanSettings settings = MakeSettings(shape);
  BeamSearch search = MakeSearch(shape, *AvailableOps().front(), false, 2);
  search.Plan(settings, MakeRequest(shape, false));
  const PlanStats stats = search.stats();
  CHECK(stats.decoder.decoded_nodes > 0 && stats.decoder.reencoded_nodes > 0);
  CHECK_LE(stats.decoder.decoded_nodes + stats.decoder.reencoded_nodes, stats.rows_asked);
  CHECK(stats.seconds > 0.0 && stats.bytes > 0 && stats.branches > 0);
  search.ResetStats();
  CHECK_EQ(search.stats().rows_asked + search.stats().decoder.decoded_nodes, 0);
  CHECK_EQ(search.stats().branches, 0);
}

// Counts are of rows, however these part, or do not.
TEST(StatsDoNotDependOnBranches) {
  const Shape shape = SmallShapes()[2];
  const PlanSettings settings = MakeSettings(shape);
  const auto stats_of = [&](int num_threads, size_t near_bytes) {
    BeamSearch search = MakeSearch(shape, *ScalarOps(), false, num_threads, 0.4, near_bytes);
    search.Plan(settings, MakeRequest(shape, false));
    return search.stats();
  };
  const PlanStats want = stats_of(1, size_t{1} << 30);
  CHECK_EQ(want.branches, 0);
  int64_t last = 0;
  for (size_t near_bytes : {size_t{1} << 30, size_t{0}}) {
    const PlanStats got = stats_of(2, near_bytes);
    CHECK(got.branches > last);
    last = got.branches;
    CHECK_EQ(got.rows_asked, want.rows_asked);
    CHECK_EQ(got.decoder.decoded_nodes, want.decoder.decoded_nodes);
    CHECK_EQ(got.decoder.reencoded_nodes, want.decoder.reencoded_nodes);
    CHECK_EQ(got.decoder.attention_flops, want.decoder.attention_flops);
  }
}

// Their weights are read by all threads at once.
TEST(LargeModelsHaveNoBranches) {
  Shape shape = SmallShapes()[0];
  PlanSettings settings = MakeSettings(shape);
  settings.horizon = 1;
  for (int embed : {16, 320}) {
    shape.embed_dim = embed;
    BeamSearch search = MakeSearch(shape, FindOps("auto"), false, 2);
    search.Plan(settings, MakeRequest(shape, false));
    CHECK_EQ(search.stats().branches > 0, embed == 16);
  }
}

// A model that diverged: logits are NaN or infinite everywhere.
// They overflow, here or there, and so may logits; what comes of it are plans or errors.
TEST(HugeWeightsDoNotCrash) {
  const Shape shape = SmallShapes()[0];
  SearchRequest likely;
  likely.context = {1, 2};
  likely.num_tokens = 30;
  for (const Ops* ops : TestedOps()) {
    for (double scale : {10.0, 1e10, 1e19, 1e30, 5e37}) {
      const Context context(Text(ops->name, "scale", scale));
      BeamSearch search = MakeSearch(shape, *ops, scale == 1e19, 2, scale);
      for (const PlanSettings& settings :
           {MakeSettings(shape), MakeTruncatedSettings(shape), MakeTruncatedSettings(shape, 0.5)}) {
        if (scale > 1e37) {
          CHECK_THROWS(std::invalid_argument, search.Plan(settings, MakeRequest(shape)));
          continue;
        }
        try {
          for (const PlanResult& plan : search.Plan(settings, MakeRequest(shape))) {
            CHECK_EQ(plan.steps, settings.horizon);
            for (int32_t token : plan.tokens) CHECK(token >= 0 && token <= shape.vocab_size);
          }
        } catch (const std::invalid_argument&) {
          CHECK(scale > 10.0);
        }
      }
      try {
        search.Search(likely);
      } catch (const std::runtime_error&) {  // nothing has a probability
      } catch (const std::invalid_argument&) {
        CHECK(scale > 10.0);
      }
    }
  }
}

TEST(TooLargePlansAreRefused) {
  const Shape shape = SmallShapes()[0];
  PlanSettings settings = MakeSettings(shape);
  settings.beam_width = 1 << 20;
  settings.n_expand = 1 << 10;
  BeamSearch search = MakeSearch(shape, *ScalarOps(), false, 1);
  CHECK_THROWS(std::length_error, search.Plan(settings, MakeRequest(shape)));
}

}  // namespace tt::test
