// The tables of kernels that tests go through.
#ifndef TT_TESTS_TABLES_H_
#define TT_TESTS_TABLES_H_

#include <vector>

#include "ops.h"

namespace tt::test {

// Those that this machine runs, fastest first, and AMX's over tiles in memory where it has none.
// The last one is the scalar table.
const std::vector<const Ops*>& TestedOps();

}  // namespace tt::test

#endif  // TT_TESTS_TABLES_H_
