// csrc/ops_amx.cc over tile registers in memory, so that it is tested wherever its base runs.
#ifdef __AVX512BF16__
#include <immintrin.h>

#include "amx_tiles.h"

// The compiler's own, by the same names, need AMX.
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig ::tt::test::amx::LoadConfig
#define _tile_release ::tt::test::amx::Release
#define _tile_zero ::tt::test::amx::Zero
#define _tile_loadd ::tt::test::amx::Load
#define _tile_stored ::tt::test::amx::Store
#define _tile_dpbf16ps ::tt::test::amx::DotBf16
#ifndef __AMX_BF16__
#define __AMX_BF16__ 1
#endif
#endif

#define AmxOps AmxOpsInMemory
#include "ops_amx.cc"
