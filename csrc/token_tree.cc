#include "token_tree.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace tt {

TokenTree::TokenTree(const Model& model, const std::vector<uint8_t>& hidden)
    : model_(model), hidden_(hidden) {}

void TokenTree::Reserve(const TreeLimits& limits) {
  limits_ = limits;
  max_path_ = model_.shape.goal_len + limits.max_len;
  const size_t rows = static_cast<size_t>(limits.num_contexts) * limits.max_rows;
  contexts_.resize(limits.num_contexts);
  for (Context& context : contexts_) context.free_nodes.reserve(limits.max_nodes);
  alive_.resize(limits.max_nodes);
  for (auto* tokens : {&tokens_, &other_tokens_}) tokens->resize(rows * limits.max_tokens);
  for (auto* paths : {&paths_, &other_paths_}) paths->resize(rows * max_path_);
  for (auto* slots : {&slots_, &other_slots_}) slots->resize(rows);
  visible_.reserve(max_path_);
  keys_.resize(static_cast<size_t>(limits.max_rows) * max_path_);
  order_.resize(rows);
  newest_.resize(limits.max_rows);
}

void TokenTree::Begin(const std::vector<std::vector<int32_t>>& contexts,
                      const std::vector<int32_t>& goal) {
  goal_ = goal;
  num_rows_ = 1;
  for (int c = 0; c < num_contexts(); ++c) {
    const int start = WindowStart(static_cast<int>(contexts[c].size()));
    Context& ctx = contexts_[c];
    ctx.free_nodes.clear();
    ctx.selected = ctx.cropped = false;
    ctx.start = -1;
    ctx.path_len = ctx.num_nodes = 0;
    ctx.num_tokens = static_cast<int>(contexts[c].size()) - start;
    std::copy(contexts[c].begin() + start, contexts[c].end(), tokens_.begin() + TokenIndex(c, 0));
  }
}

void TokenTree::Tile(int times) {
  for (int c = 0; c < num_contexts(); ++c) {
    for (int row = num_rows_; row < times * num_rows_; ++row) {
      const int from = row % num_rows_;
      std::memcpy(&tokens_[TokenIndex(c, row)], tokens(c, from),
                  contexts_[c].num_tokens * sizeof(int32_t));
      std::memcpy(PathOf(c, row), PathOf(c, from), contexts_[c].path_len * sizeof(uint32_t));
      slots_[RowIndex(c, row)] = slots_[RowIndex(c, from)];
    }
  }
  num_rows_ *= times;
}

void TokenTree::Narrow(int num_rows) { num_rows_ = num_rows; }

void TokenTree::Keep(const int32_t* rows, int num_rows) {
  for (int c = 0; c < num_contexts(); ++c) {
    contexts_[c].selected = true;
    for (int i = 0; i < num_rows; ++i) {
      const int from = rows[c * num_rows + i];
      std::memcpy(&other_tokens_[TokenIndex(c, i)], tokens(c, from),
                  contexts_[c].num_tokens * sizeof(int32_t));
      std::memcpy(&other_paths_[RowIndex(c, i) * max_path_], PathOf(c, from),
                  contexts_[c].path_len * sizeof(uint32_t));
      other_slots_[RowIndex(c, i)] = slots_[RowIndex(c, from)];
    }
  }
  tokens_.swap(other_tokens_);
  paths_.swap(other_paths_);
  slots_.swap(other_slots_);
  num_rows_ = num_rows;
}

void TokenTree::Append(const int32_t* tokens) {
  for (int c = 0; c < num_contexts(); ++c) {
    for (int row = 0; row < num_rows_; ++row) {
      tokens_[TokenIndex(c, row) + contexts_[c].num_tokens] = tokens[c * num_rows_ + row];
    }
    ++contexts_[c].num_tokens;
  }
}

