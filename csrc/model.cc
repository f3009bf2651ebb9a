#include "model.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "bfloat16.h"
#include "float16.h"

namespace tt {
namespace {

AlignedBuffer<float> Padded(const float* source, int rows, int cols, int padded) {
  AlignedBuffer<float> out;
  out.ReserveZeroed(static_cast<size_t>(rows) * padded);
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < cols; ++i) {
      out[static_cast<size_t>(r) * padded + i] = source[static_cast<size_t>(r) * cols + i];
    }
  }
  return out;
}

class Packer {
 public:
  Packer(const Model& model, const WeightSource& weights)
      : shape_(model.shape),
        head_layout_(model.head_layout),
        weights_(weights),
        panel_width_(model.ops.panel_width),
        type_(WeightType(model.ops, model.bf16)) {}

  AlignedBuffer<float> Vector(const std::string& name) const {
    return Padded(weights_.Get(name, shape_.embed_dim), 1, shape_.embed_dim, shape_.width());
  }

  AlignedBuffer<float> Table(const std::string& name, int rows) const {
    const float* source = weights_.Get(name, static_cast<size_t>(rows) * shape_.embed_dim);
    return Padded(source, rows, shape_.embed_dim, shape_.width());
  }

  // Keys, values and queries of all heads as one matrix, in this order: what is cached comes first.
  PackedMatrix Kvq(const std::string& prefix) const {
    PackedMatrix packed(shape_.width(), 3 * shape_.attn_width(), panel_width_, type_);
    const char* parts[] = {"key", "value", "query"};
    for (int part = 0; part < 3; ++part) {
      const auto column = [&](int col) { return part * shape_.attn_width() + HeadColumn(col); };
      Fill(packed, prefix + parts[part], shape_.embed_dim, shape_.embed_dim, column, Same);
    }
    return packed;
  }

  PackedMatrix Proj(const std::string& name) const {
    PackedMatrix packed(shape_.attn_width(), shape_.width(), panel_width_, type_);
    const auto row = [this](int i) { return HeadColumn(i); };
    Fill(packed, name, shape_.embed_dim, shape_.embed_dim, Same, row);
    return packed;
  }

  PackedMatrix Linear(const std::string& name, int k, int n) const {
    PackedMatrix packed(RoundUp(k, kPad), RoundUp(n, kPad), panel_width_, type_);
    Fill(packed, name, k, n, Same, Same);
    return packed;
  }

  // (transition_dim, num_ids, embed_dim), no bias.
  std::vector<PackedMatrix> Heads(const std::string& name) const {
    const int ids = shape_.num_ids(), embed = shape_.embed_dim;
    const size_t size = static_cast<size_t>(ids) * embed;
    const float* source = weights_.Get(name, size * shape_.transition_dim());
    std::vector<PackedMatrix> heads;
    for (int dim = 0; dim < shape_.transition_dim(); ++dim) {
      heads.emplace_back(shape_.width(), shape_.logits_width(), panel_width_, type_);
      FillWeights(heads.back(), source + dim * size, embed, ids, Same, Same);
    }
    return heads;
  }

 private:
  static int Same(int i) { return i; }
  // Of index i of heads one after the other, as PyTorch has them.
  int HeadColumn(int i) const {
    return head_layout_.Column(i / shape_.head_dim(), i % shape_.head_dim());
  }

  // weight (n, k) and bias (n) of a PyTorch linear layer.
  template <typename Column, typename Row>
  void Fill(PackedMatrix& packed, const std::string& name, int k, int n, Column column,
            Row row) const {
    FillWeights(packed, weights_.Get(name + ".weight", static_cast<size_t>(n) * k), k, n, column,
                row);
    const float* bias = weights_.Get(name + ".bias", n);
    for (int col = 0; col < n; ++col) packed.SetBias(column(col), bias[col]);
  }

  template <typename Column, typename Row>
  static void FillWeights(PackedMatrix& packed, const float* weight, int k, int n, Column column,
                          Row row) {
    for (int col = 0; col < n; ++col) {
      for (int i = 0; i < k; ++i) {
        packed.Set(row(i), column(col), weight[static_cast<size_t>(col) * k + i]);
      }
    }
  }

  const Shape& shape_;
  const HeadLayout& head_layout_;
  const WeightSource& weights_;
  int panel_width_;
  NumberType type_;
};

// Whether float16 does for numbers with these bounds. It ends at 2^16, which leaves room for
// roundings, and has all its digits from 2^-14 on. The lower limit is a rule of thumb, as numbers
// may be far below their bounds.
bool FitFp16(std::initializer_list<double> bounds) {
  return std::all_of(bounds.begin(), bounds.end(),
                     [](double bound) { return bound >= 0x1p-6 && bound <= 0x1p15; });
}

void CheckSize(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return;
  throw std::invalid_argument(std::string(name) + ": expected a number in [" + std::to_string(low) +
                              ", " + std::to_string(high) + "], got " + std::to_string(value));
}

