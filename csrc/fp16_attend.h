// Attention over keys and values in float16 with AVX-512, bundles of several heads only: what
// simd_keys.h and simd_attend_steps.h leave open for other arithmetic than float32. Included by
// ops_avx512_fp16.cc, after `Half`, a number, and `Halves`, a vector of twice kWidth of them.
//
// A score is summed in float16. So are weighted values, kFp16Values of them; sums of these are
// float32, as are exponentials. No include guard, like simd_ops.h.

namespace {

// A lane of Vec holds two numbers of a key, or a weight twice.
template <>
struct ArithmeticOf<Half> {
  using Part = Halves;
  static constexpr int kNumbers = 2;
  static void StoreWeights(Vec weights, float* out) {
    const __m512i lower = _mm512_cvtepu16_epi32(RoundToHalves(weights));
    _mm512_storeu_si512(out, _mm512_or_si512(lower, _mm512_slli_epi32(lower, 16)));
  }
  static Halves AsPart(Vec weight) { return Halves::FromBits(weight); }
};

template <int kVecs, typename Key>
inline void LoadQuery(const float* q, float scale, Halves (&query)[kVecs / 2]) {
  UNROLL for (int v = 0; v < kVecs / 2; ++v) {
    const float* numbers = q + v * 2 * kWidth;
    query[v] = Halves(Vec::Load(numbers) * Vec(scale), Vec::Load(numbers + kWidth) * Vec(scale));
  }
}

template <int kVecs>
inline Halves LoadPart(const Half* x, int v) {
  return Halves::Load(x + v * 2 * kWidth);
}

// Lane 4 h + i is the sum of the eight numbers 8 h and up of p[i].
inline Vec SumEach(const Halves (&p)[4]) {
  const Halves pairs = SumFour(p);
  const Halves sums = pairs + Halves((__m512h)_mm512_srli_epi32((__m512i)pairs.v, 16));
  return ToFloats(_mm512_cvtepi32_epi16((__m512i)sums.v));
}

// Each chain has half of what is summed in float16.
template <int kVecs>
struct Chains<kVecs, Half> {
  static constexpr int kParts = kVecs / 2, kChains = 2;
  Halves sums[kChains][kParts];
  Vec totals[kVecs];
};

template <int kVecs>
inline void ClearHalves(Chains<kVecs, Half>& chains) {
  UNROLL for (int v = 0; v < kVecs; ++v) chains.sums[v % 2][v / 2] = Halves::Zero();
}

template <int kVecs>
inline void Clear(Chains<kVecs, Half>& chains) {
  ClearHalves(chains);
  UNROLL for (Vec& total : chains.totals) total = Vec(0.0f);
}

template <int kVecs>
inline void AddHalves(Chains<kVecs, Half>& chains) {
  UNROLL for (int v = 0; v < kVecs / 2; ++v) {
    const Halves sum = chains.sums[0][v] + chains.sums[1][v];
    chains.totals[2 * v] = chains.totals[2 * v] + sum.Lower();
    chains.totals[2 * v + 1] = chains.totals[2 * v + 1] + sum.Upper();
  }
}

template <int kVecs>
inline void Settle(Chains<kVecs, Half>& chains, int end) {
  if (end % tt::kFp16Values != 0) return;
  AddHalves(chains);
  ClearHalves(chains);
}

template <int kVecs>
inline void StoreTotal(Chains<kVecs, Half> chains, Vec scale, float* out) {
  AddHalves(chains);
  const Vec lower = ZipLower(scale, scale), upper = ZipUpper(scale, scale);  // two lanes for one
  UNROLL for (int v = 0; v < kVecs; ++v) {
    (chains.totals[v] * (v % 2 == 0 ? lower : upper)).Store(out + v * kWidth);
  }
}

void AttendHalves(const AttendArgs& args) {
  if (args.bundle_stride == 4 * kWidth) return AttendBundles<kBundleHeads, 4, Half>(args);
  AttendBundles<kBundleHeads, 8, Half>(args);
}

}  // namespace
