// Attention of whole windows, forward and backward, written once over a vector type. Included by
// simd_ops.h.
//
// One head at a time, some rows of queries against all keys that the last of them sees: scores of a
// causal half are never computed, and everything stays in the first two caches. The backward pass
// computes the weights again: kept, they would be most of the memory of a training pass.
//
// No include guard and nothing but anonymous namespaces: each instruction set has its own copy.

namespace {

using tt::kTrainRows;
using tt::TrainAttendArgs;

// ---- a head's matrices ----

// Sizes, and where things lie in scratch. A matrix of a head is (padded_len, padded_dim).
struct TrainLayout {
  size_t padded_len, padded_dim;
  size_t row_stride;  // in a tensor like qkv, from token to token
  size_t scores_stride;
  float* matrices;
  float *scores, *grads;  // (kTrainRows, scores_stride)
  float* rows;            // (kTrainRows, padded_dim)
  uint8_t* ones;          // (padded_len)
  uint8_t* keep_row;      // (padded_len)

  explicit TrainLayout(const TrainAttendArgs& args)
      : padded_len(tt::RoundUp(args.len, kPad)),
        padded_dim(tt::RoundUp(args.head_dim, kHeadPad)),
        row_stride(static_cast<size_t>(3) * args.num_heads * args.head_dim),
        scores_stride(padded_len + kPad),  // no power of 2, whose rows would share a few sets
        matrices(args.scratch),
        scores(matrices + 8 * matrix_size()),
        grads(scores + kTrainRows * scores_stride),
        rows(grads + kTrainRows * scores_stride),
        ones(reinterpret_cast<uint8_t*>(rows + kTrainRows * padded_dim)),
        keep_row(ones + padded_len) {
    __builtin_memset(ones, 1, padded_len);
    __builtin_memset(keep_row, 0, padded_len);
  }

  size_t width() const { return row_stride / 3; }  // of a token's row in a tensor like out
  size_t matrix_size() const { return padded_len * padded_dim; }
  float* matrix(int i) const { return matrices + i * matrix_size(); }
  // A matrix transposed, its columns in panels.
  Panels transposed(const float* x) const { return {x, kPanel, kPanel * padded_dim}; }
};

enum Matrix { kQuery, kKey, kValue, kOutGrad, kKeyT, kValueT, kKeyGrad, kValueGrad };

// out (padded_len, padded_dim) = x * factor; x (len, head_dim) has rows `stride` apart.
template <typename T>
void LoadMatrix(const TrainAttendArgs& args, const TrainLayout& layout, const T* x, size_t stride,
                float factor, float* out) {
  const bool fills = args.head_dim > static_cast<int>(layout.padded_dim) - kWidth;
  if (!fills) Zero(out, layout.matrix_size());
  for (int t = 0; t < args.len; ++t) {
    LoadRow(x + t * stride, args.head_dim, factor, out + t * layout.padded_dim);
  }
  const size_t end = args.len * layout.padded_dim;
  Zero(out + end, layout.matrix_size() - end);
}

template <typename T>
void StoreMatrix(const TrainAttendArgs& args, const TrainLayout& layout, const float* x,
                 float factor, T* out) {
  for (int t = 0; t < args.len; ++t) {
    StoreRow(x + t * layout.padded_dim, args.head_dim, factor, out + t * layout.row_stride);
  }
}

// Panel p has tokens [p * kPanel, (p + 1) * kPanel) as columns.
void PackTransposed(const TrainLayout& layout, const float* x, float* out) {
  const size_t dim = layout.padded_dim;
  for (size_t t = 0; t < layout.padded_len; t += kWidth) {
    float* panel = out + t / kPanel * kPanel * dim + t % kPanel;
    for (size_t i = 0; i < dim; i += kWidth) {
      Vec block[kWidth];
      UNROLL for (int j = 0; j < kWidth; ++j) block[j] = Vec::Load(x + (t + j) * dim + i);
      Transpose(block);
      UNROLL for (int j = 0; j < kWidth; ++j) block[j].Store(panel + (i + j) * kPanel);
    }
  }
}

// Queries, keys and values of a head; keys transposed too.
template <typename T>
void LoadHead(const TrainAttendArgs& args, const TrainLayout& layout, const T* qkv) {
  for (int i = kQuery; i <= kValue; ++i) {
    LoadMatrix(args, layout, qkv + i * layout.width(), layout.row_stride, 1.0f, layout.matrix(i));
  }
  PackTransposed(layout, layout.matrix(kKey), layout.matrix(kKeyT));
}

// Heads of all windows, and where they begin.
template <typename T>
struct Heads {
  const TrainAttendArgs& args;
  size_t count;

