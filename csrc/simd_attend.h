// Attention over the tree of prefixes, written once over a vector type and the type of keys and
// values, float32 or bfloat16; float16 is in fp16_attend.h. Included by simd_ops.h.
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

// ---- attention: three steps of one bundle of heads, QK, exp, weighted sum ----
//
// A row alone, or two neighbours at once over the ancestors that they share: each key and value is
// then loaded once for both. Scores lie as they are computed, in vectors of kLanes keys: lane
// h * kLanes + i is of head h and key i.

template <int kHeads>
inline constexpr int kLanesOf = kWidth / kHeads;

// Of all lanes of each head, in each of them.
// (Over V, as vectors that never hold several heads lack these functions.)
template <int kHeads, typename V>
inline V SpreadMax(V x) {
  if constexpr (kHeads == 1) {
    return V(MaxLane(x));
  } else {
    x = Max(x, SwapHalves(x));
    return Max(x, SwapLanes(x));
  }
}
template <int kHeads, typename V>
inline V SpreadSum(V x) {
  if constexpr (kHeads == 1) {
    return V(Sum(x));
  } else {
    x = x + SwapHalves(x);
    return x + SwapLanes(x);
  }
}

// The weight of one of four keys, over the lanes of each head.
template <int kHeads, typename V = Vec>
inline V SpreadWeight(const float* weights, int i) {
  if constexpr (kHeads == 1) return V::Broadcast(weights + i);
  if constexpr (kHeads > 1) return OneOfFour(V::Load(weights), i);
}

// Keys whose scores are in two vectors: what is done to scores is done to both, as one alone would
// wait for itself.
template <int kHeads>
inline constexpr int kStepOf = 2 * kLanesOf<kHeads>;
static_assert(tt::kPad % kStepOf<1> == 0);  // there is room for them

// The scores of keys [len, the next multiple of kStepOf) become kMasked.
template <int kHeads>
inline void MaskScores(float* scores, int len) {
  constexpr int kLanes = kLanesOf<kHeads>;
  const int end = tt::RoundUp(len, kLanes);
  float* last = scores + (end - kLanes) * kHeads;
  for (int i = kLanes - (end - len); i < kLanes; ++i) {
    for (int head = 0; head < kHeads; ++head) last[head * kLanes + i] = kMasked;
  }
  if (end % kStepOf<kHeads> > 0) Vec(kMasked).Store(scores + end * kHeads);
}

// Scores of keys [begin, end) of so many rows; begin is a multiple of kLanes. What follows them in
// their last vector means nothing.
template <int kRows, int kHeads, int kVecs, typename Key>
inline void DotKeys(const float* q, size_t q_stride, float scale, const Key* keys,
                    const uint32_t* path, int begin, int end, float* scores, size_t scores_size,
                    Prefetcher<kVecs, Key>& prefetcher) {
  constexpr int kLanes = kLanesOf<kHeads>;
  PartOf<Key> query[kRows][kPartsOf<kVecs, Key>];
  UNROLL for (int r = 0; r < kRows; ++r) {
    LoadQuery<kVecs, Key>(q + r * q_stride, scale, query[r]);
  }
  for (int j = begin; j < end; j += kLanes) {
    prefetcher.Ask(kLanes);
    const Key* key[kLanes];
    if (j + kLanes <= end) {
      UNROLL for (int i = 0; i < kLanes; ++i) key[i] = keys + path[j + i];
    } else {
      UNROLL for (int i = 0; i < kLanes; ++i) key[i] = keys + path[j + i < end ? j + i : end - 1];
    }
    // a vector of partial sums a key, then all of them reduced at once
    PartOf<Key> partial[kRows][kLanes];
    DotVecs<kVecs>(query, key, partial);
    UNROLL for (int r = 0; r < kRows; ++r) {
      SumEach(partial[r]).Store(scores + r * scores_size + j * kHeads);
    }
  }
}

