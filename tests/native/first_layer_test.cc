// Rows of the first layer by placed token: which are known, which are missing, what is forgotten.
#include "first_layer.h"

#include <set>

#include "check.h"
#include "engine.h"
#include "isa.h"
#include "random.h"
#include "small_models.h"

namespace tt::test {
namespace {

using Placed = std::vector<int64_t>;
using Indices = std::vector<int32_t>;

size_t RowBytes(const Model& model) { return 3 * model.shape.attn_width() * sizeof(float); }

// Fills what is missing with the placed token's own number, as a decoder would with its row.
void Fill(FirstLayer& first, const Placed& placed, size_t width) {
  float* rows = first.missing_rows();
  for (size_t i = 0; i < first.missing().size(); ++i) {
    for (size_t k = 0; k < width; ++k) rows[i * width + k] = placed[first.missing()[i]];
  }
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

TEST(FirstLayerMissesAPlacedTokenOnce) {
  const auto model = MakeModel(SmallShapes()[0], *ScalarOps());
  FirstLayer first(*model, 1 << 20);
  first.Find({5, 7, 5});
  CHECK(first.missing() == (Indices{0, 1}));
  CHECK(first[0] == first[2] && first[0] == first.missing_rows());
  first.Find({8, 7, 9, 5});
  CHECK(first.missing() == (Indices{0, 2}));
  first.Find({9, 8});
  CHECK(first.missing().empty());
  first.Find({});
  CHECK(first.missing().empty());
}

// However little room there is, every pass finds its own rows; room grows to less than twice what
// one pass needs, equal tokens counted once.
TEST(FirstLayerForgetsRatherThanGrows) {
  const auto model = MakeModel(SmallShapes()[0], *ScalarOps());
  const size_t width = 3 * model->shape.attn_width();
  for (size_t num_rows : {0, 1, 7, 40}) {
    FirstLayer first(*model, num_rows * RowBytes(*model));
    Random random(num_rows);
    size_t most = num_rows;
    for (int pass = 0; pass < 50; ++pass) {
      Placed placed;
      for (int32_t token : random.Tokens(1 + pass % 9, 20)) placed.insert(placed.end(), 3, token);
      first.Find(placed);
      Fill(first, placed, width);
      for (size_t i = 0; i < placed.size(); ++i) {
        CHECK_EQ(first[i][0], float(placed[i]));
        CHECK_EQ(first[i][width - 1], float(placed[i]));
      }
      most = std::max(most, 2 * std::set<int64_t>(placed.begin(), placed.end()).size());
      CHECK_LE(first.allocated_bytes(), most * (RowBytes(*model) + 4 * 16));
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
  const Placed placed = {shape.num_placed() - 1, 3, shape.Placed(3, 4096), int64_t{3} << 32};
  first.Find(placed);
  CHECK(first.missing() == (Indices{0, 1, 2, 3}));
  first.Find(placed);
  CHECK(first.missing().empty());
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
