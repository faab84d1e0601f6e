#!/usr/bin/env bash
# One part of what is to be run on a machine with an NVIDIA GPU. Results and logs go to a folder.
#
#     benchmarks/gpu.sh PART [results/]
#
#     test      every test that is marked gpu
#     sanitize  the kernels alone under compute-sanitizer: bad accesses, and races
#     fuzz      random calls of decode_records beside the CPU's results, and random ragged batches
#               beside float64; and under compute-sanitizer
#     job       the main job, in both state formats, and with prompts
#     engine    the example: a whole model's tokens, and what the compressors take of its steps
#     measure   most of README's times, with the baselines and jnp beside; the indexer; layers
#     records   the times of store_records, with jnp beside, and of its launches captured by hand
#     fused     the times of decode_records, beside the calls that end in values
#     ragged    the times of ragged batches, with jnp beside, and of their launches captured by hand
#     vary      the times of all other points in points.csv
#     step      a whole decode step in one program: values alone, jnp behind them, decode_records
#     profile   the launches captured in graphs by hand, and ncu's counters
#
# Every part builds and installs the package for the GPU at hand, and needs the environment's own
# build tools and JAX: the `cuda13` and `test` extras, and what build-system.requires in
# pyproject.toml names. It fails if anything in it fails; its last line says which. COMMIT names what
# is measured, where this is no git checkout.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:-}
case "$part" in
  test | sanitize | fuzz | job | engine | measure | records | fused | ragged | vary | step | profile) ;;
  *)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' benchmarks/gpu.sh
    exit 2
    ;;
esac
results=${2:-results}
mkdir -p "$results" && results=$(cd "$results" && pwd) || exit 1
failed=()

# Runs a command, shows its output, and keeps it in a log of this name.
run() {
  local name=$1
  shift
  "$@" 2>&1 | tee "$results/$name.log" || failed+=("$name")
}

build() {
  local capability
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader &&
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader) || return
  capability=${capability%%$'\n'*}
  # The folder is kept for the next part, and for what launches the same kernels.
  CUDAARCHS="${capability/./}-real" CUDAFLAGS=-lineinfo python3 -m pip install --quiet \
    --no-build-isolation --no-deps -e . -Ccmake.define.JAX_DSV4_CUDA=ON -Cbuild-dir=build
}

# Compiles what launches the kernels of operations without Python: those that were just built.
compile() { # SOURCE PROGRAM OPERATION...
  local source=$1 program=$2
  shift 2
  set -- "${@/#/build/CMakeFiles/_cuda.dir/ffi/}"
  nvcc -std=c++17 -O2 -arch=native -lineinfo -Iffi "$source" "${@/%/_launch.cu.o}" -o "$program"
}

# Writes the ids of the GPU tests that match an expression, dealt out to so many files:
# $results/NAME.00, .01 and so on.
deal_tests() { # NAME COUNT EXPRESSION
  rm -f "$results/$1".[0-9][0-9]
  python3 -m pytest --collect-only -q -m gpu -k "$3" -p no:cacheprovider >"$results/$1.log" 2>&1 ||
    { tail -20 "$results/$1.log" && return 1; }
  grep :: "$results/$1.log" | split -d -n "r/$2" - "$results/$1."
  echo "$(grep -c :: "$results/$1.log") tests in $2 processes"
}

# Runs pytest on a file of test ids.
run_shard() { # FILE LOG COMMAND...
  local file=$1 log=$2 ids
  shift 2
  mapfile -t ids <"$file"
  XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_DSV4_REQUIRE_GPU=1 timeout -k 10 360 \
    "$@" python3 -m pytest -q -p no:cacheprovider "${ids[@]}" >"$log" 2>&1
}

# As run_shard, and up to twice more where compute-sanitizer itself failed.
sanitize_shard() { # FILE LOG COMMAND...
  local rc attempt
  for attempt in 1 2 3; do
    run_shard "$@"
    rc=$?
    if [ $rc -lt 128 ] && ! grep -q "Internal Sanitizer Error" "$2"; then break; fi
    if [ $attempt -lt 3 ]; then mv "$2" "$2.crashed$attempt"; fi
  done
  return $rc
}

declare -A pids=() # of what was started, by log

# Starts a command, whose output goes to a log of this name.
start() {
  local name=$1
  shift
  "$@" >"$results/$name.log" 2>&1 &
  pids[$name]=$!
}

