#include "decoder.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

namespace tt {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// n numbers, a multiple of kHeadPad: too few to call memcpy for.
inline void CopyLanes(const float* from, size_t n, float* to) {
  for (size_t i = 0; i < n; i += kHeadPad) std::memcpy(to + i, from + i, kHeadPad * sizeof(float));
}

// Fewer rows are not worth a thread of their own.
constexpr int kMinRows = 6;
// Rows whose hidden numbers of the MLP stay near from step to step. Smaller blocks read the weights
// more often, so this is for products so fast that memory counts for more.
constexpr int kNearRows = 36;
static_assert(kNearRows <= kMaxRows);

}  // namespace

Decoder::Decoder(const Model& model, ThreadPool& pool, size_t first_layer_bytes)
    : model_(model),
      pool_(pool),
      kv_(model.shape.num_layers),
      first_(model, first_layer_bytes),
      scratch_(pool.num_threads()) {
  const Shape& shape = model.shape;
  const int widest = std::max(shape.hidden_width(), shape.attn_width());
  for (Scratch& scratch : scratch_) {
    scratch.normed.ReserveZeroed(size_t{kMaxRows} * shape.width());
    scratch.kvq.ReserveZeroed(size_t{kMaxRows} * 3 * shape.attn_width());
    scratch.attended.ReserveZeroed(size_t{kMaxRows} * shape.attn_width());
    scratch.hidden.ReserveZeroed(size_t{kMaxRows} * shape.hidden_width());
    if (model.bf16) scratch.inputs.ReserveZeroed(size_t{kMaxRows} * widest);
  }
}

void Decoder::Reserve(int max_nodes, int max_path) {
  const HeadLayout& heads = model_.head_layout;
  const size_t num_nodes = std::max(max_nodes_, static_cast<size_t>(max_nodes));
  for (auto& layer : kv_) {
    layer.Reserve(num_nodes * 2 * heads.width() * model_.key_bytes());
  }
  for (Scratch& scratch : scratch_) {
    scratch.scores.ReserveZeroed(size_t{kScoreRows} * heads.heads * RoundUp(max_path, kPad));
    scratch.fresh.Reserve(size_t{kMaxRows} * max_path);
  }
  max_nodes_ = num_nodes;  // now there is memory for them
}

void Decoder::Forward(const Pass& pass) {
  pass_ = &pass;
  const Shape& shape = model_.shape;
  h_.Reserve(static_cast<size_t>(pass.count) * shape.width());
  q_.Reserve(static_cast<size_t>(pass.count) * shape.attn_width());
  logits_.Reserve(static_cast<size_t>(pass.num_leaves) * shape.logits_width());
  shared_.resize(pass.count);
  ProjectFirst();
  pass.chained ? Prefill() : Decode();
  Count(pass);
}

// Rows in chunks of equal size, a multiple of the number of threads.
template <typename F>
void Decoder::ForRows(int begin, int end, F&& f) {
  const int rows = end - begin, threads = pool_.num_threads();
  const int full = threads * ((rows + threads * kMaxRows - 1) / (threads * kMaxRows));
  const int num_chunks =
      std::max((rows + kMaxRows - 1) / kMaxRows, std::min(full, (rows + kMinRows - 1) / kMinRows));
  pool_.Run(num_chunks, [&](int chunk, int thread) {
    f(begin + BeginOfPart(rows, chunk, num_chunks),
      begin + BeginOfPart(rows, chunk + 1, num_chunks), scratch_[thread]);
  });
}

// No node is another's ancestor: a thread takes its rows through all layers.
void Decoder::Decode() {
  ForRows(0, pass_->count, [this](int begin, int end, Scratch& scratch) {
    Embed(begin, end);
    for (int layer = 0; layer < model_.shape.num_layers; ++layer) {
      AttentionInput(layer, begin, end, false, scratch);
      AttentionOutput(layer, begin, end, scratch);
      Mlp(layer, begin, end, scratch);
    }
    Logits(begin, end, scratch);
  });
}

