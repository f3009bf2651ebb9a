#include "first_layer.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace tt {

FirstLayer::FirstLayer(const Model& model, size_t max_bytes)
    : width_(3 * static_cast<size_t>(model.shape.attn_width())),
      capacity_(std::min(static_cast<size_t>(model.shape.num_placed()),
                         max_bytes / (width_ * sizeof(float)))),
      mask_(std::bit_ceil(2 * capacity_ + 1) - 1),
      rows_(capacity_ * width_),
      entries_(new Entry[mask_ + 1]) {}

const float* FirstLayer::Find(int64_t placed) const {
  const Entry* entry = Lookup(placed);
  return entry != nullptr ? entry->row.load(std::memory_order_acquire) : nullptr;
}

// A row is taken before its entry, so that there are never more entries than rows.
void FirstLayer::Add(int64_t placed, const float* row) {
  if (num_taken_.load(std::memory_order_relaxed) > capacity_ || Lookup(placed)) return;
  const size_t taken = num_taken_.fetch_add(1, std::memory_order_relaxed);
  if (taken >= capacity_) return;
  for (Entry* entry = &First(placed);; entry = &Next(*entry)) {
    int64_t other = kEmpty;
    if (entry->placed.compare_exchange_strong(other, placed, std::memory_order_relaxed)) {
      float* kept = rows_.data() + taken * width_;
      std::memcpy(kept, row, width_ * sizeof(float));
      entry->row.store(kept, std::memory_order_release);
      return;
    }
    if (other == placed) return;  // another thread's, just now
  }
}

void FirstLayer::MakeRoom() {
  if (num_taken_.load(std::memory_order_relaxed) <= capacity_) return;
  for (size_t i = 0; i <= mask_; ++i) {
    entries_[i].placed.store(kEmpty, std::memory_order_relaxed);
    entries_[i].row.store(nullptr, std::memory_order_relaxed);
  }
  num_taken_.store(0, std::memory_order_relaxed);
}

// Its entry, whose row may still be on its way; or nullptr.
const FirstLayer::Entry* FirstLayer::Lookup(int64_t placed) const {
  for (const Entry* entry = &First(placed);; entry = &Next(*entry)) {
    const int64_t other = entry->placed.load(std::memory_order_relaxed);
    if (other == placed) return entry;
    if (other == kEmpty) return nullptr;
  }
}

FirstLayer::Entry& FirstLayer::First(int64_t placed) const {
  const uint64_t hash = static_cast<uint64_t>(placed) * 0x9E3779B97F4A7C15u;  // 2^64 / golden ratio
  return entries_[(hash >> 32) & mask_];
}

FirstLayer::Entry& FirstLayer::Next(const Entry& entry) const {
  return entries_[(&entry - entries_.get() + 1) & mask_];
}

}  // namespace tt