# Starts a process for each of the files of test ids.
start_tests() { # RUN NAME LOG COMMAND...
  local run=$1 name=$2 log=$3 file shard
  shift 3
  for file in "$results/$name".[0-9][0-9]; do
    shard=$log.${file##*.}
    "$run" "$file" "$results/$shard.log" "$@" &
    pids[$shard]=$!
  done
}

# Waits for all that was started, and prints how each ended.
finish() {
  local name
  for name in $(printf '%s\n' "${!pids[@]}" | sort); do
    if ! wait "${pids[$name]}"; then
      failed+=("$name")
      grep -E '^((FAILED|ERROR) |========= (Error|Warning|Internal|Invalid))' "$results/$name.log"
    fi
    printf '%-14s %s\n' "$name" \
      "$(grep -E ' (passed|failed|failures|error)|SUMMARY' "$results/$name.log" | tail -2 | paste -sd ' ')"
  done
  pids=()
}

run_test() {
  deal_tests tests 8 "" || { failed+=(collect) && return; }
  start_tests run_shard tests test
  finish
}

# On bad pages, tables overrun and every geometry. One cudaMalloc per buffer, for memcheck to see
# where each ends. No command buffers: with them compute-sanitizer failed to track a launch in more
# processes, which racecheck counts as a hazard.
run_sanitize() {
  local tool
  deal_tests kernels 12 "every_geometry or (no_other_byte and ffi)" || { failed+=(collect) && return; }
  export XLA_PYTHON_CLIENT_ALLOCATOR=platform
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer="
  for tool in memcheck racecheck; do
    start_tests sanitize_shard kernels "$tool" \
      compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 9
    finish # one tool beside the other fails to track launches more often
  done
}

# Padding between the buffers: without it, the next one may hide that one is overrun.
run_fuzz() {
  local name fuzz
  start fuzz-records-build compile tests/fuzz_records.cu "$results/fuzz_records" decode_records
  start fuzz-ragged-build compile tests/fuzz_ragged.cu "$results/fuzz_ragged" ragged ragged_records
  finish
  for name in records ragged; do
    fuzz=$results/fuzz_$name
    start "fuzz-$name-plain" "$fuzz" 5000
    start "fuzz-$name-memcheck" \
      compute-sanitizer --tool memcheck --padding 8192 --error-exitcode 9 "$fuzz" 5000
    start "fuzz-$name-racecheck" \
      compute-sanitizer --tool racecheck --print-limit 10000 "$fuzz" 300
  done
  finish
  # One thread initialises a barrier and arrives at it, which the tool takes for its whole warp.
  for name in records ragged; do
    ! grep ' and .* access at ' "$results/fuzz-$name-racecheck.log" | grep -v expect_bytes ||
      failed+=("fuzz-$name-races")
  done
}

run_job() {
  run job-raw python3 -m jax_dsv4
  run job-prefix python3 -m jax_dsv4 --state-format prefix
  run job-prompts python3 -m jax_dsv4 --prompt 300,2000,100000 --chunk 512
}

run_engine() {
  run engine-check python3 -m examples.engine --check
  # No command buffers: a profile would not see the kernels in them.
  run engine-bench env XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=" \
    python3 -m examples.engine --bench
}

# Dealt out: all in one part takes more than 8 minutes.
measured_points=(raw distributed no_hit prefix r4 indexer layers)
commit=(${COMMIT:+--commit "$COMMIT"})

run_measure() {
  run baseline python3 benchmarks/baseline.py
  run measure python3 benchmarks/decode.py --out "$results/decode.jsonl" "${commit[@]}" \
    --points "${measured_points[@]}"
}

run_records() {
  run records-build compile benchmarks/records.cu "$results/records" store
  run records-graph "$results/records"
  run records python3 benchmarks/records.py --out "$results/records.jsonl" "${commit[@]}"
}

run_fused() {
  run fused python3 benchmarks/decode_records.py --out "$results/fused.jsonl" "${commit[@]}"
}

run_ragged() {
  run ragged-build compile benchmarks/ragged.cu "$results/ragged" ragged ragged_records decode
  run ragged-graph "$results/ragged"
  run ragged python3 benchmarks/ragged.py --out "$results/ragged.jsonl" "${commit[@]}"
}

run_vary() {
  run vary python3 benchmarks/decode.py --out "$results/decode.jsonl" "${commit[@]}" \
    --but "${measured_points[@]}" acceptance
}

run_step() {
  run step python3 benchmarks/step.py --out "$results/step.jsonl" "${commit[@]}"
}

# ncu needs permission to read the performance counters.
run_profile() {
  local graph=$results/graph points=$results/points batch kernel
  run graph-build compile benchmarks/graph.cu "$graph" decode
  python3 benchmarks/points.py >"$points.all" || failed+=(points)
  run graph "$graph" "$points.all"
  run streams "$graph" streams
  grep -h '^{' "$results/graph.log" "$results/streams.log" >"$results/graph.jsonl"
  for batch in 1 16 256; do
    for kernel in raw prefix; do
      python3 benchmarks/points.py --points acceptance --batch "$batch" |
        grep '"ratio": 128' | grep "\"format\": \"$kernel\"" | head -1 >"$points.$kernel-$batch"
      ncu -k regex:'compress|prefix' --launch-count 1 --clock-control none \
        --section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy \
        --section LaunchStats --section WarpStateStats --section SchedulerStats \
        "$graph" "$points.$kernel-$batch" >"$results/ncu-$kernel-$batch.txt" 2>&1 ||
        failed+=("ncu-$kernel-$batch")
    done
  done
}

if build; then "run_$part"; else failed+=(build); fi
if [ ${#failed[@]} -gt 0 ]; then
  echo "$part: FAILED after $SECONDS s: ${failed[*]}"
  exit 1
fi
echo "$part: ok, $SECONDS s, results in $results"
