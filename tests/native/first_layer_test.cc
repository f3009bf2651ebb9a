// Rows of the first layer by placed token: which are known, which are forgotten, many threads at
// it.
#include "first_layer.h"

#include <atomic>
#include <set>
#include <vector>

#include "check.h"
#include "engine.h"
#include "isa.h"
#include "random.h"
#include "small_models.h"
#include "thread_pool.h"

namespace tt::test {
namespace {

size_t Width(const Model& model) { return 3 * model.shape.attn_width(); }
size_t RowBytes(const Model& model) { return Width(model) * sizeof(float); }

// Of a placed token: its own number everywhere.
std::vector<float> RowOf(const Model& model, int64_t placed) {
  return std::vector<float>(Width(model), static_cast<float>(placed));
}

bool IsRowOf(const float* row, const Model& model, int64_t placed) {
  return row != nullptr && RowOf(model, placed) == std::vector<float>(row, row + Width(model));
}

}  // namespace

TEST(PlacedTokensAreDistinct) {
  const Shape shape = WithGoal(SmallShapes()[0]);
  std::set<int64_t> seen;
  for (int position = 0; position < shape.block_size(); ++position) {
    for (int token = 0; token < shape.num_ids(); ++token)
      seen.insert(shape.Placed(token, position));
  }
  for (int i = 0; i < shape.goal_len; ++i) {
    for (int token = 0; token < shape.vocab_size; ++token) seen.insert(shape.PlacedGoal(token, i));
  }
  const int count = shape.block_size() * shape.num_ids() + shape.goal_len * shape.vocab_size;
  CHECK_EQ(static_cast<int>(seen.size()), count);
  CHECK_EQ(shape.num_placed(), int64_t{count});
  CHECK(*seen.begin() == 0 && *seen.rbegin() == count - 1);
}

TEST(FirstLayerKeepsRows) {
  const auto model = MakeModel(SmallShapes()[0], *ScalarOps());
  FirstLayer first(*model, 1 << 20);
  CHECK(first.Find(5) == nullptr);
  first.Add(5, RowOf(*model, 5).data());
  first.Add(0, RowOf(*model, 0).data());
  const float* row = first.Find(5);
  first.Add(5, RowOf(*model, 6).data());  // known already
  first.MakeRoom();                       // there is room
  CHECK(first.Find(5) == row && IsRowOf(row, *model, 5));
  CHECK(IsRowOf(first.Find(0), *model, 0));
  CHECK(first.Find(7) == nullptr);
}

// However little room there is: what was added first stays until all are forgotten.
TEST(FirstLayerForgetsRatherThanGrows) {
  const auto model = MakeModel(SmallShapes()[0], *ScalarOps());
  for (int num_rows : {0, 1, 7, 40}) {
    const Context context(Text("rows", num_rows));
    FirstLayer first(*model, num_rows * RowBytes(*model));
    CHECK_LE(first.allocated_bytes(), num_rows * (RowBytes(*model) + 4 * 16) + 4 * 16);
    for (int round = 0; round < 3; ++round) {
      const int begin = 100 * round;
      for (int placed = begin; placed < begin + 60; ++placed) {
        first.Add(placed, RowOf(*model, placed).data());
        if (placed - begin < num_rows) first.MakeRoom();
      }
      for (int placed = begin; placed < begin + 60; ++placed) {
        if (placed - begin < num_rows) {
          CHECK(IsRowOf(first.Find(placed), *model, placed));
        } else {
          CHECK(first.Find(placed) == nullptr);
        }
      }
      first.MakeRoom();
      for (int placed = 0; placed < 300; ++placed) CHECK(first.Find(placed) == nullptr);
    }
  }
}

// Tokens of a vocabulary whose products with positions are past 32 bits.
TEST(FirstLayerOfManyPlacedTokens) {
  Shape shape = SmallShapes()[0];
  shape.vocab_size = 1 << 20;
  shape.num_transitions = 1100;
  CHECK(shape.num_placed() > int64_t{1} << 32);
  const auto model = MakeModel(SmallShapes()[0], *ScalarOps());
  FirstLayer first(*model, 9 * RowBytes(*model));
  for (int64_t placed :
       {shape.num_placed() - 1, int64_t{3}, shape.Placed(3, 4096), int64_t{3} << 32}) {
    CHECK(first.Find(placed) == nullptr);
    first.Add(placed, RowOf(*model, placed).data());
    CHECK(IsRowOf(first.Find(placed), *model, placed));
  }
}

// What a thread finds is whole, also of a table that was forgotten before; where there is room
// every row is found in the end.
TEST(FirstLayerOfManyThreads) {
  constexpr int kThreads = 4, kPlaced = 40;
  const auto model = MakeModel(SmallShapes()[0], *ScalarOps());
  ThreadPool pool(kThreads);
  const auto fill = [&](FirstLayer& first, int begin) {
    std::atomic<int> wrong = 0;
    pool.Run(kThreads, [&](int task, int) {
      for (int i = 0; i < 4 * kPlaced; ++i) {
        const int placed = begin + (i + task * kPlaced / kThreads) % kPlaced;
        if (const float* row = first.Find(placed)) {
          wrong += !IsRowOf(row, *model, placed);
        } else {
          first.Add(placed, RowOf(*model, placed).data());
        }
      }
    });
    CHECK_EQ(wrong.load(), 0);
  };
  FirstLayer small(*model, kPlaced / 2 * RowBytes(*model));
  for (int round = 0; round < 50; ++round) {
    fill(small, round * kPlaced / 4);
    small.MakeRoom();
  }
  for (int round = 0; round < 50; ++round) {
    FirstLayer large(*model, kThreads * kPlaced * RowBytes(*model));
    fill(large, 0);
    for (int placed = 0; placed < kPlaced; ++placed) {
      CHECK(IsRowOf(large.Find(placed), *model, placed));
    }
  }
}

TEST(DecoderCountsTheFirstLayerOnce) {
  const Shape shape = SmallShapes()[1];
  const auto model = MakeModel(shape, *ScalarOps());
  Engine engine(*model, {.max_len = 11, .max_tokens = 20, .max_nodes = 99}, 1);
  double flops[2];
  for (double& of_pass : flops) {
    engine.tree.Begin({{0, 1, 2}}, {});
    engine.decoder.ResetStats();
    engine.decoder.Forward(engine.tree.MakePass());
    of_pass = engine.decoder.stats().gemm_flops;
  }
  const double projection = 6.0 * shape.embed_dim * shape.embed_dim;
  CHECK_EQ(flops[0] - flops[1], 3 * projection);
}

}  // namespace tt::test
