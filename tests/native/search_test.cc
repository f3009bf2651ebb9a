// Likelihood searches against the naive one.
#include "beam_search.h"
#include "check.h"
#include "isa.h"
#include "naive_search.h"
#include "small_models.h"
#include "tables.h"

namespace tt::test {
namespace {

SearchRequest MakeSearchRequest(const std::vector<int32_t>& context, int num_tokens,
                                int beam_width) {
  SearchRequest request;
  request.context = context;
  request.num_tokens = num_tokens;
  request.beam_width = beam_width;
  return request;
}

}  // namespace

TEST(SearchesEqualTheNaiveOnes) {
  for (const Ops* ops : TestedOps()) {
    for (bool with_goal : {false, true}) {
      for (bool truncated : {false, true}) {
        const Shape shape = with_goal ? WithGoal(SmallShapes()[0]) : SmallShapes()[1];
        const Context context(Text(ops->name, with_goal ? "goal" : "", truncated ? "k" : ""));
        const auto model = MakeModel(shape, *ops);
        SearchRequest request = MakeSearchRequest({1, 2, 3, 4, 0, 1, 2, 3, 4, 1, 2, 3, 2},
                                                  3 * shape.transition_dim(), 5);
        request.goal.assign(shape.goal_len, 2);
        if (truncated) request.truncation = {.top_k = 2, .cdf = 0.1f};
        const SearchResult want = NaiveSearch(*model, request);
        BeamSearch search(model, HiddenValues(shape), 2);
        const SearchResult got = search.Search(request);
        CHECK(got.tokens == want.tokens);
        CHECK(got.log_probs == want.log_probs);
      }
    }
  }
}

// Two candidates a token, and no more beams than those.
TEST(SearchesWithFewCandidates) {
  const Shape shape = SmallShapes()[1];
  const auto model = MakeModel(shape, *AvailableOps().front());
  BeamSearch search(model, HiddenValues(shape), 1);
  SearchRequest request = MakeSearchRequest({1}, 1, 100);
  request.truncation.top_k = 2;
  CHECK_EQ(search.Search(request).log_probs.size(), size_t{2});
  request.num_tokens = 2;
  CHECK_EQ(search.Search(request).log_probs.size(), size_t{4});
  request.truncation.top_k = 1;
  const SearchResult greedy = search.Search(request);
  CHECK_EQ(greedy.log_probs.size(), size_t{1});
  CHECK_EQ(greedy.log_probs[0], 0.0f);
}

}  // namespace tt::test
