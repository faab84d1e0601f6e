// Reading records as a custom call: its operands, results and attributes, what it works on, and the
// one function that checks the former and fills the latter. Shared by the CPU and CUDA handlers.
#pragma once

#include <cstdint>

#include "dequantize.h"
#include "operands.h"
#include "record_call.h"
#include "record_pool.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {

struct DequantizeAttributes {
  RecordFormat format;
  int64_t page_size;
  Scales scales;
  int64_t layer;     // of the pool, known when compiled; -1: see the operand `layer`
  int64_t geometry;  // -1: there is one only
};

struct DequantizeCall {
  RecordFormat format;
  int64_t head_dim;
  bool empty;  // no slot at all
  DequantizeParams params;
};

// Operands, in this order: slots [*G, N] i32, pool and layer as in PoolOperands, each of which all
// groups may share. The result: values [*G, N, D] f32.
inline ffi::ErrorOr<DequantizeCall> check_dequantize(ffi::RemainingArgs operands,
                                                     ffi::RemainingRets results,
                                                     const DequantizeAttributes& a) {
  constexpr auto kU8 = ffi::DataType::U8;
  OperandChecker check("dequantize_records");
  const auto failure = [&] { return ffi::Unexpected(check.error()); };
  check.require_counts(operands, 3, results, 1);
  if (!check.ok()) return failure();
  const ffi::AnyBuffer slots = *operands.get<ffi::AnyBuffer>(0);
  const ffi::AnyBuffer values = **results.get<ffi::AnyBuffer>(0);
  const PoolOperands o{*operands.get<ffi::AnyBuffer>(1),
                       *operands.get<ffi::AnyBuffer>(2),
                       a.layer,
                       a.format,
                       a.scales,
                       a.page_size};
  check.require_rank("slots", slots, 1, "N");
  check.require_rank("values", values, 2, "N, head_dim");
  check_pool_operands(check, o);
  check.require(a.geometry == -1, "geometry: expected -1");
  if (!check.ok()) return failure();

  const auto dims = slots.dimensions();
  const int64_t count = dims.back(), head_dim = values.dimensions().back();
  const int64_t record_bytes = compiled_record_bytes(check, a.format, head_dim);
  if (!check.ok()) return failure();
  check.set_groups({dims.begin(), dims.end() - 1});
  check.per_group("slots", slots, ffi::DataType::S32, {count});
  check.per_group("values", values, ffi::DataType::F32, {count, head_dim});
  const bool is_per_group = check.maybe_shared("records.pool", o.pool, kU8, pool_dims(o));
  const RecordPool pool = check_pool(check, o, record_bytes, !is_per_group);
  const int64_t total = product_of({check.num_groups(), count});
  check.require(total <= kInt32Max, "slots: groups times slots must be below 2^31");
  if (!check.ok()) return failure();

  return DequantizeCall{
      a.format,
      head_dim,
      total == 0,
      {static_cast<const int32_t*>(slots.untyped_data()), pool,
       static_cast<float*>(values.untyped_data()), static_cast<uint32_t>(check.num_groups()),
       static_cast<uint32_t>(count), a.scales}};
}

}  // namespace jax_dsv4

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(::jax_dsv4::DequantizeAttributes,
                                      ::xla::ffi::StructMember<::jax_dsv4::RecordFormat>("format"),
                                      ::xla::ffi::StructMember<int64_t>("page_size"),
                                      ::xla::ffi::StructMember<::jax_dsv4::Scales>("scales"),
                                      ::xla::ffi::StructMember<int64_t>("layer"),
                                      ::xla::ffi::StructMember<int64_t>("geometry"));
