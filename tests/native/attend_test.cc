// Attention of every table of kernels against double precision, with bounds as in ops_test.cc.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "model.h"
#include "ops.h"
#include "oracle.h"
#include "random.h"
#include "tables.h"

namespace tt::test {
namespace {

constexpr float kGuard = 123.25f;  // in memory that must not be written

struct AttendCase {
  int rows, num_heads, head_dim, num_nodes;
  NumberType type;  // kv is rounded, and handed over like this
  HeadLayout layout;
  size_t width;
  std::vector<float> q, kv;
  std::vector<std::vector<uint32_t>> paths;
  std::vector<int32_t> lens, shared;

  // A path is the first nodes of the row before it, between least_shared of them and all, then any
  // others.
  AttendCase(int num_heads, int head_dim, std::vector<int32_t> row_lens, double spread,
             NumberType type, const Ops& ops, double least_shared = 0.0)
      : rows(static_cast<int>(row_lens.size())),
        num_heads(num_heads),
        head_dim(head_dim),
        num_nodes(*std::max_element(row_lens.begin(), row_lens.end()) + 9),
        type(type),
        layout(num_heads, head_dim, ops, type != NumberType::kFloat32),
        width(layout.width() + 7),
        lens(std::move(row_lens)) {
    Random random(num_heads * 100 + head_dim);
    q = random.Normals(rows * width, spread);
    kv = random.Normals(size_t(num_nodes) * 2 * layout.width(), spread);
    const std::vector<bool> is_used = UsedColumns();
    for (size_t i = 0; i < kv.size(); ++i) {
      const size_t bundle = i / (2 * bundle_size()), column = i % layout.stride;
      if (!is_used[bundle * layout.stride + column]) kv[i] = 0.0f;
      if (type == NumberType::kBf16) kv[i] = RoundToBf16(kv[i]);
      if (type == NumberType::kFp16) kv[i] = static_cast<float>(RoundToFp16(kv[i]));
    }
    for (int r = 0; r < rows; ++r) {
      const int most = r == 0 ? 0 : std::min(lens[r], lens[r - 1]);
      const int others = static_cast<int>((1.0 - least_shared) * most);
      shared.push_back(most - (random.Below(2) == 0 ? 0 : random.Below(others + 1)));
      AddPath(lens[r], shared[r], random);
    }
  }

  void AddPath(int len, int num_shared, Random& random) {
    std::vector<uint32_t> path;
    if (num_shared > 0) path.assign(paths.back().begin(), paths.back().begin() + num_shared);
    for (int node : random.Permutation(num_nodes)) {
      const uint32_t offset = static_cast<uint32_t>(node * layout.stride);
      if (static_cast<int>(path.size()) == len) break;
      if (std::find(path.begin(), path.end(), offset) == path.end()) path.push_back(offset);
    }
    paths.push_back(path);
  }

  // No two numbers of heads lie at the same place.
  std::vector<bool> UsedColumns() const {
    std::vector<bool> is_used(layout.width());
    for (int head = 0; head < num_heads; ++head) {
      for (int i = 0; i < head_dim; ++i) {
        CHECK(!is_used.at(layout.Column(head, i)));
        is_used.at(layout.Column(head, i)) = true;
      }
    }
    return is_used;
  }

