// Keys and values as attention reads them, in registers and on their way through the caches.
// Included by simd_attend_steps.h.
//
// No include guard and nothing but anonymous namespaces: each instruction set has its own copy.

namespace {

// ---- attention: a key, or a value, in registers ----
//
// Two vectors of bfloat16 are loaded at once, numbers with even indices into one and those with odd
// indices into the other, as a pair of them is in the place of a float32. Queries are loaded in the
// same order, and sums of values are put back into theirs.

template <int kVecs, typename Key>
inline constexpr bool kInPairs = __is_same(Key, uint16_t) && kVecs % 2 == 0;

// How keys and values are multiplied: as float32.
template <typename Key>
struct ArithmeticOf {
  using Part = Vec;                   // of a key, with lanes for the same numbers of a query
  static constexpr int kNumbers = 1;  // of a lane of Vec
  static void StoreWeights(Vec weights, float* out) { weights.Store(out); }
  static Vec AsPart(Vec weight) { return weight; }
};
template <typename Key>
using PartOf = typename ArithmeticOf<Key>::Part;
template <int kVecs, typename Key>
inline constexpr int kPartsOf = kVecs / ArithmeticOf<Key>::kNumbers;

template <int kVecs, typename Key>
inline Vec LoadPart(const Key* x, int v) {
  if constexpr (kInPairs<kVecs, Key>) {
    const Key* pairs = x + v / 2 * 2 * kWidth;
    return v % 2 == 0 ? Vec::LoadHalfPairs<0>(pairs) : Vec::LoadHalfPairs<1>(pairs);
  } else {
    return LoadNumbers(x + v * kWidth);
  }
}

template <int kVecs, typename Key>
inline void LoadQuery(const float* q, float scale, Vec (&query)[kVecs]) {
  UNROLL for (int v = 0; v < kVecs; ++v) query[v] = Vec::Load(q + v * kWidth) * Vec(scale);
  if constexpr (kInPairs<kVecs, Key>) {
    UNROLL for (int v = 0; v < kVecs; v += 2) {
      const Vec lower = query[v], upper = query[v + 1];
      query[v] = EvenLanes(lower, upper);
      query[v + 1] = OddLanes(lower, upper);
    }
  }
}

template <int kVecs, typename Key>
inline void StoreInOrder(const Vec (&x)[kVecs], float* out) {
  if constexpr (kInPairs<kVecs, Key>) {
    UNROLL for (int v = 0; v < kVecs; v += 2) {
      ZipLower(x[v], x[v + 1]).Store(out + v * kWidth);
      ZipUpper(x[v], x[v + 1]).Store(out + (v + 1) * kWidth);
    }
  } else {
    UNROLL for (int v = 0; v < kVecs; ++v) x[v].Store(out + v * kWidth);
  }
}

// Vectors of sums that registers hold, of each of two rows.
constexpr int kMostSums = kRegisters / 4;

// Sums over lanes still to come, q . key, of some rows and keys. What rows share is loaded once for
// all of them; so are parts of queries for all keys, where registers do not hold whole queries.
template <int kVecs, int kRows, int kKeys, typename Key>
inline void DotVecs(const PartOf<Key> (&q)[kRows][kPartsOf<kVecs, Key>], const Key* const* key,
                    PartOf<Key> (*sums)[kKeys]) {
  constexpr int kParts = kPartsOf<kVecs, Key>, kBlock = kKeys < kMostSums ? kKeys : kMostSums;
  static_assert(kKeys % kBlock == 0);
  UNROLL for (int block = 0; block < kKeys; block += kBlock) {
    UNROLL for (int v = 0; v < kParts; ++v) {
      PartOf<Key> query[kRows];
      UNROLL for (int r = 0; r < kRows; ++r) {
        query[r] = q[r][v];
        // 1: the part of a key
        if constexpr (kRows * (kParts + kBlock) + 1 > kRegisters) Keep(query[r]);
      }
      UNROLL for (int i = block; i < block + kBlock; ++i) {
        PartOf<Key> part = LoadPart<kVecs>(key[i], v);
        if constexpr (kRows > 1) Keep(part);
        UNROLL for (int r = 0; r < kRows; ++r) {
          sums[r][i] = v == 0 ? query[r] * part : Fma(query[r], part, sums[r][i]);
        }
      }
    }
  }
}

// ---- attention: memory ----
//
// Half of a plan's keys and values are one row's alone, too many for the second cache, and all over
// the place. While rows are at what they share, which is near, lines of what is theirs alone are
// asked for, about as many as the third cache delivers in that time: more would be dropped.

// What each row has on its path and the row before it has not.
struct FreshNodes {
  const uint32_t* nodes;
  int begin[tt::kMaxRows + 1];  // in `nodes`, of a row
};

inline FreshNodes CollectFresh(const AttendArgs& args) {
  FreshNodes fresh;
  fresh.nodes = args.fresh;
  int count = 0;
  for (int r = 0; r < args.rows; ++r) {
    fresh.begin[r] = count;
    for (int j = args.shared[r]; j < args.lens[r]; ++j) args.fresh[count++] = args.paths[r][j];
  }
  fresh.begin[args.rows] = count;
  return fresh;
}

// Asks for the fresh keys, or values, of rows [begin, end), a line at a time.
template <int kVecs, typename Key>
struct Prefetcher {
  static constexpr int kBytes = kVecs * kWidth * sizeof(Key);
  const Key* base = nullptr;  // keys or values of one bundle
  const uint32_t* next = nullptr;
  const uint32_t* end = nullptr;
  int byte = 0;  // of the next node

  Prefetcher() = default;
  Prefetcher(const Key* base, const FreshNodes& fresh, int begin, int end)
      : base(base), next(fresh.nodes + fresh.begin[begin]), end(fresh.nodes + fresh.begin[end]) {}

  inline __attribute__((always_inline)) void Ask(int num_lines) {
    for (int i = 0; i < num_lines && next < end; ++i) {
      __builtin_prefetch(reinterpret_cast<const char*>(base + *next) + byte, 0, 3);
      byte += kLine;
      if (byte < kBytes) continue;
      byte = 0;
      ++next;
    }
  }

  // The next row's: those of rows before have been read.
  void SkipTo(const uint32_t* node) {
    if (next >= node) return;
    next = node;
    byte = 0;
  }
};

}  // namespace
