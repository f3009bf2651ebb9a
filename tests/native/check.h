// A test framework on one page: TEST registers a function, CHECK_* report and count, and the main
// function in native_tests.cc runs all tests.
#ifndef TT_TESTS_CHECK_H_
#define TT_TESTS_CHECK_H_

#include <sstream>
#include <string>

namespace tt::test {

struct Registration {
  Registration(const char* name, void (*function)());
};

// Counts a failed check, and prints it with the enclosing contexts.
void Fail(const char* file, int line, const std::string& message);

// What a loop is at, shown by checks that fail inside.
class Context {
 public:
  explicit Context(std::string text);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
};

// All arguments one after another, separated by spaces.
template <typename... Args>
std::string Text(const Args&... args) {
  std::ostringstream stream;
  stream.precision(9);
  ((stream << args << ' '), ...);
  std::string text = stream.str();
  if (!text.empty()) text.pop_back();
  return text;
}

inline void Check(bool holds, const char* what, const char* file, int line) {
  if (!holds) Fail(file, line, what);
}

template <typename A, typename B>
void CheckEqual(const A& a, const B& b, const char* what, const char* file, int line) {
  if (!(a == b)) Fail(file, line, Text(what, "but", a, "!=", b));
}

// Not a <= b, so that a NaN fails.
template <typename A, typename B>
void CheckAtMost(const A& a, const B& b, const char* what, const char* file, int line) {
  if (!(a <= b)) Fail(file, line, Text(what, "but", a, ">", b));
}

template <typename Exception, typename F>
void CheckThrows(F&& f, const char* what, const char* file, int line) {
  try {
    f();
  } catch (const Exception&) {
    return;
  } catch (...) {
    Fail(file, line, Text(what, "threw something else"));
    return;
  }
  Fail(file, line, Text(what, "threw nothing"));
}

}  // namespace tt::test

#define TEST(name)                                                             \
  static void name();                                                          \
  static const ::tt::test::Registration name##_is_registered_(#name, &(name)); \
  static void name()

#define CHECK(condition) ::tt::test::Check((condition), #condition, __FILE__, __LINE__)
#define CHECK_EQ(a, b) ::tt::test::CheckEqual((a), (b), #a " == " #b, __FILE__, __LINE__)
#define CHECK_LE(a, b) ::tt::test::CheckAtMost((a), (b), #a " <= " #b, __FILE__, __LINE__)
#define CHECK_THROWS(exception, ...) \
  ::tt::test::CheckThrows<exception>([&] { __VA_ARGS__; }, #__VA_ARGS__, __FILE__, __LINE__)

#endif  // TT_TESTS_CHECK_H_