// A layer's keys must all be there before anybody attends. Of the last layer only keys and values
// are wanted, except at the leaves.
void Decoder::Prefill() {
  const int last = model_.shape.num_layers - 1, num_internal = pass_->num_internal();
  const auto input = [&](int layer, int begin, int end, Scratch& scratch) {
    const int split = layer == last ? std::clamp(num_internal, begin, end) : begin;
    if (begin < split) AttentionInput(layer, begin, split, true, scratch);
    if (split < end) AttentionInput(layer, split, end, false, scratch);
  };
  ForRows(0, pass_->count, [&](int begin, int end, Scratch& scratch) {
    Embed(begin, end);
    input(0, begin, end, scratch);
  });
  for (int layer = 0; layer < last; ++layer) {
    ForRows(0, pass_->count, [&](int begin, int end, Scratch& scratch) {
      AttentionOutput(layer, begin, end, scratch);
      Mlp(layer, begin, end, scratch);
      input(layer + 1, begin, end, scratch);
    });
  }
  ForRows(num_internal, pass_->count, [&](int begin, int end, Scratch& scratch) {
    AttentionOutput(last, begin, end, scratch);
    Mlp(last, begin, end, scratch);
    Logits(begin, end, scratch);
  });
}

// Projections of the first layer that no earlier pass has needed.
void Decoder::ProjectFirst() {
  first_.Find(pass_->placed);
  const Layer& layer = model_.layers[0];
  const int width = model_.shape.width(), attn = model_.shape.attn_width();
  ForRows(0, static_cast<int>(first_.missing().size()), [&](int begin, int end, Scratch& scratch) {
    for (int i = begin; i < end; ++i) {
      EmbedRow(first_.missing()[i], RowOf(scratch.hidden, i - begin, width));
    }
    const MatrixView kvq = layer.kvq.view();
    model_.ops.layer_norm(scratch.hidden.data(), end - begin, layer.ln1_gamma.data(),
                          layer.ln1_beta.data(), model_.shape.embed_dim, kvq.type,
                          scratch.normed.data());
    Gemm(kvq, 3 * attn, scratch.normed.data(), width, end - begin,
         first_.missing_rows() + static_cast<size_t>(begin) * 3 * attn, 3 * attn, false, scratch);
  });
}

void Decoder::Embed(int begin, int end) {
  for (int row = begin; row < end; ++row) {
    shared_[row] = row > 0 ? SharedPath(row) : 0;
    EmbedRow(row, RowOf(h_, row, model_.shape.width()));
  }
}

void Decoder::EmbedRow(int row, float* out) const {
  const int width = model_.shape.width();
  const float* token =
      model_.embedding.data() + static_cast<size_t>(pass_->embedding_row[row]) * width;
  if (pass_->position[row] < 0) {
    std::memcpy(out, token, width * sizeof(float));
    return;
  }
  const float* position =
      model_.position.data() + static_cast<size_t>(pass_->position[row]) * width;
  for (int i = 0; i < width; ++i) out[i] = token[i] + position[i];
}

// How much of its path a row has in common with the row before it.
int Decoder::SharedPath(int row) const {
  const uint32_t *path = pass_->path[row], *last = pass_->path[row - 1];
  const int len = std::min(pass_->path_len[row], pass_->path_len[row - 1]);
  return static_cast<int>(std::mismatch(path, path + len, last).first - path);
}

void Decoder::AttentionInput(int layer, int begin, int end, bool keys_only, Scratch& scratch) {
  const Layer& weights = model_.layers[layer];
  const int attn = model_.shape.attn_width();
  PrefetchKeys(layer, begin, end);
  if (layer > 0) {
    Normalise(weights.ln1_gamma, weights.ln1_beta, begin, end, weights.kvq, scratch);
    if (IsOneBlock(begin, end)) return ProjectInPlace(layer, begin, end, keys_only, scratch);
    Gemm(weights.kvq.view(), keys_only ? 2 * attn : 3 * attn, scratch.normed.data(),
         model_.shape.width(), end - begin, scratch.kvq.data(), 3 * attn, false, scratch);
  }
  for (int row = begin; row < end; ++row) {
    float* own = RowOf(scratch.kvq, row - begin, 3 * attn);
    const float* kvq = layer > 0 ? own : first_[row];
    StoreKeys(layer, row, kvq);
    if (keys_only) continue;
    float* query = pass_->chained ? RowOf(q_, row, attn) : own + 2 * attn;
    if (query != kvq + 2 * attn) CopyLanes(kvq + 2 * attn, attn, query);
  }
}

// Whether products can leave these rows' keys where they stay: as they are (not to be rounded), in
// whole panels, at nodes side by side.
bool Decoder::IsOneBlock(int begin, int end) const {
  if (model_.bf16 || model_.head_layout.stride % model_.ops.panel_width != 0) return false;
  for (int row = begin + 1; row < end; ++row) {
    if (pass_->node[row] != pass_->node[row - 1] + 1) return false;
  }
  return true;
}

