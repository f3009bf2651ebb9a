// The interpreter's lock, given up and taken back.
//
// Up to Python 3.13 a thread that asks for the lock while the interpreter ends is ended itself, by
// unwinding its stack. Past a destructor this aborts the process, and objects of Python would lose
// references without the lock. Here such a thread sleeps until the process is gone, as Python
// itself has it from 3.14 on. (pybind11's guards have no such care.)
#ifndef TT_PYTHON_LOCK_H_
#define TT_PYTHON_LOCK_H_

#include <pybind11/pybind11.h>

#include <chrono>
#include <exception>
#include <thread>

namespace tt {

[[noreturn]] inline void SleepForever() {
  for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
}

// While it lives, this thread does without the lock and touches nothing of Python.
class WithoutLock {
 public:
  WithoutLock() : state_(PyEval_SaveThread()) {}
  ~WithoutLock() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {  // the stack unwinds
      SleepForever();
    }
  }
  WithoutLock(const WithoutLock&) = delete;
  WithoutLock& operator=(const WithoutLock&) = delete;

 private:
  PyThreadState* const state_;
};

// Runs f with the lock, in a thread inside of a WithoutLock.
template <typename F>
void WithLock(F&& f) {
  PyThreadState* const state = PyGILState_GetThisThreadState();
  if (state == nullptr) SleepForever();  // the interpreter has ended
  try {
    PyEval_RestoreThread(state);
    f();
  } catch (const std::exception&) {
    PyEval_SaveThread();
    throw;
  } catch (...) {  // the stack unwinds, without the lock
    SleepForever();
  }
  PyEval_SaveThread();
}

// A call with the lock, inside of WithLock. Here, too, the stack may unwind, and no object of
// Python between this and the interpreter may lose a reference then.
inline pybind11::object CallOrSleep(const pybind11::object& function,
                                    const pybind11::object& argument) {
  PyObject* result = nullptr;
  try {
    result = PyObject_CallOneArg(function.ptr(), argument.ptr());
  } catch (...) {
    SleepForever();
  }
  if (result == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(result);
}

}  // namespace tt

#endif  // TT_PYTHON_LOCK_H_
