// The kernels, written once over a vector type. Include it after defining, in an anonymous
// namespace, `Vec`, kName, kTileRows, kTileVecs and kRegisters; it defines `kSimdOps`.
//
// No include guard and nothing but anonymous namespaces: each instruction set has its own copy.
#include "ops.h"

// Before a loop of constant length: arrays of vectors become registers only if it is unrolled
// early.
#define UNROLL _Pragma("GCC unroll 32")

namespace {

using tt::AttendArgs;
using tt::kHeadPad;
using tt::kPad;
using tt::MatrixView;
using tt::Ops;

constexpr int kWidth = Vec::kWidth;
constexpr float kMasked = -1e30f;  // its exp is zero
constexpr int kPanel = kTileVecs * kWidth;
static_assert(kPad % kPanel == 0 && kHeadPad % kWidth == 0);

// ---- elementary functions ----

// e^x, relative error 1e-7: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. Zero far below.
inline Vec Exp(Vec x) {
  const Vec clamped = Max(x, Vec(-104.0f));
  const Vec n = Round(clamped * Vec(1.44269504088896341f));
  // ln 2 in two parts: n times the first is exact
  Vec r = Fma(n, Vec(-0.693359375f), clamped);
  r = Fma(n, Vec(2.12194440e-4f), r);
  Vec p(0.0013814616249874234f);
  p = Fma(p, r, Vec(0.0083687175065279f));
  p = Fma(p, r, Vec(0.04166838899254799f));
  p = Fma(p, r, Vec(0.1666652113199234f));
  p = Fma(p, r, Vec(0.4999999403953552f));
  p = Fma(p, r * r, r) + Vec(1.0f);
  return ScaleByPowerOf2(p, n);
}

// x Phi(x): Phi(x) = 1/2 + x P(x^2) / Q(x^2), a minimax fit on [-5.2, 5.2] with absolute error
// 1.3e-7 in float32; further out Phi is 0 or 1 to that precision.
inline Vec Gelu(Vec x) {
  const Vec c = Min(Max(x, Vec(-5.2f)), Vec(5.2f));
  const Vec t = c * c;
  Vec p(2.4731127368227135e-08f);
  p = Fma(p, t, Vec(6.407891760318307e-06f));
  p = Fma(p, t, Vec(0.00015686177357565612f));
  p = Fma(p, t, Vec(0.004608646500855684f));
  p = Fma(p, t, Vec(0.0325445719063282f));
  p = Fma(p, t, Vec(0.3989422619342804f));
  Vec q(1.2588686786330072e-06f);
  q = Fma(q, t, Vec(7.049617124721408e-05f));
  q = Fma(q, t, Vec(0.0018172035925090313f));
  q = Fma(q, t, Vec(0.027926700189709663f));
  q = Fma(q, t, Vec(0.24824348092079163f));
  q = Fma(q, t, Vec(1.0f));
  return x * (Vec(0.5f) + Max(c * p / q, Vec(-0.5f)));
}

void GeluRow(float* x, size_t n) {
  for (size_t i = 0; i < n; i += kWidth) Gelu(Vec::Load(x + i)).Store(x + i);
}

// ---- rows ----

// x is zero in its padding, so a sum over whole vectors is the sum over `width`.
void LayerNorm(const float* x, const float* gamma, const float* beta, int width, float* out) {
  const int padded = tt::RoundUp(width, kPad);
  Vec sum(0.0f);
  for (int i = 0; i < padded; i += kWidth) sum = sum + Vec::Load(x + i);
  const float mean = Sum(sum) / static_cast<float>(width);
  // the padding is not `mean` away from the mean
  const int whole = width / kWidth * kWidth;
  Vec squares(0.0f);
  for (int i = 0; i < whole; i += kWidth) {
    const Vec d = Vec::Load(x + i) - Vec(mean);
    squares = Fma(d, d, squares);
  }
  float total = Sum(squares);
  for (int i = whole; i < width; ++i) total += (x[i] - mean) * (x[i] - mean);
  const float variance = total / static_cast<float>(width);
  const Vec scale(1.0f / __builtin_sqrtf(variance + 1e-5f));
  for (int i = 0; i < padded; i += kWidth) {
    const Vec normed = (Vec::Load(x + i) - Vec(mean)) * scale;
    Fma(normed, Vec::Load(gamma + i), Vec::Load(beta + i)).Store(out + i);
  }
}

// Softmax of x (n), which may be probs; zero in the padding.
void Softmax(const float* x, int n, float* probs) {
  const int padded = tt::RoundUp(n, kPad);
  float max = x[0];
  for (int i = 1; i < n; ++i) max = x[i] > max ? x[i] : max;
  for (int i = 0; i < n; ++i) probs[i] = x[i] - max;
  for (int i = n; i < padded; ++i) probs[i] = kMasked;
  Vec sum(0.0f);
  for (int i = 0; i < padded; i += kWidth) {
    const Vec e = Exp(Vec::Load(probs + i));
    e.Store(probs + i);
    sum = sum + e;
  }
  const Vec total(Sum(sum));
  for (int i = 0; i < padded; i += kWidth) (Vec::Load(probs + i) / total).Store(probs + i);
}

// Sum over lanes still to come: q . key.
template <int kVecs>
inline Vec DotVecs(const Vec (&q)[kVecs], const float* key) {
  Vec sum = q[0] * Vec::Load(key);
  UNROLL for (int v = 1; v < kVecs; ++v) sum = Fma(q[v], Vec::Load(key + v * kWidth), sum);
  return sum;
}

// ---- attention: three steps of one head, QK, exp, weighted sum ----
//
// A row alone, or two neighbours at once over the ancestors that they share: each key and value is
// then loaded once for both.

template <int kVecs>
inline void LoadQuery(const float* q, float scale, Vec (&query)[kVecs]) {
  UNROLL for (int v = 0; v < kVecs; ++v) query[v] = Vec::Load(q + v * kWidth) * Vec(scale);
}

// scores[j] = q . k_j for j in [begin, len), kMasked after them; begin is a multiple of kWidth.
template <int kVecs>
inline void DotKeys(const float* q, float scale, const float* keys, const uint32_t* path, int begin,
                    int len, float* scores) {
  Vec query[kVecs];
  LoadQuery<kVecs>(q, scale, query);
  // a vector of partial sums a key, then all of them reduced at once: lane i belongs to key j + i
  for (int j = begin; j < len; j += kWidth) {
    Vec partial[kWidth];
    if (j + kWidth <= len) {
      UNROLL for (int i = 0; i < kWidth; ++i) {
        partial[i] = DotVecs<kVecs>(query, keys + path[j + i]);
      }
    } else {
      UNROLL for (int i = 0; i < kWidth; ++i) {
        partial[i] = DotVecs<kVecs>(query, keys + path[j + i < len ? j + i : len - 1]);
      }
    }
    SumEach(partial).Store(scores + j);
  }
  for (int j = len; j < tt::RoundUp(len, kWidth); ++j) scores[j] = kMasked;
}

// The same of a row and the next one over [0, end), a multiple of kWidth.
template <int kVecs>
inline void DotSharedKeys(const float* q, size_t q_stride, float scale, const float* keys,
                          const uint32_t* path, int end, float* scores, size_t scores_size) {
  Vec query0[kVecs], query1[kVecs];
  LoadQuery<kVecs>(q, scale, query0);
  LoadQuery<kVecs>(q + (end > 0 ? q_stride : 0), scale, query1);
  for (int j = 0; j < end; j += kWidth) {
    Vec partial0[kWidth], partial1[kWidth];
    UNROLL for (int i = 0; i < kWidth; ++i) {
      partial0[i] = DotVecs<kVecs>(query0, keys + path[j + i]);
      partial1[i] = DotVecs<kVecs>(query1, keys + path[j + i]);
    }
    SumEach(partial0).Store(scores + j);
    SumEach(partial1).Store(scores + scores_size + j);
  }
}

// scores[j] = exp(scores[j] - max); returns one over their sum.
inline float ExpScores(float* scores, int len) {
  Vec largest = Vec::Load(scores);
  for (int j = kWidth; j < len; j += kWidth) largest = Max(largest, Vec::Load(scores + j));
  const Vec max(MaxLane(largest));
  Vec sum(0.0f);
  for (int j = 0; j < len; j += kWidth) {
    const Vec e = Exp(Vec::Load(scores + j) - max);
    e.Store(scores + j);
    sum = sum + e;
  }
  return 1.0f / Sum(sum);
}

// A weighted sum is several sums side by side, which hides the latency of a multiply-add: value j
// goes to chain j % kChains. A row's order of additions is the same alone and beside another one,
// so that plans do not depend on how rows are shared out.
template <int kVecs>
inline constexpr int kChainsOf = kRegisters / 4 / kVecs > 4   ? 4
                                 : kRegisters / 4 / kVecs < 1 ? 1
                                                              : kRegisters / 4 / kVecs;

template <int kVecs>
struct Chains {
  static constexpr int kChains = kChainsOf<kVecs>;
  Vec sums[kChains][kVecs];
};

template <int kVecs>
inline void StoreTotal(const Chains<kVecs>& chains, float scale, float* out) {
  UNROLL for (int v = 0; v < kVecs; ++v) {
    Vec total = chains.sums[0][v];
    UNROLL for (int c = 1; c < chains.kChains; ++c) total = total + chains.sums[c][v];
    (total * Vec(scale)).Store(out + v * kWidth);
  }
}

template <int kVecs>
inline void AddOne(float weight, const float* value, Vec (&sums)[kVecs]) {
  const Vec w(weight);
  UNROLL for (int v = 0; v < kVecs; ++v) sums[v] = Fma(w, Vec::Load(value + v * kWidth), sums[v]);
}

// Chains of values [0, end), then of [end, len) too; end is a multiple of kWidth. By value: sums
// that live in a register may have no address.
template <int kVecs>
inline Chains<kVecs> AddValues(Chains<kVecs> chains, const float* weights, const float* values,
                               const uint32_t* path, int end, int len) {
  int j = end;
  for (; j + chains.kChains <= len; j += chains.kChains) {
    UNROLL for (int c = 0; c < chains.kChains; ++c) {
      AddOne<kVecs>(weights[j + c], values + path[j + c], chains.sums[c]);
    }
  }
  for (; j < len; ++j) AddOne<kVecs>(weights[j], values + path[j], chains.sums[0]);
  return chains;
}

// Of a row and the next one, values [0, end).
template <int kVecs>
inline void AddSharedValues(const float* weights, size_t stride, const float* values,
                            const uint32_t* path, int end, Chains<kVecs>* out) {
  Chains<kVecs> a, b;
  UNROLL for (int c = 0; c < a.kChains; ++c) {
    UNROLL for (int v = 0; v < kVecs; ++v) a.sums[c][v] = b.sums[c][v] = Vec(0.0f);
  }
  for (int j = 0; j < end; j += a.kChains) {
    UNROLL for (int c = 0; c < a.kChains; ++c) {
      const Vec w0 = Vec::Broadcast(weights + j + c);
      const Vec w1 = Vec::Broadcast(weights + stride + j + c);
      const float* value = values + path[j + c];
      UNROLL for (int v = 0; v < kVecs; ++v) {
        const Vec x = Vec::Load(value + v * kWidth);
        a.sums[c][v] = Fma(w0, x, a.sums[c][v]);
        b.sums[c][v] = Fma(w1, x, b.sums[c][v]);
      }
    }
  }
  out[0] = a;
  out[1] = b;
}

// One head of rows [r, r + num_rows), at most kScoreRows: each step for all of them before the next
// one, as a row alone would wait for its own maximum and sum. Pairs of rows share keys and values.
template <int kVecs>
inline void AttendBlock(const AttendArgs& args, int head, int r, int num_rows) {
  const int column = head * args.head_stride;
  const float* keys = args.kv + head * args.head_size;
  const float* values = keys + args.head_stride;
  const float* q = args.q + r * args.q_stride + column;
  float* out = args.out + r * args.out_stride + column;
  const uint32_t* const* paths = args.paths + r;
  const int32_t* lens = args.lens + r;
  int ends[tt::kScoreRows];  // what a pair does together
  float scales[tt::kScoreRows];
  const auto scores = [&args](int i) { return args.scores + i * args.scores_size; };

  for (int i = 0; i < num_rows; i += 2) {
    const bool is_pair = i + 1 < num_rows;
    ends[i] = is_pair ? args.shared[r + i + 1] / kWidth * kWidth : 0;
    DotSharedKeys<kVecs>(q + i * args.q_stride, args.q_stride, args.scale, keys, paths[i], ends[i],
                         scores(i), args.scores_size);
    for (int row = i; row < i + 1 + is_pair; ++row) {
      DotKeys<kVecs>(q + row * args.q_stride, args.scale, keys, paths[row], ends[i], lens[row],
                     scores(row));
    }
  }
  for (int i = 0; i < num_rows; ++i) scales[i] = ExpScores(scores(i), lens[i]);
  for (int i = 0; i < num_rows; i += 2) {
    Chains<kVecs> chains[2];
    AddSharedValues<kVecs>(scores(i), args.scores_size, values, paths[i], ends[i], chains);
    for (int row = i; row < i + 2 && row < num_rows; ++row) {
      StoreTotal<kVecs>(
          AddValues<kVecs>(chains[row - i], scores(row), values, paths[row], ends[i], lens[row]),
          scales[row], out + row * args.out_stride);
    }
  }
}

// Asks for what row r has and the row before it has not, into the second cache.
template <int kVecs>
inline void PrefetchRow(const AttendArgs& args, int r, const float* keys) {
  const uint32_t* path = args.paths[r];
  for (int j = args.shared[r]; j < args.lens[r]; ++j) {
    const char* node = reinterpret_cast<const char*>(keys + path[j]);
    UNROLL for (size_t i = 0; i < 2 * kVecs * kWidth * sizeof(float); i += 64) {
      __builtin_prefetch(node + i, 0, 2);
    }
  }
}

// Heads outside, rows inside: neighbouring rows share most ancestors, and one head's part of these
// fits the first cache.
template <int kVecs>
void AttendHeads(const AttendArgs& args) {
  for (int head = 0; head < args.num_heads; ++head) {
    const float* keys = args.kv + head * args.head_size;
    for (int r = 0; r < args.rows; r += tt::kScoreRows) {
      const int end = r + tt::kScoreRows < args.rows ? r + tt::kScoreRows : args.rows;
      for (int i = end; i < end + tt::kScoreRows && i < args.rows; ++i) {
        PrefetchRow<kVecs>(args, i, keys);
      }
      AttendBlock<kVecs>(args, head, r, end - r);
    }
  }
}

// Heads of other widths, a vector at a time.
void AttendWide(const AttendArgs& args) {
  for (int head = 0; head < args.num_heads; ++head) {
    const float* keys = args.kv + head * args.head_size;
    for (int r = 0; r < args.rows; ++r) {
      const uint32_t* path = args.paths[r];
      const int len = args.lens[r];
      const float* q = args.q + r * args.q_stride + head * args.head_stride;
      float* out = args.out + r * args.out_stride + head * args.head_stride;
      for (int j = 0; j < tt::RoundUp(len, kWidth); ++j) {
        Vec sum(0.0f);
        for (int i = 0; j < len && i < args.head_stride; i += kWidth) {
          sum = Fma(Vec::Load(q + i), Vec::Load(keys + path[j] + i), sum);
        }
        args.scores[j] = j < len ? Sum(sum) * args.scale : kMasked;
      }
      const float scale = ExpScores(args.scores, len);
      for (int i = 0; i < args.head_stride; i += kWidth) {
        Chains<1> chains;
        for (auto& sums : chains.sums) sums[0] = Vec(0.0f);
        const float* values = keys + args.head_stride + i;
        StoreTotal<1>(AddValues<1>(chains, args.scores, values, path, 0, len), scale, out + i);
      }
    }
  }
}

void Attend(const AttendArgs& args) {
  const int vecs = args.head_stride / kWidth;
  if (vecs == 1) return AttendHeads<1>(args);
  if (vecs == 2) return AttendHeads<2>(args);
  if (vecs == 4) return AttendHeads<4>(args);
  if (vecs == 8) return AttendHeads<8>(args);
  AttendWide(args);
}

// ---- matrix product ----

inline void StoreSum(Vec sum, float* out, bool add) {
  (add ? sum + Vec::Load(out) : sum).Store(out);
}

// A tile of c: kRows rows times one panel. Its sums stay in registers over all of k.
template <int kRows>
void TileFloat(const float* a, size_t lda, const float* w, const float* bias, int k, float* c,
               size_t ldc, bool add) {
  Vec sums[kRows][kTileVecs];
  UNROLL for (int r = 0; r < kRows; ++r) {
    UNROLL for (int v = 0; v < kTileVecs; ++v) sums[r][v] = Vec::Load(bias + v * kWidth);
  }
  for (int i = 0; i < k; ++i) {
    Vec column[kTileVecs];
    UNROLL for (int v = 0; v < kTileVecs; ++v) column[v] = Vec::Load(w + i * kPanel + v * kWidth);
    UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec x = Vec::Broadcast(a + r * lda + i);
      UNROLL for (int v = 0; v < kTileVecs; ++v) sums[r][v] = Fma(x, column[v], sums[r][v]);
    }
  }
  UNROLL for (int r = 0; r < kRows; ++r) {
    UNROLL for (int v = 0; v < kTileVecs; ++v) StoreSum(sums[r][v], c + r * ldc + v * kWidth, add);
  }
}

