// The steps of attention of a row, or of two: scores, exponentials, a weighted sum. Included by
// simd_attend.h.
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
  Prefetcher<kVecs, Key> own = asks;  // in registers, whatever the scores are stored over
  PartOf<Key> query[kRows][kPartsOf<kVecs, Key>];
  UNROLL for (int r = 0; r < kRows; ++r) {
    LoadQuery<kVecs, Key>(q + r * q_stride, scale, query[r]);
  }
  for (int j = begin; j < end; j += kLanes) {
    own.Ask(kLanes);
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
  asks = own;
}

// scores = exp(scores - max of the head); returns one over their sum, of each head.
template <int kHeads, int kVecs, typename Key>
inline Vec ExpScores(float* scores, int len, Prefetcher<kVecs, Key>& asks) {
  const int size = tt::RoundUp(len, kStepOf<kHeads>) * kHeads;
  Vec most[2] = {Vec::Load(scores), Vec::Load(scores + kWidth)};
  for (int i = 2 * kWidth; i < size; i += 2 * kWidth) {
    most[0] = Max(most[0], Vec::Load(scores + i));
    most[1] = Max(most[1], Vec::Load(scores + i + kWidth));
  }
  const Vec max = SpreadMax<kHeads>(Max(most[0], most[1]));
  Vec sums[2] = {Vec(0.0f), Vec(0.0f)};
  for (int i = 0; i < size; i += 2 * kWidth) {
    asks.Ask(4);
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

// Chains of values [0, begin), then of [begin, end) too. begin is a multiple of kValues; so is end
// if more values follow. By value: sums that live in a register may have no address.
template <int kHeads, int kVecs, typename Key, typename Prefetch>
inline Chains<kVecs, Key> AddValues(Chains<kVecs, Key> chains, const float* weights,
                                    const Key* values, const uint32_t* path, int begin, int end,
                                    Prefetch& asks) {
  int j = begin;
  for (; j + kValues <= end; j += kValues) {
    asks.Ask(kValues);
    UNROLL for (int i = 0; i < kValues; ++i) {
      AddOne<kHeads>(weights + j * kHeads, i, values + path[j + i], chains);
    }
    Settle(chains, j + kValues);
  }
  UNROLL for (int i = 0; i < kValues - 1; ++i) {
    if (j + i >= end) break;
    AddOne<kHeads>(weights + j * kHeads, i, values + path[j + i], chains);
  }
  return chains;
}

// The same of a row and the next one, in place; end is a multiple of kValues, too. What chains are
// before value 0 does not count.
template <int kHeads, int kVecs, typename Key, typename Prefetch>
inline void AddSharedValues(const float* weights, size_t stride, const Key* values,
                            const uint32_t* path, int begin, int end, Chains<kVecs, Key>* chains,
                            Prefetch& asks) {
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
                                     half, asks);
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
      asks.Ask(kValues);
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

}  // namespace
