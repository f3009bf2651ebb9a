// Kernels of training for Python: arrays checked, then one call.
#include <pybind11/stl.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "aligned_buffer.h"
#include "binding_checks.h"
#include "isa.h"
#include "python_lock.h"
#include "train_attention.h"

namespace tt {
namespace {

using Lengths = std::vector<py::ssize_t>;

std::string TypeText(const py::array& x) { return py::str(x.dtype()).cast<std::string>(); }

// Numbers, refused if they are others than said, as an array would be copied to convert it.
template <typename... T>
void Require(const char* name, const py::array& x, const char* types, const Lengths& shape) {
  if (!(py::isinstance<py::array_t<T>>(x) || ...)) Refuse(name, types, TypeText(x));
  if (Lengths(x.shape(), x.shape() + x.ndim()) != shape) {
    Refuse(name, "shape " + py::str(py::tuple(py::cast(shape))).cast<std::string>(), ShapeText(x));
  }
  if (!(x.flags() & py::array::c_style)) Refuse(name, "contiguous numbers", "strides");
}

// numpy has no bfloat16: its bits come as int16.
constexpr char kNumbers[] = "float32 or (bfloat16's bits) int16";

// Numbers of the type of another array.
void RequireLike(const char* name, const py::array& x, const Lengths& shape, const char* other_name,
                 const py::array& other) {
  Require<float, int16_t>(name, x, kNumbers, shape);
  if (!x.dtype().equal(other.dtype())) {
    Refuse(name, "the type of " + std::string(other_name) + ", " + TypeText(other), TypeText(x));
  }
}

// ---- attention ----

// What forward and backward have in common, checked.
struct Call {
  TrainAttendArgs args{};
  Lengths out_shape, stats_shape;

  Call(const py::array& qkv, const py::array& hidden, const std::optional<py::array>& keep,
       float keep_scale) {
    if (qkv.ndim() != 5 || qkv.shape(2) != 3) {
      Refuse("qkv", "shape (windows, tokens, 3, heads, head_dim)", ShapeText(qkv));
    }
    const py::ssize_t windows = InRange<py::ssize_t>("windows", qkv.shape(0), 1, 1 << 20);
    const py::ssize_t len = InRange<py::ssize_t>("tokens", qkv.shape(1), 1, kMaxTrainLen);
    const py::ssize_t heads = InRange<py::ssize_t>("heads", qkv.shape(3), 1, 1 << 10);
    const py::ssize_t dim = InRange<py::ssize_t>("head_dim", qkv.shape(4), 1, kMaxTrainHeadDim);
    Require<float, int16_t>("qkv", qkv, kNumbers, {windows, len, 3, heads, dim});
    Require<bool, uint8_t>("hidden", hidden, "bool or uint8", {len, len});
    if (keep) Require<uint8_t>("keep", *keep, "uint8", {windows * heads, len, len});
    args.num_windows = static_cast<int>(windows);
    args.len = static_cast<int>(len);
    args.num_heads = static_cast<int>(heads);
    args.head_dim = static_cast<int>(dim);
    args.bf16 = py::isinstance<py::array_t<int16_t>>(qkv);
    args.qkv = qkv.data();
    args.keep = keep ? static_cast<const uint8_t*>(keep->data()) : nullptr;
    args.keep_scale = keep_scale;
    out_shape = {windows, len, heads, dim};
    stats_shape = {windows, heads, len, 2};
  }
};

std::pair<py::array, Floats> Forward(const py::array& qkv, const py::array& hidden,
                                     const std::optional<py::array>& keep, float keep_scale,
                                     const std::string& isa) {
  Call call(qkv, hidden, keep, keep_scale);
  const Ops& ops = FindOps(isa);
  py::array out(qkv.dtype(), call.out_shape);
  Floats stats(call.stats_shape);
  call.args.out = out.mutable_data();
  call.args.stats = stats.mutable_data();
  const uint8_t* mask = static_cast<const uint8_t*>(hidden.data());
  {
    const WithoutLock without_lock;  // passes run side by side, each on its own thread
    TrainAttention(ops, call.args, mask).Forward();
  }
  return {std::move(out), std::move(stats)};
}

py::array Backward(const py::array& qkv, const py::array& hidden,
                   const std::optional<py::array>& keep, float keep_scale, const py::array& stats,
                   const py::array& out_grad, const std::string& isa) {
  Call call(qkv, hidden, keep, keep_scale);
  const Ops& ops = FindOps(isa);
  Require<float>("stats", stats, "float32", call.stats_shape);
  RequireLike("out_grad", out_grad, call.out_shape, "qkv", qkv);
  py::array qkv_grad(qkv.dtype(), Lengths(qkv.shape(), qkv.shape() + qkv.ndim()));
  call.args.stats = const_cast<float*>(static_cast<const float*>(stats.data()));  // only read
  call.args.out_grad = out_grad.data();
  call.args.qkv_grad = qkv_grad.mutable_data();
  const uint8_t* mask = static_cast<const uint8_t*>(hidden.data());
  {
    const WithoutLock without_lock;  // as above
    TrainAttention(ops, call.args, mask).Backward();
  }
  return qkv_grad;
}

// ---- GELU ----

py::array Gelu(const py::array& x, const std::optional<py::array>& out_grad,
               const std::string& isa) {
  const Lengths shape(x.shape(), x.shape() + x.ndim());
  Require<float, int16_t>("x", x, kNumbers, shape);
  if (out_grad) RequireLike("out_grad", *out_grad, shape, "x", x);
  const Ops& ops = FindOps(isa);
  py::array out(x.dtype(), shape);
  TrainGeluArgs args{};
  args.size = static_cast<size_t>(x.size());
  args.bf16 = py::isinstance<py::array_t<int16_t>>(x);
  args.x = x.data();
  args.out_grad = out_grad ? out_grad->data() : nullptr;
  args.out = out.mutable_data();
  {
    const WithoutLock without_lock;  // as above
    ops.train_gelu(args);
  }
  return out;
}

py::array GeluForward(const py::array& x, const std::string& isa) {
  return Gelu(x, std::nullopt, isa);
}

py::array GeluBackward(const py::array& x, const py::array& out_grad, const std::string& isa) {
  return Gelu(x, out_grad, isa);
}

// ---- dropout, residual, LayerNorm ----

// What forward and backward have in common, checked. x: x forward, the sum backward; y: y forward,
// the gradient of `normed` backward.
struct NormCall {
  TrainNormArgs args{};
  Lengths shape;

