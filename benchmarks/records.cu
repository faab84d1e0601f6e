// The time of one store_records launch, captured in a CUDA graph by hand, beside the least that
// such a launch can take: an empty kernel of the same grid, and one that only makes its loads (slot
// and position, then the row of the table; value and weight) and stores nothing.
//
//     nvcc -std=c++17 -O3 -arch=native -Iffi {benchmarks/records,ffi/store_launch}.cu -o records
//     ./records [N...]
//
// Cold: every call has values, slots, positions and records of its own, and between two launches of
// the graph 256 MiB are read. Prints JSON lines, in microseconds.

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "graph.cuh"
#include "kernels.h"
#include "store_launch.cuh"

using namespace jax_dsv4;

namespace {

constexpr int64_t kPositions = 65536, kPageSize = 64;

__global__ void empty_kernel() {}

template <class Record, class Stage>
__global__ void loads_kernel(const __grid_constant__ StoreParams p) {
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t index = min(thread / Stage::kLanes, p.num_values - 1);
  const RecordPages pages = pages_of(p.pool, 0);
  const int32_t slot = p.slots[index], position = p.positions[index];
  Stage stage = {static_cast<int>(thread % Stage::kLanes)};
  typename Stage::Operands operands;
  stage.load_value(static_cast<const float*>(p.values) + int64_t{index} * Record::kHeadDim);
  stage.load_weight(p.norm_weight, operands);
  const RecordPlace place = find_place(p.pool, pages, slot, p.has_position(position));
  const int64_t row = place.exists ? position : 0;
  stage.load_rotation(p.table + row * kRopeDim, false, operands);
  float sum = 0;
  for (int g = 0; g < Stage::kRotated; ++g) {
    for (int i = 0; i < 2; ++i) sum += operands.cos[g][i] + operands.sin[g][i];
  }
  for (int j = 0; j < Stage::kGroups; ++j) {
    for (int v = 0; v < 4; ++v) sum += stage.x[j][v] * operands.weight[j].x[v];
  }
  if (sum == 1.2345f) *reinterpret_cast<float*>(p.pool.data) = sum;
}

template <class Record>
void measure(uint32_t count) {
  constexpr int D = Record::kHeadDim;
  using Layout = typename Record::Layout;
  const int64_t calls = count > 1000 ? 32 : 256;
  const int64_t num_slots = std::max(calls * count, int64_t{1} << 18) / kPageSize * kPageSize;
  const int64_t page_bytes = kPageSize * (Layout::kData + Layout::kScales);
  std::mt19937 random(0);
  std::vector<int32_t> slots(num_slots), positions(calls * count);
  std::iota(slots.begin(), slots.end(), 0);
  // A decode step's rows lie anywhere, those of a prompt side by side.
  if (count <= kFewValues) std::shuffle(slots.begin(), slots.end(), random);
  for (size_t i = 0; i < positions.size(); ++i) {
    positions[i] = (count <= kFewValues ? random() : 4 * i) % kPositions;
  }

  const Buffer<float> values(calls * count * D), weight(D), table(kPositions * kRopeDim);
  const Buffer<int32_t> all_slots(slots), all_positions(positions);
  const Buffer<uint8_t> pool(num_slots / kPageSize * page_bytes);
  StoreParams p = {};
  p.norm_weight = weight.get(), p.table = table.get();
  p.num_groups = 1, p.num_values = count, p.num_positions = kPositions;
  p.pool.data = pool.get(), p.pool.num_layers = 1, p.pool.num_pages = num_slots / kPageSize;
  p.pool.page_size = Divisor(kPageSize), p.pool.page_bytes = page_bytes;
  p.pool.is_16b_aligned = page_bytes % 16 == 0;
  p.options.rms_norm_eps = 1e-6f, p.options.hadamard = D == 128;
  p.options.rounding = D == 128 ? Rounding::kNone : Rounding::kOnce;

  const size_t flushed = size_t{256} << 20;
  const Buffer<float> cold(flushed / sizeof(float)), sink(1);
  const auto time_of_calls = [&](int64_t from, auto call) {
    return time_of([&](cudaStream_t stream) {
      for (int64_t i = from; i < calls; ++i) {
        p.values = values.get() + i * count * D;
        p.slots = all_slots.get() + i * count, p.positions = all_positions.get() + i * count;
        call(stream);
      }
      stream_kernel<<<4 * 132, 512, 0, stream>>>(vectors(cold), flushed / sizeof(float4), nullptr,
                                                 0, sink.get());
    });
  };
  const auto time_of_call = [&](auto call) {
    const int64_t few = calls / 4;
    return (time_of_calls(0, call) - time_of_calls(calls - few, call)) / (calls - few);
  };
  const double kernel = time_of_call(
      [&](cudaStream_t stream) { launch_store_records(stream, p, Record::kFormat, D); });
  const bool few = count <= kFewValues;
  const uint32_t threads = few ? StageOfFew<Record>::kLanes : kStoreThreads;
  const uint32_t values_of_cta = few ? 1 : threads / StageOfMany<Record>::kLanes;
  const uint32_t ctas = (count + values_of_cta - 1) / values_of_cta;
  const auto loads_only =
      few ? loads_kernel<Record, StageOfFew<Record>> : loads_kernel<Record, StageOfMany<Record>>;
  const double loads =
      time_of_call([&](cudaStream_t stream) { loads_only<<<ctas, threads, 0, stream>>>(p); });
  const double empty =
      time_of_call([&](cudaStream_t stream) { empty_kernel<<<ctas, threads, 0, stream>>>(); });
  std::printf(
      "{\"format\": \"%s\", \"head_dim\": %d, \"N\": %u, \"kernel\": %.2f, \"loads\": %.2f, "
      "\"empty\": %.2f}\n",
      kRecordFormatNames[static_cast<int>(Record::kFormat)], D, count, kernel, loads, empty);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  using F = RecordFormat;
  using Measured =
      TypeList<Record<F::kF32, 512>, Record<F::kBf16, 512>, Record<F::kFp8, 512>,
               Record<F::kFp8DsMla, 512>, Record<F::kFp8Block128, 128>, Record<F::kMxfp4, 128>>;
  std::vector<uint32_t> counts;
  for (int i = 1; i < argc; ++i) counts.push_back(std::stoul(argv[i]));
  if (counts.empty()) counts = {1, 16, 64, 256, 8192};
  visit_any(Measured{}, [&](auto record) {
    for (uint32_t count : counts) measure<decltype(record)>(count);
    return false;
  });
}
