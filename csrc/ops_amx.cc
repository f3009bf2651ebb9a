// The table of AVX-512 with bfloat16, its products in bfloat16 by AMX, its attention in bfloat16 by
// AVX-512's float16.
#ifdef __AMX_BF16__
#include "ops.h"
#include "ops_avx512.inc.h"

namespace {

using tt::kPad;
using tt::MatrixView;
using tt::Ops;

// A tile register: 16 rows of 64 bytes, so 16 float32 or 32 bfloat16.
constexpr int kSide = 16;
// Columns of a panel of weights, of which two tiles hold kPad rows.
constexpr int kPanel = 2 * kSide;
static_assert(kPad == 2 * kSide && tt::kMaxRows % kPad == 0);

const Ops& Base() { return *tt::Avx512Bf16Ops(); }

// What tiles read must be in memory, and what they wrote must be read from there: the compiler does
// not know that they do.
inline void Fence() { asm volatile("" ::: "memory"); }

// What LDTILECFG reads. A tile of no rows must not be used.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Registers for `rows` of a and c, at most kPad, and a panel of w: 0 and 1 are sums of the upper
// half of the rows, 2 and 3 of the lower; 4 and 5 are those rows of a; 6 and 7 are w.
void ConfigureTiles(int rows) {
  const int upper = rows < kSide ? rows : kSide, lower = rows - upper;
  const int heights[] = {upper, upper, lower, lower, upper, lower, kSide, kSide};
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.rows[tile] = static_cast<uint8_t>(heights[tile]);
    config.row_bytes[tile] = heights[tile] > 0 ? 64 : 0;
  }
  Fence();
  _tile_loadconfig(&config);
}

// c (rows, num_cols) += bias.
void AddBias(const float* bias, int num_cols, int rows, float* c, size_t ldc) {
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < num_cols; i += Vec::kWidth) {
      (Vec::Load(c + r * ldc + i) + Vec::Load(bias + i)).Store(c + r * ldc + i);
    }
  }
}

// c (as configured, kPanel) = a w + bias; c += a w with `add`, the bias being there already. With
// kLower there are more than kSide rows. Tiles are named by literals; distances between rows are in
// bytes.
template <bool kLower>
void MultiplyPanel(const uint16_t* a, size_t lda, const uint16_t* w, const float* bias, int k,
                   float* c, size_t ldc, bool add) {
  const float* upper = add ? c : bias;
  const size_t stride = add ? ldc : 0;  // 0: the bias in every row
  float* c_lower = c + kSide * (ldc / sizeof(float));
  const float* lower = add ? c_lower : bias;
  _tile_loadd(0, upper, stride);
  _tile_loadd(1, upper + kSide, stride);
  if constexpr (kLower) {
    _tile_loadd(2, lower, stride);
    _tile_loadd(3, lower + kSide, stride);
  }
  const uint16_t* a_lower = a + kSide * (lda / sizeof(uint16_t));
  constexpr size_t kPairRow = kPanel * 2 * sizeof(uint16_t);
  for (int i = 0; i < k; i += kPad) {
    _tile_loadd(6, w + i * kPanel, kPairRow);
    _tile_loadd(7, w + i * kPanel + 2 * kSide, kPairRow);
    _tile_loadd(4, a + i, lda);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kLower) {
      _tile_loadd(5, a_lower + i, lda);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, ldc);
  _tile_stored(1, c + kSide, ldc);
  if constexpr (kLower) {
    _tile_stored(2, c_lower, ldc);
    _tile_stored(3, c_lower + kSide, ldc);
  }
}

void Gemm(const MatrixView& w, int num_cols, const void* a, size_t lda, int rows, float* c,
          size_t ldc, bool add) {
  if (w.type == tt::NumberType::kFloat32) {
    return Base().gemm(w, num_cols, a, lda, rows, c, ldc, add);
  }
  const uint16_t* numbers = static_cast<const uint16_t*>(a);
  if (add) AddBias(w.bias, num_cols, rows, c, ldc);
  Fence();
  for (int begin = 0, configured = 0; begin < rows; begin += kPad) {
    const int height = rows - begin < kPad ? rows - begin : kPad;
    if (height != configured) ConfigureTiles(configured = height);
    const auto multiply = height > kSide ? MultiplyPanel<true> : MultiplyPanel<false>;
    for (int col = 0; col < num_cols; col += kPanel) {
      multiply(numbers + begin * lda, lda * sizeof(uint16_t),
               static_cast<const uint16_t*>(w.data) + static_cast<size_t>(col) * w.k, w.bias + col,
               w.k, c + begin * ldc + col, ldc * sizeof(float), add);
    }
  }
  _tile_release();
  Fence();
}

// As many independent sums as a product has, no memory.
double PeakLoop(int64_t iterations, bool bf16) {
  if (!bf16) return Base().peak_loop(iterations, false);
  ConfigureTiles(kPad);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t i = 0; i < iterations; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return static_cast<double>(iterations) * 4 * kSide * kSide * kPad * 2;
}

Ops MakeOps(bool fp16) {
  Ops ops = Base();
  ops.name = "amx_bf16";
  ops.bf16_tile_rows = kPad;
  ops.gemm = Gemm;
  ops.peak_loop = PeakLoop;
  if (const Ops* half = tt::Avx512Fp16Ops(); fp16 && half != nullptr) {
    ops.fp16_keys = true;
    ops.round = half->round;
    ops.attend = half->attend;
  }
  return ops;
}

}  // namespace

namespace tt {
const Ops* AmxOps(bool fp16) {
  static const Ops with = MakeOps(true), without = MakeOps(false);
  return fp16 ? &with : &without;
}
}  // namespace tt
#else
#include "ops.h"

namespace tt {
const Ops* AmxOps(bool) { return nullptr; }
}  // namespace tt
#endif
