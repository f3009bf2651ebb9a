#include "isa.h"

#include <fstream>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
// A dot product of pairs takes Intel's processors longer than the two multiply-adds it stands for:
// measured on a Xeon of model 207, half as many operations a second as in float32, and assumed of
// the others.
bool HasFastDots() { return HasAvx512Bf16() && !__builtin_cpu_is("intel"); }
bool HasAvx512Fp16() {
  constexpr unsigned kAvx512Fp16 = 1u << 23;  // of cpuid 7, 0, edx; older compilers have no name
  unsigned a = 0, b = 0, c = 0, d = 0;
  return HasAvx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAvx512Fp16) != 0;
}
bool HasNeon() { return false; }
#if defined(__linux__)
// Linux lends a process the tile registers when it asks; it asks for all its threads. Their signals
// then need larger stacks of their own, so it asks only if there is a table.
bool HasAmx() {
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // of cpuid 7, 0, edx
  constexpr int kRequestPermission = 0x1023, kTileData = 18;    // asm/prctl.h, of Linux 5.16
  unsigned a = 0, b = 0, c = 0, d = 0;
  return HasAvx512Bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16) != 0 &&
         (d & kAmxTile) != 0 && AmxOps(false) != nullptr &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool HasAmx() { return false; }
#endif
#else
bool HasAvx2() { return false; }
bool HasAvx512() { return false; }
bool HasAvx512Bf16() { return false; }
bool HasFastDots() { return false; }
bool HasAvx512Fp16() { return false; }
bool HasAmx() { return false; }
bool HasNeon() { return true; }  // its table exists on 64-bit Arm only
#endif

std::vector<const Ops*> FindAvailableOps() {
  std::vector<const Ops*> found;
  const auto add = [&found](bool has, const Ops* ops) {
    if (has && ops != nullptr) found.push_back(ops);
  };
  // this one is made when it is asked for, by instructions that other processors lack
  if (HasAmx()) add(true, AmxOps(HasAvx512Fp16()));
  add(HasFastDots(), Avx512Bf16Ops());
  add(HasAvx512Fp16(), Avx512Fp16Ops());
  add(HasAvx512(), Avx512Ops());
  add(HasAvx512Bf16() && !HasFastDots(), Avx512Bf16Ops());
  add(HasAvx2(), Avx2Ops());
  add(HasNeon(), NeonOps());
  add(true, ScalarOps());
  return found;
}

}  // namespace

const std::vector<const Ops*>& AvailableOps() {
  static const std::vector<const Ops*> found = FindAvailableOps();  // asking takes microseconds
  return found;
}

const Ops& FindOps(const std::string& name) {
  std::string names = "auto";
  for (const Ops* ops : AvailableOps()) {
    if (name == "auto" || name == ops->name) return *ops;
    names += std::string(", ") + ops->name;
  }
  throw std::invalid_argument("isa: expected one of " + names + ", got " + name);
}

// Linux's own file: sysconf adds up all of AMD's, of which a processor uses one.
size_t ThirdCacheBytes() {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
  size_t kilobytes = 0;  // "32768K"
  if (file >> kilobytes && kilobytes > 0) return kilobytes << 10;
  return size_t{32} << 20;
}

}  // namespace tt
