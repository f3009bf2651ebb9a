#include "beam_search.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "philox.h"

namespace tt {
namespace {

// Contexts side by side share passes; more than this is planned wave by wave.
constexpr double kWaveBytes = 128e6;
// A pass may take somewhat longer than the last ones did.
constexpr double kDeadlineMargin = 1.25;

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// (rows, ...) -> (times * rows, ...), in blocks.
template <typename T>
void TileRows(std::vector<T>& rows, int times) {
  const size_t size = rows.size();
  rows.resize(size * times);
  for (int i = 1; i < times; ++i) std::copy_n(rows.begin(), size, rows.begin() + i * size);
}

// rows = rows[order].
template <typename T>
void GatherRows(std::vector<T>& rows, const int32_t* order, int kept, size_t width = 1) {
  std::vector<T> gathered(kept * width);
  for (int i = 0; i < kept; ++i) {
    std::copy_n(rows.begin() + order[i] * width, width, gathered.begin() + i * width);
  }
  rows.swap(gathered);
}

std::string Megabytes(double bytes) { return std::to_string(std::llround(bytes / 1e6)); }

}  // namespace

BeamSearch::BeamSearch(std::shared_ptr<const Model> model, std::vector<uint8_t> hidden,
                       int num_threads, double max_bytes)
    : model_(std::move(model)),
      max_bytes_(max_bytes),
      pool_(num_threads),
      tree_(*model_, hidden),
      decoder_(*model_, pool_) {
  for (int i = 0; i < num_threads; ++i)
    samplers_.emplace_back(model_->ops, model_->shape.num_ids());
}

// ---- plans ----

std::vector<PlanResult> BeamSearch::Plan(const PlanSettings& settings, const PlanRequest& request) {
  const auto begin = Clock::now();
  const int num_contexts = static_cast<int>(request.contexts.size());
  const int num_waves = (num_contexts + WaveSize(settings) - 1) / WaveSize(settings);
  std::vector<PlanResult> results;
  for (int i = 0; i < num_waves; ++i) {
    const int first = BeginOfPart(num_contexts, i, num_waves);
    const int last = BeginOfPart(num_contexts, i + 1, num_waves);
    Wave wave{.settings = settings, .request = request, .first = first, .count = last - first};
    if (request.deadline_seconds) {  // an equal share of the time for every context
      const double until = *request.deadline_seconds * last / num_contexts;
      wave.deadline =
          begin + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(until));
    }
    RunWave(wave);
    std::move(wave.results.begin(), wave.results.end(), std::back_inserter(results));
  }
  stats_.seconds += std::chrono::duration<double>(Clock::now() - begin).count();
  return results;
}

void BeamSearch::RunWave(Wave& wave) {
  const PlanSettings& settings = wave.settings;
  Reserve(LimitsOf(settings, wave.count));
  const auto first = wave.request.contexts.begin() + wave.first;
  tree_.Begin({first, first + wave.count}, {});
  wave.results.resize(wave.count);
  wave.beams.resize(wave.count);
  for (Beam& beam : wave.beams) {
    beam.returns.assign(settings.beam_width, 0.0);
    beam.past_rewards.assign(static_cast<size_t>(settings.beam_width) * settings.horizon, 0.0f);
    beam.past_values = beam.past_rewards;
  }
  // all beams are one sequence until the first action
  Forward(settings.num_rows());
  tree_.Tile(settings.beam_width);
  for (int step = 0; step < settings.horizon; ++step) {
    if (wave.request.interrupt) wave.request.interrupt();
    tree_.Tile(settings.n_expand);
    for (Beam& beam : wave.beams) {
      for (auto* rows : {&beam.past_rewards, &beam.past_values}) {
        TileRows(*rows, settings.n_expand);
      }
      TileRows(beam.returns, settings.n_expand);
    }
    if (!RunStep(wave, step)) return;  // what the last step left is the result
  }
}

