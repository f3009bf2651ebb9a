// What the files that know Python share: types of arrays, and errors that name the argument.
#ifndef TT_BINDING_CHECKS_H_
#define TT_BINDING_CHECKS_H_

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <sstream>
#include <string>

namespace tt {

namespace py = pybind11;

using Floats = py::array_t<float, py::array::c_style>;
using Doubles = py::array_t<double, py::array::c_style>;
using Tokens = py::array_t<int64_t, py::array::c_style>;

[[noreturn]] inline void Refuse(const std::string& name, const std::string& expected,
                                const std::string& got) {
  throw py::value_error(name + ": expected " + expected + ", got " + got);
}

template <typename T>
std::string Text(const T& value) {
  std::ostringstream stream;
  stream << value;
  return stream.str();
}

inline std::string ShapeText(const py::array& array) {
  return py::str(array.attr("shape")).cast<std::string>();
}

template <typename T>
T InRange(const char* name, T value, T low, T high) {
  if (value >= low && value <= high) return value;
  Refuse(name, "a number in [" + Text(low) + ", " + Text(high) + "]", Text(value));
}

inline bool IsBf16(const std::string& dtype) {
  if (dtype != "float32" && dtype != "bfloat16") Refuse("dtype", "float32 or bfloat16", dtype);
  return dtype == "bfloat16";
}

// Kernels for tests and for measuring (bind_kernels.cpp).
void BindKernels(py::module_& m);
// Kernels of training (bind_training.cpp).
void BindTraining(py::module_& m);

}  // namespace tt

#endif  // TT_BINDING_CHECKS_H_
