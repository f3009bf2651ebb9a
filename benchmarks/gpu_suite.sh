#!/usr/bin/env bash
# Everything that a GPU has to say about planner and training: tests, parity, benchmarks, in 8 minutes.
#
#   benchmarks/gpu_suite.sh [--interpret] [OUT]      OUT: $OUT, else ./gpu_results
#
# Nothing is installed. --interpret goes through the same lines on the processor, in tiny sizes.
# Exit status: 0 all passed, 1 a part failed, 2 none failed but the tests could not run.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
interpret=0
if [[ ${1:-} == --interpret ]]; then
    interpret=1
    shift
fi
out=${1:-${OUT:-gpu_results}}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python}
command -v "$python" > /dev/null || python=python3

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export GPU_PATH_FOLDER="$work/path"
PYTHONPATH=$("$python" "$root/benchmarks/gpu_path.py" "$GPU_PATH_FOLDER")
# the safe path, from Python 3.11 on: tt_fast of the working folder has no kernels
export PYTHONPATH PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1
# so that first plans compile, whatever was compiled here before
export TRITON_CACHE_DIR="$work/triton" TORCHINDUCTOR_CACHE_DIR="$work/inductor"
if ((interpret)); then
    export TRITON_INTERPRET=1
else
    unset TRITON_INTERPRET
fi

cd "$root"
failed=0 skipped=0
: > "$out/summary.txt"

say() {
    echo "$(date -u +%H:%M:%S) $*" | tee -a "$out/summary.txt"
}

# part NAME SECONDS COMMAND...: run it, keep its output, say how it ended
part() {
    local name=$1 seconds=$2 code=0 begin=$SECONDS
    shift 2
    timeout --kill-after=10 "$seconds" "$@" > "$out/$name.log" 2>&1 || code=$?
    local how=passed
    ((code == 0)) || how="FAILED (exit status $code)"
    ((code != 124 && code != 137)) || how="FAILED (out of time, $seconds s)"
    say "$name: $how, $((SECONDS - begin)) s; $(tail -n 1 "$out/$name.log")"
    ((code == 0))
}

bench() {
    # ends by itself a little before its time is up
    part "$1" "$2" "$python" "$root/benchmarks/bench_gpu.py" "$1" --out "$out" \
        --seconds "$(($2 * 3 / 4))"
}

test_shard() {
    GPU_SHARD="$1/$2" part "tests-$1" "$3" "$python" -m pytest -q -p gpu_shard -p no:cacheprovider \
        -W default "${@:5}" -k "$4"
}

wait_for() {
    local process
    for process in "$@"; do
        wait "$process" || failed=1
    done
}

"$python" - << 'END' || { say "environment: FAILED, tt_fast does not import"; exit 1; }
import tt_fast.kernels.segment, torch, triton
from tt_fast.planning.cuda import why_unavailable
print("torch", torch.__version__, "triton", triton.__version__)
reason = why_unavailable()
raise SystemExit(reason and f"no backend cuda: {reason}")
END

tests=(tests/test_cuda.py tests/test_golden_plans.py)
if [[ -d tests/kernels ]]; then
    tests+=(tests/kernels)
fi
tests+=(tests/test_head_loss.py)
chosen="cuda or kernel or head_loss"
shards=6 test_seconds=170 first_seconds=170
if ((interpret)); then
    # the rest is an ordinary run of the tests
    chosen="test_precision or test_changed_weights or (test_greedy_plans and cuda)"
    tests=(tests/test_cuda.py tests/test_golden_plans.py)
    shards=1 test_seconds=90 first_seconds=90
fi

# what is not timed, all at once
waiting=()
if "$python" -c "import hypothesis, pytest" 2> /dev/null; then
    for ((i = 0; i < shards; i++)); do
        test_shard "$i" "$shards" "$test_seconds" "$chosen" "${tests[@]}" &
        waiting+=($!)
    done
else
    say "tests: NOT RUN, pytest or hypothesis is missing"
    skipped=1
fi
if ((interpret)); then
    # there may be few processors
    wait_for "${waiting[@]}"
    waiting=()
fi
bench parity 150 &
waiting+=($!)
bench first "$first_seconds" &
waiting+=($!)
wait_for "${waiting[@]}"

# what is timed, one after another
bench ceilings 25 || failed=1
bench plans 115 || failed=1
part kernels 55 "$python" "$root/benchmarks/bench_gpu_kernels.py" --out "$out" --seconds 40 ||
    failed=1
bench decode 55 || failed=1
part training 40 "$python" "$root/benchmarks/bench_training.py" --device cuda --out "$out" \
    --seconds 30 || failed=1

part report 10 "$python" "$root/benchmarks/gpu_report.py" "$out" || failed=1
status=$((failed ? 1 : skipped ? 2 : 0))
say "exit status $status; results in $out"
exit "$status"
