// The clock that everything is timed with.
#ifndef TT_CLOCK_H_
#define TT_CLOCK_H_

#include <chrono>

namespace tt {

using Clock = std::chrono::steady_clock;

inline double SecondsSince(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

}  // namespace tt

#endif  // TT_CLOCK_H_
