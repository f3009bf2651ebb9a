#include "tables.h"

#include <algorithm>
#include <string>

#include "isa.h"

namespace tt {
const Ops* AmxOpsInMemory();  // ops_amx_in_memory.cc
}  // namespace tt

namespace tt::test {
namespace {

std::vector<const Ops*> FindTestedOps() {
  std::vector<const Ops*> tables = AvailableOps();
  const auto has = [&tables](const std::string& name) {
    return std::any_of(tables.begin(), tables.end(),
                       [&name](const Ops* ops) { return ops->name == name; });
  };
  const Ops* amx = AmxOpsInMemory();
  if (amx != nullptr && has("avx512_bf16") && !has("amx_bf16")) tables.insert(tables.begin(), amx);
  return tables;
}

}  // namespace

const std::vector<const Ops*>& TestedOps() {
  static const std::vector<const Ops*> tables = FindTestedOps();
  return tables;
}

}  // namespace tt::test