void Decoder::ProjectInPlace(int layer, int begin, int end, bool keys_only, Scratch& scratch) {
  const PackedMatrix& kvq = model_.layers[layer].kvq;
  const int attn = model_.shape.attn_width(), stride = model_.head_layout.stride;
  const auto project = [&](int col, int num_cols, float* out, int ldc) {
    Gemm(kvq.view(col), num_cols, scratch.normed.data(), model_.shape.width(), end - begin, out,
         ldc, false, scratch);
  };
  for (int bundle = 0; bundle < model_.head_layout.num_bundles; ++bundle) {
    float* key = reinterpret_cast<float*>(KeyOf(layer, bundle, begin));
    project(bundle * stride, stride, key, stride);
    project(attn + bundle * stride, stride, key + bundle_size(), stride);
  }
  if (keys_only) return;
  if (pass_->chained) {
    project(2 * attn, attn, RowOf(q_, begin, attn), attn);
  } else {
    project(2 * attn, attn, scratch.kvq.data() + 2 * attn, 3 * attn);
  }
}

// Asks for the lines that keys and values will be written to, before the projection is computed or
// read.
void Decoder::PrefetchKeys(int layer, int begin, int end) {
  const size_t key_bytes = model_.head_layout.stride * model_.key_bytes();
  const size_t bundle_bytes = bundle_size() * model_.key_bytes();
  for (int row = begin; row < end; ++row) {
    for (int bundle = 0; bundle < model_.head_layout.num_bundles; ++bundle) {
      const std::byte* key = KeyOf(layer, bundle, row);
      for (size_t i = 0; i < key_bytes; i += 64) {
        __builtin_prefetch(key + i, 1, 2);
        __builtin_prefetch(key + bundle_bytes + i, 1, 2);
      }
    }
  }
}

// kv: keys of all heads, then values of all heads.
void Decoder::StoreKeys(int layer, int row, const float* kv) {
  const NumberType type = model_.layers[layer].key_type;
  const size_t stride = model_.head_layout.stride;
  const auto store = [&](const float* from, std::byte* to) {
    if (type == NumberType::kFloat32) {
      CopyLanes(from, stride, reinterpret_cast<float*>(to));
    } else {
      model_.ops.round(from, stride, type, reinterpret_cast<uint16_t*>(to));
    }
  };
  for (int bundle = 0; bundle < model_.head_layout.num_bundles; ++bundle) {
    std::byte* key = KeyOf(layer, bundle, row);
    store(kv + bundle * stride, key);
    store(kv + model_.shape.attn_width() + bundle * stride,
          key + bundle_size() * model_.key_bytes());
  }
}

// h += proj(attention). Queries of a decoded chunk are still where its input step left them.
void Decoder::AttentionOutput(int layer, int begin, int end, Scratch& scratch) {
  const Shape& shape = model_.shape;
  const int attn = shape.attn_width();
  const auto start = Clock::now();
  model_.ops.attend({.rows = end - begin,
                     .q = pass_->chained ? RowOf(q_, begin, attn) : scratch.kvq.data() + 2 * attn,
                     .q_stride = static_cast<size_t>(pass_->chained ? attn : 3 * attn),
                     .kv = kv_[layer].data(),
                     .type = model_.layers[layer].key_type,
                     .bundle_size = bundle_size(),
                     .paths = pass_->path.data() + begin,
                     .lens = pass_->path_len.data() + begin,
                     .shared = shared_.data() + begin,
                     .num_bundles = model_.head_layout.num_bundles,
                     .bundle_heads = model_.head_layout.heads,
                     .bundle_stride = model_.head_layout.stride,
                     .scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim())),
                     .scores = scratch.scores.data(),
                     .scores_size = scratch.scores.size() / kScoreRows,
                     .fresh = scratch.fresh.data(),
                     .out = scratch.attended.data(),
                     .out_stride = static_cast<size_t>(attn)});
  scratch.attention_seconds += SecondsSince(start);
  const MatrixView proj = model_.layers[layer].proj.view();
  float* inputs = scratch.attended.data();
  if (proj.type != NumberType::kFloat32) {
    inputs = scratch.inputs.data();
    model_.ops.prepare(scratch.attended.data(), static_cast<size_t>(end - begin) * attn, proj.type,
                       inputs);
  }
  Gemm(proj, shape.width(), inputs, attn, end - begin, RowOf(h_, begin, shape.width()),
       shape.width(), true, scratch);
}