const Pass& TokenTree::MakePass() {
  pass_.count = pass_.num_leaves = 0;
  for (auto* field : {&pass_.embedding_row, &pass_.position, &pass_.node, &pass_.path_len}) {
    field->clear();
  }
  pass_.placed.clear();
  pass_.path.clear();
  for (int c = 0; c < num_contexts(); ++c) {
    contexts_[c].cropped = is_cropped(c);
    if (!contexts_[c].cropped) {
      if (contexts_[c].selected) FreeDeadNodes(c);
      continue;
    }
    contexts_[c].start = WindowStart(contexts_[c].num_tokens);
    contexts_[c].num_nodes = 0;
    contexts_[c].free_nodes.clear();
    contexts_[c].selected = false;
    SortByPrefix(c);
    AddWindowNodes(c);
  }
  pass_.chained = pass_.count > 0;
  for (int c = 0; c < num_contexts(); ++c) {
    contexts_[c].cropped ? AddWindowLeaves(c) : AddNewest(c);
  }
  pass_.head = (contexts_[0].num_tokens - 1) % model_.shape.transition_dim();
  return pass_;
}

// A longer sequence loses whole transitions from the left (the original's sampling.py:51-75).
int TokenTree::WindowStart(int num_tokens) const {
  const int excess = std::max(0, num_tokens - limits_.max_len);
  return RoundUp(excess, model_.shape.transition_dim());
}

int TokenTree::WindowToken(int context, int row, int window_idx) const {
  const int goal_len = model_.shape.goal_len;
  if (window_idx < goal_len) return goal_[window_idx];
  return tokens(context, row)[contexts_[context].start + window_idx - goal_len];
}

// Distinct (prefix, newest token) pairs; the prefix is known by its last visible node.
void TokenTree::AddNewest(int context) {
  Context& ctx = contexts_[context];
  const int window_idx = model_.shape.goal_len + ctx.num_tokens - 1 - ctx.start;
  const int path_idx = ctx.path_len;
  for (int row = 0; row < num_rows_; ++row) {
    const uint64_t prefix = PathOf(context, row)[path_idx - 1];
    newest_[row] = {prefix << 32 | static_cast<uint32_t>(WindowToken(context, row, window_idx)),
                    row};
  }
  std::sort(newest_.begin(), newest_.begin() + num_rows_);
  for (int i = 0; i < num_rows_; ++i) {
    const int row = newest_[i].second;
    if (i == 0 || newest_[i].first != newest_[i - 1].first) {
      AddLeaf(context, row, window_idx, path_idx);
    } else {
      PathOf(context, row)[path_idx] = PathOf(context, newest_[i - 1].second)[path_idx];
    }
    slots_[RowIndex(context, row)] = pass_.num_leaves - 1;
  }
  if (!hidden_[window_idx]) ++ctx.path_len;
}

// Rows in the order of their windows' visible tokens: equal prefixes become neighbours.
void TokenTree::SortByPrefix(int context) {
  Context& ctx = contexts_[context];
  const int window_len = model_.shape.goal_len + ctx.num_tokens - ctx.start;
  visible_.clear();
  for (int i = 0; i < window_len; ++i) {
    if (!hidden_[i] || i == window_len - 1) visible_.push_back(i);
  }
  const size_t len = visible_.size();
  for (int row = 0; row < num_rows_; ++row) {
    for (size_t k = 0; k < len; ++k) KeyOf(row)[k] = WindowToken(context, row, visible_[k]);
  }
  int32_t* order = &order_[RowIndex(context, 0)];
  std::iota(order, order + num_rows_, 0);
  std::sort(order, order + num_rows_, [this, len](int a, int b) {
    const int32_t *x = KeyOf(a), *y = KeyOf(b);
    const auto [i, j] = std::mismatch(x, x + len, y);
    return i == x + len ? a < b : *i < *j;
  });
  ctx.path_len = static_cast<int>(len) - 1;
}

