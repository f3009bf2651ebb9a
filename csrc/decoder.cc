#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "clock.h"

namespace tt {
namespace {

// n numbers, a multiple of kHeadPad: too few to call memcpy for.
inline void CopyLanes(const float* from, size_t n, float* to) {
  for (size_t i = 0; i < n; i += kHeadPad) std::memcpy(to + i, from + i, kHeadPad * sizeof(float));
}

// Asks for the lines of so much memory.
template <int kWrite>
inline void AskFor(const void* from, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(static_cast<const char*>(from) + i, kWrite, 2);
  }
}

// How much of its path a row has in common with the row before it.
int SharedPath(const Pass& pass, int row) {
  const uint32_t *path = pass.path[row], *last = pass.path[row - 1];
  const int len = std::min(pass.path_len[row], pass.path_len[row - 1]);
  return static_cast<int>(std::mismatch(path, path + len, last).first - path);
}

// Rows whose hidden numbers of the MLP stay near from step to step. Smaller blocks read the weights
// more often, so this is for products so fast that memory counts for more.
constexpr int kNearRows = 36;
static_assert(kNearRows <= kMaxRows);

}  // namespace

void DecoderStats::operator+=(const DecoderStats& other) {
  decoded_nodes += other.decoded_nodes;
  reencoded_nodes += other.reencoded_nodes;
  gemm_flops += other.gemm_flops;
  attention_flops += other.attention_flops;
  gemm_seconds += other.gemm_seconds;
  attention_seconds += other.attention_seconds;
}

void Decoder::Activations::Reserve(const Shape& shape, int rows, int leaves, bool chained) {
  h.Reserve(static_cast<size_t>(rows) * shape.width());
  if (chained) q.Reserve(static_cast<size_t>(rows) * shape.attn_width());
  logits.Reserve(static_cast<size_t>(leaves) * shape.logits_width());
  shared.resize(std::max(shared.size(), static_cast<size_t>(rows)));
}

