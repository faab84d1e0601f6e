// Storing records as a custom call: its operands, results and attributes, and the one function that
// checks them and fills StoreParams. Shared by the CPU and CUDA handlers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>
#include <string>
#include <utility>

#include "config.h"
#include "operands.h"
#include "store.h"
#include "xla/ffi/api/ffi.h"

XLA_FFI_REGISTER_ENUM_ATTR_DECODING(::jax_dsv4::RecordFormat);
XLA_FFI_REGISTER_ENUM_ATTR_DECODING(::jax_dsv4::Scales);
XLA_FFI_REGISTER_ENUM_ATTR_DECODING(::jax_dsv4::Rounding);

namespace jax_dsv4 {

struct StoreAttributes {
  RecordFormat format;
  int64_t page_size;
  Scales scales;
  bool scale_floor;
  float rms_norm_eps;
  bool interleaved;
  bool hadamard;
  Rounding rounding;
  int64_t layer;     // of the pool, known when compiled; kNoLayer: see the operand `layer`
  int64_t geometry;  // -1: there is one only
};

// In the order of the call; groups as in DecodeBuffers.
struct StoreBuffers {
  ffi::AnyBuffer values;       // [*G, N, D] f32 or bf16
  ffi::AnyBuffer slots;        // [*G, N] i32
  ffi::AnyBuffer positions;    // [*G, N] i32
  ffi::AnyBuffer norm_weight;  // [*G, D] f32, or [*G, 0]: no norm
  ffi::AnyBuffer table;        // [*G, positions, 64] f32, or [*G, 0, 64]: no rotation
  ffi::AnyBuffer pool;         // [*G, (layers,) num_pages, page_bytes] u8
  ffi::AnyBuffer layer;        // [*G, 1] i32, or [*G, 0]: none, or the attribute
  ffi::AnyBuffer pool_out;     // aliases pool
};

struct StoreCall {
  RecordFormat format;
  int64_t head_dim;
  bool empty;  // no value at all, or no page
  StoreParams params;
};

inline ffi::ErrorOr<StoreCall> check_store(ffi::RemainingArgs operands, ffi::RemainingRets results,
                                           const StoreAttributes& a) {
  constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();
  constexpr int64_t kNoLayer = -1;
  constexpr auto kI32 = ffi::DataType::S32, kF32 = ffi::DataType::F32, kU8 = ffi::DataType::U8;
  OperandChecker check("store_records");
  const auto failure = [&] { return ffi::Unexpected(check.error()); };
  check.require_counts(operands, 7, results, 1);
  if (!check.ok()) return failure();
  const auto arg = [&](size_t i) { return *operands.get<ffi::AnyBuffer>(i); };
  const StoreBuffers b{arg(0), arg(1), arg(2), arg(3),
                       arg(4), arg(5), arg(6), **results.get<ffi::AnyBuffer>(0)};

  check.require_rank("values", b.values, 2, "N, head_dim");
  check.require_rank("norm_weight", b.norm_weight, 1, "head_dim");
  check.require_rank("cos_sin_cache", b.table, 2, "positions, 64");
  check.require_rank("layer", b.layer, 1, "0 or 1");
  if (!check.ok()) return failure();
  const bool has_layer_operand = b.layer.dimensions().back() != 0;
  const bool has_layers = has_layer_operand || a.layer != kNoLayer;
  const int pool_rank = has_layers ? 3 : 2;
  check.require_rank("records.pool", b.pool, pool_rank,
                     has_layers ? "layers, num_pages, page_bytes" : "num_pages, page_bytes");
  check.require(static_cast<size_t>(a.format) < std::size(kRecordFormatNames),
                "format: expected 0 to 5");
  check.require(a.scales <= Scales::kUe8m0 &&
                    (a.scales == Scales::kF32 || a.format == RecordFormat::kFp8Block128),
                "scales: expected 0, or 1 or 2 in format fp8_block128");
  check.require(!a.scale_floor || a.format == RecordFormat::kFp8DsMla,
                "scale_floor: expected false, but in format fp8_ds_mla");
  check.require(a.rounding <= Rounding::kModel, "rounding: expected 0 to 2");
  check.require(a.rms_norm_eps >= 0, "rms_norm_eps: expected at least 0");
  check.require(!a.hadamard || a.format != RecordFormat::kFp8DsMla,
                "hadamard: expected false in format fp8_ds_mla");
  check.require(a.page_size >= 1 && a.page_size <= kInt32Max, "page_size: expected 1 to 2^31 - 1");
  check.require(a.geometry == -1, "geometry: expected -1");
  if (!check.ok()) return failure();

  const int64_t head_dim = b.values.dimensions().back();
  int64_t record_bytes = 0;
  const bool is_compiled = visit_record(a.format, head_dim, [&](auto record) {
    using Layout = typename decltype(record)::Layout;
    record_bytes = Layout::kData + Layout::kScales;
  });
  check.require(is_compiled, std::string("no compiled format ") +
                                 kRecordFormatNames[static_cast<int>(a.format)] + " for head_dim " +
                                 std::to_string(head_dim));
  if (!check.ok()) return failure();

  const Dims pool_dims = dims_of(b.pool);
  const Dims pool(pool_dims.end() - pool_rank, pool_dims.end());  // of one group
  check.set_groups({pool_dims.begin(), pool_dims.end() - pool_rank});
  const int64_t num_layers = has_layers ? pool.front() : 1;
  const int64_t num_pages = *(pool.end() - 2), page_bytes = pool.back();
  const int64_t count = b.values.dimensions()[b.values.dimensions().size() - 2];
  const int64_t num_positions = b.table.dimensions()[b.table.dimensions().size() - 2];
  const bool has_weight = b.norm_weight.dimensions().back() != 0;
  const ffi::DataType values_dtype = b.values.element_type();
  check.require(values_dtype == kF32 || values_dtype == ffi::DataType::BF16,
                "values: expected BF16 or F32");

  StoreCall call;
  StoreParams& p = call.params;
  const auto stride = [](bool is_per_group, int64_t size) {
    return is_per_group ? static_cast<uint32_t>(size) : 0;
  };
  p.values_stride =
      stride(check.maybe_shared("values", b.values, values_dtype, {count, head_dim}), count);
  p.slots_stride = stride(check.maybe_shared("slots", b.slots, kI32, {count}), count);
  p.positions_stride = stride(check.maybe_shared("positions", b.positions, kI32, {count}), count);
  p.weight_stride = stride(
      check.maybe_shared("norm_weight", b.norm_weight, kF32, {has_weight ? head_dim : 0}), 1);
  p.table_stride = check.maybe_shared("cos_sin_cache", b.table, kF32, {num_positions, kRopeDim})
                       ? num_positions
                       : 0;
  p.layer_stride = stride(check.maybe_shared("layer", b.layer, kI32, {has_layer_operand}), 1);
  check.per_group("records.pool", b.pool, kU8, pool);
  check.per_group("records.pool result", b.pool_out, kU8, pool);
  check.aliases("records.pool", b.pool, b.pool_out);
  check.require(a.layer >= kNoLayer && (a.layer == kNoLayer || a.layer < num_layers) &&
                    (a.layer == kNoLayer || !has_layer_operand),
                "layer: expected an index of one of the pool's layers, in the attribute or in the "
                "operand");
  check.require(page_bytes % 4 == 0 && page_bytes / record_bytes >= a.page_size,
                "records.pool: expected pages of a multiple of 4 bytes that hold page_size records "
                "of " +
                    std::to_string(record_bytes) + " bytes, got " + std::to_string(page_bytes));
  const int64_t groups = check.num_groups();
  check.require(product_of({groups, count}) <= kInt32Max,
                "values: groups times values must be below 2^31");
  check.require(num_positions <= kInt32Max && num_layers <= kInt32Max && num_pages <= kInt32Max,
                "cos_sin_cache, records.pool: positions, layers and pages must be below 2^31");
  if (!check.ok()) return failure();

  call.format = a.format;
  call.head_dim = head_dim;
  call.empty = groups * count == 0 || product_of(pool) == 0;
  p.values = b.values.untyped_data();
  p.slots = static_cast<const int32_t*>(b.slots.untyped_data());
  p.positions = static_cast<const int32_t*>(b.positions.untyped_data());
  p.norm_weight = has_weight ? static_cast<const float*>(b.norm_weight.untyped_data()) : nullptr;
  p.table = num_positions != 0 ? static_cast<const float*>(b.table.untyped_data()) : nullptr;
  p.layer = has_layer_operand ? static_cast<const int32_t*>(b.layer.untyped_data()) : nullptr;
  p.pool = static_cast<uint8_t*>(b.pool.untyped_data()) +
           std::max<int64_t>(a.layer, 0) * num_pages * page_bytes;
  p.num_groups = static_cast<uint32_t>(groups);
  p.num_values = static_cast<uint32_t>(count);
  p.num_positions = static_cast<uint32_t>(num_positions);
  p.num_layers = static_cast<uint32_t>(num_layers);
  p.num_pages = static_cast<uint32_t>(num_pages);
  p.page_size = Divisor(static_cast<uint32_t>(a.page_size));
  p.page_bytes = page_bytes;
  p.group_pages = num_layers * num_pages;
  p.values_are_bf16 = values_dtype == ffi::DataType::BF16;
  p.is_16b_aligned = (page_bytes | reinterpret_cast<intptr_t>(p.pool)) % 16 == 0;
  p.options = {a.rms_norm_eps, a.interleaved, a.hadamard, a.scale_floor, a.scales, a.rounding};
  return call;
}

}  // namespace jax_dsv4

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::jax_dsv4::StoreAttributes, ::xla::ffi::StructMember<::jax_dsv4::RecordFormat>("format"),
    ::xla::ffi::StructMember<int64_t>("page_size"),
    ::xla::ffi::StructMember<::jax_dsv4::Scales>("scales"),
    ::xla::ffi::StructMember<bool>("scale_floor"), ::xla::ffi::StructMember<float>("rms_norm_eps"),
    ::xla::ffi::StructMember<bool>("interleaved"), ::xla::ffi::StructMember<bool>("hadamard"),
    ::xla::ffi::StructMember<::jax_dsv4::Rounding>("rounding"),
    ::xla::ffi::StructMember<int64_t>("layer"), ::xla::ffi::StructMember<int64_t>("geometry"));
