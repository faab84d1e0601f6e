// The kinds of records that are compiled, and where a slot's record lies in a pool. Host and
// device; no XLA types.
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

// The pool of G groups, [G or 1, layers, num_pages, page_bytes].
struct RecordPool {
  uint8_t* data;
  const int32_t* layer;   // [G or 1], or null: `data` is at the layer already
  uint32_t layer_stride;  // from one group to the next; 0: all groups share it
  uint32_t num_layers;
  uint32_t num_pages;  // of a layer
  Divisor page_size;
  int64_t page_bytes;
  int64_t group_pages;  // of all its layers, or 0: all groups share the pool
  bool is_16b_aligned;  // every page
};

// A group's pages of the call's layer.
struct RecordPages {
  int64_t first;
  uint32_t count;  // 0: the layer does not exist
};

JAX_DSV4_HD RecordPages pages_of(const RecordPool& pool, uint32_t group) {
  const uint32_t layer =
      pool.layer == nullptr ? 0 : static_cast<uint32_t>(pool.layer[group * pool.layer_stride]);
  const bool exists = layer < pool.num_layers;
  return {group * pool.group_pages + int64_t{exists ? layer : 0} * pool.num_pages,
          exists ? pool.num_pages : 0};
}

struct RecordPlace {
  bool exists;
  uint32_t page;  // of the group's; 0 where nothing exists, as the row
  uint32_t row;
};

// `may_exist`: whether all else that the record needs exists. Without a branch, before which a warp
// would wait for all that it loads.
JAX_DSV4_HD RecordPlace find_place(const RecordPool& pool, const RecordPages& pages, int32_t slot,
                                   bool may_exist) {
  const uint32_t n = static_cast<uint32_t>(slot) & 0x7fffffffu;
  const uint32_t page = n / pool.page_size;
  const bool exists = may_exist & (slot >= 0) & (page < pages.count);
  return {exists, exists ? page : 0, exists ? n - page * pool.page_size.value : 0};
}

// One record's bytes on its page.
struct RecordBytes {
  uint8_t* data;
  uint8_t* scales;

  RecordBytes() = default;
  // Of so many bytes each in a record.
  JAX_DSV4_HD RecordBytes(const RecordPool& pool, const RecordPages& pages,
                          const RecordPlace& place, int data_bytes, int scale_bytes)
      : data(pool.data + (pages.first + place.page) * pool.page_bytes),
        scales(data + int64_t{pool.page_size.value} * data_bytes +
               int64_t{place.row} * scale_bytes) {
    data += int64_t{place.row} * data_bytes;
  }
};
template <class Layout>
struct RecordRow : RecordBytes {
  JAX_DSV4_HD RecordRow(const RecordPool& pool, const RecordPages& pages, const RecordPlace& place)
      : RecordBytes(pool, pages, place, Layout::kData, Layout::kScales) {}
};

}  // namespace jax_dsv4
