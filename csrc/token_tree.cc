#include "token_tree.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace tt {

int Branch::num_rows() const {
  size_t num_rows = 0;
  for (const Strand& strand : strands) num_rows += strand.rows.size();
  return static_cast<int>(num_rows);
}

TokenTree::TokenTree(const Model& model, const std::vector<uint8_t>& hidden)
    : model_(model), hidden_(hidden) {}

void TokenTree::Reserve(const TreeLimits& limits) {
  limits_ = limits;
  max_path_ = model_.shape.goal_len + limits.max_len;
  const size_t rows = static_cast<size_t>(limits.num_contexts) * limits.max_rows;
  contexts_.resize(limits.num_contexts);
  all_.strands.resize(limits.num_contexts);
  for (int c = 0; c < limits.num_contexts; ++c) {
    all_.strands[c].context = c;
    all_.strands[c].rows.reserve(limits.max_rows);
    all_.strands[c].nodes.reserve(limits.max_nodes);
  }
  all_.newest.reserve(limits.max_rows);
  alive_.resize(limits.max_nodes);
  for (auto* tokens : {&tokens_, &other_tokens_}) tokens->resize(rows * limits.max_tokens);
  for (auto* paths : {&paths_, &other_paths_}) paths->resize(rows * max_path_);
  slots_.resize(rows);
  same_.resize(rows);
  visible_.reserve(max_path_);
  keys_.resize(static_cast<size_t>(limits.max_rows) * max_path_);
}

void TokenTree::Begin(const std::vector<std::vector<int32_t>>& contexts,
                      const std::vector<int32_t>& goal) {
  goal_ = goal;
  num_rows_ = 1;
  for (int c = 0; c < num_contexts(); ++c) {
    const int start = WindowStart(static_cast<int>(contexts[c].size()));
    contexts_[c] = {};
    Strand& strand = all_.strands[c];
    strand.path_len = 0;
    strand.num_tokens = static_cast<int>(contexts[c].size()) - start;
    std::copy(contexts[c].begin() + start, contexts[c].end(), tokens_.begin() + TokenIndex(c, 0));
  }
  NumberRows();
}

void TokenTree::NumberRows() {
  for (Strand& strand : all_.strands) {
    strand.rows.resize(num_rows_);
    std::iota(strand.rows.begin(), strand.rows.end(), 0);
  }
}

void TokenTree::Tile(int times) {
  Tile(all_, times);
  num_rows_ *= times;
}

// Copies lie beside their row, which is at the same leaf.
void TokenTree::Tile(Branch& branch, int times) {
  for (Strand& strand : branch.strands) {
    const int c = strand.context;
    const size_t count = strand.rows.size();
    strand.rows.resize(times * count);
    for (size_t i = times * count; i-- > 0;) {
      const int from = strand.rows[i / times], copy = static_cast<int>(i % times);
      const int row = from + copy * num_rows_;
      strand.rows[i] = row;
      if (copy == 0) continue;
      std::memcpy(&tokens_[TokenIndex(c, row)], tokens(c, from),
                  strand.num_tokens * sizeof(int32_t));
      std::memcpy(PathOf(c, row), PathOf(c, from), strand.path_len * sizeof(uint32_t));
      slots_[RowIndex(c, row)] = slots_[RowIndex(c, from)];
    }
  }
}

void TokenTree::Narrow(int num_rows) {
  num_rows_ = num_rows;
  NumberRows();
}

void TokenTree::Keep(const int32_t* rows, int num_rows) {
  for (const Strand& strand : all_.strands) {
    const int c = strand.context;
    contexts_[c].selected = true;
    for (int i = 0; i < num_rows; ++i) {
      const int from = rows[c * num_rows + i];
      std::memcpy(&other_tokens_[TokenIndex(c, i)], tokens(c, from),
                  strand.num_tokens * sizeof(int32_t));
      std::memcpy(&other_paths_[RowIndex(c, i) * max_path_], PathOf(c, from),
                  strand.path_len * sizeof(uint32_t));
    }
  }
  tokens_.swap(other_tokens_);
  paths_.swap(other_paths_);
  num_rows_ = num_rows;
  NumberRows();
}

