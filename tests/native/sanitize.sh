#!/usr/bin/env bash
# The native tests under sanitizers: memory and undefined behaviour, then data races.
# Usage: tests/native/sanitize.sh [part of a test's name]. Compiler: CXX. A line per configuration;
# exits with 1 if one of them failed, after the output of what failed.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# $1: sanitizers, the rest: arguments of the tests
check() {
  local build=$work/$1
  cmake -S "$root" -B "$build" -DTT_PYTHON=OFF -DTT_TESTS=ON -DTT_SANITIZE="$1" \
    -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="-O1 -D_GLIBCXX_ASSERTIONS" &&
    cmake --build "$build" --parallel 2 --target native_tests &&
    "$build/native_tests" "${@:2}"
}

failed=0
for sanitizers in address,undefined thread; do
  begin=$SECONDS
  if check "$sanitizers" "$@" >"$work/log" 2>&1; then
    echo "$sanitizers: ok, $(tail -n 1 "$work/log"), $((SECONDS - begin)) s"
  else
    cat "$work/log"
    echo "$sanitizers: FAILED, $((SECONDS - begin)) s"
    failed=1
  fi
done
exit "$failed"
