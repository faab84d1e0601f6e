// What reading records works on, once checked. Host and device; no XLA types.
#pragma once

#include <cstdint>

#include "record.h"
#include "record_pool.h"

namespace jax_dsv4 {

// G groups of N slots each.
struct DequantizeParams {
  const int32_t* slots;  // [G, N]
  RecordPool pool;       // only read
  float* values;         // [G, N, D]
  uint32_t num_groups;   // G
  uint32_t num_slots;    // N
  Scales scales;
};

}  // namespace jax_dsv4
