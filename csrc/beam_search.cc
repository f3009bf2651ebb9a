#include "beam_search.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "philox.h"

namespace tt {
namespace {

// Keys and values of a branch may be this part of the third cache, if none were shared: others use
// it, too.
constexpr double kBranchShare = 1.0 / 3.0;
// A branch has rows for so many tiles of products at least: fewer would read the weights too often.
constexpr int kMinTiles = 2;
// Larger models' weights do not stay near themselves: they are read by all threads at once.
constexpr size_t kMostBranchWeights = size_t{8} << 20;
// Rows of a branch before the action, where each is copied: so few would read all weights for
// little.
constexpr int kMinParents = 2;

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

// The best that have a probability, at most `count`: descending, equal ones ascending by index.
void BestCandidates(const std::vector<float>& log_probs, int count, std::vector<int32_t>& best) {
  best.clear();
  for (size_t j = 0; j < log_probs.size(); ++j) {
    if (log_probs[j] > kMinusInfinity) best.push_back(static_cast<int32_t>(j));
  }
  const size_t kept = std::min(best.size(), static_cast<size_t>(count));
  std::partial_sort(best.begin(), best.begin() + kept, best.end(), [&](int a, int b) {
    return log_probs[a] > log_probs[b] || (log_probs[a] == log_probs[b] && a < b);
  });
  best.resize(kept);
}

std::string Megabytes(double bytes) { return std::to_string(std::llround(bytes / 1e6)); }

}  // namespace

BeamSearch::BeamSearch(std::shared_ptr<const Model> model, std::vector<uint8_t> hidden,
                       int num_threads, double max_bytes, size_t near_bytes)
    : model_(std::move(model)),
      max_bytes_(max_bytes),
      near_bytes_(static_cast<double>(near_bytes)),
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
  const int wave_size = WaveSize(*model_, settings);
  const int num_waves = (num_contexts + wave_size - 1) / wave_size;
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
  stats_.seconds += SecondsSince(begin);
  return results;
}

void BeamSearch::RunWave(Wave& wave) {
  const PlanSettings& settings = wave.settings;
  Reserve(PlanLimits(*model_, settings, wave.count));
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
    if (!RunStep(wave, step)) return;  // what the last step left is the result
  }
}

// From one selection to the next. False if the deadline does not allow it; the step has then left
// no trace in the results.
bool BeamSearch::RunStep(Wave& wave, int step) {
  const Shape& shape = model_->shape;
  const int observation = step > 0 ? shape.observation_dim : 0;  // the first one is given
  const Segment segment{.step = step,
                        .action = observation,
                        .end = observation + shape.action_dim + 2,
                        .first_draw = wave.token};
  if (!SampleSegment(wave, segment)) return false;
  if (wave.request.value_function && !CallValueFunction(wave, step)) return false;
  if (wave.request.trace) TraceTokens(wave, segment);
  Select(wave, step);
  return true;
}

// ---- segments ----

// Appends a segment's tokens to every row; the logits of the last one are not computed.
bool BeamSearch::SampleSegment(Wave& wave, const Segment& segment) {
  PrepareBeams(wave);
  for (int i = 0; i < segment.end; ++i) {
    if (i == segment.action) tree_.Tile(wave.settings.n_expand);
    if (i > 0 && Split(wave, segment, i)) return SampleBranches(wave, segment, i);
    if (!SampleToken(wave, segment, i)) return false;
  }
  return true;
}

// By all threads, of all rows.
bool BeamSearch::SampleToken(Wave& wave, const Segment& segment, int i) {
  const auto begin = Clock::now();
  int nodes = 0;  // of the pass
  if (!fresh_) {
    if (wave.deadline && !FitsDeadline(wave, segment, i)) return false;
    const double most = NodesAhead(wave);
    nodes = Forward(tree_.num_rows());
    if (most > tree_.total_rows()) unshared_ = nodes / most;
  }
  DrawTokens(wave, segment, i);
  tree_.Append(drawn_.data(), wave.settings.num_rows());
  fresh_ = false;
  ++wave.token;
  if (nodes > 0) pace_.Learn(SecondsSince(begin), nodes, 1);
  return true;
}

