// NEON, which every 64-bit Arm has.
#ifdef __aarch64__
#include <arm_neon.h>
#include <stdint.h>

namespace {

constexpr char kName[] = "neon";

struct Vec {
  static constexpr int kWidth = 4;
  static constexpr bool kLooksUp = false;
  float32x4_t v;

  Vec() = default;
  explicit Vec(float x) : v(vdupq_n_f32(x)) {}
  explicit Vec(float32x4_t x) : v(x) {}
  static Vec Load(const float* p) { return Vec(vld1q_f32(p)); }
  static Vec Broadcast(const float* p) { return Vec(vld1q_dup_f32(p)); }
  static Vec LoadBf16(const uint16_t* p) {
    return Vec(vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)));
  }
  static Vec FromBytes(const uint8_t* p) {
    uint32_t bytes;
    __builtin_memcpy(&bytes, p, sizeof(bytes));
    const uint16x8_t x = vmovl_u8(vcreate_u8(bytes));
    return Vec(vcvtq_f32_u32(vmovl_u16(vget_low_u16(x))));
  }
  // Of (4, 2) bfloat16, each the upper half of a float, the first or the second of each pair.
  template <int kOdd>
  static Vec LoadHalfPairs(const uint16_t* p) {
    const uint32x4_t pairs = vreinterpretq_u32_u16(vld1q_u16(p)), high = vdupq_n_u32(0xffff0000u);
    return Vec(vreinterpretq_f32_u32(kOdd ? vandq_u32(pairs, high) : vshlq_n_u32(pairs, 16)));
  }
  void Store(float* p) const { vst1q_f32(p, v); }
};

inline Vec operator+(Vec a, Vec b) { return Vec(vaddq_f32(a.v, b.v)); }
inline Vec operator-(Vec a, Vec b) { return Vec(vsubq_f32(a.v, b.v)); }
inline Vec operator*(Vec a, Vec b) { return Vec(vmulq_f32(a.v, b.v)); }
inline Vec operator/(Vec a, Vec b) { return Vec(vdivq_f32(a.v, b.v)); }
inline Vec Fma(Vec a, Vec b, Vec c) { return Vec(vfmaq_f32(c.v, a.v, b.v)); }
inline Vec Max(Vec a, Vec b) { return Vec(vmaxq_f32(a.v, b.v)); }
inline Vec Min(Vec a, Vec b) { return Vec(vminq_f32(a.v, b.v)); }
inline float Sum(Vec a) { return vaddvq_f32(a.v); }
inline float MaxLane(Vec a) { return vmaxvq_f32(a.v); }
inline void Keep(Vec& a) { asm volatile("" : "+w"(a.v)); }

// a[0], b[0], a[1], b[1] and so on, of their lower and upper halves.
inline Vec ZipLower(Vec a, Vec b) { return Vec(vzip1q_f32(a.v, b.v)); }
inline Vec ZipUpper(Vec a, Vec b) { return Vec(vzip2q_f32(a.v, b.v)); }

// Lanes 0 and 2 of a, then of b; and those between.
inline Vec EvenLanes(Vec a, Vec b) { return Vec(vuzp1q_f32(a.v, b.v)); }
inline Vec OddLanes(Vec a, Vec b) { return Vec(vuzp2q_f32(a.v, b.v)); }

inline Vec ScaleByPowerOf2(Vec a, Vec n, Vec shifted, Vec least) {
  const uint32x4_t normal = vcgeq_f32(n.v, least.v);
  const uint32x4_t exponent = vshlq_n_u32(vreinterpretq_u32_f32(shifted.v), 23);
  const uint32x4_t scaled = vaddq_u32(vreinterpretq_u32_f32(a.v), exponent);
  return Vec(vreinterpretq_f32_u32(vandq_u32(normal, scaled)));
}

// Lane i is the sum of p[i].
inline Vec SumEach(const Vec (&p)[4]) {
  return Vec(vpaddq_f32(vpaddq_f32(p[0].v, p[1].v), vpaddq_f32(p[2].v, p[3].v)));
}

// The nearest bfloat16, ties to even, in the upper halves; what is below does not count.
inline uint32x4_t NearestBf16(Vec a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a.v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  return vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
}
inline Vec RoundToBf16(Vec a) {
  return Vec(vreinterpretq_f32_u32(vandq_u32(NearestBf16(a), vdupq_n_u32(0xffff0000u))));
}
inline void StoreBf16(Vec a, uint16_t* p) { vst1_u16(p, vshrn_n_u32(NearestBf16(a), 16)); }

// 24 of 32 registers hold sums.
constexpr int kTileRows = 6;
constexpr int kRegisters = 32;
constexpr int kTileVecs = 4;
constexpr int kPointerRows = kTileRows;  // one pointer

}  // namespace
#include "simd_ops.h"

namespace {
constexpr Ops kOps = MakeOps();
}

namespace tt {
const Ops* NeonOps() { return &kOps; }
}  // namespace tt
#else
#include "ops.h"

namespace tt {
const Ops* NeonOps() { return nullptr; }
}  // namespace tt
#endif
