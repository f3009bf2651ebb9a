// Random walks of a tree beside plain sequences of tokens.
#include "token_tree.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "check.h"
#include "random.h"
#include "small_models.h"

namespace tt::test {
namespace {

using Row = std::vector<int32_t>;

// What a node stands for: its window's visible tokens up to it, and itself. Entries are embedding
// row and position.
using Prefix = std::vector<std::pair<int32_t, int32_t>>;

struct WalkSettings {
  Shape shape;
  std::vector<uint8_t> hidden;
  int max_len;
  int num_ids;  // tokens that are used: few make rows equal
  std::vector<int> context_lens;
  Row goal = {};
};

class Walk {
 public:
  Walk(const WalkSettings& settings, uint64_t seed)
      : settings_(settings),
        model_(MakeModel(settings.shape, *ScalarOps())),
        random_(seed),
        tree_(*model_, settings.hidden) {
    tree_.Reserve({.num_contexts = NumContexts(),
                   .max_rows = kMaxRows,
                   .max_len = settings.max_len,
                   .max_tokens = settings.max_len + kMaxSteps,
                   .max_nodes = kMaxNodes});
    for (int len : settings.context_lens) {
      rows_.push_back({random_.Tokens(len, settings.num_ids)});
    }
    std::vector<Row> contexts;
    for (const auto& rows : rows_) contexts.push_back(rows[0]);
    tree_.Begin(contexts, settings.goal);
    starts_.assign(NumContexts(), -1);
    prefixes_.resize(NumContexts());
    hidden_nodes_.resize(NumContexts());
  }

  // One pass after another; between them rows are copied, dropped and reordered at random.
  void Run(int num_steps) {
    CheckPass();
    for (int step = 0; step < num_steps; ++step) {
      Change();
      Append();
      if (random_.Below(3) == 0) Change();
      if (random_.Below(3) == 0) RunBranches();
      CheckPass();
    }
  }
  int num_branches() const { return num_branches_; }

 private:
  static constexpr int kMaxRows = 24, kMaxSteps = 200, kMaxNodes = 4000;

  int NumContexts() const { return static_cast<int>(settings_.context_lens.size()); }
  int NumRows() const { return static_cast<int>(rows_[0].size()); }

  void Change() {
    switch (random_.Below(5)) {
      case 0:
        return Tile(1 + random_.Below(kMaxRows / NumRows()));
      case 1:
        return Keep(1 + random_.Below(NumRows()));
      case 2:
        return Keep(1 + random_.Below(kMaxRows));
      case 3:
        return random_.Below(4) == 0 ? Narrow(1 + random_.Below(NumRows())) : void();
      default:
        return;
    }
  }

  void Tile(int times) {
    tree_.Tile(times);
    for (auto& rows : rows_) {
      const std::vector<Row> block = rows;
      for (int i = 1; i < times; ++i) rows.insert(rows.end(), block.begin(), block.end());
    }
  }

  void Keep(int num_rows) {
    const std::vector<int32_t> chosen = random_.Tokens(NumContexts() * num_rows, NumRows());
    tree_.Keep(chosen.data(), num_rows);
    for (int c = 0; c < NumContexts(); ++c) {
      std::vector<Row> kept;
      for (int i = 0; i < num_rows; ++i) kept.push_back(rows_[c][chosen[c * num_rows + i]]);
      rows_[c].swap(kept);
    }
  }

  void Narrow(int num_rows) {
    tree_.Narrow(num_rows);
    for (auto& rows : rows_) rows.resize(num_rows);
  }

  void Append() {
    const auto tokens = random_.Tokens(size_t(NumContexts()) * NumRows(), settings_.num_ids);
    tree_.Append(tokens.data(), NumRows());
    size_t next = 0;
    for (auto& rows : rows_) {
      for (Row& row : rows) row.push_back(tokens[next++]);
    }
  }