// False if the deadline does not allow it; the step has then left no trace in the results.
bool BeamSearch::RunStep(Wave& wave, int step) {
  const PlanSettings& settings = wave.settings;
  const Shape& shape = model_->shape;
  if (!SampleTokens(wave, step, shape.action_dim, settings.action, false)) return false;
  if (!SampleTokens(wave, step, 2, settings.reward, true)) return false;
  if (wave.request.value_function && !CallValueFunction(wave, step)) return false;
  Select(wave, step);
  if (step + 1 == settings.horizon) return true;
  return SampleTokens(wave, step + 1, shape.observation_dim, settings.observation, false);
}

// Appends `count` sampled tokens to every row; the logits of the last one are not computed yet.
bool BeamSearch::SampleTokens(Wave& wave, int step, int count, const Truncation& truncation,
                              bool estimate) {
  for (int i = 0; i < count; ++i) {
    const auto begin = Clock::now();
    int nodes = 0;  // of the pass
    if (!fresh_) {
      if (wave.deadline && !FitsDeadline(wave, step)) return false;
      const double most = NodesAhead(wave);
      nodes = Forward(tree_.num_rows());
      if (most > tree_.total_rows()) unshared_ = nodes / most;
    }
    DrawTokens(wave, truncation,
               !estimate ? Estimate::kNone
               : i == 0  ? Estimate::kReward
                         : Estimate::kValue);
    tree_.Append(drawn_.data());
    fresh_ = false;
    ++wave.token;
    if (nodes == 0) continue;
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    const double weight = seconds_per_node_ > 0.0 ? 0.1 : 1.0;
    seconds_per_node_ += weight * (seconds / nodes - seconds_per_node_);
  }
  return true;
}

// Nodes of the next pass, at most: its rows, and of windows that are cropped all tokens, of which
// rows share those from before the plan.
double BeamSearch::NodesAhead(const Wave& wave) const {
  double nodes = 0.0;
  for (int c = 0; c < tree_.num_contexts(); ++c) {
    const int window = tree_.is_cropped(c) ? tree_.window_len(c) : 1;
    const int own = std::min(window, std::max(1, wave.token));
    nodes += window - own + double(own) * tree_.num_rows();
  }
  return nodes;
}

// Whether the next pass ends in time. The first step is made in any case, with fewer candidates if
// need be.
bool BeamSearch::FitsDeadline(Wave& wave, int step) {
  const double left = std::chrono::duration<double>(*wave.deadline - Clock::now()).count();
  const double per_node = kDeadlineMargin * seconds_per_node_;
  if (step > 0) {
    const double most = NodesAhead(wave);
    return per_node * most * (most > tree_.total_rows() ? unshared_ : 1.0) <= left;
  }
  const double cost = per_node * wave.count;  // of a row of each context
  const int tokens_left = model_->shape.action_dim + 2 - wave.token;
  const int affordable = cost > 0.0
                             ? static_cast<int>(std::clamp(left / (cost * tokens_left), 1.0, 1e9))
                             : tree_.num_rows();
  if (affordable < tree_.num_rows()) {
    tree_.Narrow(affordable);
    for (Beam& beam : wave.beams) beam.returns.resize(affordable);
  }
  return true;
}

// The number of nodes that were computed.
int BeamSearch::Forward(int rows_asked) {
  for (int c = 0; c < tree_.num_contexts(); ++c) {
    stats_.rows_asked += int64_t{rows_asked} * (tree_.is_cropped(c) ? tree_.window_len(c) : 1);
  }
  const Pass& pass = tree_.MakePass();
  decoder_.Forward(pass);
  fresh_ = true;
  return pass.count;
}

