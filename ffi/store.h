// What storing records works on, once checked. Host and device; no XLA types.
#pragma once

#include <cstdint>

#include "config.h"
#include "record.h"
#include "record_pool.h"

namespace jax_dsv4 {

// G groups of N values each; every group has a pool of its own. An operand of shape [G or 1, ...]
// is one per group, or one that all groups share.
struct StoreParams {
  const void* values;        // [G or 1, N, D]
  const int32_t* slots;      // [G or 1, N]
  const int32_t* positions;  // [G or 1, N]
  const float* norm_weight;  // [G or 1, D]; null: no norm
  const float* table;        // [G or 1, num_positions, 64]; null: no rotation
  RecordPool pool;           // updated in place

  uint32_t num_groups;  // G
  uint32_t num_values;  // N
  uint32_t num_positions;
  bool values_are_bf16;

  // From one group to the next: N, D and so on, or 0 where all groups share the operand.
  uint32_t values_stride, slots_stride, positions_stride, weight_stride;
  int64_t table_stride;

  RecordOptions options;

  JAX_DSV4_HD bool has_position(int32_t position) const {
    return (table == nullptr) | (static_cast<uint32_t>(position) < num_positions);
  }
};

}  // namespace jax_dsv4
