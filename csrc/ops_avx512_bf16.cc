// Compiled for AVX-512 with its bfloat16 instructions.
#ifdef __AVX512BF16__
#include "ops_avx512.inc.h"
namespace {
constexpr char kName[] = "avx512_bf16";
}
#include "simd_ops.h"

namespace {

// The dot product of pairs that this instruction set adds is worth two multiply-adds and takes no
// longer than one on AMD's processors. (On Intel's it takes as long as four: there this table is
// used by name, and as the base of AMX's.)

// As AddPair of simd_ops.h.
template <int kRows>
inline void AddPair(const TileRows<kRows, uint16_t>& a, const uint16_t* w,
                    Vec (&sums)[kRows][kTileVecs]) {
  __m512bh column[kTileVecs];
  UNROLL for (int v = 0; v < kTileVecs; ++v) {
    column[v] = (__m512bh)_mm512_loadu_si512(w + v * 2 * kWidth);
  }
  UNROLL for (int r = 0; r < kRows; ++r) {
    int32_t pair;
    __builtin_memcpy(&pair, a[r], sizeof(pair));
    const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
    UNROLL for (int v = 0; v < kTileVecs; ++v) {
      sums[r][v] = Vec(_mm512_dpbf16_ps(sums[r][v].v, x, column[v]));
    }
  }
}

void DotGemm(const MatrixView& w, int num_cols, const void* a, size_t lda, int rows, float* c,
             size_t ldc, bool add) {
  if (w.type == NumberType::kFloat32) return Gemm(w, num_cols, a, lda, rows, c, ldc, add);
  TileLoop<uint16_t>(w, num_cols, static_cast<const uint16_t*>(a), lda, rows, c, ldc, add);
}

// As many independent sums as a tile has, no memory.
double DotPeakLoop(int64_t iterations, bool bf16) {
  if (!bf16) return PeakLoop(iterations, false);
  Vec sums[kTileRows * kTileVecs];
  UNROLL for (Vec& sum : sums) sum = Vec(1.0f);
  const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  for (int64_t i = 0; i < iterations; ++i) {
    UNROLL for (Vec& sum : sums) sum = Vec(_mm512_dpbf16_ps(sum.v, ones, ones));
    UNROLL for (Vec& sum : sums) Keep(sum);
  }
  return static_cast<double>(iterations) * kTileRows * kTileVecs * kWidth * 4;
}

constexpr Ops kOps = MakeOps<Bfloats>(NumberType::kBf16, DotGemm, DotPeakLoop);

}  // namespace

namespace tt {
const Ops* Avx512Bf16Ops() { return &kOps; }
}  // namespace tt
#else
#include "ops.h"

namespace tt {
const Ops* Avx512Bf16Ops() { return nullptr; }
}  // namespace tt
#endif
