// AMX's tile registers in memory.
//
// Plain functions, as tests/native/ops_amx_in_memory.cc is compiled for an instruction set that the
// rest of the tests may lack.
#ifndef TT_TESTS_AMX_TILES_H_
#define TT_TESTS_AMX_TILES_H_

#include <stddef.h>

namespace tt::test::amx {

// What the instructions of these names do. A tile that is not configured, or a product of tiles
// that do not fit each other, is a failed check.
void LoadConfig(const void* config);
void Release();
void Zero(int tile);
void Load(int tile, const void* from, size_t stride);
void Store(int tile, void* to, size_t stride);
void DotBf16(int sum, int a, int b);

}  // namespace tt::test::amx

#endif  // TT_TESTS_AMX_TILES_H_
