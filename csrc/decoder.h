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

// Fewer rows are not worth a thread of their own.
inline constexpr int kMinThreadRows = 6;

// What passes have cost so far. Seconds are summed over threads.
struct DecoderStats {
  int64_t decoded_nodes = 0;    // newest tokens
  int64_t reencoded_nodes = 0;  // nodes of cropped windows, their leaves included
  // Of the model's own sizes, padding not counted. What the first layer projects is counted when it
  // is, which several threads may do at once.
  double gemm_flops = 0.0;
  double attention_flops = 0.0;
  double gemm_seconds = 0.0;
  double attention_seconds = 0.0;

  void operator+=(const DecoderStats& other);
};

// Keys and values of all nodes, and forward passes: one at a time by all threads, or by each thread
// one of its own.
class Decoder {
 public:
  // first_layer_bytes: see FirstLayer. Ant's model, of the official size, can use 57 MB.
  Decoder(const Model& model, ThreadPool& pool, size_t first_layer_bytes = size_t{64} << 20);

  // Room for so many nodes and logits.
  void Reserve(int max_nodes, int max_path);
  // Keys and values of the new nodes are kept; logits of the leaves are (num_leaves, logits_width).
  void Forward(const Pass& pass);
  const float* logits(int slot) const { return LogitsOf(all_, slot); }

  // Before threads make passes of their own, of at most so many nodes.
  void ReserveBranches(int max_nodes);
  // By the calling thread alone, which is number `thread` of the pool; the pass is not chained.
  void ForwardBranch(const Pass& pass, int thread);
  const float* branch_logits(int thread, int slot) const {
    return LogitsOf(scratch_[thread].branch, slot);
  }

  DecoderStats stats() const;
  void ResetStats();
  size_t allocated_bytes() const;

 private:
  // A pass, and what is computed of it.
  struct Activations {
    const Pass* pass = nullptr;
    AlignedBuffer<float> h;       // (rows, width) residual stream
    AlignedBuffer<float> q;       // (rows, attn_width) of a chained pass
    AlignedBuffer<float> logits;  // (leaves, logits_width)
    std::vector<int32_t> shared;  // (rows) AttendArgs::shared

    void Reserve(const Shape& shape, int rows, int leaves, bool chained);
    size_t bytes() const { return (h.size() + q.size() + logits.size()) * sizeof(float); }
  };
  // Of one thread. Buffers are of one chunk of rows, (kMaxRows, ...).
  struct Scratch {
    AlignedBuffer<float> normed;      // (width) as Ops::gemm takes it
    AlignedBuffer<float> kvq;         // (3 attn_width)
    AlignedBuffer<float> attended;    // (attn_width)
    AlignedBuffer<float> hidden;      // (hidden_width, or 3 attn_width if that is more)
    AlignedBuffer<float> scores;      // (kScoreRows, AttendArgs::scores_size)
    AlignedBuffer<uint32_t> fresh;    // (kMaxRows * longest path) AttendArgs::fresh
    AlignedBuffer<float> inputs;      // (wider of these two) as Ops::gemm takes it, if rounded
    std::vector<const float*> first;  // (1) the first layer's rows, in FirstLayer or in `hidden`
    std::vector<int32_t> missing;     // rows that were not found
    Activations branch;
    DecoderStats stats;
  };
  // Rows [begin, end) of a pass, at most kMaxRows.
  struct Chunk {
    Activations& of;
    int begin, end;
    Scratch& scratch;

    const Pass& pass() const { return *of.pass; }
    int count() const { return end - begin; }
    Chunk Part(int first, int last) const { return {of, first, last, scratch}; }
  };

  template <typename F>
  void ForRows(int begin, int end, F&& f);
  void Decode(const Chunk& chunk);
  void Prefill();

  // Steps over the rows of a chunk.
  void Embed(const Chunk& chunk);
  const float* TokenEmbedding(const Pass& pass, int row) const;
  void EmbedRow(const Pass& pass, int row, float* out) const;
  void AttentionInput(const Chunk& chunk, int layer, bool keys_only);
  void FirstInput(const Chunk& chunk);
  void ProjectMissing(const Chunk& chunk);
  bool IsOneBlock(const Chunk& chunk) const;
  void ProjectInPlace(const Chunk& chunk, int layer, bool keys_only);
  void PrefetchKeys(const Chunk& chunk, int layer);
  void StoreKeys(const Chunk& chunk, int layer, int row, const float* kv);
  void AttentionOutput(const Chunk& chunk, int layer);
  void Mlp(const Chunk& chunk, int layer);
  void Logits(const Chunk& chunk);

  void Gemm(const MatrixView& weights, int num_cols, const void* a, size_t lda, int rows, float* c,
            size_t ldc, bool add, Scratch& scratch);
  void Normalise(const AlignedBuffer<float>& gamma, const AlignedBuffer<float>& beta,
                 const Chunk& chunk, const PackedMatrix& weights);
  static float* RowOf(AlignedBuffer<float>& buffer, int row, int width) {
    return buffer.data() + static_cast<size_t>(row) * width;
  }
  const float* LogitsOf(const Activations& of, int slot) const {
    return of.logits.data() + static_cast<size_t>(slot) * model_.shape.logits_width();
  }
  // Of all nodes, keys or values of one bundle of heads.
  size_t bundle_size() const { return max_nodes_ * model_.head_layout.stride; }
  // The key of a node; its value is bundle_size() numbers further.
  std::byte* KeyOf(int layer, int bundle, size_t node) {
    const size_t number = 2 * bundle * bundle_size() + node * model_.head_layout.stride;
    return kv_[layer].data() + number * model_.key_bytes();
  }
  void Count(const Pass& pass, DecoderStats& stats) const;

  const Model& model_;
  ThreadPool& pool_;
  size_t max_nodes_ = 0;
  // a layer: (num_bundles, 2, max_nodes, stride) of HeadLayout, numbers of Layer::key_type
  std::vector<AlignedBuffer<std::byte>> kv_;
  FirstLayer first_;
  Activations all_;
  std::vector<Scratch> scratch_;  // a thread
};

}  // namespace tt

#endif  // TT_DECODER_H_
