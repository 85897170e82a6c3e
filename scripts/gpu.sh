#!/usr/bin/env bash
# Everything that needs a GPU in one call of under nine minutes: build, tests, bandwidth, loops, counters, sanitizers,
# memory, a search, and at the end a table with the goal beside each figure.
#
#     bash scripts/gpu.sh              # python3 (or PYTHON=...) has torch with CUDA, triton, pytest, pybind11, ninja
#     bash scripts/gpu.sh --dry-run    # every stage on the CPU at tiny sizes, to see that all of them run
#
# Rows name the commit; where there is no .git, COMMIT=$(git rev-parse --short HEAD), taken where there is one, says it.
# Under ${OUT:-out/gpu}: rows.jsonl, stages.tsv, table.txt, logs/, and all of it in gpu.tar.gz, made anew after each
# stage, so that a run cut off loses one stage. Stages have limits of their own, shortened when LIMIT seconds (530) near
# their end; a stage that fails does not stop the others. Copy rows.jsonl to benchmarks/results/gpu.jsonl to publish.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-out/gpu}
DRY=
[ "${1:-}" = --dry-run ] && DRY=1
LIMIT=${LIMIT:-${DRY:+3}530}
PATIENCE=${DRY:+9} # times the limits: a busy CPU must not look like a failing stage
ROWS=$OUT/rows.jsonl
rm -rf "$OUT/logs"
mkdir -p "$OUT/logs"
rm -f "$ROWS" "$OUT"/{stages.tsv,table.txt,gpu.tar.gz}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET

collect() {  # the table so far, and everything in one file
  "$PYTHON" benchmarks/gpu_table.py "$OUT" >"$OUT/table.txt" 2>&1
  local packed
  packed=$(mktemp) && tar czf "$packed" -C "$OUT" $(cd "$OUT" && ls | grep -v 'tar.gz$') && mv "$packed" "$OUT/gpu.tar.gz"
}

running= started= failed=0
trap '[ -n "$running" ] && kill $running 2>/dev/null; collect; cat "$OUT/table.txt"; exit 130' INT TERM

begin() {  # name, seconds at most, command...: starts a stage
  local name=$1 limit=$2 left=$((LIMIT - SECONDS))
  shift 2
  limit=$((limit * ${PATIENCE:-1}))
  [ "$limit" -gt "$left" ] && limit=$left
  [ "$limit" -lt 3 ] && limit=3 && set -- sh -c 'echo no time left; exit 75'
  timeout -k 5 "$limit" "$@" >"$OUT/logs/$name.log" 2>&1 &
  running="$running $!"
  started="$started $name:$!:$SECONDS"
}

end() {  # waits for all that were started
  local entry name pid since code
  for entry in $started; do
    IFS=: read -r name pid since <<<"$entry"
    wait "$pid"
    code=$?
    [ $code = 0 ] || failed=1
    printf '%s\t%s\t%s\n' "$name" "$([ $code = 0 ] && echo ok || echo "rc=$code")" $((SECONDS - since)) >>"$OUT/stages.tsv"
    tail -1 "$OUT/stages.tsv"
  done
  started= running=
  collect
}

stage() { begin "$@"; end; }

tool() { command -v "$1" || ls -d /usr/local/cuda*/bin/"$1" 2>/dev/null | head -1; }

if [ -n "$DRY" ]; then
  export CUDA_VISIBLE_DEVICES= DEVICE=cpu TORCHDYNAMO_DISABLE=1
  if [ -f tests/helpers/cuda_stub.py ] && { command -v "${CC:-gcc}" || command -v clang; } >/dev/null; then
    STUB=$(mktemp -d) # kernels are compiled and launched, on a libcuda that does nothing
    export STUB
  else
    export TRITON_INTERPRET=1
  fi
  tiny=--tiny
  types=fp32
  share="0 48"
  tests="tests/test_device.py"
