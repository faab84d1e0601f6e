// What a decode step that ends in records works on, once checked: a decode step's operands, and
// where the records of its windows go. Host and device; no XLA types.
#pragma once

#include <cstdint>

#include "config.h"
#include "decode.h"
#include "record.h"
#include "record_pool.h"

namespace jax_dsv4 {

// Where a step's records go, and what they are made with. Groups as in DecodeParams.
struct RecordTarget {
  const int32_t* tables;     // [G or 1, B, max_pages]
  const float* norm_weight;  // [G or 1, D]; null: no norm
  const float* cos_sin;      // [G or 1, num_positions, 64]; null: no rotation
  RecordPool pool;           // updated in place

  uint32_t max_pages;
  uint32_t num_positions;
  uint32_t tables_stride;  // from one group to the next, in requests: B or 0
  uint32_t weight_stride;  // in arrays: 1 or 0
  int64_t cos_sin_stride;  // in positions: num_positions or 0
  RecordOptions options;
};

// `kv_comp` is null: a value goes nowhere else.
struct DecodeRecordsParams : DecodeParams {
  RecordTarget records;
};

// One compressor's part of a checked call that ends in records.
template <class Params>
struct RecordsCall {
  Selection selection;  // `out` is f32: a value is rounded as its record needs
  StateFormat state_format;
  RecordFormat format;
  Params params;
};
using DecodeRecordsCall = RecordsCall<DecodeRecordsParams>;

// The place of window w of a request, whose row of tables this is; `position`: of its first token.
JAX_DSV4_HD RecordPlace find_record(const RecordTarget& t, const RecordPages& pages,
                                    const int32_t* table, uint32_t window, uint32_t position) {
  const uint32_t logical = window / t.pool.page_size;
  bool exists = logical < t.max_pages && (t.cos_sin == nullptr || position < t.num_positions);
  const uint32_t page = exists ? static_cast<uint32_t>(table[logical]) : ~0u;
  exists = page < pages.count;
  return {exists, exists ? page : 0, exists ? window - logical * t.pool.page_size.value : 0};
}

}  // namespace jax_dsv4
