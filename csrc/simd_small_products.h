// Products of matrices that stay in the first cache, and rows of tensors to and from them, written
// once over a vector type. Included by simd_ops.h.
//
// No include guard and nothing but anonymous namespaces: each instruction set has its own copy.

namespace {

// ---- products of small matrices ----

// The right factor: rows `row_stride` apart, of each kPanel columns `panel_stride` apart.
struct Panels {
  const float* data;
  size_t row_stride;
  size_t panel_stride;
};

inline Panels Plain(const float* x, size_t row_stride) { return {x, row_stride, kPanel}; }

// c (kRows, kVecs vectors) = a b with a (kRows, inner), its rows lda apart. Transposed: c += a^T b
// with a (inner, kRows).
template <int kVecs, bool kTransposed, int kRows>
void ProductTile(const float* a, size_t lda, const float* b, size_t ldb, int inner, float* c,
                 size_t ldc) {
  Vec sums[kRows][kVecs];
  UNROLL for (int r = 0; r < kRows; ++r) {
    UNROLL for (int v = 0; v < kVecs; ++v) {
      sums[r][v] = kTransposed ? Vec::Load(c + r * ldc + v * kWidth) : Vec(0.0f);
    }
  }
  for (int i = 0; i < inner; ++i) {
    Vec row[kVecs];
    UNROLL for (int v = 0; v < kVecs; ++v) row[v] = Vec::Load(b + i * ldb + v * kWidth);
    UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec x = Vec::Broadcast(kTransposed ? a + i * lda + r : a + r * lda + i);
      UNROLL for (int v = 0; v < kVecs; ++v) sums[r][v] = Fma(x, row[v], sums[r][v]);
    }
  }
  UNROLL for (int r = 0; r < kRows; ++r) {
    UNROLL for (int v = 0; v < kVecs; ++v) sums[r][v].Store(c + r * ldc + v * kWidth);
  }
}

using ProductTileFn = void (*)(const float*, size_t, const float*, size_t, int, float*, size_t);

template <int kVecs, bool kTransposed, int kCount, int... kRows>
struct ProductTiles : ProductTiles<kVecs, kTransposed, kCount - 1, kCount - 1, kRows...> {
};  // kOf[n - 1]: n rows
template <int kVecs, bool kTransposed, int... kRows>
struct ProductTiles<kVecs, kTransposed, 0, kRows...> {
  static constexpr ProductTileFn kOf[] = {ProductTile<kVecs, kTransposed, kRows + 1>...};
};

// c (rows, cols) = a b, or += a^T b; cols counts whole vectors.
template <bool kTransposed>
void Product(const float* a, size_t lda, const Panels& b, int inner, int rows, int cols, float* c,
             size_t ldc) {
  constexpr const ProductTileFn* kWhole = ProductTiles<kTileVecs, kTransposed, kTileRows>::kOf;
  constexpr const ProductTileFn* kOne = ProductTiles<1, kTransposed, kTileRows>::kOf;
  const int num_tiles = (rows + kTileRows - 1) / kTileRows;
  for (int col = 0; col < cols;) {
    const bool is_whole = col % kPanel == 0 && col + kPanel <= cols;
    const float* panel = b.data + col / kPanel * b.panel_stride + col % kPanel;
    for (int t = 0; t < num_tiles; ++t) {
      const int begin = rows * t / num_tiles, end = rows * (t + 1) / num_tiles;
      const ProductTileFn tile = (is_whole ? kWhole : kOne)[end - begin - 1];
      tile(a + begin * (kTransposed ? 1 : lda), lda, panel, b.row_stride, inner,
           c + begin * ldc + col, ldc);
    }
    col += is_whole ? kPanel : kWidth;
  }
}

// ---- rows of tensors ----

// out = x (dim) * factor, zero behind it in whole vectors.
template <typename T>
inline void LoadRow(const T* x, int dim, float factor, float* out) {
  int i = 0;
  for (; i + kWidth <= dim; i += kWidth) (LoadNumbers(x + i) * Vec(factor)).Store(out + i);
  if (i == dim) return;
  T tail[kWidth] = {};
  for (int j = 0; i + j < dim; ++j) tail[j] = x[i + j];
  (LoadNumbers(tail) * Vec(factor)).Store(out + i);
}

// out (dim) = x * factor; x is padded to whole vectors.
template <typename T>
inline void StoreRow(const float* x, int dim, float factor, T* out) {
  int i = 0;
  for (; i + kWidth <= dim; i += kWidth) StoreNumbers(Vec::Load(x + i) * Vec(factor), out + i);
  if (i == dim) return;
  T tail[kWidth];
  StoreNumbers(Vec::Load(x + i) * Vec(factor), tail);
  for (int j = 0; i + j < dim; ++j) out[i + j] = tail[j];
}

inline void Zero(float* x, size_t size) {
  for (size_t i = 0; i < size; i += kWidth) Vec(0.0f).Store(x + i);
}

// Log2(kWidth) times, the first half of all rows is interleaved with the second: that turns the
// bits (row, column) of a number's place into (column, row).
template <int kStep = 1>
inline void Transpose(Vec (&x)[kWidth]) {
  if constexpr (kStep < kWidth) {
    Vec y[kWidth];
    UNROLL for (int i = 0; i < kWidth / 2; ++i) {
      y[2 * i] = ZipLower(x[i], x[i + kWidth / 2]);
      y[2 * i + 1] = ZipUpper(x[i], x[i + kWidth / 2]);
    }
    Transpose<2 * kStep>(y);
    UNROLL for (int i = 0; i < kWidth; ++i) x[i] = y[i];
  }
}

}  // namespace