// scores = exp(scores - max of the head); returns one over their sum, of each head.
template <int kHeads, int kVecs, typename Key>
inline Vec ExpScores(float* scores, int len, Prefetcher<kVecs, Key>& prefetcher) {
  const int size = tt::RoundUp(len, kStepOf<kHeads>) * kHeads;
  Vec most[2] = {Vec::Load(scores), Vec::Load(scores + kWidth)};
  for (int i = 2 * kWidth; i < size; i += 2 * kWidth) {
    most[0] = Max(most[0], Vec::Load(scores + i));
    most[1] = Max(most[1], Vec::Load(scores + i + kWidth));
  }
  const Vec max = SpreadMax<kHeads>(Max(most[0], most[1]));
  Vec sums[2] = {Vec(0.0f), Vec(0.0f)};
  for (int i = 0; i < size; i += 2 * kWidth) {
    prefetcher.Ask(4);
    const Vec e0 = Exp(Vec::Load(scores + i) - max), e1 = Exp(Vec::Load(scores + i + kWidth) - max);
    ArithmeticOf<Key>::StoreWeights(e0, scores + i);
    ArithmeticOf<Key>::StoreWeights(e1, scores + i + kWidth);
    sums[0] = sums[0] + e0;
    sums[1] = sums[1] + e1;
  }
  return Vec(1.0f) / SpreadSum<kHeads>(sums[0] + sums[1]);
}

// A weighted sum is several sums side by side, which hides the latency of a multiply-add: value j
// goes to chain j % kChains. A row's order of additions is the same alone and beside another one,
// so that plans do not depend on how rows are shared out.
constexpr int kValues = 4;  // a step
template <int kParts>
inline constexpr int kChainsOf = kParts > kMostSums             ? 1
                                 : kMostSums / kParts > kValues ? kValues
                                                                : kMostSums / kParts;

template <int kVecs, typename Key>
struct Chains {
  static constexpr int kParts = kPartsOf<kVecs, Key>, kChains = kChainsOf<kParts>;
  PartOf<Key> sums[kChains][kParts];
};

template <int kVecs, typename Key>
inline void Clear(Chains<kVecs, Key>& chains) {
  UNROLL for (int c = 0; c < chains.kChains; ++c) {
    UNROLL for (int v = 0; v < chains.kParts; ++v) chains.sums[c][v] = Vec(0.0f);
  }
}

// Called when values [0, end) have been added, end a multiple of kValues.
template <int kVecs, typename Key>
inline void Settle(Chains<kVecs, Key>&, int) {}

template <int kVecs, typename Key>
inline void StoreTotal(const Chains<kVecs, Key>& chains, Vec scale, float* out) {
  Vec totals[kVecs];
  UNROLL for (int v = 0; v < kVecs; ++v) {
    totals[v] = chains.sums[0][v];
    UNROLL for (int c = 1; c < chains.kChains; ++c) totals[v] = totals[v] + chains.sums[c][v];
    totals[v] = totals[v] * scale;
  }
  StoreInOrder<kVecs, Key>(totals, out);
}

template <int kHeads, int kVecs, typename Key>
inline void AddOne(const float* weights, int i, const Key* value, Chains<kVecs, Key>& chains) {
  auto& sums = chains.sums[i % chains.kChains];
  const auto weight = ArithmeticOf<Key>::AsPart(SpreadWeight<kHeads>(weights, i));
  UNROLL for (int v = 0; v < chains.kParts; ++v) {
    sums[v] = Fma(weight, LoadPart<kVecs>(value, v), sums[v]);
  }
}

// Chains of values [0, end), then of [end, len) too; end is a multiple of kValues. By value: sums
// that live in a register may have no address.
template <int kHeads, int kVecs, typename Key, typename Prefetch>
inline Chains<kVecs, Key> AddValues(Chains<kVecs, Key> chains, const float* weights,
                                    const Key* values, const uint32_t* path, int end, int len,
                                    Prefetch& prefetcher) {
  int j = end;
  for (; j + kValues <= len; j += kValues) {
    prefetcher.Ask(kValues);
    UNROLL for (int i = 0; i < kValues; ++i) {
      AddOne<kHeads>(weights + j * kHeads, i, values + path[j + i], chains);
    }
    Settle(chains, j + kValues);
  }
  UNROLL for (int i = 0; i < kValues - 1; ++i) {
    if (j + i >= len) break;
    AddOne<kHeads>(weights + j * kHeads, i, values + path[j + i], chains);
  }
  return chains;
}

