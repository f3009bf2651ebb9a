#include "thread_pool.h"

#include <unistd.h>

#include <chrono>
#include <exception>
#include <stdexcept>
#include <string>

#include "clock.h"

namespace tt {
namespace {

// Longer than the pause between two regions of a plan, or than one thread usually waits for the
// rows of another.
constexpr std::chrono::microseconds kLookTime{300};
constexpr int kLooks = 64;  // between two looks at the clock

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until `done` holds of the value, first by looking, unless `look` is false, then asleep.
template <typename T, typename Done>
void WaitFor(std::atomic<T>& value, bool look, Done done) {
  for (auto end = Clock::now() + kLookTime; look; look = Clock::now() < end) {
    for (int i = 0; i < kLooks; ++i) {
      if (done(value.load(std::memory_order_acquire))) return;
      Pause();
    }
  }
  for (T seen = value.load(std::memory_order_acquire); !done(seen);
       seen = value.load(std::memory_order_acquire)) {
    value.wait(seen, std::memory_order_acquire);
  }
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) : owner_(getpid()) {
  // with more threads than processors, looking would take time from those that work
  const int num_processors = static_cast<int>(std::thread::hardware_concurrency());
  looks_ = num_threads <= num_processors;
  try {
    for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { Work(i); });
  } catch (const std::exception& error) {
    const size_t started = workers_.size() + 1;
    Stop();
    throw std::runtime_error("num_threads: expected as many as can be started, " +
                             std::to_string(started) + " now, got " + std::to_string(num_threads) +
                             ": " + error.what());
  }
}

ThreadPool::~ThreadPool() {
  if (getpid() != owner_) {  // these threads stayed in the parent, their names may be others' here
    new std::vector<std::thread>(std::move(workers_));  // nobody may join, detach or destroy them
    return;
  }
  Stop();
}

void ThreadPool::Stop() {
  stop_.store(true, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::RunTasks(int num_tasks, Call call, void* f) {
  if (num_tasks <= 1 || workers_.empty() || getpid() != owner_) {
    for (int task = 0; task < num_tasks; ++task) call(f, task, 0);
    return;
  }
  call_ = call;
  f_ = f;
  num_tasks_ = num_tasks;
  next_task_.store(0, std::memory_order_relaxed);
  busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  TakeTasks(0);
  WaitFor(busy_, looks_, [](int busy) { return busy == 0; });
}

void ThreadPool::TakeTasks(int thread) {
  for (int task; (task = next_task_.fetch_add(1, std::memory_order_relaxed)) < num_tasks_;) {
    call_(f_, task, thread);
  }
}

void ThreadPool::Work(int thread) {
  for (uint32_t seen = 0;; ++seen) {
    WaitFor(generation_, looks_, [seen](uint32_t now) { return now != seen; });
    if (stop_.load(std::memory_order_relaxed)) return;
    TakeTasks(thread);
    if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_one();
  }
}

}  // namespace tt
