// The kernel that stores records, and its grid. No XLA types.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "config.h"
#include "record_stage.cuh"
#include "store.h"

namespace jax_dsv4 {

// Few values are spread over the whole chip, in CTAs of one warp.
inline constexpr int64_t kFewChannels = 512 << 10;
inline constexpr uint32_t kStoreWarps = 4;

// As many lanes as hold a value make its record.
template <class Record, class Value>
__global__ void __launch_bounds__(32 * kStoreWarps, 8)
    store_records_kernel(const __grid_constant__ StoreParams p) {
  using Stage = RecordStage<Record::kFormat, Record::kHeadDim>;
  using Layout = typename Record::Layout;
  constexpr int D = Record::kHeadDim;
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  const bool is_value = thread / Stage::kLanes < p.num_values;
  const uint32_t index = is_value ? thread / Stage::kLanes : p.num_values - 1;

  // All is loaded at once, but the row of the table; and so it is for a value that goes nowhere.
  const StoreGroup group = group_of(p, blockIdx.y);
  const RecordIndex where = {group.slots[index], group.positions[index]};
  const int64_t value = int64_t{blockIdx.y} * p.values_stride + index;
  Stage stage = {static_cast<int>(thread % Stage::kLanes)};
  typename Stage::Operands operands;
  stage.load_value(static_cast<const Value*>(p.values) + value * D);
  if (p.norm_weight != nullptr) {
    stage.load_weight(p.norm_weight + int64_t{blockIdx.y} * p.weight_stride * D, operands);
  }
  const RecordPlace place = find_place(p, group, where);
  if (p.table != nullptr) {
    stage.load_rotation(group.table + int64_t{place.position} * kRopeDim, p.options.interleaved,
                        operands);
  }
  uint8_t* const page = p.pool + (group.first_page + place.page) * p.page_bytes;
  stage.finish(
      operands, p.norm_weight != nullptr, p.table != nullptr, p.options,
      {is_value && place.exists, p.is_16b_aligned, page + int64_t{place.row} * Layout::kData,
       page + int64_t{p.page_size.value} * Layout::kData + int64_t{place.row} * Layout::kScales});
}

struct StoreGrid {
  dim3 ctas;
  uint32_t threads;
};

template <class Record>
StoreGrid store_grid(const StoreParams& p) {
  const int64_t threads = int64_t{p.num_values} * (Record::kHeadDim / 16);
  const int64_t channels = p.num_groups * int64_t{p.num_values} * Record::kHeadDim;
  const uint32_t of_cta = channels <= kFewChannels ? 32 : 32 * kStoreWarps;
  return {dim3(static_cast<uint32_t>((threads + of_cta - 1) / of_cta), p.num_groups), of_cta};
}

template <class Record>
void launch_store_records(cudaStream_t stream, const StoreParams& p) {
  const StoreGrid grid = store_grid<Record>(p);
  const auto kernel =
      p.values_are_bf16 ? store_records_kernel<Record, bf16> : store_records_kernel<Record, float>;
  kernel<<<grid.ctas, grid.threads, 0, stream>>>(p);
}

}  // namespace jax_dsv4
