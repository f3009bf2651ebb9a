// Attention of whole windows as plain loops: the definition, number by number. Included by
// ops_scalar.cc.
#include <cmath>

#include "bfloat16.h"
#include "ops.h"

namespace tt {
namespace {

// One head of one window, by token and number of the head.
struct ScalarHead {
  const TrainAttendArgs& args;
  int window, head;

  int dim() const { return args.head_dim; }
  size_t Index(int t) const {  // of all heads' tokens, window by window
    return (static_cast<size_t>(window) * args.num_heads + head) * args.len + t;
  }
  size_t InOut(int t, int i) const {
    return ((static_cast<size_t>(window) * args.len + t) * args.num_heads + head) * dim() + i;
  }
  // part: 0 query, 1 key, 2 value
  size_t InQkv(int part, int t, int i) const {
    const size_t token = static_cast<size_t>(window) * args.len + t;
    return ((token * 3 + part) * args.num_heads + head) * dim() + i;
  }
  float Qkv(int part, int t, int i) const {
    return ReadNumber(args.bf16, args.qkv, InQkv(part, t, i));
  }
  // Of the sum of kept values, before it is scaled.
  float OutGrad(int t, int i) const {
    return ReadNumber(args.bf16, args.out_grad, InOut(t, i)) * args.keep_scale;
  }
  float Keep(int query, int key) const {
    return args.keep == nullptr ? 1.0f : args.keep[Index(query) * args.len + key];
  }
  float Score(int query, int key) const {
    float dot = 0.0f;
    for (int i = 0; i < dim(); ++i) dot += Qkv(0, query, i) * Qkv(1, key, i);
    const size_t row = static_cast<size_t>(query) * RoundUp(args.len, kPad);
    return dot * args.scale + args.bias[row + key];
  }
  float Weight(int query, int key) const {
    const float* stats = args.stats + 2 * Index(query);
    return std::exp(Score(query, key) - stats[0]) * stats[1];
  }

  void Forward(int query) const {
    float* stats = args.stats + 2 * Index(query);
    const int end = args.ends[query];
    stats[0] = Score(query, 0);
    for (int key = 1; key < end; ++key) stats[0] = std::fmax(stats[0], Score(query, key));
    float sum = 0.0f;
    for (int key = 0; key < end; ++key) sum += std::exp(Score(query, key) - stats[0]);
    stats[1] = 1.0f / sum;
    for (int key = 0; key < end; ++key) {
      args.scratch[key] = Weight(query, key) * Keep(query, key) * args.keep_scale;
    }
    for (int i = 0; i < dim(); ++i) {
      float total = 0.0f;
      for (int key = 0; key < end; ++key) total += args.scratch[key] * Qkv(2, key, i);
      WriteNumber(args.bf16, total, args.out, InOut(query, i));
    }
  }

  // Adds to gradients (2, len, dim) of keys and values; row is room for (2, len).
  void Backward(int query, float* grads, float* row) const {
    float *weights = row, *score_grads = row + args.len;
    float dot = 0.0f;
    const int end = args.ends[query];
    for (int key = 0; key < end; ++key) {
      weights[key] = Weight(query, key);
      score_grads[key] = 0.0f;
      for (int i = 0; i < dim(); ++i) score_grads[key] += OutGrad(query, i) * Qkv(2, key, i);
      score_grads[key] *= Keep(query, key);
      dot += weights[key] * score_grads[key];
    }
    for (int key = 0; key < end; ++key) {
      score_grads[key] = weights[key] * (score_grads[key] - dot) * args.scale;
      for (int i = 0; i < dim(); ++i) {
        grads[key * dim() + i] += score_grads[key] * Qkv(0, query, i);
        grads[(args.len + key) * dim() + i] += weights[key] * Keep(query, key) * OutGrad(query, i);
      }
    }
    for (int i = 0; i < dim(); ++i) {
      float total = 0.0f;
      for (int key = 0; key < end; ++key) total += score_grads[key] * Qkv(1, key, i);
      WriteNumber(args.bf16, total, args.qkv_grad, InQkv(0, query, i));
    }
  }

  void BackwardAll() const {
    float* grads = args.scratch;
    const int size = args.len * dim();
    for (int i = 0; i < 2 * size; ++i) grads[i] = 0.0f;
    for (int query = 0; query < args.len; ++query) Backward(query, grads, grads + 2 * size);
    for (int t = 0; t < args.len; ++t) {
      for (int i = 0; i < dim(); ++i) {
        WriteNumber(args.bf16, grads[t * dim() + i], args.qkv_grad, InQkv(1, t, i));
        WriteNumber(args.bf16, grads[size + t * dim() + i], args.qkv_grad, InQkv(2, t, i));
      }
    }
  }
};

void TrainForward(const TrainAttendArgs& args) {
  for (int window = 0; window < args.num_windows; ++window) {
    for (int head = 0; head < args.num_heads; ++head) {
      for (int query = 0; query < args.len; ++query) {
        ScalarHead{args, window, head}.Forward(query);
      }
    }
  }
}

void TrainBackward(const TrainAttendArgs& args) {
  for (int window = 0; window < args.num_windows; ++window) {
    for (int head = 0; head < args.num_heads; ++head) {
      ScalarHead{args, window, head}.BackwardAll();
    }
  }
}

}  // namespace
}  // namespace tt