// The nodes of all windows but the newest tokens': a row adds those that its neighbour lacks.
void TokenTree::AddWindowNodes(int context) {
  const int len = contexts_[context].path_len;
  const int32_t* order = &order_[RowIndex(context, 0)];
  for (int i = 0; i < num_rows_; ++i) {
    int shared = 0;
    if (i > 0) {
      const int32_t *a = KeyOf(order[i - 1]), *b = KeyOf(order[i]);
      shared = static_cast<int>(std::mismatch(a, a + len, b).first - a);
      std::copy_n(PathOf(context, order[i - 1]), shared, PathOf(context, order[i]));
    }
    for (int k = shared; k < len; ++k) AddNode(context, order[i], visible_[k], k);
  }
  // the next context overwrites the keys: until the leaves are added, a slot says whether a row
  // equals its neighbour altogether
  for (int i = num_rows_ - 1; i > 0; --i) {
    const int32_t *a = KeyOf(order[i - 1]), *b = KeyOf(order[i]);
    slots_[RowIndex(context, order[i])] = std::equal(a, a + len + 1, b);
  }
  slots_[RowIndex(context, order[0])] = false;
}

void TokenTree::AddWindowLeaves(int context) {
  Context& ctx = contexts_[context];
  const int window_idx = model_.shape.goal_len + ctx.num_tokens - 1 - ctx.start;
  const int path_idx = ctx.path_len;
  const int32_t* order = &order_[RowIndex(context, 0)];
  for (int i = 0; i < num_rows_; ++i) {
    int32_t& slot = slots_[RowIndex(context, order[i])];
    if (!slot) {
      AddLeaf(context, order[i], window_idx, path_idx);
    } else if (!hidden_[window_idx]) {
      PathOf(context, order[i])[path_idx] = PathOf(context, order[i - 1])[path_idx];
    }
    slot = pass_.num_leaves - 1;
  }
  if (!hidden_[window_idx]) ++ctx.path_len;
}

// A new node; unless hidden, it ends its own path at path_idx.
void TokenTree::AddNode(int context, int row, int window_idx, int path_idx) {
  const int node = NewNode(context);
  uint32_t* path = PathOf(context, row);
  const bool hidden = hidden_[window_idx];
  if (!hidden) path[path_idx] = static_cast<uint32_t>(NodeOffset(node));
  const int goal_len = model_.shape.goal_len, position = window_idx - goal_len;
  const int token = WindowToken(context, row, window_idx);
  pass_.embedding_row.push_back(
      position < 0 ? model_.GoalRow(token, window_idx)
                   : model_.EmbeddingRow(token, position % model_.shape.transition_dim()));
  pass_.position.push_back(std::max(position, -1));
  pass_.placed.push_back(position < 0 ? model_.shape.PlacedGoal(token, window_idx)
                                      : model_.shape.Placed(token, position));
  pass_.node.push_back(node);
  pass_.path.push_back(path);
  pass_.path_len.push_back(path_idx + (hidden ? 0 : 1));
  ++pass_.count;
}

int TokenTree::NewNode(int context) {
  Context& ctx = contexts_[context];
  int idx = ctx.num_nodes;
  if (!ctx.free_nodes.empty()) {
    idx = ctx.free_nodes.back();
    ctx.free_nodes.pop_back();
  } else if (ctx.num_nodes++ == limits_.max_nodes) {
    throw std::logic_error("tt: too many nodes");
  }
  return context * limits_.max_nodes + idx;
}

void TokenTree::FreeDeadNodes(int context) {
  Context& ctx = contexts_[context];
  ctx.selected = false;
  std::fill_n(alive_.begin(), ctx.num_nodes, 0);
  const int first = NodeOffset(context * limits_.max_nodes), stride = NodeOffset(1);
  for (int row = 0; row < num_rows_; ++row) {
    const uint32_t* path = PathOf(context, row);
    for (int k = 0; k < ctx.path_len; ++k) alive_[(static_cast<int>(path[k]) - first) / stride] = 1;
  }
  ctx.free_nodes.clear();
  for (int idx = ctx.num_nodes; idx-- > 0;) {
    if (!alive_[idx]) ctx.free_nodes.push_back(idx);
  }
}

void TokenTree::AddLeaf(int context, int row, int window_idx, int path_idx) {
  AddNode(context, row, window_idx, path_idx);
  ++pass_.num_leaves;
}

}  // namespace tt
