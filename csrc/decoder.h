// The transformer over the nodes of a pass.
#ifndef TT_DECODER_H_
#define TT_DECODER_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "aligned_buffer.h"
#include "first_layer.h"
#include "model.h"
#include "thread_pool.h"
#include "token_tree.h"

namespace tt {

// What passes have cost so far. Seconds are summed over threads.
struct DecoderStats {
  int64_t decoded_nodes = 0;    // newest tokens
  int64_t reencoded_nodes = 0;  // nodes of cropped windows, their leaves included
  double gemm_flops = 0.0;      // of the model's own sizes, padding not counted
  double attention_flops = 0.0;
  double gemm_seconds = 0.0;
  double attention_seconds = 0.0;
};

// Keys and values of all nodes, and one forward pass at a time.
class Decoder {
 public:
  // first_layer_bytes: see FirstLayer. Ant's model, of the official size, can use 57 MB.
  Decoder(const Model& model, ThreadPool& pool, size_t first_layer_bytes = size_t{64} << 20);

  // Room for so many nodes and logits.
  void Reserve(int max_nodes, int max_path);
  // Keys and values of the new nodes are kept; logits of the leaves are (num_leaves, logits_width).
  void Forward(const Pass& pass);
  const float* logits(int slot) const {
    return logits_.data() + static_cast<size_t>(slot) * model_.shape.logits_width();
  }

  DecoderStats stats() const;
  void ResetStats();
  size_t allocated_bytes() const;

 private:
  // Activations of one thread's rows, (kMaxRows, ...).
  struct Scratch {
    AlignedBuffer<float> normed;    // (width) as Ops::gemm takes it
    AlignedBuffer<float> kvq;       // (3 attn_width)
    AlignedBuffer<float> attended;  // (attn_width)
    AlignedBuffer<float> hidden;    // (hidden_width)
    AlignedBuffer<float> scores;    // (kScoreRows, AttendArgs::scores_size)
    AlignedBuffer<uint32_t> fresh;  // (kMaxRows * longest path) AttendArgs::fresh
    AlignedBuffer<float> inputs;    // (wider of these two) as Ops::gemm takes it, if rounded
    double gemm_seconds = 0.0;
    double attention_seconds = 0.0;
  };

  template <typename F>
  void ForRows(int begin, int end, F&& f);
  void Decode();
  void Prefill();

  void ProjectFirst();
  // Steps over rows [begin, end) of the pass.
  void Embed(int begin, int end);
  void EmbedRow(int row, float* out) const;
  int SharedPath(int row) const;
  void AttentionInput(int layer, int begin, int end, bool keys_only, Scratch& scratch);
  bool IsOneBlock(int begin, int end) const;
  void ProjectInPlace(int layer, int begin, int end, bool keys_only, Scratch& scratch);
  void PrefetchKeys(int layer, int begin, int end);
  void StoreKeys(int layer, int row, const float* kv);
  void AttentionOutput(int layer, int begin, int end, Scratch& scratch);
  void Mlp(int layer, int begin, int end, Scratch& scratch);
  void Logits(int begin, int end, Scratch& scratch);

  void Gemm(const MatrixView& weights, int num_cols, const void* a, size_t lda, int rows, float* c,
            size_t ldc, bool add, Scratch& scratch);
  void Normalise(const AlignedBuffer<float>& gamma, const AlignedBuffer<float>& beta, int begin,
                 int end, const PackedMatrix& weights, Scratch& scratch);
  float* RowOf(AlignedBuffer<float>& buffer, int row, int width) {
    return buffer.data() + static_cast<size_t>(row) * width;
  }
  // Of all nodes, keys or values of one bundle of heads.
  size_t bundle_size() const { return max_nodes_ * model_.head_layout.stride; }
  // The key of a row's node; its value is bundle_size() numbers further.
  std::byte* KeyOf(int layer, int bundle, int row) {
    const size_t node = pass_->node[row];
    const size_t number = 2 * bundle * bundle_size() + node * model_.head_layout.stride;
    return kv_[layer].data() + number * model_.key_bytes();
  }
  void Count(const Pass& pass);

  const Model& model_;
  ThreadPool& pool_;
  const Pass* pass_ = nullptr;
  size_t max_nodes_ = 0;
  // a layer: (num_bundles, 2, max_nodes, stride) of HeadLayout, numbers of Layer::key_type
  std::vector<AlignedBuffer<std::byte>> kv_;
  FirstLayer first_;
  AlignedBuffer<float> h_;        // (rows, width) residual stream
  AlignedBuffer<float> q_;        // (rows, attn_width)
  std::vector<int32_t> shared_;   // (rows) AttendArgs::shared
  AlignedBuffer<float> logits_;   // (leaves, logits_width)
  std::vector<Scratch> scratch_;  // a thread
  DecoderStats stats_;
};

}  // namespace tt

#endif  // TT_DECODER_H_
