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

// Nothing kept, nothing shared: every call encodes the window of one sequence.
class FreshEncoder {
 public:
  FreshEncoder(const Model& model, int max_len)
      : model_(model),
        limits_{.num_contexts = 1,
                .max_rows = 1,
                .max_len = max_len,
                .max_tokens = max_len,
                .max_nodes = model.shape.goal_len + max_len} {}

  std::vector<float> Logits(const std::vector<int32_t>& goal,
                            const std::vector<int32_t>& tokens) const {
    Engine engine(model_, limits_, 1);
    engine.tree.Begin({tokens}, goal);
    engine.decoder.Forward(engine.tree.MakePass());
    return engine.Logits(0, 0);
  }

 private:
  const Model& model_;
  const TreeLimits limits_;
};

}  // namespace tt::test

#endif  // TT_TESTS_ENGINE_H_
