// The kernels, written once over a vector type. Include it after defining, in an anonymous
// namespace, `Vec`, kName, kTileRows, kTileVecs, kPointerRows and kRegisters; it defines `MakeOps`.
//
// Of functions of vectors it needs those that ops_neon.cc has, and of these do not speak for
// themselves:
//   Keep(a): a is in a register here; compilers neither load it again for another use, nor fold its
//     load into each of them.
//   ScaleByPowerOf2(a, n, shifted, least): a 2^n, or zero where n is below `least` or NaN; a is in
//     [0.7, 1.42], n an integer, which is in the last bits of `shifted`, too.
//   SumEach(p): lane i is the sum of p[i].
// And if vectors hold several heads, those that ops_avx2.cc has beyond that.
//
// No include guard and nothing but anonymous namespaces: each instruction set has its own copy.
#include "normal_table.h"
#include "ops.h"

// Before a loop of constant length: arrays of vectors become registers only if it is unrolled
// early.
#define UNROLL _Pragma("GCC unroll 32")

namespace {

using tt::AttendArgs;
using tt::kHeadPad;
using tt::kPad;
using tt::MatrixView;
using tt::NumberType;
using tt::Ops;

constexpr int kWidth = Vec::kWidth;
constexpr float kMasked = -1e30f;  // its exp is zero
constexpr int kPanel = kTileVecs * kWidth;
constexpr int kLine = 64;  // bytes of a cache line
static_assert(kPad % kPanel == 0 && kHeadPad % kWidth == 0);

// ---- numbers in memory, float32 or bfloat16 ----

inline Vec LoadNumbers(const float* x) { return Vec::Load(x); }
inline Vec LoadNumbers(const uint16_t* x) { return Vec::LoadBf16(x); }
inline void StoreNumbers(Vec x, float* out) { x.Store(out); }
inline void StoreNumbers(Vec x, uint16_t* out) { StoreBf16(x, out); }

// To bfloat16.
void RoundNumbers(const float* x, size_t n, NumberType, uint16_t* out) {
  for (size_t i = 0; i < n; i += kWidth) StoreBf16(Vec::Load(x + i), out + i);
}

// ---- inputs of matrix products ----

// How they lie in memory: as they are, rounded to bfloat16 but float32 still, in bfloat16.
struct Floats {
  using Number = float;
  static void Store(Vec x, float* out) { x.Store(out); }
};
struct RoundedFloats {
  using Number = float;
  static void Store(Vec x, float* out) { RoundToBf16(x).Store(out); }
};
struct Bfloats {
  using Number = uint16_t;
  static void Store(Vec x, uint16_t* out) { StoreBf16(x, out); }
};

template <typename Inputs>
inline void PrepareAs(const float* x, size_t n, typename Inputs::Number* out) {
  for (size_t i = 0; i < n; i += kWidth) Inputs::Store(Vec::Load(x + i), out + i);
}

// ---- elementary functions ----

// Added to a number, it rounds that to an integer, which is in the last bits of the sum.
constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23
// Smaller powers of two count as zero: less than 1, times these, would not be a normal number.
constexpr float kLeastPower = -125.0f;

// e^x of x up to 88, relative error 1e-7: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. Of NaN
// and of what is far below, zero.
inline Vec Exp(Vec x) {
  const Vec shifted = Fma(x, Vec(1.44269504088896341f), Vec(kToInteger));
  const Vec n = shifted - Vec(kToInteger);
  // ln 2 in two parts: n times the first is exact
  Vec r = Fma(n, Vec(-0.693359375f), x);
  r = Fma(n, Vec(2.12194440e-4f), r);
  Vec p(0.0013814616249874234f);
  p = Fma(p, r, Vec(0.0083687175065279f));
  p = Fma(p, r, Vec(0.04166838899254799f));
  p = Fma(p, r, Vec(0.1666652113199234f));
  p = Fma(p, r, Vec(0.4999999403953552f));
  p = Fma(p, r * r, r) + Vec(1.0f);
  return ScaleByPowerOf2(p, n, shifted, Vec(kLeastPower));
}

// Phi(x) = 1/2 + x P(x^2) / Q(x^2), a minimax fit on [-5.2, 5.2] with absolute error 1.3e-7 in
// float32; further out Phi is 0 or 1 to that precision.
inline Vec RationalNormalCdf(Vec x) {
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
  return Vec(0.5f) + Max(c * p / q, Vec(-0.5f));
}

// Phi(z) - 1/2 for z >= 0, by pieces; absolute error 1e-7.
template <typename V>
inline V LookUpMass(V z) {
  using Table = tt::NormalTable;
  const V scale(Table::kPiecesPerUnit), near = Min(z, V(Table::kEnd));
  const V piece = Fma(near, scale, V(kToInteger));
  const V rest = Fma(near, scale, V(kToInteger) - piece);
  V mass = LookUp(tt::kNormalTable.coefficients[Table::kDegree], piece);
  UNROLL for (int i = Table::kDegree - 1; i >= 0; --i) {
    mass = Fma(mass, rest, LookUp(tt::kNormalTable.coefficients[i], piece));
  }
  return mass;
}

template <typename V = Vec>
inline V NormalCdf(V x) {
  if constexpr (V::kLooksUp) {
    return V(0.5f) + CopySign(LookUpMass(Abs(x)), x);
  } else {
    return RationalNormalCdf(x);
  }
}

// x Phi(x)
template <typename V = Vec>
inline V Gelu(V x) {
  if constexpr (V::kLooksUp) {
    return Fma(Abs(x), LookUpMass(Abs(x)), x * V(0.5f));
  } else {
    return x * NormalCdf(x);
  }
}

template <typename Inputs>
inline void GeluAs(const float* x, size_t n, typename Inputs::Number* out) {
  for (size_t i = 0; i < n; i += kWidth) Inputs::Store(Gelu(Vec::Load(x + i)), out + i);
}

// ---- rows ----

inline Vec NormScale(float variance) { return Vec(1.0f / __builtin_sqrtf(variance + 1e-5f)); }

// A row that fits into registers, (kVecs vectors) without padding.
template <int kVecs, typename Inputs>
inline void NormInRegisters(const float* x, const float* gamma, const float* beta,
                            typename Inputs::Number* out) {
  static_assert(kVecs * kWidth % kPad == 0 && (kVecs & (kVecs - 1)) == 0);
  Vec row[kVecs], sums[kVecs];
  UNROLL for (int v = 0; v < kVecs; ++v) row[v] = sums[v] = Vec::Load(x + v * kWidth);
  const auto total = [&sums] {  // of a tree: less to wait for than one after the other
    UNROLL for (int step = kVecs / 2; step > 0; step /= 2) {
      UNROLL for (int v = 0; v < step; ++v) sums[v] = sums[v] + sums[v + step];
    }
    return Sum(sums[0]) / static_cast<float>(kVecs * kWidth);
  };
  const Vec mean(total());
  UNROLL for (int v = 0; v < kVecs; ++v) {
    row[v] = row[v] - mean;
    sums[v] = row[v] * row[v];
  }
  const Vec scale = NormScale(total());
  UNROLL for (int v = 0; v < kVecs; ++v) {
    const int i = v * kWidth;
    Inputs::Store(Fma(row[v] * scale, Vec::Load(gamma + i), Vec::Load(beta + i)), out + i);
  }
}

// x is zero in its padding, so a sum over whole vectors is the sum over `width`.
template <typename Inputs>
inline void NormRow(const float* x, const float* gamma, const float* beta, int width,
                    typename Inputs::Number* out) {
  constexpr int kVecs = kRegisters / 4;  // with AVX-512 128 numbers, the official width
  if (width == kVecs * kWidth) return NormInRegisters<kVecs, Inputs>(x, gamma, beta, out);
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
  const Vec scale = NormScale(variance);
  for (int i = 0; i < padded; i += kWidth) {
    const Vec normed = (Vec::Load(x + i) - Vec(mean)) * scale;
    Inputs::Store(Fma(normed, Vec::Load(gamma + i), Vec::Load(beta + i)), out + i);
  }
}

template <typename Inputs>
void LayerNormAs(const float* x, int rows, const float* gamma, const float* beta, int width,
                 typename Inputs::Number* out) {
  const size_t stride = tt::RoundUp(width, kPad);
  for (int r = 0; r < rows; ++r) {
    NormRow<Inputs>(x + r * stride, gamma, beta, width, out + r * stride);
  }
}

// The functions of a table that make inputs. OfHalves: for weights of 16 bits, unused without any.
template <typename OfHalves>
struct InputsOf {
  // f(out as Inputs, Inputs())
  template <typename F>
  static void Choose(NumberType type, void* out, F&& f) {
    if (type == NumberType::kFloat32) return f(static_cast<float*>(out), Floats());
    if (type == NumberType::kRounded) return f(static_cast<float*>(out), RoundedFloats());
    f(static_cast<typename OfHalves::Number*>(out), OfHalves());
  }
  static void Prepare(const float* x, size_t n, NumberType type, void* out) {
    Choose(type, out, [=](auto* to, auto inputs) { PrepareAs<decltype(inputs)>(x, n, to); });
  }
  static void LayerNorm(const float* x, int rows, const float* gamma, const float* beta, int width,
                        NumberType type, void* out) {
    Choose(type, out, [=](auto* to, auto inputs) {
      LayerNormAs<decltype(inputs)>(x, rows, gamma, beta, width, to);
    });
  }
  static void Gelu(const float* x, size_t n, NumberType type, void* out) {
    Choose(type, out, [=](auto* to, auto inputs) { GeluAs<decltype(inputs)>(x, n, to); });
  }
};

// Softmax of x (n), which may be probs; zero in the padding.
void Softmax(const float* x, int n, float* probs) {
  const int padded = tt::RoundUp(n, kPad);
  const int whole = n / kWidth * kWidth;
  Vec largest(x[0]);
  for (int i = 0; i < whole; i += kWidth) largest = Max(largest, Vec::Load(x + i));
  float max = MaxLane(largest);
  for (int i = whole; i < n; ++i) max = x[i] > max ? x[i] : max;
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

}  // namespace
#include "simd_attend.h"
#include "simd_small_products.h"
#include "simd_train_attend.h"
#include "simd_train_rows.h"

namespace {

// ---- matrix product ----

inline void StoreSum(Vec sum, float* out, bool add) {
  (add ? sum + Vec::Load(out) : sum).Store(out);
}

// Rows of the left factor, kPointerRows of them to a pointer: all of them, in most tables.
template <int kRows, typename Number>
class TileRows {
 public:
  TileRows(const Number* a, size_t lda) : lda_(lda) {
    UNROLL for (int i = 0; i < kPointers; ++i) {
      starts_[i] = a + i * kPointerRows * lda;
      asm("" : "+r"(starts_[i]));  // or the compiler makes it from the first one, every time
    }
  }
  const Number* operator[](int r) const {
    return starts_[r / kPointerRows] + r % kPointerRows * lda_;
  }
  void Advance(int n) { UNROLL for (const Number*& start : starts_) start += n; }

