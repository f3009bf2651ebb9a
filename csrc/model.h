// Shape and packed weights of a Trajectory Transformer.
#ifndef TT_MODEL_H_
#define TT_MODEL_H_

#include <cstdint>
#include <string>
#include <vector>

#include "aligned_buffer.h"
#include "ops.h"

namespace tt {

// Sizes as in the Python ModelConfig, and what follows from them.
struct Shape {
  int observation_dim = 0;
  int action_dim = 0;
  int vocab_size = 0;
  int num_transitions = 0;
  int num_layers = 0;
  int num_heads = 0;
  int embed_dim = 0;
  int goal_len = 0;  // tokens that a goal prepends

  // Throws std::invalid_argument naming the first size that is out of range.
  void Check() const;

  int transition_dim() const { return observation_dim + action_dim + 2; }
  int block_size() const { return num_transitions * transition_dim() - 1; }
  int num_ids() const { return vocab_size + 1; }  // with the stop token
  int head_dim() const { return embed_dim / num_heads; }
  // A placed token is a token at a position of the window, or one of the goal's.
  int64_t num_placed() const { return Placed(0, block_size()) + int64_t{goal_len} * vocab_size; }
  int64_t Placed(int token, int position) const { return int64_t{position} * num_ids() + token; }
  int64_t PlacedGoal(int token, int goal_idx) const {
    return Placed(0, block_size()) + int64_t{goal_idx} * vocab_size + token;
  }
  // padded widths
  int width() const { return RoundUp(embed_dim, kPad); }
  int hidden_width() const { return RoundUp(4 * embed_dim, kPad); }
  int head_stride() const { return RoundUp(head_dim(), kHeadPad); }
  int attn_width() const { return RoundUp(num_heads * head_stride(), kPad); }
  int logits_width() const { return RoundUp(num_ids(), kPad); }
};

// Where the numbers of heads lie in keys, values and queries. A bundle is one head, its numbers in
// order; or it is Ops::bundle_heads of them, if they divide so and are not too wide. Then it has
// kBundleNumbers of each of its heads in turn: a vector's products belong to several heads, and a
// key's sum is within four lanes. Numbers of 16 bits lie in two such vectors zipped, as they are
// loaded.
struct HeadLayout {
  HeadLayout(int num_heads, int head_dim, const Ops& ops, bool bf16);

  int heads;   // of a bundle
  int stride;  // numbers of a bundle, padded
  int num_bundles;
  bool bf16;
  bool fp16;  // whether attention takes keys in float16, too

  int width() const { return num_bundles * stride; }
  // Of number i of a head, among those of all heads.
  int Column(int head, int i) const;
};

// What a model's weights are packed as; afterwards they may become kFp16.
inline NumberType WeightType(const Ops& ops, bool bf16) {
  return bf16 ? ops.bf16_weights : NumberType::kFloat32;
}

// A weight matrix in the layout of MatrixView.
class PackedMatrix {
 public:
  PackedMatrix() = default;
  // Type: kFloat32, or one that Ops::bf16_weights may be.
  PackedMatrix(int k, int n, int panel_width, NumberType type);

  // Element (i, col) of the padded matrix, and of the bias; zero until set.
  void Set(int i, int col, float value);
  void SetBias(int col, float value) { bias_[col] = value; }

  // Bounds are of Euclidean norms, of every input row and of what columns [first, last) make of it.
  double BoundOutput(double input_bound, int first, int last) const;
  // From kRounded, once: says whether every number and every sum is in float16's range, and columns
  // lose less than they may have lost to bfloat16. If so, nothing else but views comes after it.
  bool TryFp16(double input_bound);

  size_t bytes() const { return size_t(k_) * n_ * (InFloats(type_) ? 4 : 2); }
  // Columns from this one on, the first of a panel.
  MatrixView view(int first_col = 0) const {
    return {Data(static_cast<size_t>(first_col) * k_), bias_.data() + first_col, k_, n_ - first_col,
            type_};
  }

 private:
  static bool InFloats(NumberType type) {
    return type == NumberType::kFloat32 || type == NumberType::kRounded;
  }
  // Where element (i, col) is among numbers of that type.
  size_t Index(NumberType type, int i, int col) const;
  // Of all types but kFp16.
  float At(int i, int col) const;
  double ColumnNorm(int col) const;
  const void* Data(size_t offset) const {
    if (InFloats(type_)) return float_data_.data() + offset;
    return half_data_.data() + offset;
  }

  int k_ = 0, n_ = 0, panel_width_ = 1;
  NumberType type_ = NumberType::kFloat32;
  AlignedBuffer<float> float_data_;
  AlignedBuffer<uint16_t> half_data_;
  AlignedBuffer<float> bias_;
};

struct Layer {
  AlignedBuffer<float> ln1_gamma, ln1_beta, ln2_gamma, ln2_beta;  // (width)
  PackedMatrix kvq;                                               // (width, 3 attn_width)
  PackedMatrix proj;                                              // (attn_width, width)
  PackedMatrix up, down;                                          // the MLP
  NumberType key_type;  // and of values; float16 or not by bounds of its own
};

// Weights by their PyTorch names, contiguous float32 in PyTorch's layout.
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  // (size) elements; throws std::invalid_argument if the name is missing or its size another.
  virtual const float* Get(const std::string& name, size_t size) const = 0;
};

// Packed once for one table of kernels and one data type.
struct Model {
  Model(const Shape& shape, const WeightSource& weights, const Ops& ops, bool bf16);

  Shape shape;
  const Ops& ops;
  bool bf16;
  HeadLayout head_layout;
  AlignedBuffer<float> embedding;  // (vocab_size * transition_dim + 1 [+ goal rows], width)
  AlignedBuffer<float> position;   // (block_size, width)
  AlignedBuffer<float> lnf_gamma, lnf_beta;
  std::vector<Layer> layers;
  std::vector<PackedMatrix> heads;  // one a dimension, (width, logits_width)

  // Bytes of a number that is kept of a node, see Layer::key_type.
  size_t key_bytes() const { return bf16 ? sizeof(uint16_t) : sizeof(float); }
  // Of all layers' weights, which every pass reads.
  size_t LayerBytes() const;
  // Row of `embedding` of a token, or of a goal's token.
  int EmbeddingRow(int token, int dim) const;
  int GoalRow(int token, int goal_idx) const;

 private:
  void UseFp16();
};

}  // namespace tt

#endif  // TT_MODEL_H_
