// Whole plans: beam search for high predicted return, and likelihood search.
//
// Source of both: trajectory/search/core.py of the original.
#ifndef TT_BEAM_SEARCH_H_
#define TT_BEAM_SEARCH_H_

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "clock.h"
#include "decoder.h"
#include "isa.h"
#include "model.h"
#include "pace.h"
#include "plan_limits.h"
#include "sampler.h"
#include "thread_pool.h"
#include "token_tree.h"

namespace tt {

// Raw probabilities (num_rows, 2, num_ids) of reward and value -> (num_rows) estimates of each.
using ValueFunction =
    std::function<void(const float* probs, int num_rows, float* rewards, float* values)>;

struct PlanRequest {
  std::vector<std::vector<int32_t>> contexts;
  std::vector<uint64_t> seeds;         // one a context
  std::vector<uint32_t> plan_indices;  // one a context
  const double* uniforms = nullptr;    // (num_contexts, num_draws, num_rows), or generated
  bool trace = false;
  ValueFunction value_function;     // or the settings' estimators
  std::function<void()> interrupt;  // called now and then; may throw
  std::optional<double> deadline_seconds;
};

// What happened in one context. B rows are kept, R = B * n_expand drawn.
struct PlanResult {
  std::vector<int32_t> tokens;  // (steps, transition_dim)
  double score = 0.0;
  std::vector<float> rewards, values;  // (steps)
  int steps = 0;                       // fewer than the horizon if the deadline passed
  int num_beams = 0;                   // fewer than asked if the deadline is very short
  // if traced
  std::vector<std::vector<int32_t>> drawn;                 // per token: (R) or (B)
  std::vector<float> candidate_rewards, candidate_values;  // (steps, R)
  std::vector<double> candidate_scores;                    // (steps, R)
  std::vector<int32_t> parents;                            // (steps, B)
  std::vector<int32_t> beams;                              // (B, steps * transition_dim)
};

struct SearchRequest {
  std::vector<int32_t> context, goal;
  int num_tokens = 1;
  int beam_width = 1;
  Truncation truncation;
  float temperature = 1.0f;
  std::function<void()> interrupt;
};

struct SearchResult {
  std::vector<int32_t> tokens;  // (num_tokens) appended ones
  std::vector<float> log_probs;
};

// Rows that were asked for and nodes that were computed: their ratio is what sharing saves.
struct PlanStats {
  DecoderStats decoder;
  int64_t rows_asked = 0;  // tokens forwarded with a cache a beam and nothing shared
  int64_t branches = 0;    // that rows parted into, all of them counted
  double seconds = 0.0;
  size_t bytes = 0;  // buffers that were allocated, whether touched or not
};

// One model's planner; calls must not overlap.
class BeamSearch {
 public:
  // max_bytes: what may be used at once; a search that may need more is refused. near_bytes: of the
  // cache that threads' keys and values should stay in; it changes no plan.
  BeamSearch(std::shared_ptr<const Model> model, std::vector<uint8_t> hidden, int num_threads,
             double max_bytes = std::numeric_limits<double>::infinity(),
             size_t near_bytes = ThirdCacheBytes());

  std::vector<PlanResult> Plan(const PlanSettings& settings, const PlanRequest& request);
  SearchResult Search(const SearchRequest& request);
  // (num_ids) logits of the token after a context, which is cropped at the model's own window.
  std::vector<float> Logits(const std::vector<int32_t>& context, const std::vector<int32_t>& goal);

  PlanStats stats() const;
  void ResetStats();
  int num_threads() const { return pool_.num_threads(); }
  const Model& model() const { return *model_; }

 private:
  // What the search knows of one context besides its tokens. Rows are candidates, then beams.
  struct Beam {
    std::vector<double> returns;                   // (rows) discounted rewards so far
    std::vector<float> past_rewards, past_values;  // (rows, horizon)
    std::vector<float> rewards, values;            // (rows) estimates of this step
    std::vector<double> scores;                    // (rows)
    std::vector<int32_t> order;                    // scratch of selection
  };
  // Contexts that are planned side by side.
  struct Wave {
    const PlanSettings& settings;
    const PlanRequest& request;
    int first;            // index of the first context
    int count;            // contexts
    int token = 0;        // index of the draw within the plan
    double factor = 1.0;  // discount^step, a running product: the same on every backend
    std::optional<Clock::time_point> deadline = {};
    double value_seconds = 0.0;  // of the last call of the value function, for all contexts
    std::vector<Beam> beams = {};
    std::vector<PlanResult> results = {};
  };
  // Tokens of every row from one selection to the next: of an observation, unless it is given, an
  // action, reward and value.
  struct Segment {
    int step;
    int action, end;  // where the action begins, and the tokens end
    int first_draw;   // index of the first token's draw within the plan
  };
  enum class Estimate { kNone, kReward, kValue };
  struct Draw {
    const Truncation& truncation;
    Estimate estimate;
    int token;  // index within the plan
  };
  // Rows [begin, end) that are at one leaf of a pass.
  struct Leaf {
    int context, slot;
    const int32_t *begin, *end;
  };

  void RunWave(Wave& wave);
  bool RunStep(Wave& wave, int step);
  bool SampleSegment(Wave& wave, const Segment& segment);
  bool SampleToken(Wave& wave, const Segment& segment, int i);
  bool Split(const Wave& wave, const Segment& segment, int i);
  int NumBranches(int rows) const;
  bool SampleBranches(Wave& wave, const Segment& segment, int first);
  void PrepareBeams(Wave& wave);
  void DrawTokens(Wave& wave, const Segment& segment, int i);
  void DrawTokens(Wave& wave, const Segment& segment, int i, const Branch& branch, int thread);
  Draw DrawOf(const Wave& wave, const Segment& segment, int i) const;
  template <typename F>
  void ForLeaves(const Branch& branch, F&& f) const;
  void DrawLeaf(Wave& wave, const Draw& draw, const Leaf& leaf, const float* logits,
                Sampler& sampler);
  void CheckLogits();
  double Uniform(const Wave& wave, int context, int row, int token) const;
  size_t ProbsOf(const Wave& wave, int context, int row, int which) const;
  void TraceTokens(Wave& wave, const Segment& segment);
  bool CallValueFunction(Wave& wave, int step);
  void Select(Wave& wave, int step);
  void KeepBest(Wave& wave, int context, int step, int kept);
  int Forward(int rows_asked);
  double NodesAhead(const Wave& wave) const;
  static double SecondsLeft(const Wave& wave);
  bool FitsDeadline(Wave& wave, const Segment& segment, int i);
  bool BranchFitsDeadline(const Wave& wave, const Branch& branch) const;
  void Reserve(const TreeLimits& limits);

  std::shared_ptr<const Model> model_;
  const double max_bytes_, near_bytes_;
  ThreadPool pool_;
  TokenTree tree_;
  Decoder decoder_;
  std::vector<Sampler> samplers_;  // a thread
  bool fresh_ = false;             // logits are those of the newest tokens
  std::vector<Leaf> leaves_;       // of all rows
  std::vector<int32_t> drawn_;     // (num_contexts, settings.num_rows) newest tokens
  std::vector<int32_t> parents_;   // (num_contexts, kept)
  std::vector<float> probs_;       // (num_contexts, num_rows, 2, num_ids) for a value function
  PlanStats stats_;
  Pace pace_;
  double unshared_ = 1.0;  // nodes of the last pass over cropped windows, of `NodesAhead`
};

}  // namespace tt

#endif  // TT_BEAM_SEARCH_H_