// Rows of each slot side by side, a counting sort.
void BeamSearch::GroupRows() {
  const int num_rows = tree_.num_rows();
  slot_begin_.assign(tree_.num_slots() + 1, 0);
  slot_rows_.resize(tree_.total_rows());
  const auto each = [&](auto&& f) {
    for (int c = 0; c < tree_.num_contexts(); ++c) {
      for (int row = 0; row < num_rows; ++row) f(tree_.slot(c, row), c * num_rows + row);
    }
  };
  each([&](int slot, int) { ++slot_begin_[slot + 1]; });
  std::partial_sum(slot_begin_.begin(), slot_begin_.end(), slot_begin_.begin());
  each([&](int slot, int row) { slot_rows_[slot_begin_[slot]++] = row; });
  std::rotate(slot_begin_.begin(), slot_begin_.end() - 1, slot_begin_.end());
  slot_begin_[0] = 0;
}

// A token for every row; equal prefixes share a distribution, and each row draws for itself.
void BeamSearch::DrawTokens(Wave& wave, const Truncation& truncation, Estimate estimate) {
  GroupRows();
  drawn_.resize(tree_.total_rows());
  if (estimate == Estimate::kReward) {
    for (Beam& beam : wave.beams) {
      beam.rewards.resize(tree_.num_rows());
      beam.values.resize(tree_.num_rows());
    }
    if (wave.request.value_function) {
      probs_.resize(ProbsOf(wave, wave.count, 0, 0));
    }
  }
  const int num_slots = tree_.num_slots();
  const int num_tasks = std::min(num_slots, 4 * pool_.num_threads());
  pool_.Run(num_tasks, [&](int task, int thread) {
    const int end = BeginOfPart(num_slots, task + 1, num_tasks);
    for (int slot = BeginOfPart(num_slots, task, num_tasks); slot < end; ++slot) {
      DrawSlot(wave, slot, truncation, estimate, samplers_[thread]);
    }
  });
  CheckLogits();
  if (!wave.request.trace) return;
  for (int c = 0; c < wave.count; ++c) {
    const auto begin = drawn_.begin() + c * tree_.num_rows();
    wave.results[c].drawn.emplace_back(begin, begin + tree_.num_rows());
  }
}

// Throws if a sampler met logits that are not finite, as torch.multinomial does in the original.
void BeamSearch::CheckLogits() {
  bool replaced = false;
  for (Sampler& sampler : samplers_) replaced |= sampler.TakeReplaced();
  if (!replaced) return;
  throw std::invalid_argument(
      "model: expected finite logits, after division by the temperature, got infinite ones or NaN");
}

void BeamSearch::DrawSlot(Wave& wave, int slot, const Truncation& truncation, Estimate estimate,
                          Sampler& sampler) {
  const int num_rows = tree_.num_rows(), num_ids = model_->shape.num_ids();
  const bool is_reward = estimate == Estimate::kReward;
  const int32_t* begin = &slot_rows_[slot_begin_[slot]];
  const int32_t* end = slot_rows_.data() + slot_begin_[slot + 1];
  if (begin == end) return;  // nobody went on from it
  sampler.Load(decoder_.logits(slot), wave.settings.temperature);
  if (estimate != Estimate::kNone && wave.request.value_function) {
    for (const int32_t* row = begin; row != end; ++row) {
      const size_t first = ProbsOf(wave, *row / num_rows, *row % num_rows, !is_reward);
      std::copy_n(sampler.RawProbs(), num_ids, &probs_[first]);
    }
  } else if (estimate != Estimate::kNone) {
    const Estimator& estimator =
        is_reward ? wave.settings.reward_estimator : wave.settings.value_estimator;
    const float number = estimator(sampler.RawProbs());
    for (const int32_t* row = begin; row != end; ++row) {
      Beam& beam = wave.beams[*row / num_rows];
      (is_reward ? beam.rewards : beam.values)[*row % num_rows] = number;
    }
  }
  sampler.Truncate(truncation);
  for (const int32_t* row = begin; row != end; ++row) {
    drawn_[*row] = sampler.Draw(Uniform(wave, *row / num_rows, *row % num_rows));
  }
}