Decoder::Decoder(const Model& model, ThreadPool& pool, size_t first_layer_bytes)
    : model_(model),
      pool_(pool),
      kv_(model.shape.num_layers),
      first_(model, first_layer_bytes),
      scratch_(pool.num_threads()) {
  const Shape& shape = model.shape;
  const int attn = shape.attn_width(), hidden = shape.hidden_width();
  for (Scratch& scratch : scratch_) {
    scratch.normed.ReserveZeroed(size_t{kMaxRows} * shape.width());
    scratch.kvq.ReserveZeroed(size_t{kMaxRows} * 3 * attn);
    scratch.attended.ReserveZeroed(size_t{kMaxRows} * attn);
    scratch.hidden.ReserveZeroed(size_t{kMaxRows} * std::max(hidden, 3 * attn));
    if (model.bf16) scratch.inputs.ReserveZeroed(size_t{kMaxRows} * std::max(hidden, attn));
    scratch.first.resize(kMaxRows);
    scratch.missing.reserve(kMaxRows);
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

void Decoder::ReserveBranches(int max_nodes) {
  first_.MakeRoom();
  for (Scratch& scratch : scratch_) {
    scratch.branch.Reserve(model_.shape, max_nodes, max_nodes, false);
  }
}

void Decoder::Forward(const Pass& pass) {
  first_.MakeRoom();
  all_.pass = &pass;
  all_.Reserve(model_.shape, pass.count, pass.num_leaves, pass.chained);
  if (pass.chained) {
    Prefill();
  } else {
    ForRows(0, pass.count, [this](const Chunk& chunk) { Decode(chunk); });
  }
  Count(pass, scratch_[0].stats);
}

void Decoder::ForwardBranch(const Pass& pass, int thread) {
  Scratch& scratch = scratch_[thread];
  scratch.branch.pass = &pass;
  const int num_chunks = (pass.count + kMaxRows - 1) / kMaxRows;
  for (int i = 0; i < num_chunks; ++i) {
    Decode({scratch.branch, BeginOfPart(pass.count, i, num_chunks),
            BeginOfPart(pass.count, i + 1, num_chunks), scratch});
  }
  Count(pass, scratch.stats);
}

// Rows in chunks of equal size, a multiple of the number of threads.
template <typename F>
void Decoder::ForRows(int begin, int end, F&& f) {
  const int rows = end - begin, threads = pool_.num_threads();
  const int full = threads * ((rows + threads * kMaxRows - 1) / (threads * kMaxRows));
  const int num_chunks = std::max((rows + kMaxRows - 1) / kMaxRows,
                                  std::min(full, (rows + kMinThreadRows - 1) / kMinThreadRows));
  pool_.Run(num_chunks, [&](int chunk, int thread) {
    f(Chunk{all_, begin + BeginOfPart(rows, chunk, num_chunks),
            begin + BeginOfPart(rows, chunk + 1, num_chunks), scratch_[thread]});
  });
}

// No node is another's ancestor: a thread takes its rows through all layers.
void Decoder::Decode(const Chunk& chunk) {
  Embed(chunk);
  for (int layer = 0; layer < model_.shape.num_layers; ++layer) {
    AttentionInput(chunk, layer, false);
    AttentionOutput(chunk, layer);
    Mlp(chunk, layer);
  }
  Logits(chunk);
}

// A layer's keys must all be there before anybody attends. Of the last layer only keys and values
// are wanted, except at the leaves.
void Decoder::Prefill() {
  const Pass& pass = *all_.pass;
  const int last = model_.shape.num_layers - 1, num_internal = pass.num_internal();
  const auto input = [&](const Chunk& chunk, int layer) {
    const int split =
        layer == last ? std::clamp(num_internal, chunk.begin, chunk.end) : chunk.begin;
    if (chunk.begin < split) AttentionInput(chunk.Part(chunk.begin, split), layer, true);
    if (split < chunk.end) AttentionInput(chunk.Part(split, chunk.end), layer, false);
  };
  ForRows(0, pass.count, [&](const Chunk& chunk) {
    Embed(chunk);
    input(chunk, 0);
  });
  for (int layer = 0; layer < last; ++layer) {
    ForRows(0, pass.count, [&](const Chunk& chunk) {
      AttentionOutput(chunk, layer);
      Mlp(chunk, layer);
      input(chunk, layer + 1);
    });
  }
  ForRows(num_internal, pass.count, [&](const Chunk& chunk) {
    AttentionOutput(chunk, last);
    Mlp(chunk, last);
    Logits(chunk);
  });
}

void Decoder::Embed(const Chunk& chunk) {
  const int width = model_.shape.width();
  for (int row = chunk.begin; row < chunk.end; ++row) {  // all at once, as they are far
    AskFor<0>(TokenEmbedding(chunk.pass(), row), width * sizeof(float));
  }
  for (int row = chunk.begin; row < chunk.end; ++row) {
    chunk.of.shared[row] = row > 0 ? SharedPath(chunk.pass(), row) : 0;
    EmbedRow(chunk.pass(), row, RowOf(chunk.of.h, row, width));
  }
}

const float* Decoder::TokenEmbedding(const Pass& pass, int row) const {
  return model_.embedding.data() +
         static_cast<size_t>(pass.embedding_row[row]) * model_.shape.width();
}

void Decoder::EmbedRow(const Pass& pass, int row, float* out) const {
  const int width = model_.shape.width();
  const float* token = TokenEmbedding(pass, row);
  if (pass.position[row] < 0) {
    std::memcpy(out, token, width * sizeof(float));
    return;
  }
  const float* position = model_.position.data() + static_cast<size_t>(pass.position[row]) * width;
  for (int i = 0; i < width; ++i) out[i] = token[i] + position[i];
}

void Decoder::AttentionInput(const Chunk& chunk, int layer, bool keys_only) {
  const Layer& weights = model_.layers[layer];
  const Pass& pass = chunk.pass();
  Scratch& scratch = chunk.scratch;
  const int attn = model_.shape.attn_width();
  if (layer == 0) {
    PrefetchKeys(chunk, layer);
    FirstInput(chunk);
  } else {
    Normalise(weights.ln1_gamma, weights.ln1_beta, chunk, weights.kvq);
    if (IsOneBlock(chunk)) return ProjectInPlace(chunk, layer, keys_only);
    PrefetchKeys(chunk, layer);
    Gemm(weights.kvq.view(), keys_only ? 2 * attn : 3 * attn, scratch.normed.data(),
         model_.shape.width(), chunk.count(), scratch.kvq.data(), 3 * attn, false, scratch);
  }
  for (int row = chunk.begin; row < chunk.end; ++row) {
    float* own = RowOf(scratch.kvq, row - chunk.begin, 3 * attn);
    const float* kvq = layer > 0 ? own : scratch.first[row - chunk.begin];
    StoreKeys(chunk, layer, row, kvq);
    if (keys_only) continue;
    float* query = pass.chained ? RowOf(chunk.of.q, row, attn) : own + 2 * attn;
    if (query != kvq + 2 * attn) CopyLanes(kvq + 2 * attn, attn, query);
  }
}

// scratch.first: what the first layer projects, most of it known from earlier passes.
void Decoder::FirstInput(const Chunk& chunk) {
  Scratch& scratch = chunk.scratch;
  scratch.missing.clear();
  for (int i = 0; i < chunk.count(); ++i) {
    scratch.first[i] = first_.Find(chunk.pass().placed[chunk.begin + i]);
    if (scratch.first[i] == nullptr) scratch.missing.push_back(i);
  }
  if (!scratch.missing.empty()) ProjectMissing(chunk);
}

void Decoder::ProjectMissing(const Chunk& chunk) {
  const Layer& layer = model_.layers[0];
  const MatrixView kvq = layer.kvq.view();
  Scratch& scratch = chunk.scratch;
  const int width = model_.shape.width(), attn = model_.shape.attn_width();
  const int count = static_cast<int>(scratch.missing.size());
  for (int i = 0; i < count; ++i) {
    EmbedRow(chunk.pass(), chunk.begin + scratch.missing[i], RowOf(scratch.hidden, i, width));
  }
  model_.ops.layer_norm(scratch.hidden.data(), count, layer.ln1_gamma.data(), layer.ln1_beta.data(),
                        model_.shape.embed_dim, kvq.type, scratch.normed.data());
  Gemm(kvq, 3 * attn, scratch.normed.data(), width, count, scratch.hidden.data(), 3 * attn, false,
       scratch);
  for (int i = 0; i < count; ++i) {
    const float* row = RowOf(scratch.hidden, i, 3 * attn);
    scratch.first[scratch.missing[i]] = row;
    first_.Add(chunk.pass().placed[chunk.begin + scratch.missing[i]], row);
  }
  const double embed = model_.shape.embed_dim;
  scratch.stats.gemm_flops += 6.0 * count * embed * embed;
}

// Whether products can leave these rows' keys where they stay: as they are (not to be rounded), in
// whole panels, at nodes side by side.
bool Decoder::IsOneBlock(const Chunk& chunk) const {
  if (model_.bf16 || model_.head_layout.stride % model_.ops.panel_width != 0) return false;
  const std::vector<int32_t>& node = chunk.pass().node;
  for (int row = chunk.begin + 1; row < chunk.end; ++row) {
    if (node[row] != node[row - 1] + 1) return false;
  }
  return true;
}

void Decoder::ProjectInPlace(const Chunk& chunk, int layer, bool keys_only) {
  Scratch& scratch = chunk.scratch;
  const PackedMatrix& kvq = model_.layers[layer].kvq;
  const int attn = model_.shape.attn_width(), stride = model_.head_layout.stride;
  const auto project = [&](int col, int num_cols, float* out, int ldc) {
    Gemm(kvq.view(col), num_cols, scratch.normed.data(), model_.shape.width(), chunk.count(), out,
         ldc, false, scratch);
  };
  for (int bundle = 0; bundle < model_.head_layout.num_bundles; ++bundle) {
    float* key = reinterpret_cast<float*>(KeyOf(layer, bundle, chunk.pass().node[chunk.begin]));
    project(bundle * stride, stride, key, stride);
    project(attn + bundle * stride, stride, key + bundle_size(), stride);
  }
  if (keys_only) return;
  if (chunk.pass().chained) {
    project(2 * attn, attn, RowOf(chunk.of.q, chunk.begin, attn), attn);
  } else {
    project(2 * attn, attn, scratch.kvq.data() + 2 * attn, 3 * attn);
  }
}

// Asks for the lines that keys and values will be copied to, before the projection is computed or
// read. Products that write them in place ask themselves.
void Decoder::PrefetchKeys(const Chunk& chunk, int layer) {
  const size_t key_bytes = model_.head_layout.stride * model_.key_bytes();
  const size_t bundle_bytes = bundle_size() * model_.key_bytes();
  for (int row = chunk.begin; row < chunk.end; ++row) {
    for (int bundle = 0; bundle < model_.head_layout.num_bundles; ++bundle) {
      const std::byte* key = KeyOf(layer, bundle, chunk.pass().node[row]);
      AskFor<1>(key, key_bytes);
      AskFor<1>(key + bundle_bytes, key_bytes);
    }
  }
}

// kv: keys of all heads, then values of all heads.
void Decoder::StoreKeys(const Chunk& chunk, int layer, int row, const float* kv) {
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
    std::byte* key = KeyOf(layer, bundle, chunk.pass().node[row]);
    store(kv + bundle * stride, key);
    store(kv + model_.shape.attn_width() + bundle * stride,
          key + bundle_size() * model_.key_bytes());
  }
}

// h += proj(attention). Queries of a decoded chunk are still where its input step left them.
void Decoder::AttentionOutput(const Chunk& chunk, int layer) {
  const Pass& pass = chunk.pass();
  Scratch& scratch = chunk.scratch;
  const Shape& shape = model_.shape;
  const int attn = shape.attn_width();
  const auto start = Clock::now();
  model_.ops.attend(
      {.rows = chunk.count(),
       .q = pass.chained ? RowOf(chunk.of.q, chunk.begin, attn) : scratch.kvq.data() + 2 * attn,
       .q_stride = static_cast<size_t>(pass.chained ? attn : 3 * attn),
       .kv = kv_[layer].data(),
       .type = model_.layers[layer].key_type,
       .bundle_size = bundle_size(),
       .paths = pass.path.data() + chunk.begin,
       .lens = pass.path_len.data() + chunk.begin,
       .shared = chunk.of.shared.data() + chunk.begin,
       .num_bundles = model_.head_layout.num_bundles,
       .bundle_heads = model_.head_layout.heads,
       .bundle_stride = model_.head_layout.stride,
       .scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim())),
       .scores = scratch.scores.data(),
       .scores_size = scratch.scores.size() / kScoreRows,
       .fresh = scratch.fresh.data(),
       .out = scratch.attended.data(),
       .out_stride = static_cast<size_t>(attn)});
  scratch.stats.attention_seconds += SecondsSince(start);
  const MatrixView proj = model_.layers[layer].proj.view();
  float* inputs = scratch.attended.data();
  if (proj.type != NumberType::kFloat32) {
    inputs = scratch.inputs.data();
    model_.ops.prepare(scratch.attended.data(), static_cast<size_t>(chunk.count()) * attn,
                       proj.type, inputs);
  }
  Gemm(proj, shape.width(), inputs, attn, chunk.count(),
       RowOf(chunk.of.h, chunk.begin, shape.width()), shape.width(), true, scratch);
}

