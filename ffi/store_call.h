// Storing records as a custom call: its operands, results and attributes, and the one function that
// checks them and fills StoreParams. Shared by the CPU and CUDA handlers.
#pragma once

#include <cstdint>

#include "operands.h"
#include "record_call.h"
#include "store.h"
#include "xla/ffi/api/ffi.h"

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

// In the order of the call; groups as in StepOperands.
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
  constexpr auto kI32 = ffi::DataType::S32, kU8 = ffi::DataType::U8;
  OperandChecker check("store_records");
  const auto failure = [&] { return ffi::Unexpected(check.error()); };
  check.require_counts(operands, 7, results, 1);
  if (!check.ok()) return failure();
  const auto arg = [&](size_t i) { return *operands.get<ffi::AnyBuffer>(i); };
  const StoreBuffers b{arg(0), arg(1), arg(2), arg(3),
                       arg(4), arg(5), arg(6), **results.get<ffi::AnyBuffer>(0)};
  const PoolOperands o{b.pool, b.layer, a.layer, a.format, a.scales, a.page_size};
  const RecordOperands made_with{
      b.norm_weight,
      b.table,
      a.format,
      {a.rms_norm_eps, a.interleaved, a.hadamard, a.scale_floor, a.scales, a.rounding}};

  check.require_rank("values", b.values, 2, "N, head_dim");
  check_pool_operands(check, o);
  check_record_operands(check, made_with);
  check.require(a.geometry == -1, "geometry: expected -1");
  if (!check.ok()) return failure();

  const Dims dims = pool_dims(o);
  check.set_groups({b.pool.dimensions().begin(), b.pool.dimensions().end() - o.rank()});
  const int64_t head_dim = b.values.dimensions().back();
  const int64_t record_bytes = compiled_record_bytes(check, a.format, head_dim);
  if (!check.ok()) return failure();
  const int64_t count = b.values.dimensions()[b.values.dimensions().size() - 2];
  const ffi::DataType values_dtype = b.values.element_type();
  check.require(values_dtype == ffi::DataType::F32 || values_dtype == ffi::DataType::BF16,
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
  const RecordInputs inputs = check_record_inputs(check, made_with, head_dim);
  check.per_group("records.pool", b.pool, kU8, dims);
  check.per_group("records.pool result", b.pool_out, kU8, dims);
  check.aliases("records.pool", b.pool, b.pool_out);
  p.pool = check_pool(check, o, record_bytes, /*is_shared=*/false);
  const int64_t groups = check.num_groups();
  check.require(product_of({groups, count}) <= kInt32Max,
                "values: groups times values must be below 2^31");
  if (!check.ok()) return failure();

  call.format = a.format;
  call.head_dim = head_dim;
  call.empty = groups * count == 0 || product_of(dims) == 0;
  p.values = b.values.untyped_data();
  p.slots = static_cast<const int32_t*>(b.slots.untyped_data());
  p.positions = static_cast<const int32_t*>(b.positions.untyped_data());
  p.norm_weight = inputs.norm_weight;
  p.table = inputs.table;
  p.num_groups = static_cast<uint32_t>(groups);
  p.num_values = static_cast<uint32_t>(count);
  p.num_positions = inputs.num_positions;
  p.weight_stride = inputs.weight_is_per_group;
  p.table_stride = inputs.table_is_per_group ? inputs.num_positions : 0;
  p.values_are_bf16 = values_dtype == ffi::DataType::BF16;
  p.options = made_with.options;
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
