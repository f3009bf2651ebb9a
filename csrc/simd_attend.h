// Attention over the tree of prefixes, written once over a vector type and the type of keys and
// values, float32 or bfloat16; float16 is in fp16_attend.h. Included by simd_ops.h.
//
// No include guard and nothing but anonymous namespaces: each instruction set has its own copy.
#include "simd_keys.h"

namespace {

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
                    Prefetcher<kVecs, Key>& asks) {
  constexpr int kLanes = kLanesOf<kHeads>;
  Prefetcher<kVecs, Key> prefetcher = asks;  // in registers, whatever the scores are stored over
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
  asks = prefetcher;
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

// Of a row and the next one, values [begin, end); both are multiples of kValues. `chains` are of
// the two rows.
template <int kHeads, int kVecs, typename Key, typename Prefetch>
inline void AddSharedValues(const float* weights, size_t stride, const Key* values,
                            const uint32_t* path, int begin, int end, Chains<kVecs, Key>* chains,
                            Prefetch& prefetcher) {
  if constexpr (kPartsOf<kVecs, Key> > kMostSums) {  // half after half
    constexpr int kHalf = kVecs / 2;
    UNROLL for (int first = 0; first < kVecs; first += kHalf) {
      Chains<kHalf, Key> half[2];
      static_assert(half[0].kChains == 1);
      if (begin > 0) {
        UNROLL for (int v = 0; v < kHalf; ++v) {
          UNROLL for (int r = 0; r < 2; ++r) half[r].sums[0][v] = chains[r].sums[0][first + v];
        }
      }
      AddSharedValues<kHeads, kHalf>(weights, stride, values + first * kWidth, path, begin, end,
                                     half, prefetcher);
      UNROLL for (int v = 0; v < kHalf; ++v) {
        UNROLL for (int r = 0; r < 2; ++r) chains[r].sums[0][first + v] = half[r].sums[0][v];
      }
    }
  } else {
    Chains<kVecs, Key> a, b;  // in registers
    if (begin == 0) {
      Clear(a);
      Clear(b);
    } else {
      a = chains[0];
      b = chains[1];
    }
    for (int j = begin; j < end; j += kValues) {
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
    chains[0] = a;
    chains[1] = b;
  }
}

// ---- attention: blocks of rows ----

// Keys, or values, that all rows of a block read before the next ones. The first cache holds two
// strips; rows with fewer keys find what they share there anyway.
template <int kVecs, typename Key>
inline constexpr int kStrip = (16 << 10) / (kVecs * kWidth * sizeof(Key));

// One bundle of rows [begin, end), at most kScoreRows: each step for all of them before the next
// one, as a row alone would wait for its own maximum and sum. What all rows share is read in
// strips; pairs of rows read what they share at once.
template <int kHeads, int kVecs, typename Key>
class AttendBlock {
 public:
  AttendBlock(const AttendArgs& args, const FreshNodes& fresh, int bundle, int begin, int end)
      : args_(args),
        fresh_(fresh),
        first_(begin),
        num_rows_(end - begin),
        column_(bundle * args.bundle_stride),
        keys_(static_cast<const Key*>(args.kv) + 2 * bundle * args.bundle_size) {
    for (int i = 0; i < num_rows_; i += 2) ends_[i] = IsPair(i) ? Shared(i + 1) : 0;
    if (num_rows_ < 3 || len(0) <= 2 * kStrip<kVecs, Key>) return;
    common_ = Shared(1);
    for (int i = 2; i < num_rows_; ++i) common_ = Shared(i) < common_ ? Shared(i) : common_;
    if (num_rows_ % 2 > 0) ends_[num_rows_ - 1] = common_;
  }

  void Attend() {
    Prefetcher<kVecs, Key> asks_keys(keys_, fresh_, first_, first_ + num_rows_);
    InStrips([&](int i, int begin, int end) { DotPair(i, begin, end, asks_keys); });
    for (int i = 0; i < num_rows_; i += 2) DotRest(i, asks_keys);
    Prefetcher<kVecs, Key> asks_values(values(), fresh_, first_, first_ + num_rows_);
    for (int i = 0; i < num_rows_; ++i) {
      scales_[i] = ExpScores<kHeads>(scores(i), len(i), asks_values);
    }
    InStrips([&](int i, int begin, int end) { AddPair(i, begin, end, asks_values); });
    for (int i = 0; i < num_rows_; i += 2) AddRest(i, asks_values);
  }

 private:
  using Asks = Prefetcher<kVecs, Key>;
  static constexpr int kLanes = kLanesOf<kHeads>;
  static_assert(kLanes % kValues == 0 && kStrip<kVecs, Key> % kLanes == 0);

  const Key* values() const { return keys_ + args_.bundle_size; }
  const uint32_t* path(int i) const { return args_.paths[first_ + i]; }
  int len(int i) const { return args_.lens[first_ + i]; }
  float* scores(int i) const { return args_.scores + i * args_.scores_size; }
  const uint32_t* fresh(int i) const { return fresh_.nodes + fresh_.begin[first_ + i]; }
  // By a row and the one before it, of this block: whole vectors of scores.
  int Shared(int i) const { return args_.shared[first_ + i] / kLanes * kLanes; }
  // Rows i and i + 1, unless i is the last one.
  bool IsPair(int i) const { return i + 1 < num_rows_; }
  int EndOfPair(int i) const { return IsPair(i) ? i + 2 : i + 1; }

  // f(i, begin, end): of what all rows share, keys [begin, end) by rows i and i + 1.
  template <typename F>
  void InStrips(F&& f) const {
    for (int begin = 0; begin < common_; begin += kStrip<kVecs, Key>) {
      const int end = begin + kStrip<kVecs, Key> < common_ ? begin + kStrip<kVecs, Key> : common_;
      for (int i = 0; i < num_rows_; i += 2) f(i, begin, end);
    }
  }

  template <int kRows>
  void Dot(int i, int begin, int end, Asks& asks) const {
    const float* q = args_.q + (first_ + i) * args_.q_stride + column_;
    DotKeys<kRows, kHeads>(q, args_.q_stride, args_.scale, keys_, path(i), begin, end, scores(i),
                           args_.scores_size, asks);
  }
  void DotPair(int i, int begin, int end, Asks& asks) const {
    IsPair(i) ? Dot<2>(i, begin, end, asks) : Dot<1>(i, begin, end, asks);
  }
  void DotRest(int i, Asks& asks) const {
    asks.SkipTo(fresh(i));
    if (ends_[i] > common_) DotPair(i, common_, ends_[i], asks);
    for (int row = i; row < EndOfPair(i); ++row) {
      Dot<1>(row, ends_[i], len(row), asks);
      MaskScores<kHeads>(scores(row), len(row));
    }
  }

  // The first call, begin = 0, is the one that clears the sums.
  void AddPair(int i, int begin, int end, Asks& asks) {
    if (IsPair(i)) {
      AddSharedValues<kHeads, kVecs>(scores(i), args_.scores_size, values(), path(i), begin, end,
                                     chains_ + i, asks);
    } else {
      if (begin == 0) Clear(chains_[i]);
      chains_[i] =
          AddValues<kHeads, kVecs>(chains_[i], scores(i), values(), path(i), begin, end, asks);
    }
  }
  void AddRest(int i, Asks& asks) {
    asks.SkipTo(fresh(i));
    if (common_ == 0 || ends_[i] > common_) AddPair(i, common_, ends_[i], asks);
    for (int row = i; row < EndOfPair(i); ++row) {
      float* out = args_.out + (first_ + row) * args_.out_stride + column_;
      StoreTotal(AddValues<kHeads, kVecs>(chains_[row], scores(row), values(), path(row), ends_[i],
                                          len(row), asks),
                 scales_[row], out);
    }
  }

  const AttendArgs& args_;
  const FreshNodes& fresh_;
  const int first_, num_rows_, column_;
  const Key* const keys_;     // of the bundle
  int common_ = 0;            // keys that all rows share
  int ends_[tt::kScoreRows];  // what a pair does together, of its first row
  Vec scales_[tt::kScoreRows];
  Chains<kVecs, Key> chains_[tt::kScoreRows];
};

// Bundles outside, rows inside: neighbouring rows share most ancestors, which stay in a near cache.
template <int kHeads, int kVecs, typename Key>
void AttendBundles(const AttendArgs& args) {
  const FreshNodes fresh = CollectFresh(args);
  for (int bundle = 0; bundle < args.num_bundles; ++bundle) {
    for (int r = 0; r < args.rows; r += tt::kScoreRows) {
      const int end = r + tt::kScoreRows < args.rows ? r + tt::kScoreRows : args.rows;
      AttendBlock<kHeads, kVecs, Key>(args, fresh, bundle, r, end).Attend();
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