double BeamSearch::Uniform(const Wave& wave, int context, int row) const {
  const PlanRequest& request = wave.request;
  const int i = wave.first + context;
  if (request.uniforms == nullptr) {
    return PhiloxUniform(request.seeds[i], row, wave.token, request.plan_indices[i]);
  }
  const size_t num_draws = wave.settings.num_draws(model_->shape);
  return request.uniforms[(i * num_draws + wave.token) * wave.settings.num_rows() + row];
}

// Index into probs_, which is (num_contexts, settings.num_rows, 2, num_ids) however many rows are
// left.
size_t BeamSearch::ProbsOf(const Wave& wave, int context, int row, int which) const {
  const size_t rows = size_t(context) * wave.settings.num_rows() + row;
  return (2 * rows + which) * model_->shape.num_ids();
}

// False, and nothing called, if the deadline leaves less time than the last call took.
bool BeamSearch::CallValueFunction(Wave& wave, int step) {
  const auto begin = Clock::now();
  if (wave.deadline && step > 0) {
    const double left = std::chrono::duration<double>(*wave.deadline - begin).count();
    if (kDeadlineMargin * wave.value_seconds > left) return false;
  }
  for (int c = 0; c < wave.count; ++c) {
    Beam& beam = wave.beams[c];
    wave.request.value_function(&probs_[ProbsOf(wave, c, 0, 0)], tree_.num_rows(),
                                beam.rewards.data(), beam.values.data());
  }
  wave.value_seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  return true;
}

// Keeps the best candidates, by score descending, then row ascending.
void BeamSearch::Select(Wave& wave, int step) {
  const int num_rows = tree_.num_rows(), kept = std::min(num_rows, wave.settings.beam_width);
  parents_.resize(size_t(wave.count) * kept);
  const double next_factor = wave.factor * wave.settings.discount;
  for (int c = 0; c < wave.count; ++c) {
    Beam& beam = wave.beams[c];
    beam.scores.resize(num_rows);
    for (int row = 0; row < num_rows; ++row) {
      beam.returns[row] += wave.factor * static_cast<double>(beam.rewards[row]);
      beam.scores[row] = beam.returns[row] + next_factor * static_cast<double>(beam.values[row]);
    }
    beam.order.resize(num_rows);
    std::iota(beam.order.begin(), beam.order.end(), 0);
    const auto is_better = [&beam](int a, int b) {  // NaN comes last, as in the reference
      const double x = beam.scores[a], y = beam.scores[b];
      if (std::isnan(x) != std::isnan(y)) return std::isnan(y);
      return x > y || (!(x < y) && a < b);
    };
    std::partial_sort(beam.order.begin(), beam.order.begin() + kept, beam.order.end(), is_better);
    std::copy_n(beam.order.begin(), kept, parents_.begin() + size_t(c) * kept);
  }
  wave.factor = next_factor;
  tree_.Keep(parents_.data(), kept);
  for (int c = 0; c < wave.count; ++c) KeepBest(wave, c, step, kept);
}