// For all the rows that there will be at the segment's end.
void BeamSearch::PrepareBeams(Wave& wave) {
  const int times = wave.settings.n_expand;
  for (Beam& beam : wave.beams) {
    for (auto* rows : {&beam.past_rewards, &beam.past_values}) TileRows(*rows, times);
    TileRows(beam.returns, times);
    beam.rewards.resize(times * tree_.num_rows());
    beam.values.resize(times * tree_.num_rows());
  }
  drawn_.resize(size_t(wave.count) * wave.settings.num_rows());
  if (wave.request.value_function) probs_.resize(ProbsOf(wave, wave.count, 0, 0));
}

// Whether rows part from token i on.
bool BeamSearch::Split(const Wave& wave, const Segment& segment, int i) {
  if (model_->LayerBytes() > kMostBranchWeights) return false;
  if (wave.deadline && segment.step == 0) return false;  // rows may yet be dropped
  const int times = i < segment.action ? wave.settings.n_expand : 1;
  const int num_branches = NumBranches(times * tree_.total_rows());
  if (num_branches < 2) return false;
  if (times > 1 && tree_.total_rows() < kMinParents * num_branches) return false;
  const int left = segment.end - i, after_copies = std::min(left, segment.end - segment.action);
  return tree_.Split({.num_branches = num_branches,
                      .num_passes = left,
                      .nodes_per_row = left - after_copies + times * after_copies});
}

// Of so many rows: as many for each thread.
int BeamSearch::NumBranches(int rows) const {
  int window = 1;  // the longest one
  for (int c = 0; c < tree_.num_contexts(); ++c) window = std::max(window, tree_.window_len(c));
  const double near = kBranchShare * near_bytes_ / (NodeBytes(*model_) * window);
  const int tile = model_->bf16 ? model_->ops.bf16_tile_rows : model_->ops.tile_rows;
  const double size = std::max(near, double{kMinTiles} * tile);
  const int wanted = static_cast<int>(std::ceil(rows / size)), threads = pool_.num_threads();
  return std::min(std::max(1, (wanted + threads / 2) / threads) * threads, rows / kMinThreadRows);
}

