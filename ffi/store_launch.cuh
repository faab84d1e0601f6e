// The kernel that stores records, and its grid.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "config.h"
#include "record_stage.cuh"
#include "store.h"

namespace jax_dsv4 {

// Few values are spread over the whole chip, each in a CTA of its own. Of many, each has the lanes
// that it needs, in CTAs of four warps.
inline constexpr int64_t kFewValues = 1024;
inline constexpr uint32_t kStoreThreads = 128;

template <class Record>
using StageOfFew = RecordStage<Record::kHeadDim, Record::kHeadDim / 4>;
template <class Record>
using StageOfMany = RecordStage<Record::kHeadDim, Record::kHeadDim / 16>;

// The lanes that hold a value make its record.
template <class Record, class Stage, class Value>
__global__ void __launch_bounds__(kStoreThreads, 8)
    store_records_kernel(const __grid_constant__ StoreParams p) {
  constexpr int D = Record::kHeadDim;
  constexpr RecordFormat kFormat = Record::kFormat;
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  const bool is_value = thread / Stage::kLanes < p.num_values;
  const uint32_t index = is_value ? thread / Stage::kLanes : p.num_values - 1;

  // All is loaded at once, but the row of the table; and so it is for a value that goes nowhere.
  __shared__ typename Stage::Exchange exchange;
  const uint32_t group = blockIdx.y;
  const RecordPages pages = pages_of(p.pool, group);
  const int32_t slot = p.slots[group * p.slots_stride + index];
  const int32_t position = p.positions[group * p.positions_stride + index];
  Stage stage = {static_cast<int>(thread % Stage::kLanes)};
  typename Stage::Operands operands;
  const int64_t value = int64_t{group} * p.values_stride + index;
  stage.load_value(static_cast<const Value*>(p.values) + value * D);
  if (p.norm_weight != nullptr) {
    stage.load_weight(p.norm_weight + int64_t{group} * p.weight_stride * D, operands);
  }
  const RecordPlace place = find_place(p.pool, pages, slot, is_value & p.has_position(position));
  if (p.table != nullptr) {
    const int64_t row = group * p.table_stride + (place.exists ? position : 0);
    stage.load_rotation(p.table + row * kRopeDim, p.options.interleaved, operands);
  }
  const auto transform = [&](bool round_each) {
    stage.template transform<kFormat != RecordFormat::kFp8DsMla>(
        operands, p.norm_weight != nullptr, p.table != nullptr, p.options, round_each,
        kIsQuantized<kFormat> && !round_each, &exchange);
  };
  // One branch, not one behind each step.
  if (p.options.rounding == Rounding::kModel) {
    transform(true);
  } else {
    transform(false);
  }
  stage.template store<kFormat>(p.options, place.exists,
                                RecordRow<typename Record::Layout>(p.pool, pages, place),
                                p.pool.is_16b_aligned);
}

template <class Record, class Stage>
void launch_store_records_in(cudaStream_t stream, const StoreParams& p, uint32_t threads) {
  const uint32_t values = threads / Stage::kLanes;
  const dim3 grid((p.num_values + values - 1) / values, p.num_groups);
  const auto kernel = p.values_are_bf16 ? store_records_kernel<Record, Stage, bf16>
                                        : store_records_kernel<Record, Stage, float>;
  kernel<<<grid, threads, 0, stream>>>(p);
}

template <class Record>
void launch_store_records(cudaStream_t stream, const StoreParams& p) {
  if (p.num_groups * int64_t{p.num_values} <= kFewValues) {
    launch_store_records_in<Record, StageOfFew<Record>>(stream, p, StageOfFew<Record>::kLanes);
  } else {
    launch_store_records_in<Record, StageOfMany<Record>>(stream, p, kStoreThreads);
  }
}

}  // namespace jax_dsv4