const Shape& Checked(const Shape& shape) {
  shape.Check();
  return shape;
}

}  // namespace

void Shape::Check() const {
  constexpr int kLimit = 1 << 20;  // products of two of them stay far inside 64 bits
  CheckSize("observation_dim", observation_dim, 1, kLimit);
  CheckSize("action_dim", action_dim, 1, kLimit);
  CheckSize("vocab_size", vocab_size, 2, kLimit);
  CheckSize("num_transitions", num_transitions, 1, kLimit);
  CheckSize("num_layers", num_layers, 1, kLimit);
  CheckSize("embed_dim", embed_dim, 1, kLimit);
  CheckSize("num_heads", num_heads, 1, embed_dim);
  CheckSize("goal_len", goal_len, 0, kLimit);
  if (embed_dim % num_heads != 0) {
    throw std::invalid_argument("embed_dim: expected a multiple of num_heads=" +
                                std::to_string(num_heads) + ", got " + std::to_string(embed_dim));
  }
  constexpr int64_t kRows = int64_t{1} << 30;  // indices of embeddings are int
  CheckSize("vocab_size * transition_dim", int64_t{vocab_size} * (transition_dim() + goal_len), 1,
            kRows);
  CheckSize("num_transitions * transition_dim", int64_t{num_transitions} * transition_dim(), 1,
            kRows);
}

HeadLayout::HeadLayout(int num_heads, int head_dim, const Ops& ops, bool bf16)
    : heads(num_heads % ops.bundle_heads == 0 && RoundUp(head_dim, kHeadPad) <= kMaxBundled
                ? ops.bundle_heads
                : 1),
      stride(heads * RoundUp(head_dim, kHeadPad)),
      num_bundles(num_heads / heads),
      bf16(bf16),
      fp16(bf16 && ops.fp16_keys && heads > 1) {}

int HeadLayout::Column(int head, int i) const {
  const int begin = head / heads * stride;
  if (heads == 1) return begin + i;
  const int width = heads * kBundleNumbers, vector = i / kBundleNumbers;
  const int lane = head % heads * kBundleNumbers + i % kBundleNumbers;
  if (bf16) return begin + (vector / 2 * width + lane) * 2 + vector % 2;
  return begin + vector * width + lane;
}

PackedMatrix::PackedMatrix(int k, int n, int panel_width, NumberType type)
    : k_(k), n_(n), panel_width_(panel_width), type_(type) {
  const size_t size = static_cast<size_t>(k) * n;
  InFloats(type) ? float_data_.ReserveZeroed(size) : half_data_.ReserveZeroed(size);
  bias_.ReserveZeroed(n);
}

size_t PackedMatrix::Index(NumberType type, int i, int col) const {
  const size_t panel = col / panel_width_, column = col % panel_width_;
  if (InFloats(type)) return (panel * k_ + i) * panel_width_ + column;
  const size_t place =
      type == NumberType::kFp16 ? column / 2 + column % 2 * (panel_width_ / 2) : column;
  return ((panel * (k_ / 2) + i / 2) * panel_width_ + place) * 2 + i % 2;
}

void PackedMatrix::Set(int i, int col, float value) {
  assert(type_ != NumberType::kFp16);
  const size_t index = Index(type_, i, col);
  if (InFloats(type_)) {
    float_data_[index] = type_ == NumberType::kRounded ? FromBf16(ToBf16(value)) : value;
  } else {
    half_data_[index] = ToBf16(value);
  }
}

float PackedMatrix::At(int i, int col) const {
  assert(type_ != NumberType::kFp16);
  const size_t index = Index(type_, i, col);
  return InFloats(type_) ? float_data_[index] : FromBf16(half_data_[index]);
}

double PackedMatrix::ColumnNorm(int col) const {
  double squares = 0.0;
  for (int i = 0; i < k_; ++i) squares += double{At(i, col)} * At(i, col);
  return std::sqrt(squares);
}

double PackedMatrix::BoundOutput(double input_bound, int first, int last) const {
  double squares = 0.0;
  for (int col = first; col < last; ++col) {
    const double bound = ColumnNorm(col) * input_bound + std::abs(bias_[col]);
    squares += bound * bound;
  }
  return std::sqrt(squares);
}

bool PackedMatrix::TryFp16(double input_bound) {
  assert(type_ == NumberType::kRounded);
  std::vector<double> norms;
  for (int col = 0; col < n_; ++col) norms.push_back(ColumnNorm(col));
  const double weight_bound = *std::max_element(norms.begin(), norms.end());
  // no part of a sum is larger than the product of the two norms
  if (!FitFp16({input_bound, weight_bound, input_bound * weight_bound})) return false;
  AlignedBuffer<uint16_t> rounded(static_cast<size_t>(k_) * n_);
  for (int col = 0; col < n_; ++col) {
    double squares = 0.0;  // of what the column loses
    for (int i = 0; i < k_; ++i) {
      const float weight = At(i, col);
      const uint16_t half = ToFp16(weight);
      // from the smallest normal number on, float16 has all digits of bfloat16
      if (!(std::abs(weight) >= 0x1p-14f)) squares += std::pow(double{weight} - FromFp16(half), 2);
      rounded[Index(NumberType::kFp16, i, col)] = half;
    }
    if (!(std::sqrt(squares) <= 0x1p-9 * norms[col])) return false;  // or is no number
  }
  half_data_ = std::move(rounded);
  float_data_ = AlignedBuffer<float>();
  type_ = NumberType::kFp16;
  return true;
}

