// The kernel that stores records, and its grid: a warp for each value. No XLA types.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "config.h"
#include "record_stage.cuh"
#include "store.h"

namespace jax_dsv4 {

template <class Record, class Value>
__global__ void __launch_bounds__(128, 8)
    store_records_kernel(const __grid_constant__ StoreParams p) {
  using Stage = RecordStage<Record::kFormat, Record::kHeadDim>;
  constexpr int D = Record::kHeadDim;
  const int lane = threadIdx.x % 32;
  const uint32_t group = blockIdx.y;
  const uint32_t index = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (index >= p.num_values) return;

  // All that is loaded at once; a value that goes nowhere takes the same way.
  Stage stage;
  typename Stage::Operands operands;
  const RecordIndex where = load_index(p, group, index);
  const int64_t value = int64_t{group} * p.values_stride + index;
  stage.load_value(static_cast<const Value*>(p.values) + value * D, lane);
  if (p.norm_weight != nullptr) {
    Stage::load_weight(p.norm_weight + int64_t{group} * p.weight_stride * D, lane, operands);
  }
  const RecordPlace place = find_place(p, group, where);
  if (p.table != nullptr) {
    const float* row = p.table + (group * p.table_stride + place.position) * kRopeDim;
    Stage::load_rotation(row, p.options.interleaved, lane, operands);
  }
  uint8_t* const page = p.pool + place.page * p.page_bytes;
  stage.finish(operands, p.norm_weight != nullptr, p.table != nullptr, p.options, lane,
               {place.exists, p.is_16b_aligned, page + int64_t{place.row} * Record::Layout::kData,
                page + int64_t{p.page_size.value} * Record::Layout::kData +
                    int64_t{place.row} * Record::Layout::kScales});
}

// Warps of a CTA. Few values are spread over the whole chip; of many, a CTA takes several.
inline uint32_t store_warps(const StoreParams& p) {
  constexpr int64_t kFewValues = 1024;
  return p.num_groups * int64_t{p.num_values} <= kFewValues ? 1 : 4;
}

template <class Record>
void launch_store_records(cudaStream_t stream, const StoreParams& p) {
  const uint32_t warps = store_warps(p);
  const dim3 grid((p.num_values + warps - 1) / warps, p.num_groups);
  const auto kernel =
      p.values_are_bf16 ? store_records_kernel<Record, bf16> : store_records_kernel<Record, float>;
  kernel<<<grid, 32 * warps, 0, stream>>>(p);
}

}  // namespace jax_dsv4
