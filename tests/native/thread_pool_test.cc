#include "thread_pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <vector>

#include "check.h"

namespace tt::test {

TEST(PoolRunsEveryTaskOnce) {
  for (int num_threads : {1, 2, 7}) {
    ThreadPool pool(num_threads);
    CHECK_EQ(pool.num_threads(), num_threads);
    for (int num_tasks : {0, 1, 2, 3, 8, 1000}) {
      const Context context(Text(num_threads, "threads", num_tasks, "tasks"));
      std::vector<std::atomic<int>> runs(num_tasks), by_thread(num_threads);
      pool.Run(num_tasks, [&](int task, int thread) {
        ++runs[task];
        ++by_thread[thread];
      });
      int total = 0;
      for (const auto& count : runs) CHECK_EQ(count.load(), 1);
      for (const auto& count : by_thread) total += count;
      CHECK_EQ(total, num_tasks);
    }
  }
}

// What tasks wrote without atomics is there for the caller, and for the next run's tasks.
TEST(PoolOrdersItsRuns) {
  for (int num_threads : {2, 7}) {
    ThreadPool pool(num_threads);
    std::vector<int> values(5, 0), others(5, 0);
    const int num_runs = num_threads == 2 ? 5000 : 1000;
    for (int run = 0; run < num_runs; ++run) {
      pool.Run(5, [&](int task, int) { others[task] = values[(task + 1) % 5] + 1; });
      values.swap(others);
    }
    for (int value : values) CHECK_EQ(value, num_runs);
  }
}

TEST(PoolsComeAndGo) {
  std::atomic<int> total{0};
  for (int i = 0; i < 100; ++i) {
    ThreadPool used(3), unused(3);
    if (i % 2 == 0) used.Run(3, [&](int, int) { ++total; });
  }
  CHECK_EQ(total.load(), 150);
}

TEST(PoolInsidePool) {
  ThreadPool outer(2);
  std::atomic<int> total{0};
  outer.Run(4, [&](int, int) {
    ThreadPool inner(2);
    for (int i = 0; i < 50; ++i) inner.Run(3, [&](int, int) { ++total; });
  });
  CHECK_EQ(total.load(), 600);
}

// A child process has none of the threads; it works alone, and may end the pool beside one of its
// own.
TEST(PoolAfterFork) {
  auto owned = std::make_unique<ThreadPool>(3);
  ThreadPool& pool = *owned;
  std::atomic<int> total{0};
  pool.Run(10, [&](int, int) { ++total; });
  const pid_t child = fork();
  if (child == 0) {
    int sum = 0;
    pool.Run(10, [&](int task, int) { sum += task; });
    {
#if !defined(__SANITIZE_THREAD__)  // which lets a forked child start no threads
      const ThreadPool own(4);     // joins its threads at the end
#endif
      owned.reset();
    }
    _exit(sum == 45 ? 0 : 1);
  }
  int status = -1;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK_EQ(status, 0);
  pool.Run(10, [&](int, int) { ++total; });
  CHECK_EQ(total.load(), 20);
}

}  // namespace tt::test