Model::Model(const Shape& s, const WeightSource& weights, const Ops& o, bool b)
    : shape(Checked(s)),
      ops(o),
      bf16(b),
      head_layout(shape.num_heads, shape.head_dim(), ops, bf16) {
  const Packer pack(*this, weights);
  embedding = pack.Table("tok_emb.weight", shape.vocab_size * shape.transition_dim() + 1);
  if (shape.goal_len > 0) {
    // appended to the same table
    const AlignedBuffer<float> tokens = std::move(embedding);
    const AlignedBuffer<float> goals =
        pack.Table("goal_emb.weight", shape.vocab_size * shape.goal_len);
    embedding = AlignedBuffer<float>(tokens.size() + goals.size());
    for (size_t i = 0; i < tokens.size(); ++i) embedding[i] = tokens[i];
    for (size_t i = 0; i < goals.size(); ++i) embedding[tokens.size() + i] = goals[i];
  }
  // with a goal the original allots more rows than it uses
  position = pack.Table("pos_emb", shape.block_size() + shape.goal_len);
  lnf_gamma = pack.Vector("ln_f.weight");
  lnf_beta = pack.Vector("ln_f.bias");
  heads = pack.Heads("head.weight");
  const int embed = shape.embed_dim;
  for (int i = 0; i < shape.num_layers; ++i) {
    const std::string block = "blocks." + std::to_string(i) + ".";
    layers.push_back({pack.Vector(block + "ln1.weight"), pack.Vector(block + "ln1.bias"),
                      pack.Vector(block + "ln2.weight"), pack.Vector(block + "ln2.bias"),
                      pack.Kvq(block + "attn."), pack.Proj(block + "attn.proj"),
                      pack.Linear(block + "mlp.0", embed, 4 * embed),
                      pack.Linear(block + "mlp.2", 4 * embed, embed),
                      bf16 ? NumberType::kBf16 : NumberType::kFloat32});
  }
  if (bf16 && (ops.fp16_weights || ops.fp16_keys)) UseFp16();
}

// Every layer's bounds follow from its norms, as a normalised row has a known length.
void Model::UseFp16() {
  const auto normed = [this](const AlignedBuffer<float>& gamma, const AlignedBuffer<float>& beta) {
    double largest = 0.0, squares = 0.0;
    for (int i = 0; i < shape.embed_dim; ++i) {
      largest = std::max(largest, std::abs(double{gamma[i]}));
      squares += double{beta[i]} * beta[i];
    }
    return std::sqrt(double(shape.embed_dim)) * largest + std::sqrt(squares);
  };
  for (Layer& layer : layers) {
    const double first = normed(layer.ln1_gamma, layer.ln1_beta);
    const double second = normed(layer.ln2_gamma, layer.ln2_beta);
    const int attn = shape.attn_width();
    const double keys = layer.kvq.BoundOutput(first, 0, attn);
    const double values = layer.kvq.BoundOutput(first, attn, 2 * attn);
    const double queries =
        layer.kvq.BoundOutput(first, 2 * attn, 3 * attn) / std::sqrt(double(shape.head_dim()));
    if (head_layout.fp16 &&
        FitFp16({keys, queries, keys * queries, values, kFp16Values * values})) {
      layer.key_type = NumberType::kFp16;
    }
    if (!ops.fp16_weights) continue;
    const double hidden = layer.up.BoundOutput(second, 0, shape.hidden_width());
    // what attention returns are means of values, and GELU makes nothing larger
    layer.kvq.TryFp16(first);
    layer.proj.TryFp16(values);
    layer.up.TryFp16(second);
    layer.down.TryFp16(hidden);
  }
  if (!ops.fp16_weights) return;
  const double last = normed(lnf_gamma, lnf_beta);
  for (PackedMatrix& head : heads) head.TryFp16(last);
}

size_t Model::LayerBytes() const {
  size_t bytes = 0;
  for (const Layer& layer : layers) {
    bytes += layer.kvq.bytes() + layer.proj.bytes() + layer.up.bytes() + layer.down.bytes();
  }
  return bytes;
}

int Model::EmbeddingRow(int token, int dim) const {
  if (token == shape.vocab_size) return shape.vocab_size * shape.transition_dim();
  return token + dim * shape.vocab_size;
}

int Model::GoalRow(int token, int goal_idx) const {
  return shape.vocab_size * shape.transition_dim() + 1 + token + goal_idx * shape.vocab_size;
}

}  // namespace tt