// h += down(gelu(up(ln2(h))))
void Decoder::Mlp(const Chunk& chunk, int layer) {
  const Layer& weights = model_.layers[layer];
  Scratch& scratch = chunk.scratch;
  const int width = model_.shape.width(), hidden = model_.shape.hidden_width();
  const MatrixView up = weights.up.view(), down = weights.down.view();
  const int most = up.type == NumberType::kFp16 ? kNearRows : kMaxRows;
  const int num_blocks = (chunk.count() + most - 1) / most;
  float* inputs = down.type == NumberType::kFloat32 ? scratch.hidden.data() : scratch.inputs.data();
  for (int i = 0; i < num_blocks; ++i) {
    const Chunk block = chunk.Part(chunk.begin + BeginOfPart(chunk.count(), i, num_blocks),
                                   chunk.begin + BeginOfPart(chunk.count(), i + 1, num_blocks));
    Normalise(weights.ln2_gamma, weights.ln2_beta, block, weights.up);
    Gemm(up, hidden, scratch.normed.data(), width, block.count(), scratch.hidden.data(), hidden,
         false, scratch);
    model_.ops.gelu(scratch.hidden.data(), static_cast<size_t>(block.count()) * hidden, down.type,
                    inputs);
    Gemm(down, width, inputs, hidden, block.count(), RowOf(chunk.of.h, block.begin, width), width,
         true, scratch);
  }
}

