// Compiled for AVX2 and FMA.
#ifdef __AVX2__
#include <immintrin.h>
#include <stdint.h>

namespace {

constexpr char kName[] = "avx2";

struct Vec {
  static constexpr int kWidth = 8;
  static constexpr bool kLooksUp = false;
  __m256 v;

  Vec() = default;
  explicit Vec(float x) : v(_mm256_set1_ps(x)) {}
  explicit Vec(__m256 x) : v(x) {}
  static Vec Load(const float* p) { return Vec(_mm256_loadu_ps(p)); }
  static Vec Broadcast(const float* p) { return Vec(_mm256_broadcast_ss(p)); }
  static Vec LoadBf16(const uint16_t* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return Vec(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)));
  }
  static Vec FromBytes(const uint8_t* p) {
    const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return Vec(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)));
  }
  // Of (8, 2) bfloat16, each the upper half of a float, the first or the second of each pair.
  template <int kOdd>
  static Vec LoadHalfPairs(const uint16_t* p) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i high = _mm256_set1_epi32(-0x10000);
    return Vec(
        _mm256_castsi256_ps(kOdd ? _mm256_and_si256(pairs, high) : _mm256_slli_epi32(pairs, 16)));
  }
  void Store(float* p) const { _mm256_storeu_ps(p, v); }
};

inline Vec operator+(Vec a, Vec b) { return Vec(_mm256_add_ps(a.v, b.v)); }
inline Vec operator-(Vec a, Vec b) { return Vec(_mm256_sub_ps(a.v, b.v)); }
inline Vec operator*(Vec a, Vec b) { return Vec(_mm256_mul_ps(a.v, b.v)); }
inline Vec operator/(Vec a, Vec b) { return Vec(_mm256_div_ps(a.v, b.v)); }
inline Vec Fma(Vec a, Vec b, Vec c) { return Vec(_mm256_fmadd_ps(a.v, b.v, c.v)); }
inline Vec Max(Vec a, Vec b) { return Vec(_mm256_max_ps(a.v, b.v)); }
inline Vec Min(Vec a, Vec b) { return Vec(_mm256_min_ps(a.v, b.v)); }
inline void Keep(Vec& a) { asm volatile("" : "+x"(a.v)); }

// a[0], b[0], a[1], b[1] and so on, of their lower and upper halves.
inline Vec ZipLower(Vec a, Vec b) {
  return Vec(
      _mm256_permute2f128_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v), 0x20));
}
inline Vec ZipUpper(Vec a, Vec b) {
  return Vec(
      _mm256_permute2f128_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v), 0x31));
}

// Quarters 0, 2, 1, 3.
inline Vec SwapInner(__m256 a) {
  return Vec(_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(a), 0xD8)));
}
// Lanes 0, 2, 4 and so on of a, then of b; and those between.
inline Vec EvenLanes(Vec a, Vec b) { return SwapInner(_mm256_shuffle_ps(a.v, b.v, 0x88)); }
inline Vec OddLanes(Vec a, Vec b) { return SwapInner(_mm256_shuffle_ps(a.v, b.v, 0xDD)); }

inline Vec ScaleByPowerOf2(Vec a, Vec n, Vec shifted, Vec least) {
  const __m256 normal = _mm256_cmp_ps(n.v, least.v, _CMP_GE_OQ);
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23);
  const __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(a.v), exponent);
  return Vec(_mm256_and_ps(normal, _mm256_castsi256_ps(scaled)));
}

inline float Sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline float MaxLane(Vec a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

// Sums of four vectors, each still spread over the two 128-bit lanes.
inline __m256 SumFour(Vec a, Vec b, Vec c, Vec d) {
  return _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
}

// Lane i is the sum of p[i].
inline Vec SumEach(const Vec (&p)[8]) {
  const __m256 low = SumFour(p[0], p[1], p[2], p[3]), high = SumFour(p[4], p[5], p[6], p[7]);
  return Vec(_mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                           _mm256_permute2f128_ps(low, high, 0x31)));
}

// Lane 4 h + i is the sum of the four lanes 4 h and up of p[i].
inline Vec SumEach(const Vec (&p)[4]) { return Vec(SumFour(p[0], p[1], p[2], p[3])); }

// Of each four lanes: with its two halves swapped, with each half's two lanes swapped, and one lane
// in all of them.
inline Vec SwapHalves(Vec a) { return Vec(_mm256_permute_ps(a.v, 0x4E)); }
inline Vec SwapLanes(Vec a) { return Vec(_mm256_permute_ps(a.v, 0xB1)); }
inline Vec OneOfFour(Vec a, int i) {  // i is known once loops are unrolled
  if (i == 0) return Vec(_mm256_permute_ps(a.v, 0x00));
  if (i == 1) return Vec(_mm256_permute_ps(a.v, 0x55));
  if (i == 2) return Vec(_mm256_permute_ps(a.v, 0xAA));
  return Vec(_mm256_permute_ps(a.v, 0xFF));
}

// The nearest bfloat16, ties to even, in the upper halves; what is below does not count.
inline __m256i NearestBf16(Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
inline Vec RoundToBf16(Vec a) {
  const __m256i high = _mm256_set1_epi32(-0x10000);
  return Vec(_mm256_castsi256_ps(_mm256_and_si256(NearestBf16(a), high)));
}
inline void StoreBf16(Vec a, uint16_t* p) {
  const __m256i rounded = _mm256_srli_epi32(NearestBf16(a), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

// 12 of 16 registers hold sums.
constexpr int kTileRows = 6;
constexpr int kRegisters = 16;
constexpr int kTileVecs = 2;
// Loads add up their own addresses: a pointer, and 0, 1 or 2 strides. With one pointer compilers
// spend up to one instruction in six of the loop on rows' addresses (Clang 14; GCC 12 one in 13).
constexpr int kPointerRows = 3;

}  // namespace
#include "simd_ops.h"

namespace {
constexpr Ops kOps = MakeOps();
}

namespace tt {
const Ops* Avx2Ops() { return &kOps; }
}  // namespace tt
#else
#include "ops.h"

namespace tt {
const Ops* Avx2Ops() { return nullptr; }
}  // namespace tt
#endif
