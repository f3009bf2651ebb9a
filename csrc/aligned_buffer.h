// Memory aligned to a cache line, allocated ahead of use.
#ifndef TT_ALIGNED_BUFFER_H_
#define TT_ALIGNED_BUFFER_H_

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

namespace tt {

template <typename T>
class AlignedBuffer {
 public:
  static constexpr size_t kAlignment = 64;
  static constexpr size_t kHugePage = size_t{2} << 20;

  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t size) { Reserve(size); }

  // At least `size` elements. Growing loses the contents and zeroes nothing: pages that are never
  // touched cost no memory.
  void Reserve(size_t size) {
    if (size <= size_) return;
    if (size > std::numeric_limits<size_t>::max() / sizeof(T) - kHugePage) throw std::bad_alloc();
    data_.reset();
    size_ = 0;
    const size_t alignment = size * sizeof(T) < kHugePage ? kAlignment : kHugePage;
    const size_t bytes = (size * sizeof(T) + alignment - 1) / alignment * alignment;
    data_.reset(static_cast<T*>(std::aligned_alloc(alignment, bytes)));
    if (!data_) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    // keys and values are read all over the place: fewer pages, fewer misses of the TLB
    if (alignment == kHugePage) madvise(data_.get(), bytes, MADV_HUGEPAGE);
#endif
    size_ = size;
  }

  // The same, every element zero if memory was allocated.
  void ReserveZeroed(size_t size) {
    if (size <= size_) return;
    Reserve(size);
    for (size_t i = 0; i < size; ++i) data_[i] = T{};
  }

  size_t size() const { return size_; }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<T[], Free> data_;
  size_t size_ = 0;
};

}  // namespace tt

#endif  // TT_ALIGNED_BUFFER_H_
