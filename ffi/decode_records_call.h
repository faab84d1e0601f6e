// A decode step that ends in records as a custom call, of one compressor or of several: operands,
// results and attributes, and the one function that checks them. Shared by the CPU and CUDA
// handlers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "config.h"
#include "decode_call.h"
#include "decode_records.h"
#include "operands.h"
#include "record_call.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {

// Of one compressor: a dictionary among the call's attributes, "compressor_0" and so on.
struct CompressorAttributes {
  int64_t compress_ratio;
  bool overlap;
  int64_t column;  // of `kv_score`, the first of this compressor's
  DType kv_score_dtype;
  StateFormat state_format;
  DType state_dtype;
  RecordFormat format;
  int64_t page_size;  // of the records
  Scales scales;
  bool scale_floor;
  float rms_norm_eps;
  bool interleaved;
  bool hadamard;
  Rounding rounding;
};

}  // namespace jax_dsv4

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::jax_dsv4::CompressorAttributes, ::xla::ffi::StructMember<int64_t>("compress_ratio"),
    ::xla::ffi::StructMember<bool>("overlap"), ::xla::ffi::StructMember<int64_t>("column"),
    ::xla::ffi::StructMember<::jax_dsv4::DType>("kv_score_dtype"),
    ::xla::ffi::StructMember<::jax_dsv4::StateFormat>("state_format"),
    ::xla::ffi::StructMember<::jax_dsv4::DType>("state_dtype"),
    ::xla::ffi::StructMember<::jax_dsv4::RecordFormat>("format"),
    ::xla::ffi::StructMember<int64_t>("page_size"),
    ::xla::ffi::StructMember<::jax_dsv4::Scales>("scales"),
    ::xla::ffi::StructMember<bool>("scale_floor"), ::xla::ffi::StructMember<float>("rms_norm_eps"),
    ::xla::ffi::StructMember<bool>("interleaved"), ::xla::ffi::StructMember<bool>("hadamard"),
    ::xla::ffi::StructMember<::jax_dsv4::Rounding>("rounding"));

namespace jax_dsv4 {

// A checked call.
struct DecodeRecordsCalls {
  std::vector<DecodeRecordsCall> each;  // of the compressors, in their order
  bool empty;                           // no request at all: nothing to do
  int64_t geometry;
};

// One compressor's operands, in the order of the call.
struct CompressorOperands {
  StepOperands step;      // up to `score_tables`; the others are last in the call, for all
  ffi::AnyBuffer tables;  // [*G, B, max_pages] i32, of the records
  RecordOperands made_with;
  PoolOperands pool;
  ffi::AnyBuffer pool_out;  // aliases the pool

