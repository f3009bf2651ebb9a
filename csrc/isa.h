// Which instruction sets this machine has, and how large its last cache is.
#ifndef TT_ISA_H_
#define TT_ISA_H_

#include <cstddef>
#include <string>
#include <vector>

#include "ops.h"

namespace tt {

// What was compiled and runs here, fastest first; the last one is "scalar".
const std::vector<const Ops*>& AvailableOps();

// The table of that name, the fastest for "auto"; throws std::invalid_argument if there is none.
const Ops& FindOps(const std::string& name);

// Of the third cache that the first processor uses, shared by several; a usual size where the
// system does not tell.
size_t ThirdCacheBytes();

}  // namespace tt

#endif  // TT_ISA_H_