// Of a row and the next one, values [0, end).
template <int kHeads, int kVecs, typename Key, typename Prefetch>
inline void AddSharedValues(const float* weights, size_t stride, const Key* values,
                            const uint32_t* path, int end, Chains<kVecs, Key>* out,
                            Prefetch& prefetcher) {
  if constexpr (kPartsOf<kVecs, Key> > kMostSums) {  // half after half
    constexpr int kHalf = kVecs / 2;
    UNROLL for (int begin = 0; begin < kVecs; begin += kHalf) {
      Chains<kHalf, Key> both[2];  // of the two rows
      AddSharedValues<kHeads, kHalf>(weights, stride, values + begin * kWidth, path, end, both,
                                     prefetcher);
      static_assert(both[0].kChains == 1);
      UNROLL for (int v = 0; v < kHalf; ++v) {
        out[0].sums[0][begin + v] = both[0].sums[0][v];
        out[1].sums[0][begin + v] = both[1].sums[0][v];
      }
    }
  } else {
    Chains<kVecs, Key> a, b;
    Clear(a);
    Clear(b);
    for (int j = 0; j < end; j += kValues) {
      prefetcher.Ask(kValues);
      UNROLL for (int i = 0; i < kValues; ++i) {
        const int c = i % a.kChains;
        const float* pair = weights + j * kHeads;
        const auto w0 = ArithmeticOf<Key>::AsPart(SpreadWeight<kHeads>(pair, i));
        const auto w1 = ArithmeticOf<Key>::AsPart(SpreadWeight<kHeads>(pair + stride, i));
        const Key* value = values + path[j + i];
        UNROLL for (int v = 0; v < a.kParts; ++v) {
          PartOf<Key> x = LoadPart<kVecs>(value, v);
          Keep(x);  // for both rows
          a.sums[c][v] = Fma(w0, x, a.sums[c][v]);
          b.sums[c][v] = Fma(w1, x, b.sums[c][v]);
        }
      }
      Settle(a, j + kValues);
      Settle(b, j + kValues);
    }
    out[0] = a;
    out[1] = b;
  }
}

// One bundle of rows [r, r + num_rows), at most kScoreRows: each step for all of them before the
// next one, as a row alone would wait for its own maximum and sum. Pairs of rows share keys and
// values.
template <int kHeads, int kVecs, typename Key>
inline void AttendBlock(const AttendArgs& args, const FreshNodes& fresh, int bundle, int r,
                        int num_rows) {
  constexpr int kLanes = kLanesOf<kHeads>;
  static_assert(kLanes % kValues == 0);
  const int column = bundle * args.bundle_stride;
  const Key* keys = static_cast<const Key*>(args.kv) + 2 * bundle * args.bundle_size;
  const Key* values = keys + args.bundle_size;
  const float* q = args.q + r * args.q_stride + column;
  float* out = args.out + r * args.out_stride + column;
  const uint32_t* const* paths = args.paths + r;
  const int32_t* lens = args.lens + r;
  int ends[tt::kScoreRows];  // what a pair does together
  Vec scales[tt::kScoreRows];
  const auto scores = [&args](int i) { return args.scores + i * args.scores_size; };
  const auto last_of = [num_rows](int i) { return i + 1 < num_rows ? i + 1 : i; };  // of a pair
  const auto fresh_of = [&](int i) { return fresh.nodes + fresh.begin[r + i]; };

  Prefetcher<kVecs, Key> asks_keys(keys, fresh, r, r + num_rows);
  for (int i = 0; i < num_rows; i += 2) {
    ends[i] = last_of(i) > i ? args.shared[r + i + 1] / kLanes * kLanes : 0;
    asks_keys.SkipTo(fresh_of(i));
    if (ends[i] > 0) {
      DotKeys<2, kHeads>(q + i * args.q_stride, args.q_stride, args.scale, keys, paths[i], 0,
                         ends[i], scores(i), args.scores_size, asks_keys);
    }
    for (int row = i; row <= last_of(i); ++row) {
      DotKeys<1, kHeads>(q + row * args.q_stride, args.q_stride, args.scale, keys, paths[row],
                         ends[i], lens[row], scores(row), args.scores_size, asks_keys);
      MaskScores<kHeads>(scores(row), lens[row]);
    }
  }
  Prefetcher<kVecs, Key> asks_values(values, fresh, r, r + num_rows);
  for (int i = 0; i < num_rows; ++i) {
    scales[i] = ExpScores<kHeads>(scores(i), lens[i], asks_values);
  }
  for (int i = 0; i < num_rows; i += 2) {
    asks_values.SkipTo(fresh_of(i));
    Chains<kVecs, Key> chains[2];
    AddSharedValues<kHeads, kVecs>(scores(i), args.scores_size, values, paths[i], ends[i], chains,
                                   asks_values);
    for (int row = i; row <= last_of(i); ++row) {
      StoreTotal(AddValues<kHeads, kVecs>(chains[row - i], scores(row), values, paths[row], ends[i],
                                          lens[row], asks_values),
                 scales[row], out + row * args.out_stride);
    }
  }
}