// The same with two rows of w at a time, in bfloat16.
template <int kRows>
void TileBf16(const uint16_t* a, size_t lda, const uint16_t* w, const float* bias, int k, float* c,
              size_t ldc, bool add) {
  Vec sums[kRows][kTileVecs];
  UNROLL for (int r = 0; r < kRows; ++r) {
    UNROLL for (int v = 0; v < kTileVecs; ++v) sums[r][v] = Vec::Load(bias + v * kWidth);
  }
  for (int i = 0; i < k; i += 2) {
    Vec::Pairs column[kTileVecs];
    UNROLL for (int v = 0; v < kTileVecs; ++v) {
      column[v] = Vec::LoadPairs(w + i * kPanel + v * 2 * kWidth);
    }
    UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec::Pairs x = Vec::BroadcastPair(a + r * lda + i);
      UNROLL for (int v = 0; v < kTileVecs; ++v) sums[r][v] = DotPairs(x, column[v], sums[r][v]);
    }
  }
  UNROLL for (int r = 0; r < kRows; ++r) {
    UNROLL for (int v = 0; v < kTileVecs; ++v) StoreSum(sums[r][v], c + r * ldc + v * kWidth, add);
  }
}

using FloatTile = void (*)(const float*, size_t, const float*, const float*, int, float*, size_t,
                           bool);
