#include "isa.h"

#include <stdexcept>

namespace tt {
namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports also asks whether the operating system keeps the wide registers.
bool HasAvx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool HasAvx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool HasAvx512Bf16() { return HasAvx512() && __builtin_cpu_supports("avx512bf16"); }
bool HasNeon() { return false; }
#else
bool HasAvx2() { return false; }
bool HasAvx512() { return false; }
bool HasAvx512Bf16() { return false; }
bool HasNeon() { return true; }  // its table exists on 64-bit Arm only
#endif

}  // namespace

std::vector<const Ops*> AvailableOps() {
  std::vector<const Ops*> found;
  const auto add = [&found](bool has, const Ops* ops) {
    if (has && ops != nullptr) found.push_back(ops);
  };
  add(HasAvx512Bf16(), Avx512Bf16Ops());
  add(HasAvx512(), Avx512Ops());
  add(HasAvx2(), Avx2Ops());
  add(HasNeon(), NeonOps());
  add(true, ScalarOps());
  return found;
}

const Ops& FindOps(const std::string& name) {
  const std::vector<const Ops*> found = AvailableOps();
  std::string names = "auto";
  for (const Ops* ops : found) {
    if (name == "auto" || name == ops->name) return *ops;
    names += std::string(", ") + ops->name;
  }
  throw std::invalid_argument("isa: expected one of " + names + ", got " + name);
}

}  // namespace tt