  NormCall(const char* x_name, const py::array& x, const char* y_name, const py::array& y,
           const std::optional<py::array>& keep, float keep_scale, const py::array& gamma) {
    if (x.ndim() != 2) Refuse(x_name, "shape (rows, width)", ShapeText(x));
    const py::ssize_t width = InRange<py::ssize_t>("width", x.shape(1), 1, 1 << 20);
    shape = {x.shape(0), width};
    Require<float>(x_name, x, "float32", shape);
    Require<float, int16_t>(y_name, y, kNumbers, shape);
    if (keep) Require<uint8_t>("keep", *keep, "uint8", shape);
    Require<float>("gamma", gamma, "float32", {width});
    args.num_rows = static_cast<size_t>(x.shape(0));
    args.width = static_cast<int>(width);
    args.bf16 = py::isinstance<py::array_t<int16_t>>(y);
    args.keep = keep ? static_cast<const uint8_t*>(keep->data()) : nullptr;
    args.keep_scale = keep_scale;
    args.gamma = static_cast<const float*>(gamma.data());
  }
};

std::tuple<Floats, py::array, Floats> Norm(const py::array& x, const py::array& y,
                                           const std::optional<py::array>& keep, float keep_scale,
                                           const py::array& gamma, const py::array& beta, float eps,
                                           const std::string& isa) {
  NormCall call("x", x, "y", y, keep, keep_scale, gamma);
  Require<float>("beta", beta, "float32", {call.shape[1]});
  const Ops& ops = FindOps(isa);
  Floats sum(call.shape), stats(Lengths{call.shape[0], 2});
  py::array normed(y.dtype(), call.shape);
  call.args.x = static_cast<const float*>(x.data());
  call.args.y = y.data();
  call.args.beta = static_cast<const float*>(beta.data());
  call.args.eps = eps;
  call.args.sum = sum.mutable_data();
  call.args.stats = stats.mutable_data();
  call.args.normed = normed.mutable_data();
  {
    const WithoutLock without_lock;  // as above
    ops.train_norm(call.args);
  }
  return {std::move(sum), std::move(normed), std::move(stats)};
}

std::tuple<Floats, py::array, Floats, Floats> NormGrad(const py::array& sum, const py::array& stats,
                                                       const std::optional<py::array>& keep,
                                                       float keep_scale, const py::array& gamma,
                                                       const py::array& sum_grad,
                                                       const py::array& normed_grad,
                                                       const std::string& isa) {
  NormCall call("sum", sum, "normed_grad", normed_grad, keep, keep_scale, gamma);
  Require<float>("stats", stats, "float32", {call.shape[0], 2});
  Require<float>("sum_grad", sum_grad, "float32", call.shape);
  const Ops& ops = FindOps(isa);
  Floats x_grad(call.shape), gamma_grad(call.shape[1]), beta_grad(call.shape[1]);
  py::array y_grad(normed_grad.dtype(), call.shape);
  AlignedBuffer<float> scratch(2 * static_cast<size_t>(RoundUp(call.args.width, kPad)));
  call.args.sum = const_cast<float*>(static_cast<const float*>(sum.data()));      // only read
  call.args.stats = const_cast<float*>(static_cast<const float*>(stats.data()));  // only read
  call.args.sum_grad = static_cast<const float*>(sum_grad.data());
  call.args.normed_grad = normed_grad.data();
  call.args.x_grad = x_grad.mutable_data();
  call.args.y_grad = y_grad.mutable_data();
  call.args.gamma_grad = gamma_grad.mutable_data();
  call.args.beta_grad = beta_grad.mutable_data();
  call.args.scratch = scratch.data();
  {
    const WithoutLock without_lock;  // as above
    ops.train_norm_grad(call.args);
  }
  return {std::move(x_grad), std::move(y_grad), std::move(gamma_grad), std::move(beta_grad)};
}

// ---- masks ----

py::array DrawMask(py::array state, uint64_t first_step, int first_kept, py::ssize_t size,
                   const std::string& isa) {
  Require<uint64_t>("state", state, "uint64", {3, kKeepLanes});
  if (!state.writeable()) Refuse("state", "an array to write to", "one that is read-only");
  InRange("size", size, py::ssize_t{0}, py::ssize_t{1} << 40);
  const Ops& ops = FindOps(isa);
  py::array_t<uint8_t> keep(size);
  KeepArgs args{};
  args.size = static_cast<size_t>(size);
  args.state = static_cast<uint64_t*>(state.mutable_data());
  args.first_step = first_step;
  args.first_kept = static_cast<int16_t>(InRange("first_kept", first_kept, -32768, 32767));
  args.keep = keep.mutable_data();
  {
    const WithoutLock without_lock;  // as above
    ops.draw_keep(args);
  }
  return keep;
}

}  // namespace

void BindTraining(py::module_& m) {
  using namespace py::literals;
  m.def("train_attention", &Forward, "qkv"_a, "hidden"_a, "keep"_a, "keep_scale"_a, "isa"_a);
  m.def("train_attention_grad", &Backward, "qkv"_a, "hidden"_a, "keep"_a, "keep_scale"_a, "stats"_a,
        "out_grad"_a, "isa"_a);
  m.def("train_gelu", &GeluForward, "x"_a, "isa"_a);
  m.def("train_gelu_grad", &GeluBackward, "x"_a, "out_grad"_a, "isa"_a);
  m.def("train_norm", &Norm, "x"_a, "y"_a, "keep"_a, "keep_scale"_a, "gamma"_a, "beta"_a, "eps"_a,
        "isa"_a);
  m.def("train_norm_grad", &NormGrad, "sum"_a, "stats"_a, "keep"_a, "keep_scale"_a, "gamma"_a,
        "sum_grad"_a, "normed_grad"_a, "isa"_a);
  m.def("draw_keep", &DrawMask, "state"_a, "first_step"_a, "first_kept"_a, "size"_a, "isa"_a);
  m.attr("MAX_TRAIN_LEN") = kMaxTrainLen;
  m.attr("MAX_TRAIN_HEAD_DIM") = kMaxTrainHeadDim;
}

}  // namespace tt