void TokenTree::Append(const int32_t* tokens, int stride) { Append(all_, tokens, stride); }

void TokenTree::Append(Branch& branch, const int32_t* tokens, int stride) {
  for (Strand& strand : branch.strands) {
    const int c = strand.context;
    for (int row : strand.rows) {
      tokens_[TokenIndex(c, row) + strand.num_tokens] = tokens[c * stride + row];
    }
    ++strand.num_tokens;
  }
}

// ---- passes ----

const Pass& TokenTree::MakePass() {
  ClearPass(all_);
  for (Strand& strand : all_.strands) {
    const int c = strand.context;
    contexts_[c].cropped = is_cropped(c);
    if (contexts_[c].cropped) {
      contexts_[c].start = WindowStart(strand.num_tokens);
      FreeAllNodes(strand);
      SortByPrefix(strand);
      AddWindowNodes(strand);
    } else if (contexts_[c].selected) {
      FreeDeadNodes(strand);
    }
    contexts_[c].selected = false;
  }
  all_.pass.chained = all_.pass.count > 0;
  for (Strand& strand : all_.strands) {
    contexts_[strand.context].cropped ? AddWindowLeaves(strand) : AddNewest(all_, strand);
  }
  return all_.pass;
}

const Pass& TokenTree::MakePass(Branch& branch) {
  ClearPass(branch);
  for (Strand& strand : branch.strands) AddNewest(branch, strand);
  return branch.pass;
}

