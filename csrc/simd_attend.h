// Attention over the tree of prefixes, written once over a vector type and the type of keys and
// values, float32 or bfloat16; float16 is in fp16_attend.h. Included by simd_ops.h.
//
// No include guard and nothing but anonymous namespaces: each instruction set has its own copy.
#include "simd_attend_steps.h"

namespace {

// ---- attention: blocks of rows ----

// Keys, or values, of a strip. Rows with fewer than two strips find what they share in the first
// cache anyway.
template <int kVecs, typename Key>
inline constexpr int kStrip = tt::kStripBytes / (kVecs * kWidth * sizeof(Key));

// One bundle of rows [begin, end), at most kScoreRows: each step for all of them before the next
// one, as a row alone would wait for its own maximum and sum. What all rows share is read in
// strips, which take more instructions; pairs of rows read what they share at once.
template <int kHeads, int kVecs, typename Key>
class AttendBlock {
 public:
  AttendBlock(const AttendArgs& args, const FreshNodes& fresh, int bundle, int begin, int end)
      : args_(args),
        fresh_(fresh),
        first_(begin),
        num_rows_(end - begin),
        column_(bundle * args.bundle_stride),
        keys_(static_cast<const Key*>(args.kv) + 2 * bundle * args.bundle_size),
        common_(num_rows_ > 2 && len(0) > 2 * kStrip<kVecs, Key> ? SharedByAll() : 0) {
    for (int i = 0; i < num_rows_; i += 2) ends_[i] = IsPair(i) ? Shared(i + 1) : common_;
  }

  void Attend() {
    Asks asks_keys(keys_, fresh_, first_, first_ + num_rows_);
    SkipStrips(asks_keys);
    InStrips([&](int i, int begin, int end) { DotPair(i, begin, end, asks_keys); });
    for (int i = 0; i < num_rows_; i += 2) DotRest(i, asks_keys);
    Asks asks_values(values(), fresh_, first_, first_ + num_rows_);
    SkipStrips(asks_values);
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
  int SharedByAll() const {
    int least = Shared(1);
    for (int i = 2; i < num_rows_; ++i) least = Shared(i) < least ? Shared(i) : least;
    return least;
  }
  // Whether there is a row i + 1.
  bool IsPair(int i) const { return i + 1 < num_rows_; }
  int EndOfPair(int i) const { return IsPair(i) ? i + 2 : i + 1; }

  // What strips read is not worth asking for.
  void SkipStrips(Asks& asks) const {
    const int known = args_.shared[first_];  // to the row before the block
    asks.SkipTo(fresh(0) + (common_ > known ? common_ - known : 0));
  }

  // f(i, begin, end): of what all rows share, keys [begin, end), by row i and its partner.
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

  // With begin = 0 it clears the sums first.
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
    AddPair(i, common_, ends_[i], asks);
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
  const int common_;          // keys that all rows share, if it takes strips to read them
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
