#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: build for it, run every test there, look for bad memory accesses
# and races, and measure. Results go to the folder named by the first argument.
#
#     benchmarks/gpu.sh [results/]
#
# Uses the environment's own build tools and JAX: the `cuda13` and `test` extras, and what
# build-system.requires in pyproject.toml names.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-results}
mkdir -p "$results"
results=$(cd "$results" && pwd)
architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader

CUDAARCHS="$architecture-real" python3 -m pip install --quiet --no-build-isolation --no-deps -e . \
  -Ccmake.define.JAX_DSV4_CUDA=ON
JAX_DSV4_REQUIRE_GPU=1 python3 -m pytest -q -m gpu 2>&1 | tee "$results/tests.log"

# On bad pages, tables overrun and every geometry, the kernels alone. One cudaMalloc per buffer, for
# memcheck to see where each ends.
for tool in memcheck racecheck; do
  JAX_DSV4_REQUIRE_GPU=1 XLA_PYTHON_CLIENT_ALLOCATOR=platform timeout -k 10 900 \
    compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 9 \
    python3 -m pytest -q -m gpu -k every_geometry -p no:cacheprovider >"$results/$tool.log" 2>&1 ||
    failed="${failed:-} $tool"
  tail -3 "$results/$tool.log"
done

python3 -m jax_dsv4 | tee "$results/main.log"
measure() { python3 benchmarks/decode.py --out "$results/decode.jsonl" "$@" | tee -a "$results/decode.log"; }
measure --batch 1 16 32 64 128 256 512 --baselines --reference
measure --state-format prefix --regime "all emit" "no hit" distributed --batch 1 16 64 128 256 512
measure --state-format prefix --regime "all emit" "no hit" --layers --batch 1 16 128 256
measure --ratio 4 --state-format prefix --layers --batch 1 16 256
measure --regime distributed --batch 32 64 128 256 --baselines
measure --regime "no hit" --batch 1 16 64 256
measure --ratio 4 --head-dim 512 128 --state-format raw prefix --batch 1 16 64 256
measure --max-pages 1024 --state-format raw prefix --batch 1 16 64 256
measure --next-n 1 2 8 --state-format raw prefix --batch 1 16 256
measure --state bfloat16 --kv-score bfloat16 float32 --batch 1 16 256
measure --head-dim 128 --batch 1 16 256
measure --warm --batch 1 16 64 --baselines

nvcc -std=c++17 -O3 -arch=native -Iffi benchmarks/graph.cu -o "$results/graph"
"$results/graph" | tee "$results/graph.jsonl"
# Needs permission to read the performance counters.
for batch in 1 16 256; do
  for kernel in compress prefix; do
    ncu -k regex:"$kernel" --launch-count 1 --clock-control none \
      --section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy \
      --section LaunchStats --section WarpStateStats --section SchedulerStats \
      "$results/graph" "$batch" >"$results/ncu-$kernel-$batch.txt" || true
  done
done
test -z "${failed:-}" || { echo "failed:$failed"; exit 1; }