else
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA device"; exit 1; }
  tiny=
  types="fp32 mixed bf16"
  share="0 4"
fi

# 1. The extension, and beside it every compilation that later stages would wait for.
if [ -n "$DRY" ]; then
  stage build 60 "$PYTHON" -c 'from dss_fast.step import extension; print(extension.load().__file__, "is there and not built again")'
else
  begin build 110 "$PYTHON" setup.py build_ext --inplace
  for k in 0 1 2 3 4 5 6 7; do begin "warm-$k" 110 env DSS_FAST_NO_EXTENSION=1 "$PYTHON" scripts/every_kernel.py --share $k 8; done
  for t in $types; do begin "warm-$t" 110 env DSS_FAST_NO_EXTENSION=1 "$PYTHON" benchmarks/bandwidth.py "$ROWS" --warm-up --types "$t"; done
  end
fi

# 2. Is it right? The kernels' tests in parallel where pytest can; those of graphs alone, they fill the memory.
if [ -n "$DRY" ]; then
  stage tests 60 "$PYTHON" -m pytest -q -k "triton or cuda or graph or device" tests/test_device.py
else
  many=$("$PYTHON" -c 'import xdist; print("-n 8")' 2>/dev/null)
  stage tests 100 "$PYTHON" -m pytest -q $many -k "triton or cuda" tests/step
  stage graphs 60 "$PYTHON" -m pytest -q tests/test_graph.py tests/test_device.py
fi

# 3. How fast is it?
stage bandwidth 130 "$PYTHON" benchmarks/bandwidth.py "$ROWS" --types $types --seconds 115 $tiny ${DRY:+--rounds 2 --ops forward}
stage loop 30 "$PYTHON" benchmarks/graph_loop.py "$ROWS" $tiny

# 4. Hardware counters of one forward per dtype.
profiler=$(tool ncu)
metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
metrics=$metrics,dram__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread
metrics=$metrics,sm__warps_active.avg.pct_of_peak_sustained_active
for t in $types; do
  if [ -n "$profiler" ] && [ -z "$DRY" ]; then
    stage "counters-$t" 25 "$profiler" --clock-control none --csv --metrics $metrics -k regex:_step_kernel \
      --launch-skip 1 --launch-count 1 "$PYTHON" scripts/every_kernel.py --forward "$t"
  else
    stage "counters-$t" 25 "$PYTHON" scripts/every_kernel.py --forward "$t" $tiny
    echo "no profiler (ncu): the kernel ran, nothing was counted" >>"$OUT/logs/counters-$t.log"
  fi
done

# 5. Does it touch what it should not? The caching allocator would hide overruns between tensors of one block.
sanitizer=$(tool compute-sanitizer)
if [ -n "$sanitizer" ] && [ -z "$DRY" ]; then
  for t in memcheck racecheck synccheck initcheck; do
    begin "$t" 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$t" --error-exitcode 9 \
      "$PYTHON" scripts/every_kernel.py --share $share
  done
  end
else
  stage sanitizers 60 "$PYTHON" scripts/every_kernel.py --share $share
  echo "no compute-sanitizer: the kernels ran, nothing was checked" >>"$OUT/logs/sanitizers.log"
fi

# 6. Whole uses.
stage unroll 40 "$PYTHON" benchmarks/unroll_memory.py "$ROWS" $tiny
stage search 60 "$PYTHON" benchmarks/search_time.py "$ROWS" $tiny

# 7. With the time left.
left=$((LIMIT - SECONDS - 10))
stage gradients "$left" "$PYTHON" benchmarks/bandwidth.py "$ROWS" --ops gradient --seconds $((left - 25)) \
  --types $types $tiny ${DRY:+--rounds 2}

[ -z "$DRY" ] && nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
[ -n "$DRY" ] && echo "a dry run on the CPU: nothing below is a measurement of a GPU"
echo
cat "$OUT/table.txt"
exit $failed
