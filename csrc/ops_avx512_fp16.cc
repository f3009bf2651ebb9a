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

// A number of float16.
struct Half {
  uint16_t bits;
};

inline __m256i RoundToHalves(Vec x) {
  return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec ToFloats(__m256i halves) { return Vec(_mm512_cvtxph_ps((__m256h)halves)); }

// Twice kWidth of them.
struct Halves {
  __m512h v;

  Halves() = default;
  explicit Halves(__m512h x) : v(x) {}
  // A lane of Vec becomes a pair.
  static Halves FromBits(Vec x) { return Halves((__m512h)x.v); }
  static Halves Zero() { return Halves(_mm512_setzero_ph()); }
  Halves(Vec lower, Vec upper)
      : v((__m512h)_mm512_inserti64x4(_mm512_castsi256_si512(RoundToHalves(lower)),
                                      RoundToHalves(upper), 1)) {}
  static Halves Load(const Half* p) { return Halves((__m512h)_mm512_loadu_si512(p)); }
  // The same two numbers in every pair of lanes.
  static Halves BroadcastPair(const Half* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof(pair));
    return Halves((__m512h)_mm512_set1_epi32(pair));
  }
  Vec Lower() const { return ToFloats(_mm512_castsi512_si256((__m512i)v)); }
  Vec Upper() const { return ToFloats(_mm512_extracti64x4_epi64((__m512i)v, 1)); }
};

inline Halves operator+(Halves a, Halves b) { return Halves(_mm512_add_ph(a.v, b.v)); }
inline Halves operator*(Halves a, Halves b) { return Halves(_mm512_mul_ph(a.v, b.v)); }
inline Halves Fma(Halves a, Halves b, Halves c) { return Halves(_mm512_fmadd_ph(a.v, b.v, c.v)); }
inline void Keep(Halves& a) { asm volatile("" : "+v"(a.v)); }

// Sums of neighbours: of a in the even lanes, of b in the odd lanes.
inline Halves AddPairs(Halves a, Halves b) {
  constexpr __mmask32 kOddLanes = 0xAAAAAAAA;
  const __m512i x = (__m512i)a.v, y = (__m512i)b.v;
  const __m512i even = _mm512_mask_blend_epi16(kOddLanes, x, _mm512_slli_epi32(y, 16));
  const __m512i odd = _mm512_mask_blend_epi16(kOddLanes, _mm512_srli_epi32(x, 16), y);
  return Halves((__m512h)even) + Halves((__m512h)odd);
}

}  // namespace
#include "fp16_attend.h"

namespace {

// ---- matrix product ----
//
// Of a panel's two vectors the first holds columns 0, 2, 4 and so on, the second those between; of
// each column an even row of weights, then the odd one behind it.
static_assert(kTileVecs == 2);

template <int kRows>
struct Tile<kRows, Half, Half> {
  // Rows [begin, end) of w.
  static inline void AddSums(const Half* a, size_t lda, const Half* w, const char* next, int begin,
                             int end, const float* bias, float* c, size_t ldc, bool add) {
    Halves sums[kRows][kTileVecs];
    UNROLL for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = Halves::Zero();
    for (int i = begin; i < end; i += 2) {
      __builtin_prefetch(next + i * kLine / 2, 0, 2);
      const Half* pairs = w + i * kPanel;
      const Halves first = Halves::Load(pairs), second = Halves::Load(pairs + kPanel);
      UNROLL for (int r = 0; r < kRows; ++r) {
        const Halves x = Halves::BroadcastPair(a + r * lda + i);
        sums[r][0] = Fma(x, first, sums[r][0]);
        sums[r][1] = Fma(x, second, sums[r][1]);
      }
    }
    UNROLL for (int r = 0; r < kRows; ++r) {
      const Halves sum = AddPairs(sums[r][0], sums[r][1]);
      float* out = c + r * ldc;
      StoreSum(sum.Lower() + Vec::Load(bias), out, add);
      StoreSum(sum.Upper() + Vec::Load(bias + kWidth), out + kWidth, add);
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

struct HalfInputs {
  using Number = Half;
  static void Store(Vec x, Half* out) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), RoundToHalves(x));
  }
};

void HalfRound(const float* x, size_t n, NumberType type, uint16_t* out) {
  if (type != NumberType::kFp16) return RoundNumbers(x, n, type, out);
  PrepareAs<HalfInputs>(x, n, reinterpret_cast<Half*>(out));
}

void HalfGemm(const MatrixView& w, int num_cols, const void* a, size_t lda, int rows, float* c,
              size_t ldc, bool add) {
  if (w.type != NumberType::kFp16) return Gemm(w, num_cols, a, lda, rows, c, ldc, add);
  TileLoop<Half>(w, num_cols, static_cast<const Half*>(a), lda, rows, c, ldc, add);
}

// As many independent sums as a tile has, no memory.
double HalfPeakLoop(int64_t iterations, bool bf16) {
  if (!bf16) return PeakLoop(iterations, false);
  Halves sums[kTileRows * kTileVecs];
  UNROLL for (Halves& sum : sums) sum = Halves::Zero();
  const Halves ones((__m512h)_mm512_set1_epi16(0x3c00));
  for (int64_t i = 0; i < iterations; ++i) {
    UNROLL for (Halves& sum : sums) sum = Fma(ones, ones, sum);
    UNROLL for (Halves& sum : sums) Keep(sum);
  }
  return static_cast<double>(iterations) * kTileRows * kTileVecs * 2 * kWidth * 2;
}

void HalfAttend(const AttendArgs& args) {
  args.type == NumberType::kFp16 ? AttendHalves(args) : Attend(args);
}

constexpr Ops MakeHalfOps() {
  Ops ops = MakeOps<HalfInputs>(NumberType::kRounded, HalfGemm, HalfPeakLoop);
  ops.fp16_weights = ops.fp16_keys = true;
  ops.round = HalfRound;
  ops.attend = HalfAttend;
  return ops;
}
constexpr Ops kOps = MakeHalfOps();

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
