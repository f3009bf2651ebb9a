// Attention over the tree of prefixes, written once over a vector type and the type of keys and
// values, float32 or bfloat16. Included by simd_ops.h.
//
// No include guard and nothing but anonymous namespaces: each instruction set has its own copy.

namespace {

// ---- attention: a key, or a value, in registers ----
//
// Two vectors of bfloat16 are loaded at once, numbers with even indices into one and those with odd
// indices into the other, as a pair of them is in the place of a float32. Queries are loaded in the
// same order, and sums of values are put back into theirs.

template <int kVecs, typename Key>
inline constexpr bool kInPairs = sizeof(Key) == sizeof(uint16_t) && kVecs % 2 == 0;

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

// Sum over lanes still to come: q . key.
template <int kVecs, typename Key>
inline Vec DotVecs(const Vec (&q)[kVecs], const Key* key) {
  Vec sum = q[0] * LoadPart<kVecs>(key, 0);
  UNROLL for (int v = 1; v < kVecs; ++v) sum = Fma(q[v], LoadPart<kVecs>(key, v), sum);
  return sum;
}

// ---- attention: memory ----
//
// Half of a plan's keys and values are one row's alone, too many for the second cache, and all over
// the place. So each step of a pair of rows asks for a few nodes of the next pair: memory works
// while we compute. (All requests at once would be no faster than none: only so many can wait.)

// What each row has on its path and the row before it has not.
struct FreshNodes {
  const uint32_t* nodes;
  int begin[tt::kMaxRows + 4];  // in `nodes`, of a row; of rows that do not exist, the end
};

inline FreshNodes CollectFresh(const AttendArgs& args) {
  FreshNodes fresh;
  fresh.nodes = args.fresh;
  int count = 0;
  for (int r = 0; r < args.rows; ++r) {
    fresh.begin[r] = count;
    for (int j = args.shared[r]; j < args.lens[r]; ++j) args.fresh[count++] = args.paths[r][j];
  }
  for (int r = args.rows; r < args.rows + 4; ++r) fresh.begin[r] = count;
  return fresh;
}

// The next pair's nodes, spread over the steps of this one.
template <int kVecs, typename Key>
struct Prefetcher {
  const Key* base = nullptr;  // keys or values of one head
  const uint32_t* next = nullptr;
  const uint32_t* end = nullptr;
  int per_step = 0;

  Prefetcher() = default;
  Prefetcher(const Key* base, const FreshNodes& fresh, int row, int num_steps)
      : base(base),
        next(fresh.nodes + fresh.begin[row]),
        end(fresh.nodes + fresh.begin[row + 2]),
        per_step(static_cast<int>(end - next + num_steps - 1) / num_steps) {}