void TokenTree::ClearPass(Branch& branch) const {
  Pass& pass = branch.pass;
  pass.count = pass.num_leaves = 0;
  pass.chained = false;
  pass.head = (branch.strands[0].num_tokens - 1) % model_.shape.transition_dim();
  for (auto* field : {&pass.embedding_row, &pass.position, &pass.node, &pass.path_len}) {
    field->clear();
  }
  pass.placed.clear();
  pass.path.clear();
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

// Where the newest token is in the window.
int TokenTree::NewestIndex(const Strand& strand) const {
  return model_.shape.goal_len + strand.num_tokens - 1 - contexts_[strand.context].start;
}

// Rows in order of (prefix, newest token), branch.newest; the prefix is known by its last visible
// node.
void TokenTree::SortByNewest(Branch& branch, Strand& strand) const {
  const int c = strand.context, window_idx = NewestIndex(strand);
  branch.newest.clear();
  for (int row : strand.rows) {
    const uint64_t prefix = PathOf(c, row)[strand.path_len - 1];
    branch.newest.emplace_back(
        prefix << 32 | static_cast<uint32_t>(WindowToken(c, row, window_idx)), row);
  }
  std::sort(branch.newest.begin(), branch.newest.end());
  for (size_t i = 0; i < strand.rows.size(); ++i) strand.rows[i] = branch.newest[i].second;
}

// A node for every distinct (prefix, newest token).
void TokenTree::AddNewest(Branch& branch, Strand& strand) {
  const int c = strand.context, window_idx = NewestIndex(strand), path_idx = strand.path_len;
  SortByNewest(branch, strand);
  for (size_t i = 0; i < strand.rows.size(); ++i) {
    const int row = strand.rows[i];
    if (i == 0 || branch.newest[i].first != branch.newest[i - 1].first) {
      AddLeaf(branch.pass, strand, row, window_idx, path_idx);
    } else {
      PathOf(c, row)[path_idx] = PathOf(c, strand.rows[i - 1])[path_idx];
    }
    slots_[RowIndex(c, row)] = branch.pass.num_leaves - 1;
  }
  if (!hidden_[window_idx]) ++strand.path_len;
}

// Rows in the order of their windows' visible tokens: equal prefixes become neighbours.
void TokenTree::SortByPrefix(Strand& strand) {
  const int c = strand.context, newest_idx = NewestIndex(strand);
  visible_.clear();
  for (int i = 0; i <= newest_idx; ++i) {
    if (!hidden_[i] || i == newest_idx) visible_.push_back(i);
  }
  const size_t len = visible_.size();
  for (int row : strand.rows) {
    for (size_t k = 0; k < len; ++k) KeyOf(row)[k] = WindowToken(c, row, visible_[k]);
  }
  std::sort(strand.rows.begin(), strand.rows.end(), [this, len](int a, int b) {
    const int32_t *x = KeyOf(a), *y = KeyOf(b);
    const auto [i, j] = std::mismatch(x, x + len, y);
    return i == x + len ? a < b : *i < *j;
  });
  strand.path_len = static_cast<int>(len) - 1;
}

// The nodes of all windows but the newest tokens': a row adds those that its neighbour lacks.
void TokenTree::AddWindowNodes(Strand& strand) {
  const int c = strand.context, len = strand.path_len;
  for (int i = 0; i < num_rows_; ++i) {
    const int row = strand.rows[i];
    int shared = 0;
    bool same = false;  // kept for the leaves, as the next context overwrites the keys
    if (i > 0) {
      const int last = strand.rows[i - 1];
      const int32_t *a = KeyOf(last), *b = KeyOf(row);
      shared = static_cast<int>(std::mismatch(a, a + len, b).first - a);
      same = shared == len && a[len] == b[len];
      std::copy_n(PathOf(c, last), shared, PathOf(c, row));
    }
    same_[RowIndex(c, row)] = same;
    for (int k = shared; k < len; ++k) AddNode(all_.pass, strand, row, visible_[k], k);
  }
}

void TokenTree::AddWindowLeaves(Strand& strand) {
  const int c = strand.context, window_idx = NewestIndex(strand), path_idx = strand.path_len;
  for (int i = 0; i < num_rows_; ++i) {
    const int row = strand.rows[i];
    if (!same_[RowIndex(c, row)]) {
      AddLeaf(all_.pass, strand, row, window_idx, path_idx);
    } else if (!hidden_[window_idx]) {
      PathOf(c, row)[path_idx] = PathOf(c, strand.rows[i - 1])[path_idx];
    }
    slots_[RowIndex(c, row)] = all_.pass.num_leaves - 1;
  }
  if (!hidden_[window_idx]) ++strand.path_len;
}

// A new node; unless hidden, it ends its own path at path_idx.
void TokenTree::AddNode(Pass& pass, Strand& strand, int row, int window_idx, int path_idx) {
  if (strand.nodes.empty()) throw std::logic_error("tt: too many nodes");
  const int c = strand.context, node = strand.nodes.back();
  strand.nodes.pop_back();
  uint32_t* path = PathOf(c, row);
  const bool hidden = hidden_[window_idx];
  if (!hidden) path[path_idx] = static_cast<uint32_t>(NodeOffset(node));
  const int goal_len = model_.shape.goal_len, position = window_idx - goal_len;
  const int token = WindowToken(c, row, window_idx);
  pass.embedding_row.push_back(
      position < 0 ? model_.GoalRow(token, window_idx)
                   : model_.EmbeddingRow(token, position % model_.shape.transition_dim()));
  pass.position.push_back(std::max(position, -1));
  pass.placed.push_back(position < 0 ? model_.shape.PlacedGoal(token, window_idx)
                                     : model_.shape.Placed(token, position));
  pass.node.push_back(node);
  pass.path.push_back(path);
  pass.path_len.push_back(path_idx + (hidden ? 0 : 1));
  ++pass.count;
}

void TokenTree::AddLeaf(Pass& pass, Strand& strand, int row, int window_idx, int path_idx) {
  AddNode(pass, strand, row, window_idx, path_idx);
  ++pass.num_leaves;
}

void TokenTree::FreeAllNodes(Strand& strand) {
  strand.nodes.resize(limits_.max_nodes);
  std::iota(strand.nodes.rbegin(), strand.nodes.rend(), strand.context * limits_.max_nodes);
}

void TokenTree::FreeDeadNodes(Strand& strand) {
  const int first = strand.context * limits_.max_nodes, stride = NodeOffset(1);
  std::fill(alive_.begin(), alive_.end(), 0);
  for (int row : strand.rows) {
    const uint32_t* path = PathOf(strand.context, row);
    for (int k = 0; k < strand.path_len; ++k) {
      alive_[(static_cast<int>(path[k]) - NodeOffset(first)) / stride] = 1;
    }
  }
  strand.nodes.clear();
  for (int idx = limits_.max_nodes; idx-- > 0;) {
    if (!alive_[idx]) strand.nodes.push_back(first + idx);
  }
}

// ---- branches ----

bool TokenTree::Split(const SplitLimits& limits) {
  for (const Strand& strand : all_.strands) {
    const int last = strand.num_tokens + limits.num_passes - 1;
    if (WindowStart(last) != contexts_[strand.context].start) return false;
    // rows that differ in a hidden token only will be one again
    if (hidden_[NewestIndex(strand)]) return false;
  }
  if (!ShareOut(limits.num_branches)) return false;
  for (int i = 0; i < num_branches_; ++i) Provide(branches_[i], limits.nodes_per_row);
  return true;
}

// Leaf after leaf of the next pass: each goes where its middle is, if branches are even shares of
// all rows. False if a leaf is more than a share.
bool TokenTree::ShareOut(int num_branches) {
  int last_share = -1;
  int64_t before = 0;  // rows
  num_branches_ = 0;
  for (Strand& strand : all_.strands) {
    SortByNewest(all_, strand);
    for (size_t begin = 0, end; begin < strand.rows.size(); begin = end) {
      end = EndOfLeaf(begin);
      const int64_t count = static_cast<int64_t>(end - begin);
      if (count * num_branches > total_rows()) {
        num_branches_ = 0;
        return false;
      }
      const auto share =
          static_cast<int>((2 * before + count) * num_branches / (2 * int64_t{total_rows()}));
      if (share > last_share) AddBranch();
      last_share = share;
      before += count;
      auto& rows = branches_[num_branches_ - 1].strands[strand.context].rows;
      rows.insert(rows.end(), strand.rows.begin() + begin, strand.rows.begin() + end);
    }
  }
  return true;
}

// Where the leaf ends that begins there in all_.newest.
size_t TokenTree::EndOfLeaf(size_t begin) const {
  size_t end = begin + 1;
  while (end < all_.newest.size() && all_.newest[end].first == all_.newest[begin].first) ++end;
  return end;
}

// An empty one.
void TokenTree::AddBranch() {
  if (static_cast<size_t>(num_branches_) == branches_.size()) branches_.emplace_back();
  Branch& branch = branches_[num_branches_++];
  branch.strands.resize(num_contexts());
  for (const Strand& all : all_.strands) {
    Strand& strand = branch.strands[all.context];
    strand.context = all.context;
    strand.num_tokens = all.num_tokens;
    strand.path_len = all.path_len;
    strand.rows.clear();
    strand.nodes.clear();
  }
}

// Nodes, and room for as many rows as may become of its own: what follows throws nothing.
void TokenTree::Provide(Branch& branch, int nodes_per_row) {
  const size_t times = limits_.max_rows / num_rows_, num_rows = times * branch.num_rows();
  for (Strand& strand : branch.strands) {
    auto& all = all_.strands[strand.context].nodes;
    const size_t num_nodes = strand.rows.size() * nodes_per_row;
    if (num_nodes > all.size()) throw std::logic_error("tt: too many nodes");
    strand.nodes.assign(all.end() - num_nodes, all.end());
    all.resize(all.size() - num_nodes);
    strand.rows.reserve(times * strand.rows.size());
  }
  branch.newest.reserve(num_rows);
  Pass& pass = branch.pass;
  for (auto* field : {&pass.embedding_row, &pass.position, &pass.node, &pass.path_len}) {
    field->reserve(num_rows);
  }
  pass.placed.reserve(num_rows);
  pass.path.reserve(num_rows);
}

void TokenTree::Join(int times) {
  for (int i = 0; i < num_branches_; ++i) {
    for (const Strand& strand : branches_[i].strands) {
      auto& all = all_.strands[strand.context].nodes;
      all.insert(all.end(), strand.nodes.begin(), strand.nodes.end());  // what is left
    }
  }
  for (Strand& strand : all_.strands) {
    strand.num_tokens = branches_[0].strands[strand.context].num_tokens;
    strand.path_len = branches_[0].strands[strand.context].path_len;
  }
  num_rows_ *= times;
  num_branches_ = 0;
  NumberRows();
}

}  // namespace tt