  // Some tokens more, branch after branch, if the tree parts rows; copies of all on the way.
  void RunBranches() {
    const int num_passes = 1 + random_.Below(4), times = 1 + random_.Below(kMaxRows / NumRows());
    const int tile_at = random_.Below(num_passes);
    const int most = 2 + random_.Below(4), num_rows = NumRows();
    if (!tree_.Split({most, num_passes, times * num_passes})) return CheckUnsplit();
    CHECK(tree_.num_branches() > 1 && tree_.num_branches() <= most);
    for (auto& rows : rows_) rows.resize(times * num_rows);
    std::set<std::pair<int, int>> seen;
    for (int b = 0; b < tree_.num_branches(); ++b) {
      Branch& branch = tree_.branch(b);
      CHECK_LE(branch.num_rows() * most, 2 * NumContexts() * num_rows);
      for (const Strand& strand : branch.strands) {
        for (int row : strand.rows) CHECK(seen.emplace(strand.context, row).second);
      }
      for (int i = 0; i < num_passes; ++i) {
        if (i == tile_at) TileBranch(branch, times);
        CheckBranchPass(branch);
        AppendToBranch(branch);
      }
    }
    CHECK_EQ(seen.size(), size_t(NumContexts()) * num_rows);
    num_branches_ += tree_.num_branches();
    tree_.Join(times);
  }

  // All rows are together yet.
  void CheckUnsplit() {
    CHECK_EQ(tree_.num_branches(), 0);
    CHECK_EQ(tree_.all().num_rows(), NumContexts() * NumRows());
  }

  void TileBranch(Branch& branch, int times) {
    const int num_rows = NumRows() / times;
    for (const Strand& strand : branch.strands) {
      auto& rows = rows_[strand.context];
      for (int row : strand.rows) {
        for (int i = 1; i < times; ++i) rows[row + i * num_rows] = rows[row];
      }
    }
    tree_.Tile(branch, times);
  }

  void AppendToBranch(Branch& branch) {
    std::vector<int32_t> tokens(size_t(NumContexts()) * kMaxRows, -1);
    for (const Strand& strand : branch.strands) {
      for (int row : strand.rows) {
        const int32_t token = random_.Below(settings_.num_ids);
        tokens[strand.context * kMaxRows + row] = token;
        rows_[strand.context][row].push_back(token);
      }
    }
    tree_.Append(branch, tokens.data(), kMaxRows);
  }

  // Its nodes are new, and of no other branch.
  void CheckBranchPass(Branch& branch) {
    const Pass& pass = tree_.MakePass(branch);
    CHECK(!pass.chained);
    CHECK_EQ(pass.num_leaves, pass.count);
    for (int i = 0; i < pass.count; ++i) AddNode(pass, i);
    for (const Strand& strand : branch.strands) {
      if (!strand.rows.empty()) CHECK_EQ(pass.head, Head(strand.context, strand.rows[0]));
    }
    CheckLeaves(branch);
  }

  int Head(int c, int row) const {
    return (int(rows_[c][row].size()) - 1) % settings_.shape.transition_dim();
  }

  // A row's window starts at a whole transition, as late as needed.
  int WindowStart(const Row& row) const {
    int start = 0;
    while (static_cast<int>(row.size()) - start > settings_.max_len) {
      start += settings_.shape.transition_dim();
    }
    return start;
  }

  // What a row's newest token must stand for.
  Prefix Expected(const Row& row) const {
    const Shape& shape = settings_.shape;
    const int start = WindowStart(row), len = static_cast<int>(row.size()) - start;
    Prefix prefix;
    for (int i = 0; i < shape.goal_len + len; ++i) {
      if (settings_.hidden[i] && i + 1 < shape.goal_len + len) continue;
      const int p = i - shape.goal_len;
      if (p < 0) {
        prefix.emplace_back(model_->GoalRow(settings_.goal[i], i), -1);
      } else {
        prefix.emplace_back(model_->EmbeddingRow(row[start + p], p % shape.transition_dim()), p);
      }
    }
    return prefix;
  }

  void CheckPass() {
    std::vector<bool> cropped;
    for (int c = 0; c < NumContexts(); ++c) {
      const Row& row = rows_[c][0];
      const int start = WindowStart(row);
      cropped.push_back(start != starts_[c]);
      CHECK_EQ(tree_.is_cropped(c), cropped[c]);
      const int len = settings_.shape.goal_len + static_cast<int>(row.size()) - start;
      CHECK_EQ(tree_.window_len(c), len);
      starts_[c] = start;
      hidden_nodes_[c].clear();
      cropped[c] ? prefixes_[c].clear() : ForgetDeadNodes(c);
    }
    const Pass& pass = tree_.MakePass();
    for (int i = 0; i < pass.count; ++i) AddNode(pass, i);
    CHECK_EQ(pass.chained, std::find(cropped.begin(), cropped.end(), true) != cropped.end());
    CHECK_EQ(pass.head, Head(0, 0));
    for (const Strand& strand : tree_.all().strands) {
      CHECK_EQ(std::set<int>(strand.rows.begin(), strand.rows.end()).size(), size_t(NumRows()));
    }
    CheckLeaves(tree_.all());
  }

