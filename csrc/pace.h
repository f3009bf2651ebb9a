// How long passes take, for plans that must be made in time.
#ifndef TT_PACE_H_
#define TT_PACE_H_

#include <cmath>

namespace tt {

// Seconds of a node, with all that goes with it: a running mean, of which every pass is a tenth.
class Pace {
 public:
  // What comes may take somewhat longer than what was.
  static constexpr double kMargin = 1.25;

  // That so many nodes of so many passes took this long.
  void Learn(double seconds, double nodes, int num_passes) {
    const double weight = seconds_per_node_ > 0.0 ? 1.0 - std::pow(0.9, num_passes) : 1.0;
    seconds_per_node_ += weight * (seconds / nodes - seconds_per_node_);
  }

  // Seconds to allow for so many nodes; 0 as long as nothing has been learnt.
  double Cost(double nodes) const { return kMargin * seconds_per_node_ * nodes; }

 private:
  double seconds_per_node_ = 0.0;
};

}  // namespace tt

#endif  // TT_PACE_H_
