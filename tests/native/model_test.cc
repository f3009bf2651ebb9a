#include "model.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "check.h"
#include "float16.h"
#include "isa.h"
#include "oracle.h"
#include "small_models.h"
#include "tables.h"

namespace tt::test {
namespace {

// A model's weights, all zero, of which one is missing or has another size.
class FaultyWeights : public WeightSource {
 public:
  explicit FaultyWeights(std::string missing) : missing_(std::move(missing)) {}
  const float* Get(const std::string& name, size_t size) const override {
    if (name == missing_) throw std::invalid_argument("weights: expected " + name);
    zeros_.resize(std::max(zeros_.size(), size));
    return zeros_.data();
  }

 private:
  std::string missing_;
  mutable std::vector<float> zeros_;
};

// Checks that a shape with one size changed is refused, and that the error names it.
void CheckRefused(int Shape::* size, int value, const std::string& name) {
  const Context context(Text(name, value));
  Shape shape = SmallShapes()[0];
  shape.*size = value;
  CHECK_THROWS(std::invalid_argument, shape.Check());
  CHECK_THROWS(std::invalid_argument, Model(shape, RandomWeights(0), *ScalarOps(), false));
  try {
    shape.Check();
  } catch (const std::invalid_argument& error) {
    CHECK(std::string(error.what()).find(name) != std::string::npos);
  }
}

}  // namespace

TEST(ShapeRefusesBadSizes) {
  for (const Shape& shape : SmallShapes()) {
    shape.Check();
    WithGoal(shape).Check();
  }
  for (int value : {0, -1, (1 << 20) + 1}) {
    CheckRefused(&Shape::observation_dim, value, "observation_dim");
    CheckRefused(&Shape::action_dim, value, "action_dim");
    CheckRefused(&Shape::vocab_size, value, "vocab_size");
    CheckRefused(&Shape::num_transitions, value, "num_transitions");
    CheckRefused(&Shape::num_layers, value, "num_layers");
    CheckRefused(&Shape::num_heads, value, "num_heads");
    CheckRefused(&Shape::embed_dim, value, "embed_dim");
  }
  CheckRefused(&Shape::goal_len, -1, "goal_len");
  CheckRefused(&Shape::num_heads, 3, "embed_dim");    // 16 is no multiple of it
  CheckRefused(&Shape::num_heads, 17, "num_heads");   // more than embed_dim
  CheckRefused(&Shape::vocab_size, 1, "vocab_size");  // a token would say nothing
  // each is allowed, but there would be too many embeddings
  Shape shape = SmallShapes()[0];
  shape.vocab_size = shape.observation_dim = 1 << 20;
  CHECK_THROWS(std::invalid_argument, shape.Check());
}

TEST(ModelPassesOnWhatItsWeightsThrow) {
  const Shape shape = WithGoal(SmallShapes()[0]);
  Model(shape, FaultyWeights(""), *ScalarOps(), false);
  for (const char* name : {"tok_emb.weight", "goal_emb.weight", "pos_emb", "ln_f.bias",
                           "blocks.1.attn.query.weight", "blocks.0.mlp.2.bias", "head.weight"}) {
    const Context context(name);
    CHECK_THROWS(std::invalid_argument, Model(shape, FaultyWeights(name), *ScalarOps(), false));
  }
}

// The index formulas in ops.h.
TEST(PackedMatrixLayout) {
  constexpr int kRows = 32, kCols = 64, kPanel = 16;
  const auto number = [](int i, int col) { return static_cast<float>(i * kCols + col) + 0.3f; };
  for (NumberType type : {NumberType::kFloat32, NumberType::kRounded, NumberType::kBf16}) {
    const bool bf16 = type == NumberType::kBf16;
    PackedMatrix packed(kRows, kCols, kPanel, type);
    for (int col = 0; col < kCols; ++col) {
      packed.SetBias(col, static_cast<float>(col));
      for (int i = 0; i < kRows; ++i) packed.Set(i, col, number(i, col));
    }
    const MatrixView view = packed.view();
    CHECK(view.k == kRows && view.n == kCols && view.type == type);
    const MatrixView part = packed.view(2 * kPanel);
    const size_t begin = static_cast<const char*>(part.data) - static_cast<const char*>(view.data);
    CHECK_EQ(begin, 2 * kPanel * kRows * (bf16 ? sizeof(uint16_t) : sizeof(float)));
    CHECK(part.k == kRows && part.n == kCols - 2 * kPanel && part.type == type);
    CHECK_EQ(part.bias[1], 2.0f * kPanel + 1.0f);
    for (int col = 0; col < kCols; ++col) {
      CHECK_EQ(view.bias[col], static_cast<float>(col));
      const size_t panel = col / kPanel, column = col % kPanel;
      for (int i = 0; i < kRows; ++i) {
        if (bf16) {
          const size_t pair = (panel * kRows / 2 + i / 2) * kPanel + column;
          const uint16_t bits = static_cast<const uint16_t*>(view.data)[pair * 2 + i % 2];
          CHECK_EQ(std::bit_cast<float>(uint32_t{bits} << 16), RoundToBf16(number(i, col)));
        } else {
          const size_t index = (panel * kRows + i) * kPanel + column;
          const float want = number(i, col);
          CHECK_EQ(static_cast<const float*>(view.data)[index],
                   type == NumberType::kRounded ? RoundToBf16(want) : want);
        }
      }
    }
  }
}

// Every float16 but those that are no numbers, and what lies between two of them.
TEST(Fp16IsRoundedToNearestEven) {
  const auto value = [](int bits) {
    const int exponent = bits >> 10, mantissa = bits & 0x3ff;
    return exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  };
  for (int bits = 0; bits < 0x7bff; ++bits) {
    const float x = static_cast<float>(value(bits)), next = static_cast<float>(value(bits + 1));
    const float middle = (x + next) / 2;  // exact
    CHECK_EQ(ToFp16(x), bits);
    CHECK_EQ(ToFp16(-x), bits | 0x8000);
    CHECK_EQ(FromFp16(static_cast<uint16_t>(bits)), x);
    CHECK_EQ(FromFp16(static_cast<uint16_t>(bits | 0x8000)), -x);
    CHECK_EQ(ToFp16(middle), bits + bits % 2);
    CHECK_EQ(ToFp16(std::nextafter(middle, 0.0f)), bits);
    CHECK_EQ(ToFp16(std::nextafter(middle, next)), bits + 1);
    CHECK_EQ(RoundToFp16(middle), value(bits + bits % 2));
  }
}

// The index formula in ops.h, and the bounds of what fits.
TEST(PackedMatrixInFp16) {
  constexpr int kRows = 32, kCols = 64, kPanel = 32;
  const auto number = [](int i, int col) { return static_cast<float>(i - col) / 64.0f; };
  const auto pack = [&](float scale) {
    PackedMatrix packed(kRows, kCols, kPanel, NumberType::kRounded);
    for (int col = 0; col < kCols; ++col) {
      packed.SetBias(col, 3.0f);
      for (int i = 0; i < kRows; ++i) packed.Set(i, col, scale * number(i, col));
    }
    return packed;
  };
  PackedMatrix packed = pack(1.0f);
  double norm = 0.0;  // of the last column, the largest
  for (int i = 0; i < kRows; ++i) norm += std::pow(number(i, kCols - 1), 2);
  norm = std::sqrt(norm);
  CHECK_LE(std::abs(packed.BoundOutput(7.0, kCols - 1, kCols) - (7.0 * norm + 3.0)), 1e-9);
  CHECK(packed.TryFp16(1.0));
  const MatrixView view = packed.view();
  CHECK(view.type == NumberType::kFp16 && view.bias[1] == 3.0f);
  for (int col = 0; col < kCols; ++col) {
    const int panel = col / kPanel, place = col % kPanel / 2 + col % 2 * (kPanel / 2);
    for (int i = 0; i < kRows; ++i) {
      const int pair = (panel * kRows / 2 + i / 2) * kPanel + place;
      CHECK_EQ(static_cast<const uint16_t*>(view.data)[pair * 2 + i % 2], ToFp16(number(i, col)));
    }
  }
  const auto fits = [&](float scale, double input, const std::vector<float>& column = {}) {
    PackedMatrix other = pack(scale);
    for (int i = 0; !column.empty() && i < kRows; ++i) {
      other.Set(i, 5, i < static_cast<int>(column.size()) ? column[i] : 0.0f);
    }
    const bool fit = other.TryFp16(input);
    CHECK((other.view().type == NumberType::kFp16) == fit);
    return fit;
  };
  CHECK(fits(1.0f, 0x1p12) && !fits(1.0f, 0x1p14));      // the sum
  CHECK(!fits(0x1p-8f, 0x1p16) && !fits(1.0f, 0x1p-7));  // the input
  CHECK(!fits(0x1p16f, 0x1p-5) && !fits(0x1p-9f, 4.0));  // the weights
  CHECK(!fits(0x1p-5f, 0x1p-5) && !fits(0.0f, 1.0));     // the sum once more
  // a weight that loses 2^-25, the last of its eight digits, beside others that lose nothing:
  // 2^-8.8 and 2^-9.2 of the column's norm
  const float loses = 255 * 0x1p-25f, exact = 0x1p-17f;
  CHECK(!fits(1.0f, 1.0, {loses, exact, exact}));
  CHECK(fits(1.0f, 1.0, {loses, exact, exact, exact, exact}));
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  CHECK(!fits(1.0f, kInfinity) && !fits(1.0f, std::nan("")) && !fits(1.0f, 1.0, {kNaN}));
}

namespace {

// Those whose name contains `part` are `scale` times as large.
EditedWeights ScaledWeights(const std::string& part, double scale) {
  return EditedWeights([part, scale](const std::string& name, std::vector<float>& values) {
    if (name.find(part) == std::string::npos) return;
    for (float& x : values) x = static_cast<float>(x * scale);
  });
}

// The bounds of csrc/model.cc, from the weights as they are.
class Bounds {
 public:
  Bounds(const WeightSource& weights, int embed) : weights_(weights), embed_(embed) {}

