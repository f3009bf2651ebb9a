// AVX-512 vectors, with or without its bfloat16 instructions (__AVX512BF16__).
#include <immintrin.h>
#include <stdint.h>

namespace {

struct Vec {
  static constexpr int kWidth = 16;
  static constexpr bool kLooksUp = true;
  __m512 v;

  Vec() = default;
  explicit Vec(float x) : v(_mm512_set1_ps(x)) {}
  explicit Vec(__m512 x) : v(x) {}
  static Vec Load(const float* p) { return Vec(_mm512_loadu_ps(p)); }
  static Vec Broadcast(const float* p) { return Vec(_mm512_set1_ps(*p)); }
  static Vec LoadBf16(const uint16_t* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return Vec(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)));
  }
  static Vec FromBytes(const uint8_t* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return Vec(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(x)));
  }
  // Of (16, 2) bfloat16, each the upper half of a float, the first or the second of each pair.
  template <int kOdd>
  static Vec LoadHalfPairs(const uint16_t* p) {
    const __m512i pairs = _mm512_loadu_si512(p), high = _mm512_set1_epi32(-0x10000);
    return Vec(
        _mm512_castsi512_ps(kOdd ? _mm512_and_si512(pairs, high) : _mm512_slli_epi32(pairs, 16)));
  }
  void Store(float* p) const { _mm512_storeu_ps(p, v); }
};