// Of leaves, which are the last rows of the pass.
void Decoder::Logits(const Chunk& chunk) {
  const int width = model_.shape.logits_width(), first = chunk.begin - chunk.pass().num_internal();
  const PackedMatrix& head = model_.heads[chunk.pass().head];
  Normalise(model_.lnf_gamma, model_.lnf_beta, chunk, head);
  Gemm(head.view(), width, chunk.scratch.normed.data(), model_.shape.width(), chunk.count(),
       RowOf(chunk.of.logits, first, width), width, false, chunk.scratch);
}

void Decoder::Gemm(const MatrixView& weights, int num_cols, const void* a, size_t lda, int rows,
                   float* c, size_t ldc, bool add, Scratch& scratch) {
  const auto start = Clock::now();
  model_.ops.gemm(weights, num_cols, a, lda, rows, c, ldc, add);
  scratch.stats.gemm_seconds += SecondsSince(start);
}

// Rows as inputs of a product with `weights`.
void Decoder::Normalise(const AlignedBuffer<float>& gamma, const AlignedBuffer<float>& beta,
                        const Chunk& chunk, const PackedMatrix& weights) {
  model_.ops.layer_norm(RowOf(chunk.of.h, chunk.begin, model_.shape.width()), chunk.count(),
                        gamma.data(), beta.data(), model_.shape.embed_dim, weights.view().type,
                        chunk.scratch.normed.data());
}