 private:
  static constexpr int kPointers = (kRows + kPointerRows - 1) / kPointerRows;
  const Number* starts_[kPointers];
  size_t lda_;
};

// Adds the first or second of two columns of `a` times that row of `w`.
template <int kOdd, int kRows>
inline void AddProducts(const TileRows<kRows, float>& a, const float* w,
                        Vec (&sums)[kRows][kTileVecs]) {
  Vec column[kTileVecs];
  UNROLL for (int v = 0; v < kTileVecs; ++v) column[v] = Vec::Load(w + kOdd * kPanel + v * kWidth);
  UNROLL for (int r = 0; r < kRows; ++r) {
    const Vec x = Vec::Broadcast(a[r] + kOdd);
    UNROLL for (int v = 0; v < kTileVecs; ++v) sums[r][v] = Fma(x, column[v], sums[r][v]);
  }
}

// Adds the next two columns of `a` times two rows of `w`.
template <int kRows>
inline void AddPair(const TileRows<kRows, float>& a, const float* w,
                    Vec (&sums)[kRows][kTileVecs]) {
  AddProducts<0>(a, w, sums);
  AddProducts<1>(a, w, sums);
}

// Rows of c that a tile will write: keys and values of new nodes, where float32 products write them
// in place, and rows of a long pass are in no near cache.
template <int kRows>
inline void AskForOutput(const float* c, size_t ldc) {
  constexpr int kNumbers = kLine / sizeof(float);
  UNROLL for (int r = 0; r < kRows; ++r) {
    UNROLL for (int i = 0; i < kPanel; i += kNumbers) __builtin_prefetch(c + r * ldc + i, 1, 3);
  }
}

// A tile of c: kRows rows times one panel. Its sums stay in registers over all of k. A line of
// `next` is asked for in every step. For other types of numbers there may be another AddPair, or
// another tile.
template <int kRows, typename Number, typename Weight>
struct Tile {
  static void Multiply(const Number* a, size_t lda, const Weight* w, const char* next,
                       const float* bias, int k, float* c, size_t ldc, bool add) {
    AskForOutput<kRows>(c, ldc);
    Vec sums[kRows][kTileVecs];
    UNROLL for (int r = 0; r < kRows; ++r) {
      UNROLL for (int v = 0; v < kTileVecs; ++v) sums[r][v] = Vec::Load(bias + v * kWidth);
    }
    TileRows<kRows, Number> rows(a, lda);
    for (int i = 0; i < k; i += 2) {
      __builtin_prefetch(next, 0, 2);
      AddPair(rows, w, sums);
      rows.Advance(2);
      w += 2 * kPanel;
      next += kLine;
    }
    UNROLL for (int r = 0; r < kRows; ++r) {
      UNROLL for (int v = 0; v < kTileVecs; ++v) {
        StoreSum(sums[r][v], c + r * ldc + v * kWidth, add);
      }
    }
  }
};

template <typename Number, typename Weight>
using TileFn = void (*)(const Number*, size_t, const Weight*, const char*, const float*, int,
                        float*, size_t, bool);

template <typename Number, typename Weight, int kCount, int... kRows>
struct Tiles : Tiles<Number, Weight, kCount - 1, kCount - 1, kRows...> {};  // kOf[n - 1]: n rows
template <typename Number, typename Weight, int... kRows>
struct Tiles<Number, Weight, 0, kRows...> {
  static constexpr TileFn<Number, Weight> kOf[] = {Tile<kRows + 1, Number, Weight>::Multiply...};
};

// Tiles of equal height, give or take a row: a short last tile would run below the peak.
// A panel of w stays in the first cache while the rows pass by it; meanwhile the next one comes
// from the third, where the weights of a whole model are.
template <typename Weight, typename Number>
inline void TileLoop(const MatrixView& w, int num_cols, const Number* a, size_t lda, int rows,
                     float* c, size_t ldc, bool add) {
  const int num_tiles = (rows + kTileRows - 1) / kTileRows;
  const size_t panel_bytes = static_cast<size_t>(w.k) * kPanel * sizeof(Weight);
  const size_t tile_bytes = static_cast<size_t>(w.k) / 2 * kLine;  // that a tile asks for
  for (int col = 0; col < num_cols; col += kPanel) {
    const Weight* panel = static_cast<const Weight*>(w.data) + static_cast<size_t>(col) * w.k;
    const char* lines = reinterpret_cast<const char*>(panel);
    // one tile alone would only be slowed down; lines that are here already cost next to nothing
    const bool has_next = num_tiles > 1 && col + kPanel < num_cols;
    for (int t = 0; t < num_tiles; ++t) {
      const int begin = rows * t / num_tiles, end = rows * (t + 1) / num_tiles;
      const bool asks = has_next && (t + 1) * tile_bytes <= panel_bytes;
      Tiles<Number, Weight, kTileRows>::kOf[end - begin - 1](
          a + begin * lda, lda, panel, asks ? lines + panel_bytes + t * tile_bytes : lines,
          w.bias + col, w.k, c + begin * ldc + col, ldc, add);
    }
  }
}

// Of weights in float32, rounded or not.
inline void Gemm(const MatrixView& w, int num_cols, const void* a, size_t lda, int rows, float* c,
                 size_t ldc, bool add) {
  TileLoop<float>(w, num_cols, static_cast<const float*>(a), lda, rows, c, ldc, add);
}

// ---- the machine's peak ----

// As many independent sums as a tile has, no memory. Rounded numbers are multiplied alike.
double PeakLoop(int64_t iterations, bool) {
  Vec sums[kTileRows * kTileVecs];
  UNROLL for (Vec& sum : sums) sum = Vec(1.0f);
  const Vec x(1.0f), y(1e-9f);
  for (int64_t i = 0; i < iterations; ++i) {
    UNROLL for (Vec& sum : sums) sum = Fma(x, y, sum);
    UNROLL for (Vec& sum : sums) Keep(sum);
  }
  return static_cast<double>(iterations) * kTileRows * kTileVecs * kWidth * 2;
}

// `gemm` takes float32, bf16_weights, and what OfHalves makes inputs for.
template <typename OfHalves = RoundedFloats>
constexpr Ops MakeOps(NumberType bf16_weights = NumberType::kRounded,
                      decltype(Ops::gemm) gemm = Gemm,
                      decltype(Ops::peak_loop) peak_loop = PeakLoop) {
  using Inputs = InputsOf<OfHalves>;
  return {.name = kName,
          .panel_width = kPanel,
          .tile_rows = kTileRows,
          .bf16_tile_rows = kTileRows,
          .bundle_heads = kBundleHeads,
          .bf16_weights = bf16_weights,
          .gemm = gemm,
          .prepare = Inputs::Prepare,
          .layer_norm = Inputs::LayerNorm,
          .gelu = Inputs::Gelu,
          .round = RoundNumbers,
          .attend = Attend,
          .train_forward = TrainForward,
          .train_backward = TrainBackward,
          .train_gelu = TrainGelu,
          .train_norm = TrainNorm,
          .train_norm_grad = TrainNormGrad,
          .draw_keep = DrawKeep,
          .softmax = Softmax,
          .peak_loop = peak_loop};
}

}  // namespace