  // Nodes that no row passes through may be used again.
  void ForgetDeadNodes(int c) {
    std::set<Prefix> alive;
    for (const Row& row : rows_[c]) {
      for (Prefix past = Expected(row); past.size() > 1;) {
        past.pop_back();
        alive.insert(past);
      }
    }
    std::erase_if(prefixes_[c], [&](const auto& node) { return !alive.contains(node.second); });
  }

  // Learns what a node of the pass stands for, from the nodes on its path.
  void AddNode(const Pass& pass, int i) {
    const int c = pass.node[i] / kMaxNodes;
    const bool is_hidden = settings_.hidden[WindowIndex(pass, i)];
    const uint32_t offset = static_cast<uint32_t>(pass.node[i] * model_->head_layout.stride);
    const int num_ancestors = pass.path_len[i] - (is_hidden ? 0 : 1);
    Prefix prefix;
    if (num_ancestors > 0) {
      const auto parent = prefixes_[c].find(pass.path[i][num_ancestors - 1]);
      CHECK(parent != prefixes_[c].end());
      if (parent != prefixes_[c].end()) prefix = parent->second;
    }
    CHECK_EQ(static_cast<int>(prefix.size()), num_ancestors);
    prefix.emplace_back(pass.embedding_row[i], pass.position[i]);
    if (!is_hidden) CHECK_EQ(pass.path[i][num_ancestors], offset);
    if (is_hidden) hidden_nodes_[c].push_back(offset);
    // one node a prefix, one prefix a node
    for (const auto& [other, known] : prefixes_[c]) CHECK(known != prefix || is_hidden);
    CHECK(prefixes_[c].emplace(offset, prefix).second);
    for (int j = 0; j < pass.path_len[i]; ++j) {
      const uint32_t node = pass.path[i][j];
      const auto& hidden = hidden_nodes_[c];
      CHECK(std::find(hidden.begin(), hidden.end(), node) == hidden.end());
      const Prefix& along = prefixes_[c][node];
      CHECK(j < static_cast<int>(prefix.size()) && static_cast<int>(along.size()) == j + 1 &&
            std::equal(along.begin(), along.end(), prefix.begin()));
    }
  }

  // A goal's tokens have no position; they come first, and all of them are seen.
  int WindowIndex(const Pass& pass, int i) const {
    if (pass.position[i] < 0) return pass.path_len[i] - 1;
    return settings_.shape.goal_len + pass.position[i];
  }

  // No leaves but those that rows are at, and these lie side by side.
  void CheckLeaves(const Branch& branch) {
    int num_leaves = 0;
    for (const Strand& strand : branch.strands) {
      int num_runs = 0, last = -1;
      for (int row : strand.rows) {
        const int slot = tree_.slot(strand.context, row);
        num_runs += slot != last;
        last = slot;
      }
      CHECK_EQ(CheckSlots(branch.pass, strand), num_runs);
      num_leaves += num_runs;
    }
    CHECK_EQ(branch.pass.num_leaves, num_leaves);
  }

  // Rows are at the leaf that stands for them, equal ones at the same. Returns how many leaves.
  int CheckSlots(const Pass& pass, const Strand& strand) {
    const int c = strand.context;
    std::map<Prefix, int> slots;
    for (int row : strand.rows) {
      const Prefix want = Expected(rows_[c][row]);
      const int slot = tree_.slot(c, row);
      CHECK(slot >= 0 && slot < pass.num_leaves);
      const int leaf = pass.num_internal() + slot;
      CHECK_EQ(pass.node[leaf] / kMaxNodes, c);
      const uint32_t offset = static_cast<uint32_t>(pass.node[leaf] * model_->head_layout.stride);
      CHECK(prefixes_[c][offset] == want);
      CHECK_EQ(slots.emplace(want, slot).first->second, slot);
      CHECK(std::equal(rows_[c][row].end() - strand.num_tokens, rows_[c][row].end(),
                       tree_.tokens(c, row)));
    }
    return static_cast<int>(slots.size());
  }

