// Random models that plan in microseconds.
#ifndef TT_TESTS_SMALL_MODELS_H_
#define TT_TESTS_SMALL_MODELS_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "isa.h"
#include "model.h"
#include "random.h"

namespace tt::test {

// Normal numbers by name, drawn when first asked for; LayerNorms scale by about 1.
class RandomWeights : public WeightSource {
 public:
  explicit RandomWeights(uint64_t seed, double scale = 0.4) : seed_(seed), scale_(scale) {}

  // Nearly the same numbers, off by some `relative` part of themselves.
  void Perturb(double relative, uint64_t seed) {
    relative_ = relative;
    noise_ = Random(seed);
    values_.clear();
  }

  const float* Get(const std::string& name, size_t size) const override {
    std::vector<float>& values = values_[name];
    if (values.empty()) {
      uint64_t hash = seed_;
      for (char c : name) hash = hash * 1099511628211u + static_cast<unsigned char>(c);
      const bool is_gamma = name.find("ln") != std::string::npos && name.ends_with("weight");
      values = Random(hash).Normals(size, is_gamma ? 0.1 : scale_, is_gamma ? 1.0 : 0.0);
      if (relative_ == 0.0) return values.data();
      for (float& x : values) x *= static_cast<float>(1.0 + relative_ * noise_.Normal());
    }
    if (values.size() != size) throw std::invalid_argument(name + " is another shape's already");
    return values.data();
  }

 private:
  uint64_t seed_;
  double scale_, relative_ = 0.0;
  mutable Random noise_{0};
  mutable std::map<std::string, std::vector<float>> values_;
};

// Random weights, changed by `edit` of a name and its numbers.
class EditedWeights : public RandomWeights {
 public:
  using Edit = std::function<void(const std::string&, std::vector<float>&)>;
  explicit EditedWeights(Edit edit) : RandomWeights(0), edit_(std::move(edit)) {}

  const float* Get(const std::string& name, size_t size) const override {
    const float* values = RandomWeights::Get(name, size);
    std::vector<float>& edited = edited_[name];
    edited.assign(values, values + size);
    edit_(name, edited);
    return edited.data();
  }

 private:
  Edit edit_;
  mutable std::map<std::string, std::vector<float>> edited_;
};

// Head widths 8, 16, 48 (not a power of 2 of any vector), 64, 5, 32, and sizes that fill no vector;
// two bundles of heads, and one of the widest.
inline std::vector<Shape> SmallShapes() {
  const auto shape = [](int observation, int action, int vocab, int transitions, int layers,
                        int heads, int embed) {
    return Shape{.observation_dim = observation,
                 .action_dim = action,
                 .vocab_size = vocab,
                 .num_transitions = transitions,
                 .num_layers = layers,
                 .num_heads = heads,
                 .embed_dim = embed,
                 .goal_len = 0};
  };
  return {shape(3, 2, 8, 4, 2, 2, 16), shape(1, 1, 5, 3, 1, 2, 32), shape(2, 1, 40, 4, 2, 1, 48),
          shape(2, 2, 6, 3, 2, 1, 64), shape(2, 3, 9, 3, 3, 4, 20), shape(1, 1, 7, 3, 2, 8, 40),
          shape(1, 1, 6, 3, 1, 4, 104)};
}

inline Shape WithGoal(Shape shape) {
  shape.goal_len = shape.observation_dim;
  return shape;
}

// (goal_len + block_size): value tokens, which nobody attends to.
inline std::vector<uint8_t> HiddenValues(const Shape& shape) {
  std::vector<uint8_t> hidden(shape.goal_len + shape.block_size());
  for (int i = 0; i < shape.block_size(); ++i) {
    hidden[shape.goal_len + i] = i % shape.transition_dim() == shape.transition_dim() - 1;
  }
  return hidden;
}

inline std::shared_ptr<const Model> MakeModel(const Shape& shape, const Ops& ops, bool bf16 = false,
                                              uint64_t seed = 0, double scale = 0.4) {
  return std::make_shared<Model>(shape, RandomWeights(seed, scale), ops, bf16);
}

}  // namespace tt::test

#endif  // TT_TESTS_SMALL_MODELS_H_
