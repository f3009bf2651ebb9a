// Which instruction sets this machine has.
#ifndef TT_ISA_H_
#define TT_ISA_H_

#include <string>
#include <vector>

#include "ops.h"

namespace tt {

// What was compiled and runs here, fastest first; the last one is "scalar".
const std::vector<const Ops*>& AvailableOps();

// The table of that name, the fastest for "auto"; throws std::invalid_argument if there is none.
const Ops& FindOps(const std::string& name);

}  // namespace tt

#endif  // TT_ISA_H_