  double Normed(const std::string& name) const {
    const float* gamma = weights_.Get(name + ".weight", embed_);
    const float* beta = weights_.Get(name + ".bias", embed_);
    double largest = 0.0, squares = 0.0;
    for (int i = 0; i < embed_; ++i) {
      largest = std::max(largest, std::abs(double{gamma[i]}));
      squares += double{beta[i]} * beta[i];
    }
    return std::sqrt(double(embed_)) * largest + std::sqrt(squares);
  }
  double Output(const std::string& name, double input, int n) const {
    const float* bias = weights_.Get(name + ".bias", n);
    double squares = 0.0;
    for (int o = 0; o < n; ++o) {
      squares += std::pow(Norm(name, embed_, n, o) * input + std::abs(bias[o]), 2);
    }
    return std::sqrt(squares);
  }
  double LargestNorm(const std::string& name, int k, int n) const {
    double largest = 0.0;
    for (int o = 0; o < n; ++o) largest = std::max(largest, Norm(name, k, n, o));
    return largest;
  }

 private:
  double Norm(const std::string& name, int k, int n, int row) const {
    const float* weight = weights_.Get(name + ".weight", size_t(n) * k) + size_t(row) * k;
    double squares = 0.0;
    for (int i = 0; i < k; ++i) squares += double{weight[i]} * weight[i];
    return std::sqrt(squares);
  }