// h += down(gelu(up(ln2(h))))
void Decoder::Mlp(int layer, int begin, int end, Scratch& scratch) {
  const Layer& weights = model_.layers[layer];
  const int width = model_.shape.width(), hidden = model_.shape.hidden_width();
  const MatrixView up = weights.up.view(), down = weights.down.view();
  const int rows = end - begin, most = up.type == NumberType::kFp16 ? kNearRows : kMaxRows;
  const int num_blocks = (rows + most - 1) / most;
  float* inputs = down.type == NumberType::kFloat32 ? scratch.hidden.data() : scratch.inputs.data();
  for (int block = 0; block < num_blocks; ++block) {
    const int first = BeginOfPart(rows, block, num_blocks);
    const int count = BeginOfPart(rows, block + 1, num_blocks) - first;
    Normalise(weights.ln2_gamma, weights.ln2_beta, begin + first, begin + first + count, weights.up,
              scratch);
    Gemm(up, hidden, scratch.normed.data(), width, count, scratch.hidden.data(), hidden, false,
         scratch);
    model_.ops.gelu(scratch.hidden.data(), static_cast<size_t>(count) * hidden, down.type, inputs);
    Gemm(down, width, inputs, hidden, count, RowOf(h_, begin + first, width), width, true, scratch);
  }
}

// Of leaves, which are the last rows of the pass.
void Decoder::Logits(int begin, int end, Scratch& scratch) {
  const int width = model_.shape.logits_width(), first = begin - pass_->num_internal();
  const PackedMatrix& head = model_.heads[pass_->head];
  Normalise(model_.lnf_gamma, model_.lnf_beta, begin, end, head, scratch);
  Gemm(head.view(), width, scratch.normed.data(), model_.shape.width(), end - begin,
       RowOf(logits_, first, width), width, false, scratch);
}

void Decoder::Gemm(const MatrixView& weights, int num_cols, const void* a, size_t lda, int rows,
                   float* c, size_t ldc, bool add, Scratch& scratch) {
  const auto start = Clock::now();
  model_.ops.gemm(weights, num_cols, a, lda, rows, c, ldc, add);
  scratch.gemm_seconds += SecondsSince(start);
}

// Rows as inputs of a product with `weights`.
void Decoder::Normalise(const AlignedBuffer<float>& gamma, const AlignedBuffer<float>& beta,
                        int begin, int end, const PackedMatrix& weights, Scratch& scratch) {
  model_.ops.layer_norm(RowOf(h_, begin, model_.shape.width()), end - begin, gamma.data(),
                        beta.data(), model_.shape.embed_dim, weights.view().type,
                        scratch.normed.data());
}

void Decoder::Count(const Pass& pass) {
  const Shape& shape = model_.shape;
  const double embed = shape.embed_dim, leaves = pass.num_leaves, internal = pass.num_internal();
  (pass.chained ? stats_.reencoded_nodes : stats_.decoded_nodes) += pass.count;
  // a block: 3 projections, 1 back, 2 x 4 in the MLP; of the last one an inner node has 2
  const double block = 2.0 * embed * embed * 12.0;
  stats_.gemm_flops += pass.count * block * (shape.num_layers - 1) + leaves * block +
                       internal * 4.0 * embed * embed + leaves * 2.0 * embed * shape.num_ids();
  // what the first layer projects is counted once for every row of first_
  const double projections =
      shape.num_layers > 1 ? 6.0 * pass.count : 6.0 * leaves + 4.0 * internal;
  const double missing = static_cast<double>(first_.missing().size());
  stats_.gemm_flops += (6.0 * missing - projections) * embed * embed;
  for (int i = 0; i < pass.count; ++i) {
    const int layers = i < pass.num_internal() ? shape.num_layers - 1 : shape.num_layers;
    stats_.attention_flops += 4.0 * embed * pass.path_len[i] * layers;
  }
}

DecoderStats Decoder::stats() const {
  DecoderStats stats = stats_;
  for (const Scratch& scratch : scratch_) {
    stats.gemm_seconds += scratch.gemm_seconds;
    stats.attention_seconds += scratch.attention_seconds;
  }
  return stats;
}

void Decoder::ResetStats() {
  stats_ = {};
  for (Scratch& scratch : scratch_) scratch.gemm_seconds = scratch.attention_seconds = 0.0;
}

size_t Decoder::allocated_bytes() const {
  size_t bytes =
      (h_.size() + q_.size() + logits_.size()) * sizeof(float) + first_.allocated_bytes();
  for (const auto& layer : kv_) bytes += layer.size();
  return bytes;
}

}  // namespace tt
