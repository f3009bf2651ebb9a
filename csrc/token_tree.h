// The tokens of all beams as a tree of distinct prefixes.
//
// A row is one sequence of tokens (a beam, or a candidate). A node is one distinct prefix of a
// window, computed once however many rows pass through it; a row knows its nodes by its path.
// Tokens that attention hides (values) are never on a path, so rows that differ only there share
// all later nodes. Rows that share no node to come can go on without each other, as branches.
#ifndef TT_TOKEN_TREE_H_
#define TT_TOKEN_TREE_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "model.h"

namespace tt {

// What one forward pass computes: new nodes, those whose logits are wanted last.
struct Pass {
  int count = 0;
  int num_leaves = 0;
  bool chained = false;  // some nodes are ancestors of others
  int head = 0;          // dimension of the leaves' tokens
  // per node, (count)
  std::vector<int32_t> embedding_row;
  std::vector<int32_t> position;  // in the window; -1: none, as a goal's tokens
  std::vector<int64_t> placed;    // Shape::Placed or PlacedGoal
  std::vector<int32_t> node;      // where its keys and values go
  std::vector<const uint32_t*> path;
  std::vector<int32_t> path_len;  // itself included unless hidden

  int num_internal() const { return count - num_leaves; }
};

// Rows of one context that go on together.
struct Strand {
  int context = 0;
  int num_tokens = 0;  // of a row
  int path_len = 0;
  std::vector<int32_t> rows;   // after a pass, those at the same leaf side by side
  std::vector<int32_t> nodes;  // that are on no path, the next one to be taken last
};

// Rows whose passes are made together: all of them, or some that part from the others until rows
// are dropped.
struct Branch {
  std::vector<Strand> strands;
  Pass pass;                                         // the last one
  std::vector<std::pair<uint64_t, int32_t>> newest;  // scratch: (prefix, token) and row

  int num_rows() const;
};

struct TreeLimits {
  int num_contexts = 1;
  int max_rows = 1;    // a context
  int max_len = 1;     // most tokens of a window, a goal's not counted
  int max_tokens = 1;  // most tokens of a sequence
  int max_nodes = 1;   // a context, between two crops
};

struct SplitLimits {
  int num_branches = 1;   // fewer if rows are alike; none has more than two shares of the rows
  int num_passes = 1;     // most, before branches are joined
  int nodes_per_row = 1;  // most that these passes add, for each of the rows that there are now
};

class TokenTree {
 public:
  // hidden (goal_len + block_size): positions that no query sees.
  TokenTree(const Model& model, const std::vector<uint8_t>& hidden);

  void Reserve(const TreeLimits& limits);

  // One row a context; a longer context keeps its last window only.
  void Begin(const std::vector<std::vector<int32_t>>& contexts, const std::vector<int32_t>& goal);
  // Copies of all rows as blocks: row i and row i + num_rows share a parent.
  void Tile(int times);
  // The first rows of each context only.
  void Narrow(int num_rows);
  // These rows, (num_contexts, num_rows), in this order. Nodes that no row passes through any more
  // are used again.
  void Keep(const int32_t* rows, int num_rows);
  // A token for every row, (num_contexts, stride), of which the first num_rows count.
  void Append(const int32_t* tokens, int stride);
  // Nodes for the newest tokens; where a window was cropped, for all of it.
  const Pass& MakePass();

  // Shares all rows out to branches that will have no new node in common. False, and nothing has
  // changed, if a window will be cropped on the way, or if rows have not parted enough: the newest
  // token is hidden, or a share of the rows, or more, has the same one after the same prefix.
  bool Split(const SplitLimits& limits);
  const Branch& all() const { return all_; }
  int num_branches() const { return num_branches_; }
  Branch& branch(int i) { return branches_[i]; }
  // As above, of the rows of one branch; different threads may be at different branches.
  void Tile(Branch& branch, int times);
  void Append(Branch& branch, const int32_t* tokens, int stride);
  const Pass& MakePass(Branch& branch);
  // When all branches have as many tokens, and rows are so many times as many as there were.
  void Join(int times);

