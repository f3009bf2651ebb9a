// Runs the tests of the C++ core, or those whose names contain the argument.
#include <chrono>
#include <cstdio>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "check.h"

namespace tt::test {
namespace {

constexpr int kMostPrinted = 10;  // failures of one test

std::vector<std::pair<const char*, void (*)()>>& Tests() {
  static std::vector<std::pair<const char*, void (*)()>> tests;
  return tests;
}

std::vector<std::string>& Contexts() {
  static std::vector<std::string> contexts;
  return contexts;
}

int num_failures = 0;  // of the test that runs

// Whether every check held.
bool RunTest(const char* name, void (*function)()) {
  num_failures = 0;
  const auto begin = std::chrono::steady_clock::now();
  try {
    function();
  } catch (const std::exception& error) {
    Fail(name, 0, Text("exception:", error.what()));
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  const std::string verdict = num_failures == 0 ? "ok" : Text("FAILED,", num_failures, "checks");
  std::printf("%-46s %6.2f s  %s\n", name, seconds.count(), verdict.c_str());
  std::fflush(stdout);
  return num_failures == 0;
}

}  // namespace

Registration::Registration(const char* name, void (*function)()) {
  Tests().emplace_back(name, function);
}

Context::Context(std::string text) { Contexts().push_back(std::move(text)); }
Context::~Context() { Contexts().pop_back(); }

void Fail(const char* file, int line, const std::string& message) {
  if (++num_failures > kMostPrinted) return;
  std::printf("%s:%d: %s", file, line, message.c_str());
  for (const std::string& context : Contexts()) std::printf(" [%s]", context.c_str());
  std::printf("\n");
}

}  // namespace tt::test

int main(int argc, char** argv) {
  using namespace tt::test;
  const std::string part = argc > 1 ? argv[1] : "";
  int num_run = 0, num_failed = 0;
  for (const auto& [name, function] : Tests()) {
    if (std::string(name).find(part) == std::string::npos) continue;
    ++num_run;
    if (!RunTest(name, function)) ++num_failed;
  }
  std::printf("%d tests, %d failed\n", num_run, num_failed);
  return num_run > 0 && num_failed == 0 ? 0 : 1;
}
