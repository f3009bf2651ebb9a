// The arithmetic that depends on the instruction set: one table of functions per ISA.
//
// Everything here is plain data, as it is seen by sources that are compiled for an instruction set
// this machine may lack: an inline function of the standard library compiled there could be the one
// that the linker keeps for all.
#ifndef TT_OPS_H_
#define TT_OPS_H_

#include <stddef.h>
#include <stdint.h>

namespace tt {

// Rows of activations and columns of weights are padded with zeros to a multiple of this, so that
// no kernel has a tail: twice the widest vector, and a multiple of every panel width.
inline constexpr int kPad = 32;
// Each attention head is padded to a multiple of this.
inline constexpr int kHeadPad = 16;
// Numbers of each head that a vector of a bundle holds, see HeadLayout.
inline constexpr int kBundleNumbers = 4;
// Widest heads of a bundle, padded: queries of two rows, and sums of their values, fit 32
// registers.
inline constexpr int kMaxBundled = 32;
// Rows whose attention scores are held at once; even, as rows go in pairs.
inline constexpr int kScoreRows = 8;
// Keys, or values, of a bundle that such rows read before the next ones: half of a first cache of
// 32 KB. Queries, scores, sums and lines on their way take the rest.
inline constexpr int kStripBytes = 16 << 10;
// Most rows that one call of `gemm` or `attend` takes.
inline constexpr int kMaxRows = 96;

constexpr int RoundUp(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// What weights, and the inputs they are multiplied with, are rounded to; keys and values, too.
enum class NumberType {
  kFloat32,
  kBf16,     // sums are float32
  kRounded,  // kBf16's numbers as float32 in memory; weights and their inputs, never keys
  // Weights that are bfloat16, as float16, which is exact from 2^-17 on. Sums of kFp16Sum products
  // are float16, sums of these are float32.
  kFp16,
};

// Products that are summed in float16, in order: those of even and those of odd rows of weights,
// then the two sums. If signs are mixed, that is off by less than inputs rounded to bfloat16 make
// it on average: by up to 2^-11 of a sum that grows over 64 steps, and not by 2^-9 of each product.
inline constexpr int kFp16Sum = 128;
// Values that attention sums in float16; none of their weights is more than 1.
inline constexpr int kFp16Values = 32;

// A weight matrix (k, n), n and k padded, in panels of Ops::panel_width columns.
// kFloat32, kRounded: data[(panel * k + i) * panel_width + column]
// others: data[((panel * k / 2 + i / 2) * panel_width + place) * 2 + i % 2], where place is the
// column, or for float16 column / 2 + column % 2 * panel_width / 2
struct MatrixView {
  const void* data;
  const float* bias;  // (n)
  int k;
  int n;
  NumberType type;
};

// Queries of some rows over the keys of their ancestors. Heads lie in bundles, see HeadLayout.
struct AttendArgs {
  int rows;        // at most kMaxRows
  const float* q;  // (rows, q_stride), of which (num_bundles, bundle_stride) are used
  size_t q_stride;
  // (num_bundles, 2, bundle_size): of each bundle all nodes' keys, then their values. (A node's two
  // beside each other would leave half of the first cache's sets to each.) Arithmetic is float32,
  // but for float16, which takes bundles of several heads: see fp16_attend.h.
  const void* kv;
  NumberType type;
  size_t bundle_size;
  const uint32_t* const* paths;  // (rows) of (len) offsets of nodes in kv
  const int32_t* lens;           // (rows), at least 1
  const int32_t* shared;         // (rows) how much of its path a row shares with the row before it
  int num_bundles;
  int bundle_heads;    // 1, or Ops::bundle_heads
  int bundle_stride;   // multiple of kHeadPad
  float scale;         // 1 / sqrt(head_dim)
  float* scores;       // scratch (kScoreRows, scores_size)
  size_t scores_size;  // at least bundle_heads * RoundUp(longest len, kPad)
  uint32_t* fresh;     // scratch (rows * longest len)
  float* out;          // (rows, out_stride)
  size_t out_stride;
};

// Most numbers of a head in training: with 249 tokens, such a head just fits the second cache.
inline constexpr int kMaxTrainHeadDim = 128;
// Query rows whose scores are held at once in training: a tile or two of every table. More would
// compute more of the causal half that nobody sees.
inline constexpr int kTrainRows = 12;
// In `bias`: its exp is zero.
inline constexpr float kHidden = -1e30f;

// Attention of whole windows, for training. Numbers are float32 or bfloat16, arithmetic is float32.
struct TrainAttendArgs {
  int num_windows;
  int len;        // tokens of a window
  int num_heads;  // of head_dim numbers each, at most kMaxTrainHeadDim
  int head_dim;
  bool bf16;            // qkv, out, out_grad, qkv_grad
  const void* qkv;      // (num_windows, len, 3, num_heads, head_dim)
  const float* bias;    // (len, RoundUp(len, kPad)): 0 where a query sees a key, else kHidden
  const int32_t* ends;  // (len) one past the last key that a query sees, at least 1
  const uint8_t* keep;  // (num_windows, num_heads, len, len) 0 or 1; null: all 1
  float keep_scale;     // of the weights that are kept
  float scale;          // of scores, 1 / sqrt(head_dim)
  float* scratch;       // TrainScratchSize(len, head_dim), aligned to a cache line
  // (num_windows, num_heads, len, 2): a row's largest score, and one over the sum of its
  // exponentials. Forward writes them, backward reads them.
  float* stats;
  void* out;             // forward: (num_windows, len, num_heads, head_dim)
  const void* out_grad;  // backward: the same shape
  void* qkv_grad;        // backward: the shape of qkv
};

// Numbers of scratch: 8 matrices of a head, 3 blocks of rows, 2 rows of bytes.
constexpr size_t TrainScratchSize(int len, int head_dim) {
  const size_t padded_len = RoundUp(len, kPad), padded_dim = RoundUp(head_dim, kHeadPad);
  return 8 * padded_len * padded_dim + kTrainRows * (2 * (padded_len + kPad) + padded_dim) +
         padded_len;
}

// x Phi(x), or out_grad times its derivative. Arrays have `size` numbers.
struct TrainGeluArgs {
  size_t size;
  bool bf16;
  const void* x;
  const void* out_grad;  // null: forward
  void* out;
};

// A residual branch with dropout, and the LayerNorm behind it:
// sum = x + y * keep * keep_scale, normed = (sum - mean) / deviation * gamma + beta.
// Arrays are (num_rows, width) where no shape is given.
struct TrainNormArgs {
  size_t num_rows;
  int width;
  bool bf16;  // y, normed and their gradients; all others are float32
  const float* x;
  const void* y;
  const uint8_t* keep;  // 0 or 1; null: all 1
  float keep_scale;
  const float* gamma;  // (width)
  const float* beta;   // (width)
  float eps;           // added to the variance
  // Forward writes these, backward reads the first two.
  float* sum;
  float* stats;  // (num_rows, 2): mean, and one over the deviation
  void* normed;
  // Backward.
  const float* sum_grad;
  const void* normed_grad;
  float* x_grad;
  void* y_grad;
  float* gamma_grad;  // (width)
  float* beta_grad;   // (width)
  float* scratch;     // (2, RoundUp(width, kPad))
};

// Generators that run side by side to draw a mask, and the numbers that each step of them decides.
inline constexpr int kKeepLanes = 16;
inline constexpr int kKeepStep = 4 * kKeepLanes;

// A mask: number i is bits 16 (i % 4) and up of word i / 4, and words go through the lanes step by
// step. What the last step draws beyond `size` is lost.
struct KeepArgs {
  size_t size;
  uint64_t* state;      // (3, kKeepLanes): a, b, c of SFC64; moved on
  uint64_t first_step;  // SFC64's counter, that of all lanes
  int16_t first_kept;   // 16 bits, signed, below this are dropped
  uint8_t* keep;        // (size) 0 or 1
};

struct Ops {
  const char* name;
  int panel_width;
  int tile_rows, bf16_tile_rows;  // of `a` that gemm takes at once, by the model's type
  int bundle_heads;               // that `attend` takes at once, if a model's heads suit it
  // What bfloat16's weights are to `gemm`: kBf16, or kRounded where each would have to be widened.
  NumberType bf16_weights;
  // Whether kFp16 is faster: of weights in `gemm`, which are kRounded first; of keys in `round`
  // and, in bundles, `attend`.
  bool fp16_weights = false;
  bool fp16_keys = false;
  // c (rows, num_cols) = a (rows, k) w + bias, or += with `add`; num_cols counts whole panels. a is
  // what one of the next three made for weights of w's type; lda is in numbers.
  void (*gemm)(const MatrixView& w, int num_cols, const void* a, size_t lda, int rows, float* c,
               size_t ldc, bool add);
  // out (n): x as `gemm` takes it for weights of this type, rounded, in at most four bytes a
  // number; n a multiple of kPad.
  void (*prepare)(const float* x, size_t n, NumberType type, void* out);
  // The same of rows of normalised x (width) * gamma + beta, zero in the padding, of which x and
  // gamma and beta have as much.
  void (*layer_norm)(const float* x, int rows, const float* gamma, const float* beta, int width,
                     NumberType type, void* out);
  // The same of exact GELU, x Phi(x); in float32 out may be x.
  void (*gelu)(const float* x, size_t n, NumberType type, void* out);
  // out (n) bfloat16, or float16 with fp16_keys: the nearest to x, ties to even (bfloat16's
  // subnormal numbers may become zero); n a multiple of kHeadPad.
  void (*round)(const float* x, size_t n, NumberType type, uint16_t* out);
  void (*attend)(const AttendArgs& args);
  void (*train_forward)(const TrainAttendArgs& args);
  void (*train_backward)(const TrainAttendArgs& args);
  void (*train_gelu)(const TrainGeluArgs& args);
  void (*train_norm)(const TrainNormArgs& args);
  void (*train_norm_grad)(const TrainNormArgs& args);
  void (*draw_keep)(const KeepArgs& args);
  // probs (padded) of logits (n); x may be probs. Room for RoundUp(n, kPad) in both.
  void (*softmax)(const float* x, int n, float* probs);
  // Rate of a loop of multiply-adds in registers: floating point operations it did.
  double (*peak_loop)(int64_t iterations, bool bf16);
};

// Built for this architecture; `nullptr` where the compiler has no such target.
const Ops* ScalarOps();
const Ops* Avx2Ops();
const Ops* Avx512Ops();
const Ops* Avx512Bf16Ops();
const Ops* Avx512Fp16Ops();
// To be called on machines with AVX-512 only. fp16: whether this one has its float16.
const Ops* AmxOps(bool fp16);
const Ops* NeonOps();

}  // namespace tt

#endif  // TT_OPS_H_