using Bf16Tile = void (*)(const uint16_t*, size_t, const uint16_t*, const float*, int, float*,
                          size_t, bool);

template <int... kRows>
struct TileTable {
  static constexpr FloatTile kFloat[] = {TileFloat<kRows + 1>...};
  static constexpr Bf16Tile kBf16[] = {TileBf16<kRows + 1>...};
};
template <int kCount, int... kRows>
struct MakeTiles : MakeTiles<kCount - 1, kCount - 1, kRows...> {};
template <int... kRows>
struct MakeTiles<0, kRows...> : TileTable<kRows...> {};
using Tiles = MakeTiles<kTileRows>;  // kFloat[n - 1] has n rows

// Tiles of equal height, give or take a row: a short last tile would run below the peak.
// A panel of w stays in the first cache while the rows pass by it.
template <typename T, typename Tile>
inline void TileLoop(const Tile* tiles, const MatrixView& w, int num_cols, const T* a, size_t lda,
                     int rows, float* c, size_t ldc, bool add) {
  const int num_tiles = (rows + kTileRows - 1) / kTileRows;
  for (int col = 0; col < num_cols; col += kPanel) {
    const T* panel = static_cast<const T*>(w.data) + static_cast<size_t>(col) * w.k;
    for (int t = 0; t < num_tiles; ++t) {
      const int begin = rows * t / num_tiles, end = rows * (t + 1) / num_tiles;
      tiles[end - begin - 1](a + begin * lda, lda, panel, w.bias + col, w.k, c + begin * ldc + col,
                             ldc, add);
    }
  }
}