  size_t bundle_size() const { return size_t(num_nodes) * layout.stride; }
  double Query(int row, int head, int i) const { return q[row * width + layout.Column(head, i)]; }
  // Number i of the key of node j of a row's path, and of its value.
  const float* KeyAt(int row, int head, int j, int i) const {
    const int column = layout.Column(head, i), bundle = column / layout.stride;
    return &kv[2 * bundle * bundle_size() + paths[row][j] + column % layout.stride];
  }
  double Key(int row, int head, int j, int i) const { return *KeyAt(row, head, j, i); }
  double Value(int row, int head, int j, int i) const {
    return KeyAt(row, head, j, i)[bundle_size()];
  }
  double scale() const { return 1.0 / std::sqrt(static_cast<double>(head_dim)); }
};

// Rows [begin, end), into rows of `width` numbers.
std::vector<float> RunAttend(const Ops& ops, const AttendCase& test, int begin, int end) {
  std::vector<const uint32_t*> paths;
  for (const auto& path : test.paths) paths.push_back(path.data());
  const int longest = *std::max_element(test.lens.begin(), test.lens.end());
  const size_t scores_size = size_t(test.layout.heads) * RoundUp(longest, kPad);
  std::vector<float> scores(kScoreRows * scores_size), out((end - begin) * test.width, kGuard);
  std::vector<uint32_t> fresh((end - begin) * longest);
  std::vector<uint16_t> halves(test.type == NumberType::kFloat32 ? 0 : test.kv.size());
  ops.round(test.kv.data(), halves.size(), test.type, halves.data());  // exact
  AttendArgs args{};
  args.rows = end - begin;
  args.q = &test.q[begin * test.width];
  args.q_stride = test.width;
  args.kv = test.kv.data();
  if (!halves.empty()) args.kv = halves.data();
  args.type = test.type;
  args.bundle_size = test.bundle_size();
  args.paths = &paths[begin];
  args.lens = &test.lens[begin];
  args.shared = &test.shared[begin];
  args.num_bundles = test.layout.num_bundles;
  args.bundle_heads = test.layout.heads;
  args.bundle_stride = test.layout.stride;
  args.scale = static_cast<float>(test.scale());
  args.scores = scores.data();
  args.scores_size = scores_size;
  args.fresh = fresh.data();
  args.out = out.data();
  args.out_stride = test.width;
  ops.attend(args);
  return out;
}

void CheckAttendHead(const AttendCase& test, const std::vector<float>& out, int row, int head) {
  const int len = test.lens[row];
  Doubles scores;
  double score_size = 0.0;  // largest sum of absolute products
  for (int j = 0; j < len; ++j) {
    double dot = 0.0, size = 0.0;
    for (int i = 0; i < test.head_dim; ++i) {
      const double product = test.Query(row, head, i) * test.Key(row, head, j, i);
      dot += product;
      size += std::abs(product);
    }
    scores.push_back(dot * test.scale());
    score_size = std::max(score_size, size * test.scale());
  }
  const Doubles weights = Softmax(scores);
  // a weight's relative error is that of two scores' differences, of exp and of its sum
  double relative = kRounding * (2.0 * (test.head_dim + 6) * score_size + 2.0 * len + 16);
  // in float16 that of a query, 4 products that are added and 3 sums of these; then of the weight,
  // of half of kFp16Values and of the sum of both halves
  if (test.type == NumberType::kFp16) {
    relative += std::expm1(2 * 8 * 0x1p-11 * score_size) + (kFp16Values / 2 + 2) * 0x1p-11;
  }
  for (int i = 0; i < test.head_dim; ++i) {
    double want = 0.0, size = 0.0;
    for (int j = 0; j < len; ++j) {
      const double product = weights[j] * test.Value(row, head, j, i);
      want += product;
      size += std::abs(product);
    }
    const double got = out[row * test.width + test.layout.Column(head, i)];
    const double tiny = test.type == NumberType::kFp16 ? 0x1p-24 : kTiny * 100;
    CHECK_LE(std::abs(got - want), relative * size + len * tiny);
  }
}

// A head's output, exact but for keys and values, which are rounded first.
template <typename Round>
Doubles HeadOf(const AttendCase& test, int row, int head, Round round) {
  Doubles scores, out(test.head_dim);
  for (int j = 0; j < test.lens[row]; ++j) {
    double dot = 0.0;
    for (int i = 0; i < test.head_dim; ++i) {
      dot += test.Query(row, head, i) * round(*test.KeyAt(row, head, j, i));
    }
    scores.push_back(dot * test.scale());
  }
  const Doubles weights = Softmax(scores);
  for (int j = 0; j < test.lens[row]; ++j) {
    for (int i = 0; i < test.head_dim; ++i) {
      out[i] += weights[j] * round(test.KeyAt(row, head, j, i)[test.bundle_size()]);
    }
  }
  return out;
}

// Sums of squared errors: of a table in float16, and of keys and values rounded to bfloat16.
void CheckFp16Errors(const Ops& ops, int num_heads, int head_dim, double spread) {
  const AttendCase test(num_heads, head_dim, {70, 69, 70, 33, 5}, spread, NumberType::kFp16, ops);
  const Context context(Text("heads", num_heads, "width", head_dim, "spread", spread));
  const std::vector<float> out = RunAttend(ops, test, 0, test.rows);
  double ours = 0.0, theirs = 0.0;
  for (int row = 0; row < test.rows; ++row) {
    for (int head = 0; head < num_heads; ++head) {
      const Doubles exact = HeadOf(test, row, head, [](float x) { return x; });
      const Doubles rounded = HeadOf(test, row, head, RoundToBf16);
      for (int i = 0; i < head_dim; ++i) {
        const double got = out[row * test.width + test.layout.Column(head, i)];
        ours += std::pow(got - exact[i], 2);
        theirs += std::pow(rounded[i] - exact[i], 2);
      }
    }
  }
  // half of the error at most, though float16 has three bits more: sums are rounded, too
  CHECK_LE(ours, theirs / 4);
}

void CheckAttend(const Ops& ops, const AttendCase& test) {
  const Context context(Text(ops.name, "heads", test.num_heads, "width", test.head_dim, "rows",
                             test.rows, "first len", test.lens[0], NameOf(test.type)));
  const std::vector<float> out = RunAttend(ops, test, 0, test.rows);
  const std::vector<bool> is_used = test.UsedColumns();
  for (int row = 0; row < test.rows; ++row) {
    for (int head = 0; head < test.num_heads; ++head) CheckAttendHead(test, out, row, head);
    const float* got = &out[row * test.width];
    for (int i = 0; i < test.layout.width(); ++i) CHECK(is_used[i] || got[i] == 0.0f);
    for (size_t i = test.layout.width(); i < test.width; ++i) CHECK_EQ(got[i], kGuard);
    // to the bit what it is alone, so that plans do not depend on who works on which rows
    const auto alone = RunAttend(ops, test, row, row + 1);
    CHECK(std::equal(alone.begin(), alone.end(), &out[row * test.width]));
  }
}

void CheckTables(int num_heads, int head_dim, const std::vector<int32_t>& lens, double spread) {
  for (NumberType type : {NumberType::kFloat32, NumberType::kBf16, NumberType::kFp16}) {
    for (const Ops* ops : TestedOps()) {
      const AttendCase test(num_heads, head_dim, lens, spread, type, *ops);
      if (type != NumberType::kFp16 || test.layout.fp16) CheckAttend(*ops, test);
    }
  }
}

}  // namespace

TEST(AttendAllLengths) {
  for (int head_dim : {16, 32, 48, 64}) {
    for (int len = 1; len <= 70; ++len) CheckTables(1 + len % 5, head_dim, {len}, 1.0);
  }
}

TEST(AttendRowsOfDifferentLengths) {
  for (int head_dim : {5, 8, 16, 24, 32, 33, 48, 64, 80, 96, 128}) {
    std::vector<int32_t> lens = {1, 70, 2, 16, 17, 15, 70, 33, 4, 3, 8, 31, 32};
    for (int i = 0; i < 25; ++i) lens.push_back(40 + i % 3);  // as in a plan
    for (int num_heads : {2, 3, 8}) CheckTables(num_heads, head_dim, lens, 1.0);
  }
}

// Three strips a row: shared by a whole block, or by less of it than a strip, or not at all. Blocks
// of 8, of 3, of 2 and of 5 rows; all as long, and no path longer than there is room for scores, or
// not.
TEST(AttendInStrips) {
  struct Rows {
    int count;
    double least_shared;
    bool even;
  };
  for (NumberType type : {NumberType::kFloat32, NumberType::kBf16, NumberType::kFp16}) {
    for (const Ops* ops : TestedOps()) {
      for (int head_dim : {16, 32, 64, 128}) {
        for (int num_heads : {3, 4}) {
          const HeadLayout layout(num_heads, head_dim, *ops, type != NumberType::kFloat32);
          if (type == NumberType::kFp16 && !layout.fp16) continue;
          const int size = type == NumberType::kFloat32 ? 4 : 2;
          const int len = 3 * kStripBytes / (layout.stride * size);
          for (const Rows& rows :
               {Rows{3, 0.9, false}, Rows{10, 0.0, true}, Rows{13, 0.8, false}}) {
            std::vector<int32_t> lens;
            for (int i = 0; i < rows.count; ++i) lens.push_back(rows.even ? len : len + 5 * i % 7);
            CheckAttend(*ops,
                        AttendCase(num_heads, head_dim, lens, 1.0, type, *ops, rows.least_shared));
          }
        }
      }
    }
  }
}

// Scores in the hundreds: all but a few weights vanish, and none overflows.
TEST(AttendSharply) {
  for (int head_dim : {16, 32, 48, 64}) {
    for (int num_heads : {2, 4}) CheckTables(num_heads, head_dim, {1, 9, 40}, 12.0);
  }
}

TEST(AttendInFp16IsTwiceAsNearAsBf16) {
  for (const Ops* ops : TestedOps()) {
    if (!ops->fp16_keys) continue;
    for (double spread : {0.3, 1.0, 2.0, 6.0}) {
      for (int head_dim : {5, 16, 24, 32}) CheckFp16Errors(*ops, 4, head_dim, spread);
      CheckFp16Errors(*ops, 8, 32, spread);
    }
  }
}

// Scores, and sums of values, near the end of float16's range; equal weights are 1 each before they
// are normalised.
TEST(AttendToLargeNumbersInFp16) {
  for (const Ops* ops : TestedOps()) {
    if (!ops->fp16_keys) continue;
    AttendCase test(4, 32, {200, 200, 63}, 1.0, NumberType::kFp16, *ops);
    const auto fill = [&](float query, float key, float value) {
      std::fill(test.q.begin(), test.q.end(), query);
      for (size_t i = 0; i < test.kv.size(); ++i) {
        test.kv[i] = i / test.bundle_size() % 2 == 0 ? key : value;
      }
    };
    const auto check = [&](float value) {
      const std::vector<float> out = RunAttend(*ops, test, 0, test.rows);
      for (int row = 0; row < test.rows; ++row) {
        for (int i = 0; i < test.layout.width(); ++i) CHECK_EQ(out[row * test.width + i], value);
      }
    };
    fill(0.0f, 1.0f, 0x1p15f / kFp16Values);
    check(0x1p15f / kFp16Values);
    // one key's score is 2^15, the others' are half of that: its value alone counts
    fill(static_cast<float>(0x1p5 / test.scale()), 0x1p4f, 3.0f);
    for (int row = 0; row < test.rows; ++row) {
      for (int head = 0; head < 4; ++head) {
        for (int i = 0; i < 32; ++i) {
          const size_t at = test.KeyAt(row, head, 0, i) - test.kv.data();
          test.kv[at] = 0x1p5f;
          test.kv[at + test.bundle_size()] = -7.0f;
        }
      }
    }
    check(-7.0f);
  }
}

}  // namespace tt::test