inline Vec operator+(Vec a, Vec b) { return Vec(_mm512_add_ps(a.v, b.v)); }
inline Vec operator-(Vec a, Vec b) { return Vec(_mm512_sub_ps(a.v, b.v)); }
inline Vec operator*(Vec a, Vec b) { return Vec(_mm512_mul_ps(a.v, b.v)); }
inline Vec operator/(Vec a, Vec b) { return Vec(_mm512_div_ps(a.v, b.v)); }
inline Vec Fma(Vec a, Vec b, Vec c) { return Vec(_mm512_fmadd_ps(a.v, b.v, c.v)); }
inline Vec Max(Vec a, Vec b) { return Vec(_mm512_max_ps(a.v, b.v)); }
inline Vec Min(Vec a, Vec b) { return Vec(_mm512_min_ps(a.v, b.v)); }
inline Vec Abs(Vec a) { return Vec(_mm512_abs_ps(a.v)); }
// |a|, which is a, with the sign of b.
inline Vec CopySign(Vec a, Vec b) {
  return Vec(_mm512_or_ps(a.v, _mm512_and_ps(b.v, _mm512_set1_ps(-0.0f))));
}
// Numbers of a table, at the integers that the last five bits of `from` are.
inline Vec LookUp(const float (&table)[32], Vec from) {
  return Vec(_mm512_permutex2var_ps(_mm512_loadu_ps(table), _mm512_castps_si512(from.v),
                                    _mm512_loadu_ps(table + 16)));
}
// Numbers that are not normal, which hidden keys would bring with them, are made by microcode on
// some processors, a hundred times as slowly.
inline Vec ScaleByPowerOf2(Vec a, Vec n, Vec, Vec least) {
  const __mmask16 normal = _mm512_cmp_ps_mask(n.v, least.v, _CMP_GE_OQ);
  return Vec(_mm512_maskz_scalef_ps(normal, a.v, n.v));
}
inline float Sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float MaxLane(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline void Keep(Vec& a) { asm volatile("" : "+v"(a.v)); }

// a[0], b[0], a[1], b[1] and so on, of their lower and upper halves.
inline Vec ZipLower(Vec a, Vec b) {
  const __m512i from = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  return Vec(_mm512_permutex2var_ps(a.v, from, b.v));
}
inline Vec ZipUpper(Vec a, Vec b) {
  const __m512i from =
      _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return Vec(_mm512_permutex2var_ps(a.v, from, b.v));
}

// Lanes 0, 2, 4 and so on of a, then of b; and those between.
inline Vec EvenLanes(Vec a, Vec b) {
  const __m512i from = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return Vec(_mm512_permutex2var_ps(a.v, from, b.v));
}
inline Vec OddLanes(Vec a, Vec b) {
  const __m512i from = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return Vec(_mm512_permutex2var_ps(a.v, from, b.v));
}

// Both sum two vectors, halving each: a blend and one shuffle instead of two shuffles, of which the
// processor does fewer at a time. The lower 256 bits are of a, the upper of b:
inline Vec SumHalves(Vec a, Vec b) {
  return Vec(_mm512_mask_blend_ps(0xFF00, a.v, b.v)) + Vec(_mm512_shuffle_f32x4(a.v, b.v, 0x4E));
}
// Of each 128 bits, the lower 64 are of a, the upper of b. (V: Vec, or numbers of 16 bits.)
template <typename V>
inline V SumQuarters(V a, V b) {
  const __m512d x = (__m512d)a.v, y = (__m512d)b.v;
  return V((decltype(a.v))_mm512_mask_blend_pd(0xAA, x, y)) +
         V((decltype(a.v))_mm512_shuffle_pd(x, y, 0x55));
}
// 128 bits each are of: a's lower half, a's upper half, b's two.
inline Vec SumLanes(Vec a, Vec b) {
  return Vec(_mm512_shuffle_f32x4(a.v, b.v, 0x88)) + Vec(_mm512_shuffle_f32x4(a.v, b.v, 0xDD));
}

// Of each 128 bits, the lower 64 are of a, the upper of b: sums of neighbours.
template <typename V>
inline V SumPairs(V a, V b) {
  const __m512 x = (__m512)a.v, y = (__m512)b.v;
  return V((decltype(a.v))_mm512_shuffle_ps(x, y, 0x88)) +
         V((decltype(a.v))_mm512_shuffle_ps(x, y, 0xDD));
}

// Lane i is the sum of p[i].
inline Vec SumEach(const Vec (&p)[16]) {
  Vec x[8];
  for (int i = 0; i < 4; ++i) {
    x[i] = SumHalves(p[i], p[i + 4]);
    x[i + 4] = SumHalves(p[i + 8], p[i + 12]);
  }
  const Vec even = SumLanes(SumQuarters(x[0], x[1]), SumQuarters(x[4], x[5]));
  const Vec odd = SumLanes(SumQuarters(x[2], x[3]), SumQuarters(x[6], x[7]));
  return SumPairs(even, odd);
}

// Lane 4 h + i is the sum of the four lanes 4 h and up of p[i].
template <typename V>
inline V SumFour(const V (&p)[4]) {
  return SumPairs(SumQuarters(p[0], p[1]), SumQuarters(p[2], p[3]));
}
inline Vec SumEach(const Vec (&p)[4]) { return SumFour(p); }

// Of each four lanes: with its two halves swapped, with each half's two lanes swapped, and one lane
// in all of them.
inline Vec SwapHalves(Vec a) { return Vec(_mm512_permute_ps(a.v, 0x4E)); }
inline Vec SwapLanes(Vec a) { return Vec(_mm512_permute_ps(a.v, 0xB1)); }
inline Vec OneOfFour(Vec a, int i) {  // i is known once loops are unrolled
  if (i == 0) return Vec(_mm512_permute_ps(a.v, 0x00));
  if (i == 1) return Vec(_mm512_permute_ps(a.v, 0x55));
  if (i == 2) return Vec(_mm512_permute_ps(a.v, 0xAA));
  return Vec(_mm512_permute_ps(a.v, 0xFF));
}

// The nearest bfloat16, ties to even, in the upper halves; what is below does not count.
inline __m512i NearestBf16(Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}
inline Vec RoundToBf16(Vec a) {
  const __m512i high = _mm512_set1_epi32(-0x10000);
  return Vec(_mm512_castsi512_ps(_mm512_and_si512(NearestBf16(a), high)));
}
inline void StoreBf16(Vec a, uint16_t* p) {
#ifdef __AVX512BF16__
  const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(a.v);
#else
  const __m256i rounded = _mm512_cvtepi32_epi16(_mm512_srli_epi32(NearestBf16(a), 16));
#endif
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded);
}

// 24 of 32 registers hold sums: 12 rows of 2 vectors need 14 loads for 24 multiply-adds.
constexpr int kTileRows = 12;
constexpr int kRegisters = 32;
constexpr int kTileVecs = 2;
constexpr int kPointerRows = kTileRows;  // one pointer

}  // namespace