// Bundles outside, rows inside: neighbouring rows share most ancestors, which stay in a near cache.
template <int kHeads, int kVecs, typename Key>
void AttendBundles(const AttendArgs& args) {
  const FreshNodes fresh = CollectFresh(args);
  for (int bundle = 0; bundle < args.num_bundles; ++bundle) {
    for (int r = 0; r < args.rows; r += tt::kScoreRows) {
      const int end = r + tt::kScoreRows < args.rows ? r + tt::kScoreRows : args.rows;
      AttendBlock<kHeads, kVecs, Key>(args, fresh, bundle, r, end - r);
    }
  }
}

// Heads of other widths, one by one, a vector at a time.
template <typename Key>
void AttendWide(const AttendArgs& args) {
  Prefetcher<1, Key> none;
  for (int head = 0; head < args.num_bundles; ++head) {
    const Key* keys = static_cast<const Key*>(args.kv) + 2 * head * args.bundle_size;
    for (int r = 0; r < args.rows; ++r) {
      const uint32_t* path = args.paths[r];
      const int len = args.lens[r];
      const float* q = args.q + r * args.q_stride + head * args.bundle_stride;
      float* out = args.out + r * args.out_stride + head * args.bundle_stride;
      for (int j = 0; j < len; ++j) {
        Vec sum(0.0f);
        for (int i = 0; i < args.bundle_stride; i += kWidth) {
          sum = Fma(Vec::Load(q + i), LoadNumbers(keys + path[j] + i), sum);
        }
        args.scores[j] = Sum(sum) * args.scale;
      }
      MaskScores<1>(args.scores, len);
      const Vec scale = ExpScores<1>(args.scores, len, none);
      for (int i = 0; i < args.bundle_stride; i += kWidth) {
        Chains<1, Key> chains;
        Clear(chains);
        const Key* values = keys + args.bundle_size + i;
        StoreTotal(AddValues<1>(chains, args.scores, values, path, 0, len, none), scale, out + i);
      }
    }
  }
}

constexpr int kBundleHeads = kWidth / tt::kBundleNumbers;

template <typename Key>
void AttendKeys(const AttendArgs& args) {
  const int vecs = args.bundle_stride / kWidth;
  if constexpr (kBundleHeads > 1) {
    static_assert(tt::kMaxBundled == 2 * kHeadPad && kHeadPad == 4 * tt::kBundleNumbers);
    if (args.bundle_heads > 1 && vecs == 4) return AttendBundles<kBundleHeads, 4, Key>(args);
    if (args.bundle_heads > 1) return AttendBundles<kBundleHeads, 8, Key>(args);
  }
  if (vecs == 1) return AttendBundles<1, 1, Key>(args);
  if (vecs == 2) return AttendBundles<1, 2, Key>(args);
  if (vecs == 4) return AttendBundles<1, 4, Key>(args);
  if (vecs == 8) return AttendBundles<1, 8, Key>(args);
  AttendWide<Key>(args);
}

void Attend(const AttendArgs& args) {
  args.type == tt::NumberType::kFloat32 ? AttendKeys<float>(args) : AttendKeys<uint16_t>(args);
}

}  // namespace
