#!/usr/bin/env bash
# The extension's CPU tests under the address and undefined-behaviour sanitizers, then its threads under the thread one.
#
#     bash scripts/sanitize.sh [folder]     # builds in a copy under the folder, out/sanitize by default; about 15 minutes
#
# Reports come from this package's own code: PyTorch, Python and OpenMP are not built with sanitizers, so leaks of theirs
# are not looked for and races inside them are left out. For kernels on a GPU, scripts/gpu.py runs NVIDIA's sanitizers
# over scripts/every_kernel.py.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$(command -v python)}
FOLDER=$(realpath -m "${1:-out/sanitize}")
failed=0

copy_and_build() {  # sanitizer
  rm -rf "$FOLDER/$1" && mkdir -p "$FOLDER/$1" && cp -r csrc dss_fast tests setup.py pyproject.toml README.md "$FOLDER/$1"
  cd "$FOLDER/$1" && rm -f dss_fast/_C*.so
  CFLAGS="-fsanitize=$1 -fno-omit-frame-pointer -g1 -O1" LDFLAGS="-fsanitize=$1" \
    "$PYTHON" setup.py build_ext --inplace >build.log 2>&1
  ls dss_fast/_C*.so >/dev/null || { tail -5 build.log; exit 1; }
}

run() {  # name, runtime library, tests...
  local name=$1 library
  library="$(gcc -print-file-name="$2") $(gcc -print-file-name=libstdc++.so)"
  shift 2
  rm -f "$FOLDER/$name".report*
  LD_PRELOAD=$library PYTHONPATH=$PWD timeout 1800 \
    setarch -R "$PYTHON" -m pytest -q -p no:cacheprovider "$@" >"$FOLDER/$name.log" 2>&1
  local code=$? reports
  # The sanitizers write to files of their own: pytest keeps what tests print.
  reports=$(cat "$FOLDER/$name".report* 2>/dev/null | grep -cE "runtime error:|ERROR: AddressSan|WARNING: ThreadSan")
  echo "$name: $(grep -E "passed|failed|error" "$FOLDER/$name.log" | tail -1), exit $code, $reports reports"
  [ "$code" = 0 ] && [ "$reports" = 0 ]
}

# The compiler and its subprocesses are not what is looked at.
SKIPPED="not compile and not inductor and not aot and not opcheck and not triton"
(
  copy_and_build address,undefined
  export OMP_NUM_THREADS=2 ASAN_OPTIONS=detect_leaks=0:protect_shadow_gap=0:log_path="$FOLDER/address.report"
  export UBSAN_OPTIONS=print_stacktrace=1:log_path="$FOLDER/address.report"
  run address libasan.so tests/step/test_step.py tests/unroll -k "$SKIPPED"
) || failed=1
(
  copy_and_build thread
  printf 'called_from_lib:%s\n' libtorch_cpu.so libtorch_python.so libgomp libc10.so >tsan.supp
  export TSAN_OPTIONS="suppressions=$PWD/tsan.supp ignore_noninstrumented_modules=1 log_path=$FOLDER/thread.report"
  # One OpenMP thread: the sanitizer does not see where OpenMP's threads wait for each other, and reports every loop.
  export OMP_NUM_THREADS=1
  run thread libtsan.so tests/test_serving.py -k "several_threads"
) || failed=1
exit $failed
