// One pool of threads for a planner; tasks are handed out by an atomic counter.
#ifndef TT_THREAD_POOL_H_
#define TT_THREAD_POOL_H_

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace tt {

// Where part i of num_parts begins if `count` things are shared out evenly; part num_parts: the
// end.
inline int BeginOfPart(int count, int i, int num_parts) {
  return static_cast<int>(static_cast<int64_t>(count) * i / num_parts);
}

class ThreadPool {
 public:
  // The calling thread is one of `num_threads`.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls f(task, thread) for every task in [0, num_tasks) and waits for all. f must not throw.
  template <typename F>
  void Run(int num_tasks, F&& f) {
    const auto call = [](void* g, int task, int thread) {
      (*static_cast<std::remove_reference_t<F>*>(g))(task, thread);
    };
    RunTasks(num_tasks, call, &f);
  }

 private:
  using Call = void (*)(void*, int task, int thread);

  void RunTasks(int num_tasks, Call call, void* f);
  void TakeTasks(int thread);
  void Work(int thread);
  void Stop();  // and wait for them

  Call call_ = nullptr;
  void* f_ = nullptr;
  int num_tasks_ = 0;
  alignas(64) std::atomic<int> next_task_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};  // one more for every Run
  alignas(64) std::atomic<int> busy_{0};             // workers still in this generation
  std::atomic<bool> stop_{false};
  bool looks_ = true;  // before a thread sleeps
  int owner_ = 0;      // process id: a forked child has no workers
  std::vector<std::thread> workers_;
};

}  // namespace tt

#endif  // TT_THREAD_POOL_H_
