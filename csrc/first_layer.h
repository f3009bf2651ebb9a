// Keys, values and queries of the first layer, kept from pass to pass.
//
// They depend on a token and its position alone, not on the tokens before it, so a plan, whose
// windows all have the same few thousand placed tokens, computes most of them once.
#ifndef TT_FIRST_LAYER_H_
#define TT_FIRST_LAYER_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "aligned_buffer.h"
#include "model.h"

namespace tt {

class FirstLayer {
 public:
  // Room for rows of so many bytes in all.
  FirstLayer(const Model& model, size_t max_bytes);

  // Of a placed token (see Shape): keys, values, queries (3 attn_width), as the projection has
  // them; nullptr if they are not known.
  const float* Find(int64_t placed) const;
  // Keeps a copy, unless it is known by now or there is no room. Other threads may look and add at
  // the same time; a row that is found stays as it is until all are forgotten.
  void Add(int64_t placed, const float* row);
  // If there was no room lately: forgets all rows. Nobody else may be at it.
  void MakeRoom();

  size_t allocated_bytes() const {
    return rows_.size() * sizeof(float) + (mask_ + 1) * sizeof(Entry);
  }

 private:
  static constexpr int64_t kEmpty = -1;

  struct Entry {
    std::atomic<int64_t> placed{kEmpty};
    std::atomic<const float*> row{nullptr};  // once it is copied
  };

  const Entry* Lookup(int64_t placed) const;
  Entry& First(int64_t placed) const;
  Entry& Next(const Entry& entry) const;

  const size_t width_;
  const size_t capacity_;
  const size_t mask_;
  AlignedBuffer<float> rows_;  // (capacity, width)
  // More than twice as many, a power of two. What finds its entry taken goes to the next one.
  std::unique_ptr<Entry[]> entries_;
  std::atomic<size_t> num_taken_{0};  // of the rows; past the capacity: there was no room
};

}  // namespace tt

#endif  // TT_FIRST_LAYER_H_
