#include "plan_limits.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace tt {
namespace {

// Contexts side by side share passes; more than this is planned wave by wave.
constexpr double kWaveBytes = 128e6;

// Throws if indices of nodes or tokens would not fit their types.
void CheckFits(const Model& model, int64_t nodes, int64_t rows, int64_t tokens) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  if (nodes * model.head_layout.stride <= kLimit && rows * tokens <= kLimit) return;
  throw std::length_error("beam_width: expected a search that fits in memory, got " +
                          std::to_string(rows) + " rows of " + std::to_string(tokens) + " tokens");
}

}  // namespace

// Nodes of one context at once: what its beams have kept before the first crop, or a whole window
// of every beam; and the transition that is being sampled.
TreeLimits PlanLimits(const Model& model, const PlanSettings& settings, int num_contexts) {
  const Shape& shape = model.shape;
  const int64_t rows = settings.num_rows(), beams = settings.beam_width;
  const int64_t step = beams * shape.observation_dim + rows * (shape.action_dim + 2);
  const int64_t max_len = settings.max_len;
  const int64_t uncropped =
      std::min<int64_t>(settings.horizon, max_len / shape.transition_dim() + 2);
  const int64_t grown = max_len + uncropped * beams * shape.transition_dim();
  const int64_t nodes = std::max(grown, beams * max_len) + 2 * step;
  const int64_t tokens = max_len + int64_t{settings.horizon} * shape.transition_dim();
  CheckFits(model, nodes * num_contexts, rows * num_contexts, tokens);
  return {.num_contexts = num_contexts,
          .max_rows = static_cast<int>(rows),
          .max_len = settings.max_len,
          .max_tokens = static_cast<int>(tokens),
          .max_nodes = static_cast<int>(nodes)};
}

TreeLimits SearchLimits(const Model& model, int beam_width, int num_tokens) {
  const Shape& shape = model.shape;
  const int64_t window = shape.block_size() + shape.transition_dim();
  const int64_t nodes = shape.goal_len + window * (int64_t{beam_width} + 1);
  CheckFits(model, nodes, beam_width, std::max<int64_t>(window + num_tokens, shape.num_ids()));
  return {.num_contexts = 1,
          .max_rows = beam_width,
          .max_len = shape.block_size(),
          .max_tokens = shape.block_size() + num_tokens,
          .max_nodes = static_cast<int>(nodes)};
}

int WaveSize(const Model& model, const PlanSettings& settings) {
  const double nodes = PlanLimits(model, settings, 1).max_nodes;
  return std::max(1, static_cast<int>(kWaveBytes / NodeBytes(model) / nodes));
}

double NodeBytes(const Model& model) {
  return model.key_bytes() * 2.0 * model.shape.num_layers * model.head_layout.width();
}

double SearchBytes(const Model& model, const TreeLimits& limits) {
  const Shape& shape = model.shape;
  const double nodes = double(limits.num_contexts) * limits.max_nodes;
  const double rows = double(limits.num_contexts) * limits.max_rows;
  // at most all nodes are in one pass; tokens and paths are held twice
  return nodes * (NodeBytes(model) + sizeof(float) * (shape.width() + shape.attn_width())) +
         sizeof(float) * rows * shape.logits_width() +
         2.0 * sizeof(int32_t) * rows * (limits.max_tokens + double(limits.max_len));
}

}  // namespace tt
