#include "first_layer.h"

#include <algorithm>

namespace tt {

FirstLayer::FirstLayer(const Model& model, size_t max_bytes)
    : width_(3 * static_cast<size_t>(model.shape.attn_width())),
      usual_rows_(std::min(static_cast<size_t>(model.shape.num_placed()),
                           max_bytes / (width_ * sizeof(float)))) {
  Reserve(usual_rows_);
}

void FirstLayer::Find(const std::vector<int64_t>& placed) {
  num_known_ += missing_.size();
  missing_.clear();
  missing_.reserve(placed.size());
  found_.resize(placed.size());
  while (!TryFind(placed)) {
    const bool was_empty = num_known_ == 0;
    Forget();
    if (was_empty) Reserve(std::max(usual_rows_, 2 * capacity_ + 1));
  }
}

bool FirstLayer::TryFind(const std::vector<int64_t>& placed) {
  for (size_t i = 0; i < placed.size(); ++i) {
    if (capacity_ == 0) return false;
    Entry& entry = Lookup(placed[i]);
    if (entry.placed < 0) {
      const size_t row = num_known_ + missing_.size();
      if (row == capacity_) return false;
      entry = {placed[i], static_cast<uint32_t>(row)};
      missing_.push_back(static_cast<int32_t>(i));
    }
    found_[i] = entry.row;
  }
  return true;
}

// Its entry, or the empty one where it belongs.
FirstLayer::Entry& FirstLayer::Lookup(int64_t placed) {
  const size_t mask = table_.size() - 1;
  const uint64_t hash = static_cast<uint64_t>(placed) * 0x9E3779B97F4A7C15u;  // 2^64 / golden ratio
  for (size_t i = hash >> 32;; ++i) {
    Entry& entry = table_[i & mask];
    if (entry.placed < 0 || entry.placed == placed) return entry;
  }
}

void FirstLayer::Forget() {
  std::fill(table_.begin(), table_.end(), Entry{-1, 0});
  missing_.clear();
  num_known_ = 0;
}

// Of an empty one.
void FirstLayer::Reserve(size_t num_rows) {
  capacity_ = 0;  // should there be no memory
  size_t size = 1;
  while (size < 2 * num_rows) size *= 2;
  table_.assign(size, Entry{-1, 0});
  rows_.Reserve(num_rows * width_);
  capacity_ = num_rows;
}

}  // namespace tt
