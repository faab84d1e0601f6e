// A decode step that ends in records as a custom call, of one compressor or of several: operands,
// results and attributes, and the one function that checks them. Shared by the CPU and CUDA
// handlers; and by other operations that end in records.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
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
template <class Params>
struct RecordsCalls {
  std::vector<RecordsCall<Params>> each;  // of the compressors, in their order
  bool empty;                             // no new row at all: nothing to do
  int64_t geometry;
};
using DecodeRecordsCalls = RecordsCalls<DecodeRecordsParams>;

// One compressor's operands, in the order of the call.
struct CompressorOperands {
  StepOperands step;      // up to `score_tables`; kv_lens and layer are last in the call, for all
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

// What says which new rows are a request's, in a decode step: operands and attributes of the call
// for all compressors. Others, of their own operations, have the same members.
struct DecodeLens {
  using Params = DecodeRecordsParams;
  static constexpr const char* kOperation = "decode_records";
  static constexpr size_t kOperands = 1, kAttributes = 1;

  ffi::AnyBuffer q_lens;
  std::optional<int64_t> next_n;

  // From operand(i), i < kOperands, and attribute(name, initial).
  template <class Operand, class Attribute>
  static DecodeLens read(Operand&& operand, Attribute&& attribute) {
    return {operand(0), attribute("next_n", int64_t{})};
  }
  // All that can be said before the groups are known, but for check_step_operands.
  void check_operands(OperandChecker& check, const StepOperands&) const {
    check.require_rank("q_lens", q_lens, 1, "batch");
  }
  void check_requests(OperandChecker& check, const StepOperands& o, const DecodeParams& step,
                      Params& p) const {
    static_cast<DecodeParams&>(p) = step;
    jax_dsv4::check_requests(check, o, p);
    check_q_lens(check, q_lens, p);
  }
};

// Operands: of each compressor kv_score, kv_score[1], ape, state.kv, state.score, kv_tables,
// score_tables, tables.records, norm_weight, cos_sin_cache, records.pool; then kv_lens, those of
// Lens, layer. Results: of each compressor state.kv, state.score, records.pool. The groups are
// those of the first one's state.kv.
template <class Lens>
ffi::ErrorOr<RecordsCalls<typename Lens::Params>> check_records(ffi::RemainingArgs operands,
                                                                ffi::RemainingRets results,
                                                                ffi::Dictionary attributes) {
  using O = CompressorOperands;
  constexpr size_t kLast = Lens::kOperands + 2;      // operands for all compressors
  constexpr size_t kForAll = Lens::kAttributes + 2;  // attributes likewise
  OperandChecker check(Lens::kOperation);
  const auto failure = [&] { return ffi::Unexpected(check.error()); };
  const size_t count = std::max<size_t>(1, results.size() / O::kWritten);
  check.require_counts(operands, O::kCount * count + kLast, results, O::kWritten * count);
  check.require(attributes.size() == count + kForAll, "Wrong number of attributes: expected ",
                count + kForAll, " attributes but got ", attributes.size());
  if (!check.ok()) return failure();
  const auto attribute = [&](const std::string& name, auto initial) {
    const auto got = attributes.get<decltype(initial)>(name);
    if (got) return *got;
    check.require(false, name, ": ", got.error().message());
    return initial;
  };
  const auto last = [&](size_t k) { return *operands.get<ffi::AnyBuffer>(O::kCount * count + k); };
  RecordsCalls<typename Lens::Params> calls;
  calls.geometry = attribute("geometry", int64_t{});
  const Lens lens = Lens::read([&](size_t k) { return last(1 + k); }, attribute);
  const auto layer = attribute("layer", int64_t{});
  check.require(calls.geometry >= kAutoGeometry, "geometry: expected -1 or more");
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
    const auto ret = [&](size_t k) { return **results.get<ffi::AnyBuffer>(O::kWritten * i + k); };
    const ffi::AnyBuffer layer_operand = last(kLast - 1);
    const O o{{arg(0), arg(1), arg(2), arg(3), arg(4), arg(5), arg(6), last(0), layer_operand,
               ret(0), ret(1), lens.next_n, layer, a.state_format, a.column},
              arg(7),
              {arg(8),
               arg(9),
               a.format,
               {a.rms_norm_eps, a.interleaved, a.hadamard, a.scale_floor, a.scales, a.rounding}},
              {arg(10), layer_operand, layer, a.format, a.scales, a.page_size},
              ret(2)};
    set_owner(i);
    check_step_operands(check, o.step);
    lens.check_operands(check, o.step);
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
  std::vector<DecodeParams> steps;
  for (size_t i = 0; i < count; ++i) {
    set_owner(i);
    steps.push_back(check_step(check, each[i].step, calls.each[i].selection));
    check.require(steps[i].next_n == steps[0].next_n,
                  "kv_score: expected as many rows as compressor[0] has");
  }
  check.set_owner("");
  for (size_t i = 0; i < count; ++i) {
    lens.check_requests(check, each[i].step, steps[i], calls.each[i].params);
  }
  for (size_t i = 0; i < count; ++i) {
    set_owner(i);
    auto& call = calls.each[i];
    call.params.records =
        check_record_target(check, each[i], call.selection.head_dim, call.params.batch);
  }
  if (!check.ok()) return failure();
  const DecodeParams& p = steps.front();
  calls.empty = p.num_groups * int64_t{p.batch} == 0 || p.next_n == 0;
  return calls;
}

inline ffi::ErrorOr<DecodeRecordsCalls> check_decode_records(ffi::RemainingArgs operands,
                                                             ffi::RemainingRets results,
                                                             ffi::Dictionary attributes) {
  return check_records<DecodeLens>(operands, results, attributes);
}

}  // namespace jax_dsv4
