// Attention of training for Python: arrays checked, then one call of the kernels.
#include <pybind11/stl.h>

#include <optional>
#include <utility>
#include <vector>

#include "binding_checks.h"
#include "isa.h"
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
    const py::gil_scoped_release no_gil;  // passes run side by side, each on its own thread
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
  Require<float, int16_t>("out_grad", out_grad, kNumbers, call.out_shape);
  if (!out_grad.dtype().equal(qkv.dtype())) {
    Refuse("out_grad", "the type of qkv, " + TypeText(qkv), TypeText(out_grad));
  }
  py::array qkv_grad(qkv.dtype(), Lengths(qkv.shape(), qkv.shape() + qkv.ndim()));
  call.args.stats = const_cast<float*>(static_cast<const float*>(stats.data()));  // only read
  call.args.out_grad = out_grad.data();
  call.args.qkv_grad = qkv_grad.mutable_data();
  const uint8_t* mask = static_cast<const uint8_t*>(hidden.data());
  {
    const py::gil_scoped_release no_gil;  // as above
    TrainAttention(ops, call.args, mask).Backward();
  }
  return qkv_grad;
}

}  // namespace

void BindTraining(py::module_& m) {
  using namespace py::literals;
  m.def("train_attention", &Forward, "qkv"_a, "hidden"_a, "keep"_a, "keep_scale"_a, "isa"_a);
  m.def("train_attention_grad", &Backward, "qkv"_a, "hidden"_a, "keep"_a, "keep_scale"_a, "stats"_a,
        "out_grad"_a, "isa"_a);
  m.attr("MAX_TRAIN_LEN") = kMaxTrainLen;
  m.attr("MAX_TRAIN_HEAD_DIM") = kMaxTrainHeadDim;
}

}  // namespace tt