// Tokens from `first` on: a thread takes a branch through all of them, so that its keys and values
// stay near, and waits for nobody.
bool BeamSearch::SampleBranches(Wave& wave, const Segment& segment, int first) {
  const auto begin = Clock::now();
  const int times = first < segment.action ? wave.settings.n_expand : 1;
  int most = 0;
  for (int b = 0; b < tree_.num_branches(); ++b) {
    most = std::max(most, times * tree_.branch(b).num_rows());
  }
  decoder_.ReserveBranches(most);
  std::atomic<bool> late = false;
  std::atomic<int64_t> nodes = 0, asked = 0;
  pool_.Run(tree_.num_branches(), [&](int b, int thread) {
    Branch& branch = tree_.branch(b);
    for (int i = first; i < segment.end; ++i) {
      if (i == segment.action) tree_.Tile(branch, times);
      if (wave.deadline && !BranchFitsDeadline(wave, branch)) late = true;
      if (late) return;
      const Pass& pass = tree_.MakePass(branch);
      decoder_.ForwardBranch(pass, thread);
      nodes += pass.count;
      asked += branch.num_rows();
      DrawTokens(wave, segment, i, branch, thread);
      tree_.Append(branch, drawn_.data(), wave.settings.num_rows());
    }
  });
  stats_.rows_asked += asked;
  stats_.branches += tree_.num_branches();
  CheckLogits();
  if (late) return false;
  tree_.Join(times);
  wave.token += segment.end - first;
  pace_.Learn(SecondsSince(begin), double(nodes), segment.end - first);
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

double BeamSearch::SecondsLeft(const Wave& wave) { return -SecondsSince(*wave.deadline); }

// Whether the next pass ends in time. The first step is made in any case, with fewer candidates if
// need be.
bool BeamSearch::FitsDeadline(Wave& wave, const Segment& segment, int i) {
  const double left = SecondsLeft(wave);
  if (segment.step > 0) {
    const double most = NodesAhead(wave);
    return pace_.Cost(most * (most > tree_.total_rows() ? unshared_ : 1.0)) <= left;
  }
  // of a row of each context, and all tokens to come
  const double cost = pace_.Cost(double(wave.count) * (segment.end - i));
  const int affordable =
      cost > 0.0 ? static_cast<int>(std::clamp(left / cost, 1.0, 1e9)) : tree_.num_rows();
  if (affordable < tree_.num_rows()) {
    tree_.Narrow(affordable);
    for (Beam& beam : wave.beams) {
      beam.returns.resize(affordable);
      beam.rewards.resize(affordable);
      beam.values.resize(affordable);
    }
  }
  return true;
}

// The same of a branch, which has one thread.
bool BeamSearch::BranchFitsDeadline(const Wave& wave, const Branch& branch) const {
  return pace_.Cost(double(branch.num_rows()) * pool_.num_threads()) <= SecondsLeft(wave);
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

// A token for every row, all threads at it.
void BeamSearch::DrawTokens(Wave& wave, const Segment& segment, int i) {
  const Draw draw = DrawOf(wave, segment, i);
  leaves_.clear();
  ForLeaves(tree_.all(), [this](const Leaf& leaf) { leaves_.push_back(leaf); });
  const int num_leaves = static_cast<int>(leaves_.size());
  const int num_tasks = std::min(num_leaves, 4 * pool_.num_threads());
  pool_.Run(num_tasks, [&](int task, int thread) {
    const int end = BeginOfPart(num_leaves, task + 1, num_tasks);
    for (int l = BeginOfPart(num_leaves, task, num_tasks); l < end; ++l) {
      DrawLeaf(wave, draw, leaves_[l], decoder_.logits(leaves_[l].slot), samplers_[thread]);
    }
  });
  CheckLogits();
}

// The same of a branch, by one thread.
void BeamSearch::DrawTokens(Wave& wave, const Segment& segment, int i, const Branch& branch,
                            int thread) {
  const Draw draw = DrawOf(wave, segment, i);
  ForLeaves(branch, [&](const Leaf& leaf) {
    DrawLeaf(wave, draw, leaf, decoder_.branch_logits(thread, leaf.slot), samplers_[thread]);
  });
}

BeamSearch::Draw BeamSearch::DrawOf(const Wave& wave, const Segment& segment, int i) const {
  const PlanSettings& settings = wave.settings;
  const int token = segment.first_draw + i;
  if (i < segment.action) return {settings.observation, Estimate::kNone, token};
  if (i < segment.end - 2) return {settings.action, Estimate::kNone, token};
  return {settings.reward, i < segment.end - 1 ? Estimate::kReward : Estimate::kValue, token};
}

template <typename F>
void BeamSearch::ForLeaves(const Branch& branch, F&& f) const {
  for (const Strand& strand : branch.strands) {
    const int32_t *row = strand.rows.data(), *end = row + strand.rows.size();
    while (row != end) {
      const int slot = tree_.slot(strand.context, *row);
      const int32_t* next = std::find_if(
          row, end, [&](int other) { return tree_.slot(strand.context, other) != slot; });
      f(Leaf{strand.context, slot, row, next});
      row = next;
    }
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

// Equal prefixes share a distribution, and each row draws for itself.
void BeamSearch::DrawLeaf(Wave& wave, const Draw& draw, const Leaf& leaf, const float* logits,
                          Sampler& sampler) {
  const bool is_reward = draw.estimate == Estimate::kReward;
  Beam& beam = wave.beams[leaf.context];
  sampler.Load(logits, wave.settings.temperature);
  if (draw.estimate != Estimate::kNone && wave.request.value_function) {
    for (const int32_t* row = leaf.begin; row != leaf.end; ++row) {
      std::copy_n(sampler.RawProbs(), model_->shape.num_ids(),
                  &probs_[ProbsOf(wave, leaf.context, *row, !is_reward)]);
    }
  } else if (draw.estimate != Estimate::kNone) {
    const Estimator& estimator =
        is_reward ? wave.settings.reward_estimator : wave.settings.value_estimator;
    const float number = estimator(sampler.RawProbs());
    for (const int32_t* row = leaf.begin; row != leaf.end; ++row) {
      (is_reward ? beam.rewards : beam.values)[*row] = number;
    }
  }
  sampler.Truncate(draw.truncation);
  for (const int32_t* row = leaf.begin; row != leaf.end; ++row) {
    drawn_[size_t(leaf.context) * wave.settings.num_rows() + *row] =
        sampler.Draw(Uniform(wave, leaf.context, *row, draw.token));
  }
}

double BeamSearch::Uniform(const Wave& wave, int context, int row, int token) const {
  const PlanRequest& request = wave.request;
  const int i = wave.first + context;
  if (request.uniforms == nullptr) {
    return PhiloxUniform(request.seeds[i], row, token, request.plan_indices[i]);
  }
  const size_t num_draws = wave.settings.num_draws(model_->shape);
  return request.uniforms[(i * num_draws + token) * wave.settings.num_rows() + row];
}

// Tokens of the segment, of all rows that there were at the time.
void BeamSearch::TraceTokens(Wave& wave, const Segment& segment) {
  for (int c = 0; c < wave.count; ++c) {
    for (int i = 0; i < segment.end; ++i) {
      const int times = i < segment.action ? wave.settings.n_expand : 1;
      std::vector<int32_t> drawn;
      for (int row = 0; row < tree_.num_rows() / times; ++row) {
        drawn.push_back(tree_.tokens(c, row)[tree_.num_tokens(c) - segment.end + i]);
      }
      wave.results[c].drawn.push_back(std::move(drawn));
    }
  }
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
    if (Pace::kMargin * wave.value_seconds > SecondsLeft(wave)) return false;
  }
  for (int c = 0; c < wave.count; ++c) {
    Beam& beam = wave.beams[c];
    wave.request.value_function(&probs_[ProbsOf(wave, c, 0, 0)], tree_.num_rows(),
                                beam.rewards.data(), beam.values.data());
  }
  wave.value_seconds = SecondsSince(begin);
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
  Reserve(SearchLimits(*model_, width, request.num_tokens));
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
    BestCandidates(candidates, width, order);
    const int kept = static_cast<int>(order.size());
    if (kept == 0) throw std::runtime_error("beam_search: no candidate has a probability");
    rows.resize(kept);
    tokens.resize(kept);
    totals.resize(kept);
    for (int j = 0; j < kept; ++j) {
      rows[j] = order[j] / num_ids;
      tokens[j] = order[j] % num_ids;
      totals[j] = candidates[order[j]];
    }
    tree_.Keep(rows.data(), kept);
    tree_.Append(tokens.data(), kept);
  }
  const int32_t* best = tree_.tokens(0, 0) + tree_.num_tokens(0) - request.num_tokens;
  return {{best, best + request.num_tokens}, totals};
}

std::vector<float> BeamSearch::Logits(const std::vector<int32_t>& context,
                                      const std::vector<int32_t>& goal) {
  Reserve(SearchLimits(*model_, 1, 1));
  tree_.Begin({context}, goal);
  Forward(1);
  return {decoder_.logits(0), decoder_.logits(0) + model_->shape.num_ids()};
}

// ---- memory ----

// Refuses what memory cannot hold, before the system takes it at its word.
void BeamSearch::Reserve(const TreeLimits& limits) {
  const double bytes = SearchBytes(*model_, limits);
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
