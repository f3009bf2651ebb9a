// The kernels for Python: what tests compare and `tt-fast bench` measures.
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "aligned_buffer.h"
#include "binding_checks.h"
#include "clock.h"
#include "isa.h"
#include "model.h"
#include "ops.h"
#include "python_lock.h"
#include "thread_pool.h"

namespace tt {
namespace {

std::vector<std::string> IsaNames() {
  std::vector<std::string> names;
  for (const Ops* ops : AvailableOps()) names.push_back(ops->name);
  return names;
}

int Rows(const Floats& x) {
  if (x.ndim() != 2 || x.shape(0) < 1 || x.shape(1) < 1 || x.size() > (1 << 28)) {
    Refuse("x", "a matrix", "shape " + ShapeText(x));
  }
  return static_cast<int>(x.shape(0));
}

int Cols(const Floats& x) { return static_cast<int>(x.shape(1)); }

// (rows, cols) in rows of `padded` numbers, zero behind each.
AlignedBuffer<float> PadRows(const Floats& x, int padded) {
  AlignedBuffer<float> out;
  out.ReserveZeroed(static_cast<size_t>(x.shape(0)) * padded);
  for (py::ssize_t r = 0; r < x.shape(0); ++r) {
    std::copy_n(x.data(r, 0), x.shape(1), out.data() + r * padded);
  }
  return out;
}

Floats CutRows(const AlignedBuffer<float>& x, int rows, int cols, int padded) {
  Floats out({rows, cols});
  for (int r = 0; r < rows; ++r) {
    std::copy_n(x.data() + static_cast<size_t>(r) * padded, cols, out.mutable_data(r, 0));
  }
  return out;
}

double LargestNorm(const Floats& x) {
  double largest = 0.0;
  for (py::ssize_t r = 0; r < x.shape(0); ++r) {
    double squares = 0.0;
    for (py::ssize_t i = 0; i < x.shape(1); ++i) squares += double{x.at(r, i)} * x.at(r, i);
    largest = std::max(largest, std::sqrt(squares));
  }
  return largest;
}

Floats RunGemm(const Floats& x, const Floats& weight, const Floats& bias, const std::string& dtype,
               const std::string& isa) {
  const Ops& ops = FindOps(isa);
  const int rows = InRange("rows", Rows(x), 1, kMaxRows), k = Cols(x), n = Rows(weight);
  if (Cols(weight) != k) Refuse("weight", "(n, " + Text(k) + ")", ShapeText(weight));
  if (bias.ndim() != 1 || bias.shape(0) != n) Refuse("bias", Text(n) + " numbers", ShapeText(bias));
  const int padded_k = RoundUp(k, kPad), padded_n = RoundUp(n, kPad);
  const NumberType type = WeightType(ops, IsBf16(dtype));
  PackedMatrix packed(padded_k, padded_n, ops.panel_width, type);
  for (int col = 0; col < n; ++col) {
    for (int i = 0; i < k; ++i) packed.Set(i, col, weight.at(col, i));
    packed.SetBias(col, bias.at(col));
  }
  const AlignedBuffer<float> a = PadRows(x, padded_k);
  if (IsBf16(dtype) && ops.fp16_weights) packed.TryFp16(LargestNorm(x));
  AlignedBuffer<float> c(static_cast<size_t>(rows) * padded_n);
  AlignedBuffer<float> inputs(a.size());
  ops.prepare(a.data(), static_cast<size_t>(rows) * padded_k, packed.view().type, inputs.data());
  ops.gemm(packed.view(), padded_n, inputs.data(), padded_k, rows, c.data(), padded_n, false);
  return CutRows(c, rows, n, padded_n);
}

Floats RunGelu(const Floats& x, const std::string& isa) {
  const int rows = Rows(x), padded = RoundUp(Cols(x), kPad);
  AlignedBuffer<float> out = PadRows(x, padded);
  FindOps(isa).gelu(out.data(), static_cast<size_t>(rows) * padded, NumberType::kFloat32,
                    out.data());
  return CutRows(out, rows, Cols(x), padded);
}

Floats RunSoftmax(const Floats& x, const std::string& isa) {
  const Ops& ops = FindOps(isa);
  const int rows = Rows(x), padded = RoundUp(Cols(x), kPad);
  const AlignedBuffer<float> in = PadRows(x, padded);
  AlignedBuffer<float> out(in.size());
  for (size_t r = 0; r < static_cast<size_t>(rows); ++r)
    ops.softmax(in.data() + r * padded, Cols(x), out.data() + r * padded);
  return CutRows(out, rows, Cols(x), padded);
}

Floats RunLayerNorm(const Floats& x, const Floats& gamma, const Floats& beta,
                    const std::string& isa) {
  const Ops& ops = FindOps(isa);
  const int rows = Rows(x), padded = RoundUp(Cols(x), kPad);
  if (gamma.size() != Cols(x) || beta.size() != Cols(x)) {
    Refuse("gamma, beta", Text(Cols(x)) + " numbers", ShapeText(gamma) + ", " + ShapeText(beta));
  }
  const AlignedBuffer<float> in = PadRows(x, padded);
  AlignedBuffer<float> g, b, out(in.size());
  g.ReserveZeroed(padded);
  b.ReserveZeroed(padded);
  std::copy_n(gamma.data(), Cols(x), g.data());
  std::copy_n(beta.data(), Cols(x), b.data());
  ops.layer_norm(in.data(), rows, g.data(), b.data(), static_cast<int>(Cols(x)),
                 NumberType::kFloat32, out.data());
  return CutRows(out, rows, Cols(x), padded);
}

void RequireHeads(const Floats& q, const Floats& k, const Floats& v) {
  if (q.ndim() != 3 || q.shape(0) != 2) Refuse("q", "(2, heads, head_dim)", ShapeText(q));
  InRange<py::ssize_t>("heads", q.shape(1), 1, 1 << 10);
  InRange<py::ssize_t>("head_dim", q.shape(2), 1, 1 << 10);
  for (const Floats* x : {&k, &v}) {
    if (x->ndim() != 3 || x->shape(0) != k.shape(0) || x->shape(1) != q.shape(1) ||
        x->shape(2) != q.shape(2)) {
      Refuse("k, v", "(len, heads, head_dim) of q", ShapeText(*x));
    }
  }
  InRange<py::ssize_t>("len", k.shape(0), 1, 1 << 20);
}

// f(row, head, number of the head)
template <typename F>
void ForNumbers(const Floats& x, F&& f) {
  for (int r = 0; r < x.shape(0); ++r) {
    for (int h = 0; h < x.shape(1); ++h) {
      for (int i = 0; i < x.shape(2); ++i) f(r, h, i);
    }
  }
}

// Two queries (2, heads, head_dim) over keys and values (len, heads, head_dim), of which the second
// query sees all but the last `hidden` ones. The dtype is that of keys and values.
Floats RunAttend(const Floats& q, const Floats& k, const Floats& v, int hidden,
                 const std::string& dtype, const std::string& isa) {
  RequireHeads(q, k, v);
  const auto heads = static_cast<int>(q.shape(1)), dim = static_cast<int>(q.shape(2));
  const auto len = static_cast<int>(k.shape(0));
  InRange("hidden", hidden, 0, len - 1);
  const Ops& ops = FindOps(isa);
  const bool bf16 = IsBf16(dtype);
  const HeadLayout layout(heads, dim, ops, bf16);
  const size_t bundle_size = static_cast<size_t>(len) * layout.stride, width = layout.width();
  AlignedBuffer<float> kv, scores, query, out(2 * width);
  kv.ReserveZeroed(layout.num_bundles * 2 * bundle_size);
  scores.ReserveZeroed(size_t{kScoreRows} * layout.heads * RoundUp(len, kPad));
  query.ReserveZeroed(2 * width);
  // nodes in reverse order, so that a path is more than 0, 1, 2
  std::vector<uint32_t> path(len), fresh(2 * len);
  for (int j = 0; j < len; ++j) path[j] = static_cast<uint32_t>((len - 1 - j) * layout.stride);
  ForNumbers(k, [&](int j, int h, int i) {
    const int column = layout.Column(h, i), bundle = column / layout.stride;
    float* key = kv.data() + 2 * bundle * bundle_size + path[j] + column % layout.stride;
    key[0] = *k.data(j, h, i);
    key[bundle_size] = *v.data(j, h, i);
  });
  ForNumbers(
      q, [&](int r, int h, int i) { query[r * width + layout.Column(h, i)] = *q.data(r, h, i); });
  AlignedBuffer<uint16_t> rounded(bf16 ? kv.size() : 0);
  const NumberType rounded_type = layout.fp16 ? NumberType::kFp16 : NumberType::kBf16;
  if (bf16) ops.round(kv.data(), kv.size(), rounded_type, rounded.data());
  const uint32_t* paths[] = {path.data(), path.data()};
  const int32_t lens[] = {len, len - hidden}, shared[] = {0, len - hidden};
  ops.attend({.rows = 2,
              .q = query.data(),
              .q_stride = width,
              .kv = bf16 ? static_cast<const void*>(rounded.data()) : kv.data(),
              .type = bf16 ? rounded_type : NumberType::kFloat32,
              .bundle_size = bundle_size,
              .paths = paths,
              .lens = lens,
              .shared = shared,
              .num_bundles = layout.num_bundles,
              .bundle_heads = layout.heads,
              .bundle_stride = layout.stride,
              .scale = 1.0f / std::sqrt(static_cast<float>(dim)),
              .scores = scores.data(),
              .scores_size = scores.size() / kScoreRows,
              .fresh = fresh.data(),
              .out = out.data(),
              .out_stride = width});
  Floats result({2, heads, dim});
  ForNumbers(result, [&](int r, int h, int i) {
    *result.mutable_data(r, h, i) = out[r * width + layout.Column(h, i)];
  });
  return result;
}

// GFLOP/s of all threads together: of multiply-adds in registers, the ceiling of everything else.
double PeakGflops(const std::string& dtype, int num_threads, double seconds,
                  const std::string& isa) {
  const Ops& ops = FindOps(isa);
  const bool bf16 = IsBf16(dtype);
  ThreadPool pool(InRange("num_threads", num_threads, 1, 1024));
  InRange("seconds", seconds, 0.0, 60.0);
  const WithoutLock without_lock;  // nothing of Python is touched
  std::vector<double> rates(pool.num_threads());
  pool.Run(pool.num_threads(), [&](int task, int) {
    const auto begin = Clock::now();
    double flops = 0.0;
    do flops += ops.peak_loop(20000, bf16);
    while (SecondsSince(begin) < seconds);
    rates[task] = flops / SecondsSince(begin) * 1e-9;
  });
  double total = 0.0;
  for (double rate : rates) total += rate;
  return total;
}

}  // namespace

void BindKernels(py::module_& m) {
  using namespace py::literals;
  m.def("isas", &IsaNames);
  m.def("gemm", &RunGemm, "x"_a, "weight"_a, "bias"_a, "dtype"_a, "isa"_a);
  m.def("gelu", &RunGelu, "x"_a, "isa"_a);
  m.def("softmax", &RunSoftmax, "x"_a, "isa"_a);
  m.def("layer_norm", &RunLayerNorm, "x"_a, "gamma"_a, "beta"_a, "isa"_a);
  m.def("attend", &RunAttend, "q"_a, "k"_a, "v"_a, "hidden"_a, "dtype"_a, "isa"_a);
  m.def("peak_gflops", &PeakGflops, "dtype"_a, "num_threads"_a, "seconds"_a, "isa"_a);
}

}  // namespace tt
