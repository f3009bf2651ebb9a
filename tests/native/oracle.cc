#include "oracle.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>

namespace tt::test {
namespace {

// weight (out, in) of a PyTorch linear layer, bias (out) or nullptr.
Doubles Linear(const Doubles& x, const float* weight, const float* bias, size_t num_out) {
  Doubles out(num_out);
  for (size_t o = 0; o < num_out; ++o) {
    double sum = bias == nullptr ? 0.0 : bias[o];
    for (size_t i = 0; i < x.size(); ++i) sum += x[i] * weight[o * x.size() + i];
    out[o] = sum;
  }
  return out;
}

void Add(Doubles& to, const Doubles& from) {
  for (size_t i = 0; i < to.size(); ++i) to[i] += from[i];
}

class Transformer {
 public:
  Transformer(const Shape& shape, const WeightSource& weights, const std::vector<uint8_t>& hidden)
      : shape_(shape), weights_(weights), hidden_(hidden), width_(shape.embed_dim) {}

  Doubles Logits(const std::vector<int32_t>& goal, const std::vector<int32_t>& window) {
    Embed(goal, window);
    for (int layer = 0; layer < shape_.num_layers; ++layer) {
      Block("blocks." + std::to_string(layer) + ".");
    }
    const size_t ids = shape_.num_ids(), head = (window.size() - 1) % shape_.transition_dim();
    const float* heads = weights_.Get("head.weight", shape_.transition_dim() * ids * width_);
    return Linear(Norm("ln_f.", h_.back()), heads + head * ids * width_, nullptr, ids);
  }

 private:
  void Embed(const std::vector<int32_t>& goal, const std::vector<int32_t>& window) {
    const size_t vocab = shape_.vocab_size, dim = shape_.transition_dim();
    const float* table = weights_.Get("tok_emb.weight", (vocab * dim + 1) * width_);
    const float* positions =
        weights_.Get("pos_emb", (shape_.block_size() + shape_.goal_len) * width_);
    h_.clear();
    for (size_t i = 0; i < goal.size(); ++i) {
      const float* goals = weights_.Get("goal_emb.weight", vocab * shape_.goal_len * width_);
      const float* row = goals + (goal[i] + i * vocab) * width_;
      h_.emplace_back(row, row + width_);
    }
    for (size_t p = 0; p < window.size(); ++p) {
      const size_t token = window[p];
      const float* row = table + (token == vocab ? vocab * dim : token + p % dim * vocab) * width_;
      h_.emplace_back(row, row + width_);
      for (size_t i = 0; i < width_; ++i) h_.back()[i] += positions[p * width_ + i];
    }
  }

  void Block(const std::string& name) {
    std::vector<Doubles> q, k, v;
    for (const Doubles& h : h_) {
      const Doubles normed = Norm(name + "ln1.", h);
      q.push_back(Layer(name + "attn.query", normed, width_));
      k.push_back(Layer(name + "attn.key", normed, width_));
      v.push_back(Layer(name + "attn.value", normed, width_));
    }
    for (size_t i = 0; i < h_.size(); ++i) {
      Add(h_[i], Layer(name + "attn.proj", Attend(i, q[i], k, v), width_));
      Doubles up = Layer(name + "mlp.0", Norm(name + "ln2.", h_[i]), 4 * width_);
      for (double& x : up) x = Gelu(x);
      Add(h_[i], Layer(name + "mlp.2", up, width_));
    }
  }

  // Of position i over the visible ones up to it, all heads side by side.
  Doubles Attend(size_t i, const Doubles& q, const std::vector<Doubles>& k,
                 const std::vector<Doubles>& v) const {
    const size_t head_dim = shape_.head_dim();
    Doubles out(width_, 0.0);
    for (size_t first = 0; first < width_; first += head_dim) {
      Doubles scores;
      for (size_t j = 0; j <= i; ++j) {
        if (hidden_[j]) continue;
        double dot = 0.0;
        for (size_t c = first; c < first + head_dim; ++c) dot += q[c] * k[j][c];
        scores.push_back(dot / std::sqrt(static_cast<double>(head_dim)));
      }
      const Doubles weights = Softmax(scores);
      size_t seen = 0;
      for (size_t j = 0; j <= i; ++j) {
        if (hidden_[j]) continue;
        for (size_t c = first; c < first + head_dim; ++c) out[c] += weights[seen] * v[j][c];
        ++seen;
      }
    }
    return out;
  }

  Doubles Norm(const std::string& name, const Doubles& x) const {
    return LayerNorm(x, weights_.Get(name + "weight", width_), weights_.Get(name + "bias", width_));
  }

  Doubles Layer(const std::string& name, const Doubles& x, size_t num_out) const {
    return Linear(x, weights_.Get(name + ".weight", num_out * x.size()),
                  weights_.Get(name + ".bias", num_out), num_out);
  }

  const Shape& shape_;
  const WeightSource& weights_;
  const std::vector<uint8_t>& hidden_;
  const size_t width_;
  std::vector<Doubles> h_;  // (goal_len + window, width)
};

}  // namespace

const char* NameOf(NumberType type) {
  switch (type) {
    case NumberType::kFloat32:
      return "fp32";
    case NumberType::kBf16:
      return "bf16";
    case NumberType::kRounded:
      return "rounded";
    case NumberType::kFp16:
      return "fp16";
  }
  return "";
}

float RoundToBf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rest = bits & 0xffff, half = 0x8000;
  uint32_t upper = bits >> 16;
  if (rest > half || (rest == half && upper % 2 == 1)) ++upper;
  return std::bit_cast<float>(upper << 16);
}

double RoundToFp16(double x) {
  const double step = std::exp2(std::max(std::ilogb(x), -14) - 10);
  return std::nearbyint(x / step) * step;
}

double Gelu(double x) { return 0.5 * x * std::erfc(-x * 0.7071067811865476); }

Doubles Softmax(const Doubles& x) {
  const double max = *std::max_element(x.begin(), x.end());
  Doubles out;
  double sum = 0.0;
  for (double value : x) sum += out.emplace_back(std::exp(value - max));
  for (double& p : out) p /= sum;
  return out;
}

Doubles LayerNorm(const Doubles& x, const float* gamma, const float* beta) {
  const double count = static_cast<double>(x.size());
  double mean = 0.0, variance = 0.0;
  for (double value : x) mean += value / count;
  for (double value : x) variance += (value - mean) * (value - mean) / count;
  const double scale = 1.0 / std::sqrt(variance + 1e-5);
  Doubles out;
  for (size_t i = 0; i < x.size(); ++i) out.push_back((x[i] - mean) * scale * gamma[i] + beta[i]);
  return out;
}

Doubles WindowLogits(const Shape& shape, const WeightSource& weights,
                     const std::vector<uint8_t>& hidden, const std::vector<int32_t>& goal,
                     const std::vector<int32_t>& window) {
  return Transformer(shape, weights, hidden).Logits(goal, window);
}

}  // namespace tt::test
