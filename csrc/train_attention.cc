#include "train_attention.h"

#include <cmath>
#include <stdexcept>
#include <string>

namespace tt {

TrainAttention::TrainAttention(const Ops& ops, const TrainAttendArgs& args, const uint8_t* hidden)
    : ops_(ops),
      args_(args),
      bias_(static_cast<size_t>(args.len) * RoundUp(args.len, kPad)),
      scratch_(TrainScratchSize(args.len, args.head_dim)),
      ends_(args.len) {
  ReadMask(hidden);
  args_.bias = bias_.data();
  args_.ends = ends_.data();
  args_.scale = 1.0f / std::sqrt(static_cast<float>(args.head_dim));
  args_.scratch = scratch_.data();
}

void TrainAttention::ReadMask(const uint8_t* hidden) {
  const int len = args_.len, padded = RoundUp(len, kPad);
  for (int query = 0; query < len; ++query) {
    const uint8_t* row = hidden + static_cast<size_t>(query) * len;
    float* bias = bias_.data() + static_cast<size_t>(query) * padded;
    for (int key = 0; key < len; ++key) bias[key] = row[key] != 0 ? kHidden : 0.0f;
    for (int key = len; key < padded; ++key) bias[key] = kHidden;
    int end = len;
    while (end > 0 && row[end - 1] != 0) --end;
    if (end == 0) {
      throw std::invalid_argument("hidden: expected a key in sight of every query, got none of " +
                                  std::to_string(query));
    }
    ends_[query] = end;
  }
}

}  // namespace tt
