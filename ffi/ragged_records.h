// What a ragged batch that ends in records works on, once checked. Host and device; no XLA types.
#pragma once

#include "decode_records.h"
#include "ragged.h"

namespace jax_dsv4 {

// `kv_comp` is null: a value goes nowhere else.
struct RaggedRecordsParams : RaggedParams {
  RecordTarget records;
};
using RaggedRecordsCall = RecordsCall<RaggedRecordsParams>;

}  // namespace jax_dsv4