void Gemm(const MatrixView& w, int num_cols, const float* a, size_t lda, int rows, float* c,
          size_t ldc, bool add, uint16_t* scratch) {
  if (!w.bf16) return TileLoop(Tiles::kFloat, w, num_cols, a, lda, rows, c, ldc, add);
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < w.k; i += kWidth) {
      StoreBf16(Vec::Load(a + r * lda + i), scratch + static_cast<size_t>(r) * w.k + i);
    }
  }
  TileLoop(Tiles::kBf16, w, num_cols, static_cast<const uint16_t*>(scratch), w.k, rows, c, ldc,
           add);
}

// ---- the machine's peak ----

// As many independent sums as a tile has, no memory.
template <bool kBf16>
void PeakSums(int64_t iterations) {
  Vec sums[kTileRows * kTileVecs];
  UNROLL for (Vec& sum : sums) sum = Vec(1.0f);
  alignas(64) uint16_t pairs[2 * kWidth];
  for (uint16_t& x : pairs) x = 0x3f80;  // 1.0
  const Vec::Pairs ones = Vec::LoadPairs(pairs);
  const Vec x(1.0f), y(1e-9f);
  for (int64_t i = 0; i < iterations; ++i) {
    UNROLL for (Vec& sum : sums) sum = kBf16 ? DotPairs(ones, ones, sum) : Fma(x, y, sum);
    UNROLL for (Vec& sum : sums) Keep(sum);
  }
}

double PeakLoop(int64_t iterations, bool bf16) {
  bf16 ? PeakSums<true>(iterations) : PeakSums<false>(iterations);
  return static_cast<double>(iterations) * kTileRows * kTileVecs * kWidth * (bf16 ? 4 : 2);
}

constexpr Ops kSimdOps = {kName, kPanel, Gemm, LayerNorm, GeluRow, Attend, Softmax, PeakLoop};

}  // namespace