// What the first layer projects is counted where it is.
void Decoder::Count(const Pass& pass, DecoderStats& stats) const {
  const Shape& shape = model_.shape;
  const double embed = shape.embed_dim, leaves = pass.num_leaves, internal = pass.num_internal();
  (pass.chained ? stats.reencoded_nodes : stats.decoded_nodes) += pass.count;
  // a block: 3 projections, 1 back, 2 x 4 in the MLP; of the last one an inner node has 2
  const double block = 2.0 * embed * embed * 12.0;
  stats.gemm_flops += pass.count * block * (shape.num_layers - 1) + leaves * block +
                      internal * 4.0 * embed * embed + leaves * 2.0 * embed * shape.num_ids();
  const double projections =
      shape.num_layers > 1 ? 6.0 * pass.count : 6.0 * leaves + 4.0 * internal;
  stats.gemm_flops -= projections * embed * embed;
  for (int i = 0; i < pass.count; ++i) {
    const int layers = i < pass.num_internal() ? shape.num_layers - 1 : shape.num_layers;
    stats.attention_flops += 4.0 * embed * pass.path_len[i] * layers;
  }
}

DecoderStats Decoder::stats() const {
  DecoderStats stats;
  for (const Scratch& scratch : scratch_) stats += scratch.stats;
  return stats;
}

void Decoder::ResetStats() {
  for (Scratch& scratch : scratch_) scratch.stats = {};
}

size_t Decoder::allocated_bytes() const {
  size_t bytes = all_.bytes() + first_.allocated_bytes();
  for (const Scratch& scratch : scratch_) bytes += scratch.branch.bytes();
  for (const auto& layer : kv_) bytes += layer.size();
  return bytes;
}

}  // namespace tt