// The rows of a context's beam that go on, and the result so far.
void BeamSearch::KeepBest(Wave& wave, int context, int step, int kept) {
  const int horizon = wave.settings.horizon, dim = model_->shape.transition_dim();
  Beam& beam = wave.beams[context];
  PlanResult& result = wave.results[context];
  const int32_t* parents = &parents_[size_t(context) * kept];
  result.score = beam.scores[parents[0]];
  if (step == 0) result.num_beams = tree_.num_rows();
  if (wave.request.trace) {
    const auto append = [](auto& to, const auto& from) {
      to.insert(to.end(), from.begin(), from.end());
    };
    append(result.candidate_rewards, beam.rewards);
    append(result.candidate_values, beam.values);
    append(result.candidate_scores, beam.scores);
    result.parents.insert(result.parents.end(), parents, parents + kept);
  }
  const size_t num_rows = beam.scores.size();
  for (size_t row = 0; row < num_rows; ++row) {
    beam.past_rewards[row * horizon + step] = beam.rewards[row];
    beam.past_values[row * horizon + step] = beam.values[row];
  }
  GatherRows(beam.returns, parents, kept);
  GatherRows(beam.past_rewards, parents, kept, horizon);
  GatherRows(beam.past_values, parents, kept, horizon);
  result.steps = step + 1;
  result.rewards.assign(beam.past_rewards.begin(), beam.past_rewards.begin() + step + 1);
  result.values.assign(beam.past_values.begin(), beam.past_values.begin() + step + 1);
  const auto planned = [&](int row) {
    return tree_.tokens(context, row) + tree_.num_tokens(context) - size_t(step + 1) * dim;
  };
  result.tokens.assign(planned(0), planned(0) + size_t(step + 1) * dim);
  if (!wave.request.trace || step + 1 < horizon) return;
  for (int row = 0; row < kept; ++row) {
    result.beams.insert(result.beams.end(), planned(row), planned(row) + size_t(horizon) * dim);
  }
}

// ---- likelihood search ----

SearchResult BeamSearch::Search(const SearchRequest& request) {
  const int num_ids = model_->shape.num_ids(), width = request.beam_width;
  Reserve(SearchLimits(width, request.num_tokens));
  tree_.Begin({request.context}, request.goal);
  std::vector<float> totals(1, 0.0f), log_probs(num_ids), candidates;
  std::vector<int32_t> order, rows, tokens;
  for (int i = 0; i < request.num_tokens; ++i) {
    if (request.interrupt) request.interrupt();
    Forward(tree_.num_rows());
    candidates.resize(size_t(tree_.num_rows()) * num_ids);
    for (int row = 0; row < tree_.num_rows(); ++row) {
      Sampler& sampler = samplers_[0];
      sampler.Load(decoder_.logits(tree_.slot(0, row)), request.temperature);
      CheckLogits();
      sampler.Truncate(request.truncation);
      sampler.LogProbs(log_probs.data());
      for (int id = 0; id < num_ids; ++id) {
        candidates[size_t(row) * num_ids + id] = totals[row] + log_probs[id];
      }
    }
    order.clear();
    for (size_t j = 0; j < candidates.size(); ++j) {
      if (candidates[j] > kMinusInfinity) order.push_back(static_cast<int32_t>(j));
    }
    const int kept = static_cast<int>(std::min<size_t>(order.size(), width));
    if (kept == 0) throw std::runtime_error("beam_search: no candidate has a probability");
    std::partial_sort(order.begin(), order.begin() + kept, order.end(), [&](int a, int b) {
      return candidates[a] > candidates[b] || (candidates[a] == candidates[b] && a < b);
    });
    rows.resize(kept);
    tokens.resize(kept);
    totals.resize(kept);
    for (int j = 0; j < kept; ++j) {
      rows[j] = order[j] / num_ids;
      tokens[j] = order[j] % num_ids;
      totals[j] = candidates[order[j]];
    }
    tree_.Keep(rows.data(), kept);
    tree_.Append(tokens.data());
  }
  const int32_t* best = tree_.tokens(0, 0) + tree_.num_tokens(0) - request.num_tokens;
  return {{best, best + request.num_tokens}, totals};
}

std::vector<float> BeamSearch::Logits(const std::vector<int32_t>& context,
                                      const std::vector<int32_t>& goal) {
  Reserve(SearchLimits(1, 1));
  tree_.Begin({context}, goal);
  Forward(1);
  return {decoder_.logits(0), decoder_.logits(0) + model_->shape.num_ids()};
}

// ---- memory ----

