#include "first_layer.h"

#include <algorithm>

namespace tt {

FirstLayer::FirstLayer(const Model& model, size_t max_bytes)
    : width_(3 * static_cast<size_t>(model.shape.attn_width())),
      capacity_(std::min<size_t>(model.shape.num_placed(), max_bytes / (width_ * sizeof(float)))),
      row_of_(model.shape.num_placed(), -1) {
  rows_.Reserve(capacity_ * width_);
}

void FirstLayer::Find(const std::vector<int32_t>& placed) {
  num_known_ += missing_.size();
  if (TryFind(placed)) return;
  Forget();
  if (TryFind(placed)) return;
  Forget();
  const size_t needed = std::min(row_of_.size(), placed.size());
  capacity_ = 0;  // should there be no memory
  rows_.Reserve(needed * width_);
  capacity_ = needed;
  TryFind(placed);
}

bool FirstLayer::TryFind(const std::vector<int32_t>& placed) {
  missing_.clear();
  found_.resize(placed.size());
  for (size_t i = 0; i < placed.size(); ++i) {
    int32_t& row = row_of_[placed[i]];
    if (row < 0) {
      if (num_known_ + missing_.size() == capacity_) return false;
      row = static_cast<int32_t>(num_known_ + missing_.size());
      missing_.push_back(static_cast<int32_t>(i));
    }
    found_[i] = static_cast<uint32_t>(row);
  }
  return true;
}

void FirstLayer::Forget() {
  std::fill(row_of_.begin(), row_of_.end(), -1);
  missing_.clear();
  num_known_ = 0;
}

}  // namespace tt
