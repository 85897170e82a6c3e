#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: build, tests, sanitizers, benchmarks, a short table.
#
#     bash scripts/gpu.sh            # uses the Python on PATH (or PYTHON=...), which has torch with CUDA and triton
#
# Rows are appended to benchmarks/results/; each stage has its own limit and a failing one does not stop the next.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
LOGS=${LOGS:-out/gpu}
mkdir -p "$LOGS"
unset TRITON_INTERPRET
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
declare -a REPORT=()

stage() {  # name, seconds, command...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$LOGS/$name.log" 2>&1
  local code=$?
  REPORT+=("$(printf '%-12s %-8s %4d s  %s' "$name" "$([ $code = 0 ] && echo ok || echo "rc=$code")" $((SECONDS - start)) \
    "$(grep -E '(passed|failed|error|ERROR SUMMARY)' "$LOGS/$name.log" | tail -1 | cut -c1-90)")")
}

"$PYTHON" - <<'PY' || { echo "no CUDA device: nothing to do"; exit 1; }
import sys, torch
sys.exit(not torch.cuda.is_available())
PY

stage build 120 "$PYTHON" setup.py build_ext --inplace
stage tests 150 "$PYTHON" -m pytest -q tests/step tests/test_serving.py tests/test_graph.py
SANITIZER=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
if [ -n "$SANITIZER" ]; then
  # The caching allocator hides overruns between tensors of one block.
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$tool" 75 "$SANITIZER" --tool "$tool" --error-exitcode 9 \
      "$PYTHON" scripts/sanitize.py
  done
else
  REPORT+=("sanitizers   absent   no compute-sanitizer on PATH or under /usr/local/cuda")
fi
stage benchmarks $((580 - SECONDS)) "$PYTHON" -m pytest -q -s benchmarks/bench_step.py --benchmark

"$PYTHON" benchmarks/tables.py >"$LOGS/tables.md" 2>/dev/null
tail -40 "$LOGS/benchmarks.log"
echo
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
"$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
printf '%s\n' "${REPORT[@]}"
