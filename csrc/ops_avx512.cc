// Compiled for AVX-512 F, BW, DQ and VL.
#ifdef __AVX512F__
#include "ops_avx512.inc.h"
namespace {
constexpr char kName[] = "avx512";
}
#include "simd_ops.h"

namespace {
constexpr Ops kOps = MakeOps();
}

namespace tt {
const Ops* Avx512Ops() { return &kOps; }
}  // namespace tt
#else
#include "ops.h"

namespace tt {
const Ops* Avx512Ops() { return nullptr; }
}  // namespace tt
#endif
