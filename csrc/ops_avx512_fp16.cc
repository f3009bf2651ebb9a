// The table of AVX-512, its products in bfloat16 by the multiply-adds of float16, which do twice as
// many numbers at a time as those of float32.
#ifdef __AVX512FP16__
#include "ops_avx512.inc.h"
namespace {
constexpr char kName[] = "avx512_fp16";
}
#include "simd_ops.h"

namespace {

using tt::kFp16Sum;
using tt::WeightType;

// A number of float16. Of a panel's two vectors the first holds columns 0, 2, 4 and so on, the
// second those between; of each column an even row of weights, then the odd one behind it.
struct Half {
  uint16_t bits;
};
constexpr __mmask32 kOddLanes = 0xAAAAAAAA;
static_assert(kTileVecs == 2);

inline __m512h LoadHalves(const Half* p) { return (__m512h)_mm512_loadu_si512(p); }

// Of each column the sum of even rows and that of odd ones, added; columns are in order then.
inline __m512i AddPairs(__m512h first, __m512h second) {
  const __m512i x = (__m512i)first, y = (__m512i)second;
  const __m512i even = _mm512_mask_blend_epi16(kOddLanes, x, _mm512_slli_epi32(y, 16));
  const __m512i odd = _mm512_mask_blend_epi16(kOddLanes, _mm512_srli_epi32(x, 16), y);
  return (__m512i)_mm512_add_ph((__m512h)even, (__m512h)odd);
}

inline Vec ToFloats(__m256i halves) { return Vec(_mm512_cvtxph_ps((__m256h)halves)); }

template <int kRows>
struct Tile<kRows, Half, Half> {
  // Rows [begin, end) of w.
  static inline void AddSums(const Half* a, size_t lda, const Half* w, const char* next, int begin,
                             int end, const float* bias, float* c, size_t ldc, bool add) {
    __m512h sums[kRows][kTileVecs];
    UNROLL for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ph();
    for (int i = begin; i < end; i += 2) {
      __builtin_prefetch(next + i * kLine / 2, 0, 2);
      const Half* pairs = w + i * kPanel;
      const __m512h first = LoadHalves(pairs), second = LoadHalves(pairs + kPanel);
      UNROLL for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        __builtin_memcpy(&pair, a + r * lda + i, sizeof(pair));
        const __m512h x = (__m512h)_mm512_set1_epi32(pair);
        sums[r][0] = _mm512_fmadd_ph(x, first, sums[r][0]);
        sums[r][1] = _mm512_fmadd_ph(x, second, sums[r][1]);
      }
    }
    UNROLL for (int r = 0; r < kRows; ++r) {
      const __m512i sum = AddPairs(sums[r][0], sums[r][1]);
      float* out = c + r * ldc;
      StoreSum(ToFloats(_mm512_castsi512_si256(sum)) + Vec::Load(bias), out, add);
      StoreSum(ToFloats(_mm512_extracti64x4_epi64(sum, 1)) + Vec::Load(bias + kWidth), out + kWidth,
               add);
    }
  }

  static void Multiply(const Half* a, size_t lda, const Half* w, const char* next,
                       const float* bias, int k, float* c, size_t ldc, bool add) {
    constexpr float kNone[kPanel] = {};
    for (int begin = 0; begin < k; begin += kFp16Sum) {
      const int end = begin + kFp16Sum < k ? begin + kFp16Sum : k;
      AddSums(a, lda, w, next, begin, end, begin == 0 ? bias : kNone, c, ldc, add || begin > 0);
    }
  }
};

void HalfGemm(const MatrixView& w, int num_cols, const float* a, size_t lda, int rows, float* c,
              size_t ldc, bool add, void* scratch) {
  if (w.type != WeightType::kFp16) return Gemm(w, num_cols, a, lda, rows, c, ldc, add, scratch);
  const size_t k = w.k;
  Half* rounded = static_cast<Half*>(scratch);
  for (int r = 0; r < rows; ++r) {
    for (size_t i = 0; i < k; i += kWidth) {
      const __m512 x = _mm512_loadu_ps(a + r * lda + i);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rounded + r * k + i),
                          _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
  }
  TileLoop<Half>(w, num_cols, static_cast<const Half*>(rounded), k, rows, c, ldc, add);
}

// As many independent sums as a tile has, no memory.
double HalfPeakLoop(int64_t iterations, bool bf16) {
  if (!bf16) return PeakLoop(iterations, false);
  __m512h sums[kTileRows * kTileVecs];
  UNROLL for (__m512h& sum : sums) sum = _mm512_setzero_ph();
  const __m512h ones = (__m512h)_mm512_set1_epi16(0x3c00);
  for (int64_t i = 0; i < iterations; ++i) {
    UNROLL for (__m512h& sum : sums) sum = _mm512_fmadd_ph(ones, ones, sum);
    UNROLL for (__m512h& sum : sums) asm volatile("" : "+v"(sum));
  }
  return static_cast<double>(iterations) * kTileRows * kTileVecs * 2 * kWidth * 2;
}

constexpr Ops kOps = MakeOps(HalfGemm, HalfPeakLoop, true);

}  // namespace

namespace tt {
const Ops* Avx512Fp16Ops() { return &kOps; }
}  // namespace tt
#else
#include "ops.h"

namespace tt {
const Ops* Avx512Fp16Ops() { return nullptr; }
}  // namespace tt
#endif
