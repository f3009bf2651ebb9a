// Both searches line by line: a row is a whole sequence, and every distribution comes from encoding
// its window anew.
#ifndef TT_TESTS_NAIVE_SEARCH_H_
#define TT_TESTS_NAIVE_SEARCH_H_

#include <cstdint>
#include <vector>

#include "beam_search.h"

namespace tt::test {

// What BeamSearch::Plan returns for one context, trace included, but `beams`.
PlanResult NaivePlan(const Model& model, const PlanSettings& settings,
                     const std::vector<int32_t>& context, uint64_t seed, uint32_t plan_idx);

SearchResult NaiveSearch(const Model& model, const SearchRequest& request);

}  // namespace tt::test

#endif  // TT_TESTS_NAIVE_SEARCH_H_