// Nodes of one context at once: what its beams have kept before the first crop, or a whole window
// of every beam; and the transition that is being sampled.
TreeLimits BeamSearch::LimitsOf(const PlanSettings& settings, int num_contexts) const {
  const Shape& shape = model_->shape;
  const int64_t rows = settings.num_rows(), beams = settings.beam_width;
  const int64_t step = beams * shape.observation_dim + rows * (shape.action_dim + 2);
  const int64_t max_len = settings.max_len;
  const int64_t uncropped =
      std::min<int64_t>(settings.horizon, max_len / shape.transition_dim() + 2);
  const int64_t grown = max_len + uncropped * beams * shape.transition_dim();
  const int64_t nodes = std::max(grown, beams * max_len) + 2 * step;
  const int64_t tokens = max_len + int64_t{settings.horizon} * shape.transition_dim();
  CheckFits(nodes * num_contexts, rows * num_contexts, tokens);
  return {.num_contexts = num_contexts,
          .max_rows = static_cast<int>(rows),
          .max_len = settings.max_len,
          .max_tokens = static_cast<int>(tokens),
          .max_nodes = static_cast<int>(nodes)};
}

TreeLimits BeamSearch::SearchLimits(int beam_width, int num_tokens) const {
  const Shape& shape = model_->shape;
  const int64_t window = shape.block_size() + shape.transition_dim();
  const int64_t nodes = shape.goal_len + window * (int64_t{beam_width} + 1);
  CheckFits(nodes, beam_width, std::max<int64_t>(window + num_tokens, shape.num_ids()));
  return {.num_contexts = 1,
          .max_rows = beam_width,
          .max_len = shape.block_size(),
          .max_tokens = shape.block_size() + num_tokens,
          .max_nodes = static_cast<int>(nodes)};
}

// Throws if indices of nodes or tokens would not fit their types, or no memory this side of absurd.
void BeamSearch::CheckFits(int64_t nodes, int64_t rows, int64_t tokens) const {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  if (nodes * model_->head_layout.stride <= kLimit && rows * tokens <= kLimit) return;
  throw std::length_error("beam_width: expected a search that fits in memory, got " +
                          std::to_string(rows) + " rows of " + std::to_string(tokens) + " tokens");
}

// Keys and values of one node in all layers.
double BeamSearch::NodeBytes() const {
  return model_->key_bytes() * 2.0 * model_->shape.num_layers * model_->head_layout.width();
}

int BeamSearch::WaveSize(const PlanSettings& settings) const {
  return std::max(1, static_cast<int>(kWaveBytes / NodeBytes() / LimitsOf(settings, 1).max_nodes));
}

// Refuses what memory cannot hold, before the system takes it at its word.
void BeamSearch::Reserve(const TreeLimits& limits) {
  const double nodes = double(limits.num_contexts) * limits.max_nodes;
  const double rows = double(limits.num_contexts) * limits.max_rows;
  // at most all nodes are in one pass; tokens and paths are held twice
  const Shape& shape = model_->shape;
  const double bytes =
      nodes * (NodeBytes() + sizeof(float) * (shape.width() + shape.attn_width())) +
      sizeof(float) * rows * shape.logits_width() +
      2.0 * sizeof(int32_t) * rows * (limits.max_tokens + double(limits.max_len));
  if (bytes > max_bytes_) {
    throw std::length_error("beam_width: expected a search that fits in memory, got " +
                            std::to_string(limits.max_rows) + " rows, which may need " +
                            Megabytes(bytes) + " MB of " + Megabytes(max_bytes_));
  }
  tree_.Reserve(limits);
  decoder_.Reserve(tree_.max_total_nodes(), model_->shape.goal_len + limits.max_len);
  fresh_ = false;
}

PlanStats BeamSearch::stats() const {
  PlanStats stats = stats_;
  stats.decoder = decoder_.stats();
  stats.bytes = decoder_.allocated_bytes();
  return stats;
}

void BeamSearch::ResetStats() {
  stats_ = {};
  decoder_.ResetStats();
}

}  // namespace tt