  inline __attribute__((always_inline)) void Step() {
    const uint32_t* stop = end - next < per_step ? end : next + per_step;
    for (; next < stop; ++next) {
      const char* node = reinterpret_cast<const char*>(base + *next);
      UNROLL for (size_t i = 0; i < kVecs * kWidth * sizeof(Key); i += 64) {
        __builtin_prefetch(node + i, 0, 3);
      }
    }
  }
};

// ---- attention: three steps of one head, QK, exp, weighted sum ----
//
// A row alone, or two neighbours at once over the ancestors that they share: each key and value is
// then loaded once for both.

// scores[j] = q . k_j for j in [begin, len), kMasked after them; begin is a multiple of kWidth.
template <int kVecs, typename Key>
inline void DotKeys(const float* q, float scale, const Key* keys, const uint32_t* path, int begin,
                    int len, float* scores, Prefetcher<kVecs, Key>& prefetcher) {
  Vec query[kVecs];
  LoadQuery<kVecs, Key>(q, scale, query);
  // a vector of partial sums a key, then all of them reduced at once: lane i belongs to key j + i
  for (int j = begin; j < len; j += kWidth) {
    prefetcher.Step();
    Vec partial[kWidth];
    if (j + kWidth <= len) {
      UNROLL for (int i = 0; i < kWidth; ++i) {
        partial[i] = DotVecs<kVecs, Key>(query, keys + path[j + i]);
      }
    } else {
      UNROLL for (int i = 0; i < kWidth; ++i) {
        partial[i] = DotVecs<kVecs, Key>(query, keys + path[j + i < len ? j + i : len - 1]);
      }
    }
    SumEach(partial).Store(scores + j);
  }
  for (int j = len; j < tt::RoundUp(len, kWidth); ++j) scores[j] = kMasked;
}

// The same of a row and the next one over [0, end), a multiple of kWidth.
template <int kVecs, typename Key>
inline void DotSharedKeys(const float* q, size_t q_stride, float scale, const Key* keys,
                          const uint32_t* path, int end, float* scores, size_t scores_size,
                          Prefetcher<kVecs, Key>& prefetcher) {
  Vec query0[kVecs], query1[kVecs];
  LoadQuery<kVecs, Key>(q, scale, query0);
  LoadQuery<kVecs, Key>(q + (end > 0 ? q_stride : 0), scale, query1);
  for (int j = 0; j < end; j += kWidth) {
    prefetcher.Step();
    Vec partial0[kWidth], partial1[kWidth];
    UNROLL for (int i = 0; i < kWidth; ++i) {
      partial0[i] = DotVecs<kVecs, Key>(query0, keys + path[j + i]);
      partial1[i] = DotVecs<kVecs, Key>(query1, keys + path[j + i]);
    }
    SumEach(partial0).Store(scores + j);
    SumEach(partial1).Store(scores + scores_size + j);
  }
}

// scores[j] = exp(scores[j] - max); returns one over their sum.
inline float ExpScores(float* scores, int len) {
  Vec largest = Vec::Load(scores);
  for (int j = kWidth; j < len; j += kWidth) largest = Max(largest, Vec::Load(scores + j));
  const Vec max(MaxLane(largest));
  Vec sum(0.0f);
  for (int j = 0; j < len; j += kWidth) {
    const Vec e = Exp(Vec::Load(scores + j) - max);
    e.Store(scores + j);
    sum = sum + e;
  }
  return 1.0f / Sum(sum);
}

// A weighted sum is several sums side by side, which hides the latency of a multiply-add: value j
// goes to chain j % kChains. A row's order of additions is the same alone and beside another one,
// so that plans do not depend on how rows are shared out.
template <int kVecs>
inline constexpr int kChainsOf = kRegisters / 4 / kVecs > 4   ? 4
                                 : kRegisters / 4 / kVecs < 1 ? 1
                                                              : kRegisters / 4 / kVecs;

template <int kVecs>
struct Chains {
  static constexpr int kChains = kChainsOf<kVecs>;
  Vec sums[kChains][kVecs];
};

template <int kVecs, typename Key>
inline void StoreTotal(const Chains<kVecs>& chains, float scale, float* out) {
  Vec totals[kVecs];
  UNROLL for (int v = 0; v < kVecs; ++v) {
    totals[v] = chains.sums[0][v];
    UNROLL for (int c = 1; c < chains.kChains; ++c) totals[v] = totals[v] + chains.sums[c][v];
    totals[v] = totals[v] * Vec(scale);
  }
  StoreInOrder<kVecs, Key>(totals, out);
}

template <int kVecs, typename Key>
inline void AddOne(float weight, const Key* value, Vec (&sums)[kVecs]) {
  const Vec w(weight);
  UNROLL for (int v = 0; v < kVecs; ++v) sums[v] = Fma(w, LoadPart<kVecs>(value, v), sums[v]);
}

// Chains of values [0, end), then of [end, len) too; end is a multiple of kWidth. By value: sums
// that live in a register may have no address.
template <int kVecs, typename Key>
inline Chains<kVecs> AddValues(Chains<kVecs> chains, const float* weights, const Key* values,
                               const uint32_t* path, int end, int len,
                               Prefetcher<kVecs, Key>& prefetcher) {
  int j = end;
  for (; j + chains.kChains <= len; j += chains.kChains) {
    prefetcher.Step();
    UNROLL for (int c = 0; c < chains.kChains; ++c) {
      AddOne<kVecs, Key>(weights[j + c], values + path[j + c], chains.sums[c]);
    }
  }
  for (; j < len; ++j) AddOne<kVecs, Key>(weights[j], values + path[j], chains.sums[0]);
  return chains;
}

// Of a row and the next one, values [0, end).
template <int kVecs, typename Key>
inline void AddSharedValues(const float* weights, size_t stride, const Key* values,
                            const uint32_t* path, int end, Chains<kVecs>* out,
                            Prefetcher<kVecs, Key>& prefetcher) {
  Chains<kVecs> a, b;
  UNROLL for (int c = 0; c < a.kChains; ++c) {
    UNROLL for (int v = 0; v < kVecs; ++v) a.sums[c][v] = b.sums[c][v] = Vec(0.0f);
  }
  for (int j = 0; j < end; j += a.kChains) {
    prefetcher.Step();
    UNROLL for (int c = 0; c < a.kChains; ++c) {
      const Vec w0 = Vec::Broadcast(weights + j + c);
      const Vec w1 = Vec::Broadcast(weights + stride + j + c);
      const Key* value = values + path[j + c];
      UNROLL for (int v = 0; v < kVecs; ++v) {
        const Vec x = LoadPart<kVecs>(value, v);
        a.sums[c][v] = Fma(w0, x, a.sums[c][v]);
        b.sums[c][v] = Fma(w1, x, b.sums[c][v]);
      }
    }
  }
  out[0] = a;
  out[1] = b;
}

// One head of rows [r, r + num_rows), at most kScoreRows: each step for all of them before the next
// one, as a row alone would wait for its own maximum and sum. Pairs of rows share keys and values.
template <int kVecs, typename Key>
inline void AttendBlock(const AttendArgs& args, const FreshNodes& fresh, int head, int r,
                        int num_rows) {
  const int column = head * args.head_stride;
  const Key* keys = static_cast<const Key*>(args.kv) + 2 * head * args.head_size;
  const Key* values = keys + args.head_size;
  const float* q = args.q + r * args.q_stride + column;
  float* out = args.out + r * args.out_stride + column;
  const uint32_t* const* paths = args.paths + r;
  const int32_t* lens = args.lens + r;
  int ends[tt::kScoreRows];  // what a pair does together
  float scales[tt::kScoreRows];
  const auto scores = [&args](int i) { return args.scores + i * args.scores_size; };
  // of a pair whose rows go alone after `ends`, with `size` nodes a step
  const auto num_steps = [&](int i, int size) {
    return ends[i] / size + 2 * ((lens[i] - ends[i] + size - 1) / size) + 1;
  };

  for (int i = 0; i < num_rows; i += 2) {
    const bool is_pair = i + 1 < num_rows;
    ends[i] = is_pair ? args.shared[r + i + 1] / kWidth * kWidth : 0;
    Prefetcher<kVecs, Key> prefetcher(keys, fresh, r + i + 2, num_steps(i, kWidth));
    DotSharedKeys<kVecs, Key>(q + i * args.q_stride, args.q_stride, args.scale, keys, paths[i],
                              ends[i], scores(i), args.scores_size, prefetcher);
    for (int row = i; row < i + 1 + is_pair; ++row) {
      DotKeys<kVecs, Key>(q + row * args.q_stride, args.scale, keys, paths[row], ends[i], lens[row],
                          scores(row), prefetcher);
    }
  }
  for (int i = 0; i < num_rows; ++i) scales[i] = ExpScores(scores(i), lens[i]);
  for (int i = 0; i < num_rows; i += 2) {
    Chains<kVecs> chains[2];
    Prefetcher<kVecs, Key> prefetcher(values, fresh, r + i + 2, num_steps(i, kChainsOf<kVecs>));
    AddSharedValues<kVecs, Key>(scores(i), args.scores_size, values, paths[i], ends[i], chains,
                                prefetcher);
    for (int row = i; row < i + 2 && row < num_rows; ++row) {
      StoreTotal<kVecs, Key>(AddValues<kVecs, Key>(chains[row - i], scores(row), values, paths[row],
                                                   ends[i], lens[row], prefetcher),
                             scales[row], out + row * args.out_stride);
    }
  }
}

// Heads outside, rows inside: neighbouring rows share most ancestors, and one head's part of these
// fits the first cache.
template <int kVecs, typename Key>
void AttendHeads(const AttendArgs& args) {
  const FreshNodes fresh = CollectFresh(args);
  for (int head = 0; head < args.num_heads; ++head) {
    for (int r = 0; r < args.rows; r += tt::kScoreRows) {
      const int end = r + tt::kScoreRows < args.rows ? r + tt::kScoreRows : args.rows;
      AttendBlock<kVecs, Key>(args, fresh, head, r, end - r);
    }
  }
}

// Heads of other widths, a vector at a time.
template <typename Key>
void AttendWide(const AttendArgs& args) {
  for (int head = 0; head < args.num_heads; ++head) {
    const Key* keys = static_cast<const Key*>(args.kv) + 2 * head * args.head_size;
    for (int r = 0; r < args.rows; ++r) {
      const uint32_t* path = args.paths[r];
      const int len = args.lens[r];
      const float* q = args.q + r * args.q_stride + head * args.head_stride;
      float* out = args.out + r * args.out_stride + head * args.head_stride;
      for (int j = 0; j < tt::RoundUp(len, kWidth); ++j) {
        Vec sum(0.0f);
        for (int i = 0; j < len && i < args.head_stride; i += kWidth) {
          sum = Fma(Vec::Load(q + i), LoadNumbers(keys + path[j] + i), sum);
        }
        args.scores[j] = j < len ? Sum(sum) * args.scale : kMasked;
      }
      const float scale = ExpScores(args.scores, len);
      for (int i = 0; i < args.head_stride; i += kWidth) {
        Chains<1> chains;
        for (auto& sums : chains.sums) sums[0] = Vec(0.0f);
        const Key* values = keys + args.head_size + i;
        Prefetcher<1, Key> none;
        StoreTotal<1, Key>(AddValues<1, Key>(chains, args.scores, values, path, 0, len, none),
                           scale, out + i);
      }
    }
  }
}

template <typename Key>
void AttendKeys(const AttendArgs& args) {
  const int vecs = args.head_stride / kWidth;
  if (vecs == 1) return AttendHeads<1, Key>(args);
  if (vecs == 2) return AttendHeads<2, Key>(args);
  if (vecs == 4) return AttendHeads<4, Key>(args);
  if (vecs == 8) return AttendHeads<8, Key>(args);
  AttendWide<Key>(args);
}

void Attend(const AttendArgs& args) {
  args.bf16 ? AttendKeys<uint16_t>(args) : AttendKeys<float>(args);
}

}  // namespace