  static constexpr size_t kCount = 11, kWritten = 3;  // state.kv, state.score, records.pool
};

// Where the records go, once the groups are known.
inline RecordTarget check_record_target(OperandChecker& check, const CompressorOperands& o,
                                        int64_t head_dim, int64_t batch) {
  constexpr auto kU8 = ffi::DataType::U8;
  const int64_t record_bytes = compiled_record_bytes(check, o.pool.format, head_dim);
  if (!check.ok()) return {};
  const int64_t max_pages = o.tables.dimensions().back();
  const bool tables_are_per_group =
      check.maybe_shared("tables.records", o.tables, ffi::DataType::S32, {batch, max_pages});
  const RecordInputs inputs = check_record_inputs(check, o.made_with, head_dim);
  check.per_group("records.pool", o.pool.pool, kU8, pool_dims(o.pool));
  check.per_group("records.pool result", o.pool_out, kU8, pool_dims(o.pool));
  check.aliases("records.pool", o.pool.pool, o.pool_out);
  check.require(max_pages <= kInt32Max, "tables.records: max_pages must be below 2^31");
  const RecordPool pool = check_pool(check, o.pool, record_bytes, /*is_shared=*/false);
  if (!check.ok()) return {};

  RecordTarget t;
  t.tables = static_cast<const int32_t*>(o.tables.untyped_data());
  t.norm_weight = inputs.norm_weight;
  t.cos_sin = inputs.table;
  t.pool = pool;
  t.max_pages = static_cast<uint32_t>(max_pages);
  t.num_positions = inputs.num_positions;
  t.tables_stride = tables_are_per_group ? static_cast<uint32_t>(batch) : 0;
  t.weight_stride = inputs.weight_is_per_group;
  t.cos_sin_stride = inputs.table_is_per_group ? inputs.num_positions : 0;
  t.options = o.made_with.options;
  return t;
}

// Operands: of each compressor kv_score, kv_score[1], ape, state.kv, state.score, kv_tables,
// score_tables, tables.records, norm_weight, cos_sin_cache, records.pool; then kv_lens, q_lens,
// layer. Results: of each compressor state.kv, state.score, records.pool. The groups are those of
// the first one's state.kv.
inline ffi::ErrorOr<DecodeRecordsCalls> check_decode_records(ffi::RemainingArgs operands,
                                                             ffi::RemainingRets results,
                                                             ffi::Dictionary attributes) {
  using O = CompressorOperands;
  OperandChecker check("decode_records");
  const auto failure = [&] { return ffi::Unexpected(check.error()); };
  const size_t count = std::max<size_t>(1, results.size() / O::kWritten);
  check.require_counts(operands, O::kCount * count + 3, results, O::kWritten * count);
  check.require(attributes.size() == count + 3, "Wrong number of attributes: expected ", count + 3,
                " attributes but got ", attributes.size());
  if (!check.ok()) return failure();
  const auto attribute = [&](const std::string& name, auto initial) {
    const auto got = attributes.get<decltype(initial)>(name);
    if (got) return *got;
    check.require(false, name, ": ", got.error().message());
    return initial;
  };
  DecodeRecordsCalls calls;
  calls.geometry = attribute("geometry", int64_t{});
  const auto next_n = attribute("next_n", int64_t{}), layer = attribute("layer", int64_t{});
  check.require(calls.geometry >= kAutoGeometry,
                "geometry: expected -1, or the index of one that is compiled");
  std::vector<CompressorAttributes> of_compressors;
  for (size_t i = 0; i < count; ++i) {
    of_compressors.push_back(attribute("compressor_" + std::to_string(i), CompressorAttributes{}));
  }
  if (!check.ok()) return failure();
  const auto set_owner = [&](size_t i) {
    if (count > 1) check.set_owner("compressor[" + std::to_string(i) + "]: ");
  };

  std::vector<O> each;
  for (size_t i = 0; i < count; ++i) {
    const CompressorAttributes& a = of_compressors[i];
    const auto arg = [&](size_t k) { return *operands.get<ffi::AnyBuffer>(O::kCount * i + k); };
    const auto last = [&](size_t k) {
      return *operands.get<ffi::AnyBuffer>(O::kCount * count + k);
    };
    const auto ret = [&](size_t k) { return **results.get<ffi::AnyBuffer>(O::kWritten * i + k); };
    const O o{{arg(0), arg(1), arg(2), arg(3), arg(4), arg(5), arg(6), last(0), last(2), ret(0),
               ret(1), next_n, layer, a.state_format, a.column},
              arg(7),
              {arg(8),
               arg(9),
               a.format,
               {a.rms_norm_eps, a.interleaved, a.hadamard, a.scale_floor, a.scales, a.rounding}},
              {arg(10), last(2), layer, a.format, a.scales, a.page_size},
              ret(2)};
    set_owner(i);
    check_step_operands(check, o.step);
    check.require_rank("q_lens", last(1), 1, "batch");
    check.require_rank("tables.records", o.tables, 2, "batch, max_pages");
    check_record_operands(check, o.made_with);
    check_pool_operands(check, o.pool);
    if (!check.ok()) return failure();
    const int64_t S = o.step.kv.dimensions().back();
    const Selection selection{a.overlap ? S / 2 : S, a.compress_ratio, a.overlap,
                              a.kv_score_dtype,      a.state_dtype,    DType::kF32};
    check_selection(check, selection, a.state_format);
    if (!check.ok()) return failure();
    calls.each.push_back({selection, a.state_format, a.format, {}});
    each.push_back(o);
  }

  check.set_groups(each.front().step.groups());
  for (size_t i = 0; i < count; ++i) {
    set_owner(i);
    DecodeParams& p = calls.each[i].params;
    p = check_step(check, each[i].step, calls.each[i].selection);
  }
  check.set_owner("");
  for (size_t i = 0; i < count; ++i) {
    check_requests(check, each[i].step, calls.each[i].params);
    check_q_lens(check, *operands.get<ffi::AnyBuffer>(O::kCount * count + 1), calls.each[i].params);
  }
  for (size_t i = 0; i < count; ++i) {
    set_owner(i);
    DecodeRecordsCall& call = calls.each[i];
    call.params.records =
        check_record_target(check, each[i], call.selection.head_dim, call.params.batch);
  }
  if (!check.ok()) return failure();
  const DecodeParams& p = calls.each.front().params;
  calls.empty = p.num_groups * int64_t{p.batch} == 0;
  return calls;
}

}  // namespace jax_dsv4
