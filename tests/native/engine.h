// A tree and a decoder over it, and what they compute for one sequence alone.
#ifndef TT_TESTS_ENGINE_H_
#define TT_TESTS_ENGINE_H_

#include <cstdint>
#include <vector>

#include "decoder.h"
#include "small_models.h"
#include "thread_pool.h"
#include "token_tree.h"

namespace tt::test {

struct Engine {
  Engine(const Model& model, const TreeLimits& limits, int num_threads,
         size_t first_layer_bytes = 1 << 20)
      : num_ids(model.shape.num_ids()),
        pool(num_threads),
        tree(model, HiddenValues(model.shape)),
        decoder(model, pool, first_layer_bytes) {
    tree.Reserve(limits);
    decoder.Reserve(tree.max_total_nodes(), model.shape.goal_len + limits.max_len);
  }

  // After a forward pass.
  std::vector<float> Logits(int context, int row) const {
    const float* logits = decoder.logits(tree.slot(context, row));
    return {logits, logits + num_ids};
  }

  int num_ids;
  ThreadPool pool;
  TokenTree tree;
  Decoder decoder;
};

// Nothing shared: every call encodes the window of one sequence. Of the first layer no more is kept
// than the last window needed.
class FreshEncoder {
 public:
  FreshEncoder(const Model& model, int max_len)
      : engine_(model,
                {.num_contexts = 1,
                 .max_rows = 1,
                 .max_len = max_len,
                 .max_tokens = max_len,
                 .max_nodes = model.shape.goal_len + max_len},
                1, 0) {}

  std::vector<float> Logits(const std::vector<int32_t>& goal, const std::vector<int32_t>& tokens) {
    engine_.tree.Begin({tokens}, goal);
    engine_.decoder.Forward(engine_.tree.MakePass());
    return engine_.Logits(0, 0);
  }

 private:
  Engine engine_;
};

}  // namespace tt::test

#endif  // TT_TESTS_ENGINE_H_
