// Logits of beams that grow, share and are cropped, against fresh encodes and double precision.
#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

#include "check.h"
#include "engine.h"
#include "isa.h"
#include "oracle.h"
#include "random.h"
#include "small_models.h"
#include "tables.h"

namespace tt::test {
namespace {

using Row = std::vector<int32_t>;

// Beams as in a plan: contexts end at the same dimension, rows branch, tokens are added, some rows
// are kept; `visit` sees every row after every pass.
template <typename Visit>
void GrowBeams(const Model& model, int max_len, const std::vector<int>& context_lens,
               const Row& goal, int num_threads, size_t first_layer_bytes, Visit&& visit) {
  constexpr int kBeams = 2, kRows = 6;
  const int num_contexts = static_cast<int>(context_lens.size()),
            dim = model.shape.transition_dim();
  Engine engine(model,
                {.num_contexts = num_contexts,
                 .max_rows = kRows,
                 .max_len = max_len,
                 .max_tokens = max_len + 3 * dim,
                 .max_nodes = kRows * (max_len + 2 * dim)},
                num_threads, first_layer_bytes);
  Random random(5);
  std::vector<Row> contexts;
  for (int len : context_lens) contexts.push_back(random.Tokens(len, model.shape.num_ids()));
  engine.tree.Begin(contexts, goal);
  for (int step = 0; step < 3 * dim; ++step) {
    engine.decoder.Forward(engine.tree.MakePass());
    for (int c = 0; c < num_contexts; ++c) {
      for (int row = 0; row < engine.tree.num_rows(); ++row) {
        const int32_t* tokens = engine.tree.tokens(c, row);
        visit({tokens, tokens + engine.tree.num_tokens(c)}, engine.Logits(c, row));
      }
    }
    if (step % dim == 0) engine.tree.Tile(kRows / engine.tree.num_rows());
    const int num_rows = engine.tree.num_rows();
    engine.tree.Append(random.Tokens(size_t(num_contexts) * num_rows, model.shape.num_ids()).data(),
                       num_rows);
    if (step % dim == dim - 1) {
      engine.tree.Keep(random.Tokens(num_contexts * kBeams, num_rows).data(), kBeams);
    }
  }
}

// The sums of a row are the same, and in the same order, whatever the rows beside it are.
void CheckIncremental(const Shape& shape, const Ops& ops, bool bf16, int num_threads,
                      size_t first_layer_bytes = 1 << 20) {
  const Context context(Text(ops.name, bf16 ? "bf16" : "fp32", "embed", shape.embed_dim, "goal",
                             shape.goal_len, "threads", num_threads));
  const auto model = MakeModel(shape, ops, bf16);
  const Row goal(shape.goal_len, 1);
  const int dim = shape.transition_dim(), len = shape.observation_dim;
  for (int max_len : {shape.block_size(), 2 * dim - 1}) {
    FreshEncoder fresh(*model, max_len);
    GrowBeams(*model, max_len, {len, len + 3 * dim}, goal, num_threads, first_layer_bytes,
              [&](const Row& row, const std::vector<float>& logits) {
                CHECK(logits == fresh.Logits(goal, row));
              });
  }
}

double LargestError(const std::vector<float>& got, const Doubles& want) {
  double error = 0.0;
  for (size_t i = 0; i < want.size(); ++i) error = std::max(error, std::abs(got[i] - want[i]));
  return error;
}

struct Errors {
  std::vector<double> of_table;  // largest, as TestedOps; the last one is the scalar table's
  double magnitude = 0.0;        // largest logit
};

Errors MeasureErrors(const Shape& shape, const WeightSource& weights, bool bf16) {
  const std::vector<uint8_t> hidden = HiddenValues(shape);
  Errors errors;
  for (const Ops* ops : TestedOps()) {
    const Model model(shape, weights, *ops, bf16);
    FreshEncoder fresh(model, shape.block_size());
    Random random(1);
    double worst = 0.0;
    for (int len = 1; len <= shape.block_size(); ++len) {
      const Row window = random.Tokens(len, shape.num_ids());
      const Row goal = random.Tokens(shape.goal_len, shape.vocab_size);
      const Doubles want = WindowLogits(shape, weights, hidden, goal, window);
      for (double logit : want) errors.magnitude = std::max(errors.magnitude, std::abs(logit));
      worst = std::max(worst, LargestError(fresh.Logits(goal, window), want));
    }
    errors.of_table.push_back(worst);
  }
  return errors;
}

void CheckErrors(const Shape& shape, const WeightSource& weights, bool bf16) {
  const Errors errors = MeasureErrors(shape, weights, bf16);
  const double scalar = errors.of_table.back();
  // per layer some 10 sums of up to 4 embed_dim terms, whose errors add up as in a random walk
  const double roundings = 10.0 * shape.num_layers * std::sqrt(4.0 * shape.embed_dim);
  const double rounding = bf16 ? 0x1p-9 : kRounding;
  const Context context(
      Text("embed", shape.embed_dim, "goal", shape.goal_len, bf16 ? "bf16" : "fp32"));
  CHECK_LE(scalar, roundings * rounding * errors.magnitude);
  for (size_t i = 0; i < errors.of_table.size(); ++i) {
    const Context table(TestedOps()[i]->name);
    CHECK_LE(errors.of_table[i], 2 * scalar + 16 * kRounding * errors.magnitude);
  }
}

// The first column of a matrix is so small that float16 would take its digits.
EditedWeights TinyColumn(const std::string& matrix, int num_inputs) {
  return EditedWeights([matrix, num_inputs](const std::string& name, std::vector<float>& values) {
    for (int i = 0; name == matrix && i < num_inputs; ++i) values[i] *= 1e-7f;
  });
}

}  // namespace

TEST(IncrementalLogitsEqualFreshOnes) {
  for (const Ops* ops : TestedOps()) {
    for (const Shape& shape : SmallShapes()) CheckIncremental(shape, *ops, false, 1);
    for (int i : {1, 5, 6}) CheckIncremental(SmallShapes()[i], *ops, true, 1);
    CheckIncremental(WithGoal(SmallShapes()[0]), *ops, false, 1);
    CheckIncremental(SmallShapes()[0], *ops, false, 3);
  }
}

// By several threads at once, each with branches of its own, whose rows part further.
TEST(LogitsOfBranches) {
  constexpr int kRows = 12, kTimes = 20, kPasses = 6;
  for (const Ops* ops : TestedOps()) {
    for (const bool bf16 : {false, true}) {
      const Context context(Text(ops->name, bf16 ? "bf16" : "fp32"));
      const Shape shape = SmallShapes()[0];
      const auto model = MakeModel(shape, *ops, bf16);
      Engine engine(*model,
                    {.num_contexts = 2,
                     .max_rows = kRows * kTimes,
                     .max_len = shape.block_size(),
                     .max_tokens = shape.block_size(),
                     .max_nodes = 3999},
                    3);
      Random random(5);
      const auto draw = [&] { return random.Tokens(2 * kRows * kTimes, shape.num_ids()); };
      engine.tree.Begin({random.Tokens(3, 8), random.Tokens(10, 8)}, {});
      engine.decoder.Forward(engine.tree.MakePass());
      engine.tree.Tile(kRows);
      engine.tree.Append(draw().data(), kRows * kTimes);
      CHECK(engine.tree.Split({4, kPasses, kTimes * kPasses}));
      engine.decoder.ReserveBranches(2 * kRows * kTimes);
      std::vector<Row> tokens;
      for (int i = 0; i < kPasses; ++i) tokens.push_back(draw());
      std::mutex mutex;
      int most_nodes = 0;                                    // of a pass: more than a chunk has
      std::vector<std::pair<Row, std::vector<float>>> seen;  // tokens and their logits
      engine.pool.Run(engine.tree.num_branches(), [&](int b, int thread) {
        Branch& branch = engine.tree.branch(b);
        for (int i = 0; i < kPasses; ++i) {
          if (i == 2) engine.tree.Tile(branch, kTimes);
          const Pass& pass = engine.tree.MakePass(branch);
          engine.decoder.ForwardBranch(pass, thread);
          const std::lock_guard lock(mutex);
          most_nodes = std::max(most_nodes, pass.count);
          for (const Strand& strand : branch.strands) {
            for (int row : strand.rows) {
              const int32_t* of_row = engine.tree.tokens(strand.context, row);
              const float* logits =
                  engine.decoder.branch_logits(thread, engine.tree.slot(strand.context, row));
              seen.push_back(
                  {{of_row, of_row + strand.num_tokens}, {logits, logits + shape.num_ids()}});
            }
          }
          engine.tree.Append(branch, tokens[i].data(), kRows * kTimes);
        }
      });
      CHECK_EQ(seen.size(), size_t(2 * kRows * (2 + 4 * kTimes)));
      CHECK(engine.tree.num_branches() > 2 && most_nodes > kMaxRows);
      const FreshEncoder fresh(*model, shape.block_size());
      for (const auto& [row, logits] : seen) CHECK(logits == fresh.Logits({}, row));
    }
  }
}

// However little is kept of the first layer.
TEST(IncrementalLogitsOfAForgetfulDecoder) {
  for (bool bf16 : {false, true}) {
    for (const Shape& shape : {SmallShapes()[1], WithGoal(SmallShapes()[0])}) {
      const size_t row_bytes = 3 * shape.attn_width() * sizeof(float);
      for (size_t num_rows : {0, 1, 13}) {
        CheckIncremental(shape, FindOps("auto"), bf16, 3, num_rows * row_bytes);
      }
    }
  }
}

// A value token's own logits are those of a token that sees its past, but not itself.
TEST(LogitsEqualDoublePrecision) {
  std::vector<Shape> shapes = SmallShapes();
  shapes.push_back(WithGoal(shapes[0]));
  for (const Shape& shape : shapes) {
    for (bool bf16 : {false, true}) {
      CheckErrors(shape, RandomWeights(0), bf16);
    }
  }
}

// Matrices decide one by one whether they are in float16, and their inputs are made accordingly.
TEST(LogitsWhereOneMatrixIsNotInFp16) {
  const Shape shape = WithGoal(SmallShapes()[4]);
  const struct {
    std::string name;
    int num_inputs;
    std::function<MatrixView(const Model&)> view;
  } matrices[] = {
      {"blocks.1.attn.value", shape.embed_dim, [](auto& m) { return m.layers[1].kvq.view(); }},
      {"blocks.1.attn.proj", shape.embed_dim, [](auto& m) { return m.layers[1].proj.view(); }},
      {"blocks.1.mlp.0", shape.embed_dim, [](auto& m) { return m.layers[1].up.view(); }},
      {"blocks.1.mlp.2", 4 * shape.embed_dim, [](auto& m) { return m.layers[1].down.view(); }},
      {"head", shape.embed_dim, [](auto& m) { return m.heads[0].view(); }},
  };
  for (const auto& matrix : matrices) {
    const Context context(matrix.name);
    const EditedWeights weights = TinyColumn(matrix.name + ".weight", matrix.num_inputs);
    CheckErrors(shape, weights, true);
    for (const Ops* ops : TestedOps()) {
      const Model model(shape, weights, *ops, true);
      CHECK(matrix.view(model).type == ops->bf16_weights);
      for (const auto& other : matrices) {
        const bool is_half = ops->fp16_weights && &other != &matrix;
        CHECK_EQ(other.view(model).type == NumberType::kFp16, is_half);
      }
      CHECK_EQ(model.heads[1].view().type == NumberType::kFp16, ops->fp16_weights);
    }
  }
}

TEST(DecoderCountsItsNodes) {
  const Shape shape = SmallShapes()[1];
  const auto model = MakeModel(shape, *ScalarOps());
  Engine engine(
      *model, {.num_contexts = 2, .max_rows = 4, .max_len = 11, .max_tokens = 20, .max_nodes = 99},
      2);
  engine.tree.Begin({{0, 1, 2}, {3}}, {});
  engine.decoder.Forward(engine.tree.MakePass());
  CHECK_EQ(engine.decoder.stats().reencoded_nodes, 4);
  engine.tree.Tile(4);
  const int32_t tokens[] = {0, 1, 1, 1, 2, 2, 2, 2};
  engine.tree.Append(tokens, 4);
  engine.decoder.Forward(engine.tree.MakePass());
  CHECK_EQ(engine.decoder.stats().decoded_nodes, 3);
  CHECK(engine.decoder.stats().gemm_flops > 0.0 && engine.decoder.stats().attention_flops > 0.0);
  CHECK(engine.decoder.allocated_bytes() > 0);
  engine.decoder.ResetStats();
  CHECK_EQ(engine.decoder.stats().decoded_nodes + engine.decoder.stats().reencoded_nodes, 0);
}

}  // namespace tt::test