  const WeightSource& weights_;
  int embed_;
};

// All tables, and one that takes float16 wherever this runs: models call nothing of it.
std::vector<const Ops*> TablesOfModels() {
  static const Ops half = [] {
    Ops ops = *ScalarOps();
    ops.name = "float16";
    ops.panel_width = kPad;
    ops.bundle_heads = 4;
    ops.fp16_weights = ops.fp16_keys = true;
    return ops;
  }();
  std::vector<const Ops*> tables = TestedOps();
  tables.push_back(&half);
  return tables;
}

// What of a layer is in float16: keys, kvq, proj, up, down.
std::string InFp16(const Layer& layer) {
  std::string found;
  const auto add = [&found](const char* name, NumberType type) {
    if (type == NumberType::kFp16) found += std::string(name) + " ";
  };
  add("keys", layer.key_type);
  add("kvq", layer.kvq.view().type);
  add("proj", layer.proj.view().type);
  add("up", layer.up.view().type);
  add("down", layer.down.view().type);
  return found;
}

// What a table takes of such a list.
std::string Taken(const Ops& ops, const std::string& parts) {
  const std::string keys = "keys ";
  const bool has_keys = parts.starts_with(keys);
  return (has_keys && ops.fp16_keys ? keys : "") +
         (ops.fp16_weights ? parts.substr(has_keys ? keys.size() : 0) : "");
}

}  // namespace

// Up to the scale at which one bound says that a number could become too large.
TEST(ModelUsesFp16WhereItFits) {
  const Shape shape = SmallShapes()[4];  // with bundles of heads
  const int embed = shape.embed_dim;
  const RandomWeights weights(0);
  const Bounds bounds(weights, embed);
  const std::string block = "blocks.1.", attn = block + "attn.";
  const double first = bounds.Normed(block + "ln1"), second = bounds.Normed(block + "ln2");
  const double keys = bounds.Output(attn + "key", first, embed),
               values = bounds.Output(attn + "value", first, embed),
               queries = bounds.Output(attn + "query", first, embed) / std::sqrt(shape.head_dim());
  const double hidden = bounds.Output(block + "mlp.0", second, 4 * embed);
  const double down = bounds.LargestNorm(block + "mlp.2", 4 * embed, embed);
  const double head = bounds.LargestNorm("head", embed, shape.num_ids() * shape.transition_dim());
  constexpr double kMost = 0x1p15;
  const double head_limit = kMost / (bounds.Normed("ln_f") * head);
  const std::string all = "keys kvq proj up down ";
  const struct {
    std::string part;
    double limit;  // of its scale
    std::string below, above;
  } cases[] = {
      {attn + "query", kMost / (keys * queries), all, "kvq proj up down "},
      {attn + "key", kMost / (keys * queries), all, "kvq proj up down "},
      {attn + "value", kMost / (kFp16Values * values), all, "kvq proj up down "},
      {attn + "value", kMost / (values * bounds.LargestNorm(attn + "proj", embed, embed)),
       "kvq proj up down ", "kvq up down "},
      {attn + "query", kMost / (first * bounds.LargestNorm(attn + "query", embed, embed)),
       "kvq proj up down ", "proj up down "},
      {attn + "query", 0x1p-6 / queries, "kvq proj up down ", all},
      {block + "ln2", kMost / (second * bounds.LargestNorm(block + "mlp.0", embed, 4 * embed)),
       "keys kvq proj up ", "keys kvq proj "},
      {attn + "proj", kMost / (values * bounds.LargestNorm(attn + "proj", embed, embed)), all,
       "keys kvq up down "},
      {block + "mlp.0", kMost / (hidden * down), all, "keys kvq proj up "},
      {block + "mlp.2", kMost / (hidden * down), all, "keys kvq proj up "},
      {block + "ln1", std::sqrt(kMost / (keys * queries)), all, "kvq proj up down "},
  };
  for (const Ops* ops : TablesOfModels()) {
    for (const auto& [part, limit, below, above] : cases) {
      for (double scale : {0.9 * limit, 1.1 * limit}) {
        const Context context(Text(ops->name, part, scale / limit));
        const Model model(shape, ScaledWeights(part, scale), *ops, true);
        const std::string want = scale < limit ? below : above;
        CHECK_EQ(InFp16(model.layers[1]), Taken(*ops, want));
        CHECK_EQ(InFp16(model.layers[0]), Taken(*ops, all));
      }
    }
    for (double scale : {0.9 * head_limit, 1.1 * head_limit}) {
      const Model model(shape, ScaledWeights("ln_f", scale), *ops, true);
      const bool all_fit = std::all_of(
          model.heads.begin(), model.heads.end(),
          [](const PackedMatrix& matrix) { return matrix.view().type == NumberType::kFp16; });
      CHECK_EQ(all_fit, ops->fp16_weights && scale < head_limit);
    }
    const Model exact(shape, weights, *ops, false);
    CHECK(exact.heads[0].view().type == NumberType::kFloat32);
    CHECK(exact.layers[0].key_type == NumberType::kFloat32);
    const Model one_head(SmallShapes()[3], RandomWeights(0), *ops, true);
    CHECK(one_head.layers[0].key_type == NumberType::kBf16);  // attention takes bundles only
  }
}

TEST(EmbeddingRows) {
  const Shape shape = WithGoal(SmallShapes()[0]);
  const RandomWeights weights(3);
  const Model model(shape, weights, *ScalarOps(), false);
  const int vocab = shape.vocab_size, dim = shape.transition_dim(), width = shape.embed_dim;
  const auto check_row = [&](int row, const float* source) {
    for (int i = 0; i < shape.width(); ++i) {
      CHECK_EQ(model.embedding[size_t(row) * shape.width() + i], i < width ? source[i] : 0.0f);
    }
  };
  const float* tokens = weights.Get("tok_emb.weight", size_t(vocab * dim + 1) * width);
  const float* goals = weights.Get("goal_emb.weight", size_t(vocab * shape.goal_len) * width);
  check_row(model.EmbeddingRow(2, 1), tokens + size_t(vocab + 2) * width);
  check_row(model.EmbeddingRow(vocab, 1), tokens + size_t(vocab * dim) * width);  // the stop token
  check_row(model.GoalRow(2, 1), goals + size_t(vocab + 2) * width);
}

TEST(OpsByName) {
  CHECK_EQ(std::string(AvailableOps().back()->name), "scalar");
  for (const Ops* ops : AvailableOps()) CHECK_EQ(&FindOps(ops->name), ops);
  CHECK_EQ(&FindOps("auto"), AvailableOps().front());
  CHECK_THROWS(std::invalid_argument, FindOps("mmx"));
  CHECK_THROWS(std::invalid_argument, FindOps(""));
}

}  // namespace tt::test
