// What custom calls on record pools have in common: the checks of the pool, and of what says how it
// is read. Shared by all operations on records, on CPU and CUDA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "config.h"
#include "operands.h"
#include "record_pool.h"
#include "xla/ffi/api/ffi.h"

XLA_FFI_REGISTER_ENUM_ATTR_DECODING(::jax_dsv4::RecordFormat);
XLA_FFI_REGISTER_ENUM_ATTR_DECODING(::jax_dsv4::Scales);
XLA_FFI_REGISTER_ENUM_ATTR_DECODING(::jax_dsv4::Rounding);

namespace jax_dsv4 {

struct PoolOperands {
  ffi::AnyBuffer pool;   // [*G, (layers,) num_pages, page_bytes] u8
  ffi::AnyBuffer layer;  // [*G, 1] i32, or [*G, 0]: none, or the attribute
  int64_t layer_index;   // the attribute: known when compiled; kNoLayer: see the operand
  RecordFormat format;
  Scales scales;
  int64_t page_size;

  static constexpr int64_t kNoLayer = -1;

  bool has_layer_operand() const { return layer.dimensions().back() != 0; }
  // Of the pool, without group dimensions.
  size_t rank() const { return has_layer_operand() || layer_index != kNoLayer ? 3 : 2; }
};

// All that can be said before the groups are known.
inline void check_pool_operands(OperandChecker& check, const PoolOperands& o) {
  check.require_rank("layer", o.layer, 1, "0 or 1");
  if (!check.ok()) return;
  check.require_rank("records.pool", o.pool, o.rank(),
                     o.rank() == 3 ? "layers, num_pages, page_bytes" : "num_pages, page_bytes");
  check.require(static_cast<size_t>(o.format) < std::size(kRecordFormatNames),
                "format: expected 0 to 5");
  check.require(o.scales <= Scales::kUe8m0 &&
                    (o.scales == Scales::kF32 || o.format == RecordFormat::kFp8Block128),
                "scales: expected 0, or 1 or 2 in format fp8_block128");
  check.require(o.page_size >= 1 && o.page_size <= kInt32Max, "page_size: expected 1 to 2^31 - 1");
}

// The dimensions of one group's pool.
inline Dims pool_dims(const PoolOperands& o) {
  const Dims dims = dims_of(o.pool);
  return {dims.end() - static_cast<ptrdiff_t>(o.rank()), dims.end()};
}

// Of one record, with its scales; there must be a kernel for it.
inline int64_t compiled_record_bytes(OperandChecker& check, RecordFormat format, int64_t head_dim) {
  int64_t bytes = 0;
  const bool is_compiled = visit_record(format, head_dim, [&](auto record) {
    using Layout = typename decltype(record)::Layout;
    bytes = Layout::kData + Layout::kScales;
  });
  check.require(is_compiled, "no compiled format ", kRecordFormatNames[static_cast<int>(format)],
                " for head_dim ", head_dim);
  return bytes;
}

// The pool, once the groups are known; `is_shared`: by all of them.
inline RecordPool check_pool(OperandChecker& check, const PoolOperands& o, int64_t record_bytes,
                             bool is_shared) {
  const Dims dims = pool_dims(o);
  const int64_t num_layers = dims.size() == 3 ? dims.front() : 1;
  const int64_t num_pages = *(dims.end() - 2), page_bytes = dims.back();
  const bool layer_is_per_group =
      check.maybe_shared("layer", o.layer, ffi::DataType::S32, {o.has_layer_operand()});
  check.require(o.layer_index >= PoolOperands::kNoLayer &&
                    (o.layer_index == PoolOperands::kNoLayer ||
                     (o.layer_index < num_layers && !o.has_layer_operand())),
                "layer: expected an index of one of the pool's layers, in the attribute or in the "
                "operand");
  check.require(page_bytes % 4 == 0 && page_bytes / record_bytes >= o.page_size,
                "records.pool: expected pages of a multiple of 4 bytes that hold page_size records "
                "of ",
                record_bytes, " bytes, got ", page_bytes);
  check.require(num_layers <= kInt32Max && num_pages <= kInt32Max,
                "records.pool: layers and pages must be below 2^31");
  if (!check.ok()) return {};

  RecordPool pool;
  pool.data = static_cast<uint8_t*>(o.pool.untyped_data()) +
              std::max<int64_t>(o.layer_index, 0) * num_pages * page_bytes;
  pool.layer =
      o.has_layer_operand() ? static_cast<const int32_t*>(o.layer.untyped_data()) : nullptr;
  pool.layer_stride = layer_is_per_group ? 1 : 0;
  pool.num_layers = static_cast<uint32_t>(num_layers);
  pool.num_pages = static_cast<uint32_t>(num_pages);
  pool.page_size = Divisor(static_cast<uint32_t>(o.page_size));
  pool.page_bytes = page_bytes;
  pool.group_pages = is_shared ? 0 : num_layers * num_pages;
  pool.is_16b_aligned = (page_bytes | reinterpret_cast<intptr_t>(pool.data)) % 16 == 0;
  return pool;
}

// What records are made with, by operations that write them.
struct RecordOperands {
  ffi::AnyBuffer norm_weight;  // [*G, D] f32, or [*G, 0]: no norm
  ffi::AnyBuffer table;        // [*G, positions, 64] f32, or [*G, 0, 64]: no rotation
  RecordFormat format;
  RecordOptions options;
};

// The same, checked; to be shared by the groups, or one for each.
struct RecordInputs {
  const float* norm_weight;  // [G or 1, D]; null: no norm
  const float* table;        // [G or 1, num_positions, 64]; null: no rotation
  uint32_t num_positions;
  bool weight_is_per_group, table_is_per_group;
};

// All that can be said before the groups are known.
inline void check_record_operands(OperandChecker& check, const RecordOperands& o) {
  check.require_rank("norm_weight", o.norm_weight, 1, "head_dim");
  check.require_rank("cos_sin_cache", o.table, 2, "positions, 64");
  check.require(!o.options.scale_floor || o.format == RecordFormat::kFp8DsMla,
                "scale_floor: expected false, but in format fp8_ds_mla");
  check.require(o.options.rounding <= Rounding::kModel, "rounding: expected 0 to 2");
  check.require(o.options.rms_norm_eps >= 0, "rms_norm_eps: expected at least 0");
  check.require(!o.options.hadamard || o.format != RecordFormat::kFp8DsMla,
                "hadamard: expected false in format fp8_ds_mla");
}

inline RecordInputs check_record_inputs(OperandChecker& check, const RecordOperands& o,
                                        int64_t head_dim) {
  constexpr auto kF32 = ffi::DataType::F32;
  const int64_t num_positions = o.table.dimensions()[o.table.dimensions().size() - 2];
  const bool has_weight = o.norm_weight.dimensions().back() != 0;
  RecordInputs inputs;
  inputs.weight_is_per_group =
      check.maybe_shared("norm_weight", o.norm_weight, kF32, {has_weight ? head_dim : 0});
  inputs.table_is_per_group =
      check.maybe_shared("cos_sin_cache", o.table, kF32, {num_positions, kRopeDim});
  check.require(num_positions <= kInt32Max, "cos_sin_cache: positions must be below 2^31");
  inputs.norm_weight =
      has_weight ? static_cast<const float*>(o.norm_weight.untyped_data()) : nullptr;
  inputs.table = num_positions != 0 ? static_cast<const float*>(o.table.untyped_data()) : nullptr;
  inputs.num_positions = static_cast<uint32_t>(num_positions);
  return inputs;
}

}  // namespace jax_dsv4
