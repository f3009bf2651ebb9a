// Attention of whole windows, forward and backward: what a call of the kernels needs.
#ifndef TT_TRAIN_ATTENTION_H_
#define TT_TRAIN_ATTENTION_H_

#include <cstdint>
#include <vector>

#include "aligned_buffer.h"
#include "ops.h"

namespace tt {

// Tokens of the longest window: the mask as floats is then 4 MB.
inline constexpr int kMaxTrainLen = 1024;

// One call, on one thread: nothing is kept from one to the next.
class TrainAttention {
 public:
  // args: all but bias, ends, scale and scratch. hidden (len, len): 1 where a query (row) must not
  // see a key (column). Throws std::invalid_argument if a query sees none.
  TrainAttention(const Ops& ops, const TrainAttendArgs& args, const uint8_t* hidden);

  void Forward() const { ops_.train_forward(args_); }
  void Backward() const { ops_.train_backward(args_); }

 private:
  void ReadMask(const uint8_t* hidden);

  const Ops& ops_;
  TrainAttendArgs args_;
  AlignedBuffer<float> bias_, scratch_;
  std::vector<int32_t> ends_;
};

}  // namespace tt

#endif  // TT_TRAIN_ATTENTION_H_
