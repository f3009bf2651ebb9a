// Compiled for AVX-512 with its bfloat16 instructions.
#ifdef __AVX512BF16__
#include "ops_avx512.inc.h"
namespace {
constexpr char kName[] = "avx512_bf16";
}
#include "simd_ops.h"

namespace tt {
const Ops* Avx512Bf16Ops() { return &kSimdOps; }
}  // namespace tt
#else
#include "ops.h"

namespace tt {
const Ops* Avx512Bf16Ops() { return nullptr; }
}  // namespace tt
#endif
