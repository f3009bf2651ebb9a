#include "naive_search.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "engine.h"
#include "philox.h"
#include "sampler.h"

namespace tt::test {
namespace {

struct Beam {
  std::vector<int32_t> tokens;
  double total = 0.0;                            // discounted rewards so far
  std::vector<float> rewards = {}, values = {};  // of its steps
};

class Planner {
 public:
  Planner(const Model& model, const PlanSettings& settings, uint64_t seed, uint32_t plan_idx)
      : shape_(model.shape),
        settings_(settings),
        seed_(seed),
        plan_idx_(plan_idx),
        encoder_(model, settings.max_len),
        sampler_(model.ops, model.shape.num_ids()) {}

  PlanResult Run(const std::vector<int32_t>& context) {
    beams_.assign(settings_.beam_width, Beam{.tokens = context});
    for (int step = 0; step < settings_.horizon; ++step) {
      const std::vector<Beam> block = beams_;
      for (int i = 1; i < settings_.n_expand; ++i) {
        beams_.insert(beams_.end(), block.begin(), block.end());
      }
      for (int i = 0; i < shape_.action_dim; ++i) Sample(settings_.action);
      const std::vector<float> rewards = Sample(settings_.reward, &settings_.reward_estimator);
      const std::vector<float> values = Sample(settings_.reward, &settings_.value_estimator);
      Select(rewards, values);
      if (step + 1 == settings_.horizon) break;
      for (int i = 0; i < shape_.observation_dim; ++i) Sample(settings_.observation);
    }
    const Beam& best = beams_[0];
    const size_t length = size_t(settings_.horizon) * shape_.transition_dim();
    result_.tokens.assign(best.tokens.end() - length, best.tokens.end());
    result_.rewards = best.rewards;
    result_.values = best.values;
    result_.steps = settings_.horizon;
    return result_;
  }

 private:
  // A token for every beam; returns the estimates from what it was drawn from.
  std::vector<float> Sample(const Truncation& truncation, const Estimator* estimator = nullptr) {
    std::vector<float> estimates;
    auto& drawn = result_.drawn.emplace_back();
    for (size_t row = 0; row < beams_.size(); ++row) {
      sampler_.Load(encoder_.Logits({}, beams_[row].tokens).data(), settings_.temperature);
      if (estimator != nullptr) estimates.push_back((*estimator)(sampler_.RawProbs()));
      sampler_.Truncate(truncation);
      const uint32_t token_idx = static_cast<uint32_t>(result_.drawn.size()) - 1;
      drawn.push_back(sampler_.Draw(PhiloxUniform(seed_, row, token_idx, plan_idx_)));
    }
    for (size_t row = 0; row < beams_.size(); ++row) beams_[row].tokens.push_back(drawn[row]);
    return estimates;
  }

  void Select(const std::vector<float>& rewards, const std::vector<float>& values) {
    const double next_factor = factor_ * settings_.discount;
    std::vector<double> scores;
    for (size_t row = 0; row < beams_.size(); ++row) {
      beams_[row].total += factor_ * rewards[row];
      beams_[row].rewards.push_back(rewards[row]);
      beams_[row].values.push_back(values[row]);
      scores.push_back(beams_[row].total + next_factor * values[row]);
    }
    factor_ = next_factor;
    std::vector<int32_t> order(beams_.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return scores[a] > scores[b]; });
    order.resize(settings_.beam_width);
    std::vector<Beam> kept;
    for (int32_t row : order) kept.push_back(beams_[row]);
    beams_.swap(kept);
    result_.score = scores[order[0]];
    result_.candidate_rewards.insert(result_.candidate_rewards.end(), rewards.begin(),
                                     rewards.end());
    result_.candidate_values.insert(result_.candidate_values.end(), values.begin(), values.end());
    result_.candidate_scores.insert(result_.candidate_scores.end(), scores.begin(), scores.end());
    result_.parents.insert(result_.parents.end(), order.begin(), order.end());
  }

  const Shape& shape_;
  const PlanSettings& settings_;
  const uint64_t seed_;
  const uint32_t plan_idx_;
  FreshEncoder encoder_;
  Sampler sampler_;
  std::vector<Beam> beams_;
  double factor_ = 1.0;
  PlanResult result_;
};

struct Candidate {
  float log_prob;
  size_t row;
  int32_t token;
};

}  // namespace

PlanResult NaivePlan(const Model& model, const PlanSettings& settings,
                     const std::vector<int32_t>& context, uint64_t seed, uint32_t plan_idx) {
  return Planner(model, settings, seed, plan_idx).Run(context);
}

SearchResult NaiveSearch(const Model& model, const SearchRequest& request) {
  const int num_ids = model.shape.num_ids();
  FreshEncoder encoder(model, model.shape.block_size());
  Sampler sampler(model.ops, num_ids);
  std::vector<std::vector<int32_t>> rows = {request.context};
  std::vector<float> totals = {0.0f}, log_probs(num_ids);
  for (int i = 0; i < request.num_tokens; ++i) {
    std::vector<Candidate> candidates;
    for (size_t row = 0; row < rows.size(); ++row) {
      sampler.Load(encoder.Logits(request.goal, rows[row]).data(), request.temperature);
      sampler.Truncate(request.truncation);
      sampler.LogProbs(log_probs.data());
      for (int32_t token = 0; token < num_ids; ++token) {
        const float log_prob = totals[row] + log_probs[token];
        if (log_prob > -std::numeric_limits<float>::infinity()) {
          candidates.push_back({log_prob, row, token});
        }
      }
    }
    std::stable_sort(candidates.begin(), candidates.end(),
                     [](const auto& a, const auto& b) { return a.log_prob > b.log_prob; });
    candidates.resize(std::min<size_t>(candidates.size(), request.beam_width));
    std::vector<std::vector<int32_t>> kept;
    totals.clear();
    for (const Candidate& candidate : candidates) {
      kept.push_back(rows[candidate.row]);
      kept.back().push_back(candidate.token);
      totals.push_back(candidate.log_prob);
    }
    rows.swap(kept);
  }
  return {{rows[0].end() - request.num_tokens, rows[0].end()}, totals};
}

}  // namespace tt::test
