// What storing records works on, once checked. Host and device; no XLA types.
#pragma once

#include <cstdint>

#include "config.h"
#include "paging.h"
#include "record.h"

namespace jax_dsv4 {

template <RecordFormat format, int head_dim>
struct Record {
  static constexpr RecordFormat kFormat = format;
  static constexpr int kHeadDim = head_dim;
  using Layout = RecordLayout<format, head_dim>;
};

// What is compiled.
using Records =
    TypeList<Record<RecordFormat::kF32, 128>, Record<RecordFormat::kF32, 512>,
             Record<RecordFormat::kBf16, 128>, Record<RecordFormat::kBf16, 512>,
             Record<RecordFormat::kFp8, 128>, Record<RecordFormat::kFp8, 512>,
             Record<RecordFormat::kFp8DsMla, 512>, Record<RecordFormat::kFp8Block128, 128>,
             Record<RecordFormat::kFp8Block128, 512>, Record<RecordFormat::kMxfp4, 128>,
             Record<RecordFormat::kMxfp4, 512>>;

// Calls `visit` with the compiled Record of this format and head_dim; false: there is none.
template <class Visit>
bool visit_record(RecordFormat format, int64_t head_dim, Visit&& visit) {
  return visit_any(Records{}, [&](auto record) {
    if (record.kFormat != format || record.kHeadDim != head_dim) return false;
    visit(record);
    return true;
  });
}

// G groups of N values each; every group has a pool of its own. An operand of shape [G or 1, ...]
// is one per group, or one that all groups share.
struct StoreParams {
  const void* values;        // [G or 1, N, D]
  const int32_t* slots;      // [G or 1, N]
  const int32_t* positions;  // [G or 1, N]
  const float* norm_weight;  // [G or 1, D]; null: no norm
  const float* table;        // [G or 1, num_positions, 64]; null: no rotation
  const int32_t* layer;      // [G or 1], or null: `pool` is at the layer already
  uint8_t* pool;             // [G, layers, num_pages, page_bytes], updated in place

  uint32_t num_groups;  // G
  uint32_t num_values;  // N
  uint32_t num_positions;
  uint32_t num_layers;
  uint32_t num_pages;  // of a layer
  Divisor page_size;
  int64_t page_bytes;
  int64_t group_pages;  // of all its layers
  bool values_are_bf16;
  bool is_16b_aligned;  // every page

  // From one group to the next: N, D and so on, or 0 where all groups share the operand.
  uint32_t values_stride, slots_stride, positions_stride, weight_stride, layer_stride;
  int64_t table_stride;

  RecordOptions options;
};

// What one group stores, and where.
struct StoreGroup {
  const int32_t* slots;
  const int32_t* positions;
  const float* table;
  int64_t first_page;  // of its layer
  uint32_t num_pages;  // 0: the layer does not exist
};

JAX_DSV4_HD StoreGroup group_of(const StoreParams& p, uint32_t group) {
  const uint32_t layer =
      p.layer == nullptr ? 0 : static_cast<uint32_t>(p.layer[group * p.layer_stride]);
  const bool exists = layer < p.num_layers;
  return {p.slots + group * p.slots_stride, p.positions + group * p.positions_stride,
          p.table + group * p.table_stride * kRopeDim,
          group * p.group_pages + int64_t{exists ? layer : 0} * p.num_pages,
          exists ? p.num_pages : 0};
}

// What is loaded for the place of a value, before anything waits for it.
struct RecordIndex {
  int32_t slot;
  int32_t position;
};

struct RecordPlace {
  bool exists;
  uint32_t page;  // of the group's layer; 0 where nothing exists, as the others
  uint32_t row;
  uint32_t position;  // a row of the table
};

// Without a branch: before one a warp waits for all that it loads.
JAX_DSV4_HD RecordPlace find_place(const StoreParams& p, const StoreGroup& group,
                                   RecordIndex index) {
  const uint32_t slot = static_cast<uint32_t>(index.slot) & 0x7fffffffu;
  const uint32_t position = static_cast<uint32_t>(index.position);
  const uint32_t page = slot / p.page_size;
  const bool exists = (index.slot >= 0) & (page < group.num_pages) &
                      ((p.table == nullptr) | (position < p.num_positions));
  return {exists, exists ? page : 0, exists ? slot - page * p.page_size.value : 0,
          exists ? position : 0};
}

}  // namespace jax_dsv4