  explicit Heads(const TrainAttendArgs& args)
      : args(args), count(static_cast<size_t>(args.num_windows) * args.num_heads) {}

  // In a tensor with `parts` rows (num_heads, head_dim) a token.
  size_t At(size_t head, size_t parts) const {
    const size_t tokens = head / args.num_heads * args.len;
    return (tokens * parts * args.num_heads + head % args.num_heads) * args.head_dim;
  }
  const T* Qkv(size_t head) const { return static_cast<const T*>(args.qkv) + At(head, 3); }
  const T* OutGrad(size_t head) const { return static_cast<const T*>(args.out_grad) + At(head, 1); }
  size_t After(size_t head) const { return head + 1 < count ? head + 1 : head; }
};

// ---- rows of queries ----

// Rows [begin, begin + count) of a head, the keys that one of them sees, and the scores of these
// keys in whole vectors.
struct RowBlock {
  int begin, count;
  int end;
  int cols;
};

// As even as can be: a short block would run below the peak.
inline RowBlock BlockOf(const TrainAttendArgs& args, int block, int num_blocks) {
  const int begin = args.len * block / num_blocks, stop = args.len * (block + 1) / num_blocks;
  int end = 1;
  for (int r = begin; r < stop; ++r) end = args.ends[r] > end ? args.ends[r] : end;
  return {begin, stop - begin, end, tt::RoundUp(end, kWidth)};
}

inline int NumBlocks(const TrainAttendArgs& args) {
  return (args.len + kTrainRows - 1) / kTrainRows;
}

// The mask of a query in whole vectors; head counts those of all windows.
inline const uint8_t* KeepRow(const TrainAttendArgs& args, const TrainLayout& layout, size_t head,
                              int r) {
  if (args.keep == nullptr) return layout.ones;
  const uint8_t* row = args.keep + (head * args.len + r) * args.len;
  if (tt::RoundUp(args.ends[r], kWidth) <= args.len) return row;
  __builtin_memcpy(layout.keep_row, row, args.len);  // the tensor may end with this row
  return layout.keep_row;
}

// scores (end) of a row become weights times their sum, where they are kept; zero up to `cols`.
// stats (2): see TrainAttendArgs.
inline void WeightRow(float* scores, const float* bias, const uint8_t* keep, float scale, int end,
                      int cols, float* stats) {
  Vec largest(tt::kHidden);
  for (int j = 0; j < end; j += kWidth) {
    const Vec score = Fma(Vec::Load(scores + j), Vec(scale), Vec::Load(bias + j));
    score.Store(scores + j);
    largest = Max(largest, score);
  }
  stats[0] = MaxLane(largest);
  const Vec max(stats[0]);
  Vec sum(0.0f), nan(0.0f);
  int j = 0;
  for (; j < end; j += kWidth) {
    const Vec below = Vec::Load(scores + j) - max;
    const Vec e = Exp(below);
    (e * Vec::FromBytes(keep + j)).Store(scores + j);
    sum = sum + e;
    nan = Fma(below, Vec(0.0f), nan);  // Exp knows none: one that comes in must come out
  }
  Zero(scores + j, cols - j);
  stats[1] = 1.0f / Sum(sum + nan);
}

// scores (end) of a row become kept weights, and gradients of kept weights those of scores (before
// they were scaled by `scale`); zero up to `cols`.
// W = softmax(z), kept weights W M: dz = W (M g - D), D = sum of W M g
inline void GradientRow(float* scores, float* grads, const float* bias, const uint8_t* keep,
                        float scale, const float* stats, int end, int cols) {
  const Vec max(stats[0]), inverse_sum(stats[1]);
  Vec dots(0.0f);
  for (int j = 0; j < end; j += kWidth) {
    const Vec score = Fma(Vec::Load(scores + j), Vec(scale), Vec::Load(bias + j));
    const Vec weight = Exp(score - max) * inverse_sum;
    const Vec grad = Vec::Load(grads + j) * Vec::FromBytes(keep + j);
    weight.Store(scores + j);
    grad.Store(grads + j);
    dots = Fma(weight, grad, dots);
  }
  const Vec dot(Sum(dots));
  int j = 0;
  for (; j < end; j += kWidth) {
    const Vec weight = Vec::Load(scores + j);
    (weight * (Vec::Load(grads + j) - dot)).Store(grads + j);
    (weight * Vec::FromBytes(keep + j)).Store(scores + j);
  }
  Zero(scores + j, cols - j);
  Zero(grads + j, cols - j);
}

// Some rows of the next head are asked for with each block of this one: they are short pieces far
// apart, which no processor foresees; that saves a tenth of the time. x (len, head_dim) has rows
// `stride` apart.
template <typename T>
inline void PrefetchRows(const TrainAttendArgs& args, const RowBlock& block, const T* x,
                         size_t stride) {
  for (int r = block.begin; r < block.begin + block.count; ++r) {
    const char* row = reinterpret_cast<const char*>(x + r * stride);
    for (size_t i = 0; i < args.head_dim * sizeof(T); i += 64) __builtin_prefetch(row + i, 0, 2);
  }
}

template <typename T>
inline void PrefetchQkv(const TrainAttendArgs& args, const TrainLayout& layout,
                        const RowBlock& block, const T* qkv) {
  for (int i = 0; i < 3; ++i) {
    PrefetchRows(args, block, qkv + i * layout.width(), layout.row_stride);
  }
}

// ---- forward ----

// Of some rows: scores, weights, weighted sums of values.
template <typename T>
void ForwardBlock(const TrainAttendArgs& args, const TrainLayout& layout, size_t head,
                  const RowBlock& block, T* out) {
  const size_t dim = layout.padded_dim, stride = layout.scores_stride;
  Product<false>(layout.matrix(kQuery) + block.begin * dim, dim,
                 layout.transposed(layout.matrix(kKeyT)), args.head_dim, block.count, block.cols,
                 layout.scores, stride);
  float* stats = args.stats + 2 * (head * args.len + block.begin);
  for (int i = 0; i < block.count; ++i) {
    const int r = block.begin + i;
    WeightRow(layout.scores + i * stride, args.bias + r * layout.padded_len,
              KeepRow(args, layout, head, r), args.scale, args.ends[r], block.cols, stats + 2 * i);
  }
  Product<false>(layout.scores, stride, Plain(layout.matrix(kValue), dim), block.end, block.count,
                 static_cast<int>(dim), layout.rows, dim);
  for (int i = 0; i < block.count; ++i) {
    StoreRow(layout.rows + i * dim, args.head_dim, stats[2 * i + 1] * args.keep_scale,
             out + (block.begin + i) * layout.width());
  }
}

template <typename T>
void ForwardHeads(const TrainAttendArgs& args) {
  const TrainLayout layout(args);
  const Heads<T> heads(args);
  for (size_t head = 0; head < heads.count; ++head) {
    LoadHead(args, layout, heads.Qkv(head));
    for (int b = 0; b < NumBlocks(args); ++b) {
      const RowBlock block = BlockOf(args, b, NumBlocks(args));
      PrefetchQkv(args, layout, block, heads.Qkv(heads.After(head)));
      ForwardBlock(args, layout, head, block, static_cast<T*>(args.out) + heads.At(head, 1));
    }
  }
}

void TrainForward(const TrainAttendArgs& args) {
  args.bf16 ? ForwardHeads<uint16_t>(args) : ForwardHeads<float>(args);
}

// ---- backward ----

// Of some rows: weights again, gradients of scores, and what follows for queries, keys, values.
template <typename T>
void BackwardBlock(const TrainAttendArgs& args, const TrainLayout& layout, size_t head,
                   const RowBlock& block, T* query_grad) {
  const size_t dim = layout.padded_dim, stride = layout.scores_stride;
  const int cols = static_cast<int>(dim);
  const float* query = layout.matrix(kQuery) + block.begin * dim;
  const float* out_grad = layout.matrix(kOutGrad) + block.begin * dim;
  Product<false>(query, dim, layout.transposed(layout.matrix(kKeyT)), args.head_dim, block.count,
                 block.cols, layout.scores, stride);
  Product<false>(out_grad, dim, layout.transposed(layout.matrix(kValueT)), args.head_dim,
                 block.count, block.cols, layout.grads, stride);
  const float* stats = args.stats + 2 * (head * args.len + block.begin);
  for (int i = 0; i < block.count; ++i) {
    const int r = block.begin + i;
    GradientRow(layout.scores + i * stride, layout.grads + i * stride,
                args.bias + r * layout.padded_len, KeepRow(args, layout, head, r), args.scale,
                stats + 2 * i, args.ends[r], block.cols);
  }
  Product<true>(layout.scores, stride, Plain(out_grad, dim), block.count, block.end, cols,
                layout.matrix(kValueGrad), dim);
  Product<true>(layout.grads, stride, Plain(query, dim), block.count, block.end, cols,
                layout.matrix(kKeyGrad), dim);
  Product<false>(layout.grads, stride, Plain(layout.matrix(kKey), dim), block.end, block.count,
                 cols, layout.rows, dim);
  for (int i = 0; i < block.count; ++i) {
    StoreRow(layout.rows + i * dim, args.head_dim, args.scale,
             query_grad + (block.begin + i) * layout.row_stride);
  }
}

template <typename T>
void BackwardHead(const TrainAttendArgs& args, const TrainLayout& layout, const Heads<T>& heads,
                  size_t head) {
  const size_t next = heads.After(head);
  T* qkv_grad = static_cast<T*>(args.qkv_grad) + heads.At(head, 3);
  LoadHead(args, layout, heads.Qkv(head));
  PackTransposed(layout, layout.matrix(kValue), layout.matrix(kValueT));
  LoadMatrix(args, layout, heads.OutGrad(head), layout.width(), args.keep_scale,
             layout.matrix(kOutGrad));
  Zero(layout.matrix(kKeyGrad), layout.matrix_size());
  Zero(layout.matrix(kValueGrad), layout.matrix_size());
  for (int b = 0; b < NumBlocks(args); ++b) {
    const RowBlock block = BlockOf(args, b, NumBlocks(args));
    PrefetchQkv(args, layout, block, heads.Qkv(next));
    PrefetchRows(args, block, heads.OutGrad(next), layout.width());
    BackwardBlock(args, layout, head, block, qkv_grad);
  }
  StoreMatrix(args, layout, layout.matrix(kKeyGrad), args.scale, qkv_grad + layout.width());
  StoreMatrix(args, layout, layout.matrix(kValueGrad), 1.0f, qkv_grad + 2 * layout.width());
}

template <typename T>
void BackwardHeads(const TrainAttendArgs& args) {
  const TrainLayout layout(args);
  const Heads<T> heads(args);
  for (size_t head = 0; head < heads.count; ++head) BackwardHead(args, layout, heads, head);
}

void TrainBackward(const TrainAttendArgs& args) {
  args.bf16 ? BackwardHeads<uint16_t>(args) : BackwardHeads<float>(args);
}

}  // namespace