  const WalkSettings settings_;
  std::shared_ptr<const Model> model_;
  Random random_;
  TokenTree tree_;
  std::vector<std::vector<Row>> rows_;  // by context
  std::vector<int> starts_;             // of windows, by context
  std::vector<std::map<uint32_t, Prefix>> prefixes_;
  std::vector<std::vector<uint32_t>> hidden_nodes_;
  int num_branches_ = 0;
};

}  // namespace

TEST(TreeOfOneContext) {
  const Shape shape = SmallShapes()[0];  // 7 tokens a transition
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const Context context(Text("seed", seed));
    Walk({shape, HiddenValues(shape), 20, 2, {3}}, seed).Run(60);
    Walk({shape, HiddenValues(shape), 27, 3, {24}}, seed).Run(60);
    Walk({shape, HiddenValues(shape), 13, 2, {40}}, seed).Run(60);
    Walk many({shape, HiddenValues(shape), 20, 8, {3}}, seed);
    many.Run(60);
    CHECK(many.num_branches() > 10);
  }
}

TEST(TreeOfSeveralContexts) {
  const Shape shape = SmallShapes()[1];  // 4 tokens a transition
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const Context context(Text("seed", seed));
    // they are cropped in different passes
    Walk({shape, HiddenValues(shape), 11, 2, {1, 9, 5, 21}}, seed).Run(50);
  }
}

TEST(TreeWithGoal) {
  const Shape shape = WithGoal(SmallShapes()[0]);
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const Context context(Text("seed", seed));
    Walk({shape, HiddenValues(shape), shape.block_size(), 2, {4}, {1, 0, 1}}, seed).Run(60);
  }
}

// Any position but the first may be hidden, the window's last one too.
TEST(TreeWithOtherHiddenTokens) {
  const Shape shape = SmallShapes()[0];
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const Context context(Text("seed", seed));
    Random random(seed);
    std::vector<uint8_t> hidden(shape.block_size());
    for (size_t i = 1; i < hidden.size(); ++i) hidden[i] = random.Below(3) == 0;
    Walk({shape, hidden, 20, 2, {1, 8}}, seed).Run(50);
  }
}

// Nodes that branches leave over can be used again: there are enough for the nodes there may be.
TEST(TreeGetsNodesBackFromBranches) {
  const Shape shape = SmallShapes()[0];
  const auto model = MakeModel(shape, *ScalarOps());
  constexpr int kRows = 8, kPasses = 3;
  TokenTree tree(*model, std::vector<uint8_t>(shape.block_size()));
  tree.Reserve({.num_contexts = 1,
                .max_rows = kRows,
                .max_len = shape.block_size(),
                .max_tokens = shape.block_size(),
                .max_nodes = 1 + 4 * kRows * kPasses});
  tree.Begin({{0}}, {});
  tree.MakePass();
  tree.Tile(kRows);
  const int32_t tokens[] = {0, 1, 2, 3, 0, 1, 2, 3};  // half of the nodes that each pass may add
  for (int i = 0; i < 5; ++i) {
    tree.Append(tokens, kRows);
    CHECK(tree.Split({2, kPasses, kPasses}));
    for (int b = 0; b < 2; ++b) {
      for (int pass = 0; pass < kPasses; ++pass) {
        CHECK_EQ(tree.MakePass(tree.branch(b)).count, 2);
        tree.Append(tree.branch(b), tokens, kRows);
      }
    }
    tree.Join(1);
    CHECK_EQ(tree.MakePass().count, 4);
  }
}

// Rows that differ only in a hidden token become one again.
TEST(TreeJoinsRowsAfterAHiddenToken) {
  const Shape shape = SmallShapes()[1];  // observation, action, reward, value
  const auto model = MakeModel(shape, *ScalarOps());
  TokenTree tree(*model, HiddenValues(shape));
  tree.Reserve(
      {.num_contexts = 1, .max_rows = 2, .max_len = 11, .max_tokens = 16, .max_nodes = 99});
  tree.Begin({{0, 1, 2}}, {});
  tree.MakePass();
  tree.Tile(2);
  const int32_t values[] = {3, 4}, same[] = {1, 1};
  tree.Append(values, 2);
  CHECK_EQ(tree.MakePass().num_leaves, 2);
  tree.Append(same, 2);
  CHECK_EQ(tree.MakePass().num_leaves, 1);
  CHECK_EQ(tree.slot(0, 0), tree.slot(0, 1));
}

}  // namespace tt::test
