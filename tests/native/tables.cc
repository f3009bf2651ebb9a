#include "tables.h"

#include <algorithm>
#include <string>

#include "isa.h"

namespace tt {
const Ops* AmxOpsInMemory(bool fp16);  // ops_amx_in_memory.cc
}  // namespace tt

namespace tt::test {
namespace {

std::vector<const Ops*> FindTestedOps() {
  std::vector<const Ops*> tables = AvailableOps();
  const auto has = [&tables](const std::string& name) {
    return std::any_of(tables.begin(), tables.end(),
                       [&name](const Ops* ops) { return ops->name == name; });
  };
  // as AmxOps, to be called on machines with AVX-512 only
  if (!has("avx512_bf16") || has("amx_bf16") || AmxOpsInMemory(false) == nullptr) return tables;
  tables.insert(tables.begin(), AmxOpsInMemory(false));
  if (has("avx512_fp16")) tables.insert(tables.begin(), AmxOpsInMemory(true));
  return tables;
}

}  // namespace

const std::vector<const Ops*>& TestedOps() {
  static const std::vector<const Ops*> tables = FindTestedOps();
  return tables;
}

}  // namespace tt::test