  int num_contexts() const { return limits_.num_contexts; }
  int num_rows() const { return num_rows_; }
  int total_rows() const { return num_contexts() * num_rows_; }
  int max_total_nodes() const { return limits_.num_contexts * limits_.max_nodes; }
  // Which leaf of the last pass a row's newest token is.
  int slot(int context, int row) const { return slots_[RowIndex(context, row)]; }
  // Tokens of a context's window, a goal's included.
  int window_len(int context) const {
    return model_.shape.goal_len + num_tokens(context) - WindowStart(num_tokens(context));
  }
  // Whether the next pass encodes a whole window of it.
  bool is_cropped(int context) const {
    return WindowStart(num_tokens(context)) != contexts_[context].start;
  }
  int num_tokens(int context) const { return all_.strands[context].num_tokens; }
  const int32_t* tokens(int context, int row) const {
    return tokens_.data() + TokenIndex(context, row);
  }

 private:
  struct Context {
    int start = -1;         // first token of the window; -1: nothing computed yet
    bool selected = false;  // rows were dropped since the last pass
    bool cropped = false;   // in the pass that is being made
  };

  size_t RowIndex(int context, int row) const {
    return static_cast<size_t>(context) * limits_.max_rows + row;
  }
  size_t TokenIndex(int context, int row) const {
    return RowIndex(context, row) * limits_.max_tokens;
  }
  uint32_t* PathOf(int context, int row) {
    return paths_.data() + RowIndex(context, row) * max_path_;
  }
  const uint32_t* PathOf(int context, int row) const {
    return paths_.data() + RowIndex(context, row) * max_path_;
  }
  int32_t* KeyOf(int row) { return keys_.data() + static_cast<size_t>(row) * max_path_; }
  int NodeOffset(int node) const { return node * model_.head_layout.stride; }
  void NumberRows();
  void FreeAllNodes(Strand& strand);
  void FreeDeadNodes(Strand& strand);
  int WindowStart(int num_tokens) const;
  int WindowToken(int context, int row, int window_idx) const;
  int NewestIndex(const Strand& strand) const;

  void ClearPass(Branch& branch) const;
  void SortByNewest(Branch& branch, Strand& strand) const;
  void AddNewest(Branch& branch, Strand& strand);
  void SortByPrefix(Strand& strand);
  void AddWindowNodes(Strand& strand);
  void AddWindowLeaves(Strand& strand);
  void AddNode(Pass& pass, Strand& strand, int row, int window_idx, int path_idx);
  void AddLeaf(Pass& pass, Strand& strand, int row, int window_idx, int path_idx);

  bool ShareOut(int num_branches);
  size_t EndOfLeaf(size_t begin) const;
  void AddBranch();
  void Provide(Branch& branch, int nodes_per_row);

  const Model& model_;
  const std::vector<uint8_t> hidden_;
  TreeLimits limits_;
  int num_rows_ = 0;
  int max_path_ = 0;
  std::vector<Context> contexts_;
  Branch all_;  // a strand a context
  int num_branches_ = 0;
  std::vector<Branch> branches_;  // at least as many
  std::vector<int32_t> goal_;
  std::vector<int32_t> tokens_, other_tokens_;  // (contexts, max_rows, max_tokens)
  std::vector<uint32_t> paths_, other_paths_;   // (contexts, max_rows, max_path) node offsets
  std::vector<int32_t> slots_;                  // (contexts, max_rows)
  // scratch of MakePass
  std::vector<int32_t> visible_;  // window indices that a query can see, the newest last
  std::vector<int32_t> keys_;     // (max_rows, max_path) tokens there
  std::vector<uint8_t> same_;     // (contexts, max_rows) whether a row equals the one before it
  std::vector<uint8_t> alive_;    // (max_nodes)
};

}  // namespace tt

#endif  // TT_TOKEN_TREE_H_
