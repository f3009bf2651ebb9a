// Keys, values and queries of the first layer, kept from pass to pass.
//
// They depend on a token and its position alone, not on the tokens before it, so a plan, whose
// windows all have the same few thousand placed tokens, computes most of them once.
#ifndef TT_FIRST_LAYER_H_
#define TT_FIRST_LAYER_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "aligned_buffer.h"
#include "model.h"

namespace tt {

class FirstLayer {
 public:
  // Room for rows of so many bytes in all; more if one pass has more placed tokens.
  FirstLayer(const Model& model, size_t max_bytes);

  // Finds the rows of these placed tokens (see Shape); of those that are not known yet it has only
  // the place. What was missing before has been computed since.
  void Find(const std::vector<int64_t>& placed);
  // Indices of `placed` whose rows are to be computed, and the first one's row; others follow it.
  const std::vector<int32_t>& missing() const { return missing_; }
  float* missing_rows() { return rows_.data() + num_known_ * width_; }
  // Of index i of `placed`: keys, values, queries (3 attn_width), as the projection has them.
  const float* operator[](size_t i) const { return rows_.data() + found_[i] * width_; }

  size_t allocated_bytes() const {
    return rows_.size() * sizeof(float) + table_.size() * sizeof(Entry);
  }

 private:
  struct Entry {
    int64_t placed;  // -1: empty
    uint32_t row;
  };

  // False if there are more missing rows than room.
  bool TryFind(const std::vector<int64_t>& placed);
  Entry& Lookup(int64_t placed);
  void Forget();
  void Reserve(size_t num_rows);

  const size_t width_;
  const size_t usual_rows_;
  size_t num_known_ = 0;  // of the rows, before the missing ones
  size_t capacity_ = 0;
  AlignedBuffer<float> rows_;  // (capacity, width)
  std::vector<Entry> table_;   // at least twice as many, a power of two; neighbours if taken
  std::vector<uint32_t> found_;
  std::vector<int32_t> missing_;
};

}  // namespace tt

#endif  // TT_FIRST_LAYER_H_
