// The decode operation as a custom call: its operands, results and attributes, and the one function
// that checks them and fills DecodeParams. Shared by the CPU and CUDA handlers; and its checks of a
// step's operands by other operations that make one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <optional>

#include "config.h"
#include "decode.h"
#include "operands.h"
#include "tuning.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {

struct DecodeAttributes {
  int64_t compress_ratio;
  bool overlap;
  int64_t next_n;
  int64_t layer;  // of the state, known when compiled; kNoLayer: see the operand `layer`
  DType kv_score_dtype;
  StateFormat state_format;
  DType state_dtype;
  DType out_dtype;
  int64_t geometry;  // index into GeometriesOf<Kind>::List; kAutoGeometry: ours to choose
};
inline constexpr int64_t kNoLayer = -1, kAutoGeometry = -1;

// What one compressor's step works on, whatever says which of the new rows are a request's. *G: any
// number of leading group dimensions; a read-only operand has either the state's, or all ones where
// the groups share it. *N: the new rows, [B, next_n], or [T] of a ragged batch. `layers` is there
// if the call names a layer, by its attribute or its operand.
struct StepOperands {
  ffi::AnyBuffer kv_score;      // [*G, *N, 2 S], or kv alone [*G, *N, S]
  ffi::AnyBuffer new_score;     // like kv alone, and its scores; else [*G, 0...]
  ffi::AnyBuffer ape;           // [*G, R, S] f32, or [*G, 0, S]: no bias
  ffi::AnyBuffer kv;            // [*G, (layers,) num_pages, page_size, S]  state
  ffi::AnyBuffer score;         // [*G, (layers,) num_pages, page_size, S]  state
  ffi::AnyBuffer kv_tables;     // [*G, B, max_pages] i32
  ffi::AnyBuffer score_tables;  // [*G, B, max_pages] i32
  ffi::AnyBuffer kv_lens;       // [*G, B] i32
  ffi::AnyBuffer layer;         // [*G, 1] i32, or [*G, 0]: none, or the attribute
  // Results.
  ffi::AnyBuffer kv_out;     // aliases kv
  ffi::AnyBuffer score_out;  // aliases score
  // Attributes.
  std::optional<int64_t> next_n;  // none: a ragged batch
  int64_t layer_index;
  StateFormat state_format;
  // Where `kv_score` may be wider, for it holds columns of others, too: the first of ours.
  std::optional<int64_t> column = std::nullopt;

  bool has_layer_operand() const { return layer.dimensions().back() != 0; }
  bool has_layers() const { return has_layer_operand() || layer_index != kNoLayer; }
  // Of the state, without group dimensions.
  ptrdiff_t rank() const { return has_layers() ? 4 : 3; }
  Dims groups() const { return {kv.dimensions().begin(), kv.dimensions().end() - rank()}; }
};

// All that can be said before configuration and groups are known: ranks first, for all sizes are
// read from the operands.
inline void check_step_operands(OperandChecker& check, const StepOperands& o) {
  check.require_rank("kv_lens", o.kv_lens, 1, "batch");
  check.require_rank("layer", o.layer, 1, "0 or 1");
  check.require_rank("kv_tables", o.kv_tables, 2, "batch, max_pages");
  check.require_rank("ape", o.ape, 2, "compress_ratio, state_dim");
  check.require_rank("kv_score", o.kv_score, o.next_n ? 3 : 2,
                     o.next_n ? "batch, next_n, 2 state_dim" : "rows, 2 state_dim");
  if (!check.ok()) return;
  check.require_rank("state.kv", o.kv, o.rank(),
                     o.has_layers() ? "layers, num_pages, page_size, state_dim"
                                    : "num_pages, page_size, state_dim");
  check.require(!o.next_n || (*o.next_n >= 1 && *o.next_n <= kInt32Max),
                "next_n: expected 1 to 2^31 - 1");
  check.require(static_cast<size_t>(o.state_format) < std::size(kStateFormatNames),
                "state_format: expected 0 (raw) or 1 (prefix)");
  check.require(!o.column || (*o.column >= 0 && *o.column <= kInt32Max),
                "column: expected 0 to 2^31 - 1");
}

// Returns the number of the kind's geometries.
inline int64_t check_selection(OperandChecker& check, const Selection& selection,
                               StateFormat format) {
  int64_t num_geometries = 0;
  const bool is_compiled = visit_config(selection, [&](auto config) {
    num_geometries = GeometriesOf<typename decltype(config)::KindType>::List::kSize;
  });
  check.require(is_compiled, "no compiled configuration for head_dim ", selection.head_dim,
                ", compress_ratio ", selection.compress_ratio, ", overlap ",
                selection.overlap ? "true" : "false", ", kv_score ", selection.kv_score, ", state ",
                selection.state, ", kv_comp ", selection.out,
                "; jax_dsv4._cpu.KINDS and DTYPES are compiled");
  check.require(may_hold(selection.state, format),
                "state_dtype: expected F32 in this state_format, got ", selection.state);
  return num_geometries;
}

// The operands but those that say how long requests are, once the groups are known; without
// `kv_comp`.
inline DecodeParams check_step(OperandChecker& check, const StepOperands& o,
                               const Selection& selection) {
  // Rows are numbered in 32 bits, over all groups and layers; kNowhere is none of them, nor is a
  // row of a page that starts near it.
  constexpr int64_t kMaxRows = (int64_t{1} << 32) - 16;
  const int64_t R = selection.compress_ratio, S = selection.state_dim();
  const Dims kv_dims = dims_of(o.kv);
  Dims state_dims(kv_dims.end() - o.rank(), kv_dims.end());  // of one group
  state_dims.back() = S;
  const int64_t num_layers = o.has_layers() ? state_dims.front() : 1;
  const int64_t num_pages = *(state_dims.end() - 3), page_size = *(state_dims.end() - 2);
  const int64_t batch = o.kv_lens.dimensions().back();
  const int64_t max_pages = o.kv_tables.dimensions().back();
  const bool has_ape = o.ape.dimensions()[o.ape.dimensions().size() - 2] != 0;
  const int64_t width = o.kv_score.dimensions().back();
  const bool is_pair = width == S;
  const int64_t column = o.column.value_or(0), end_column = column + (is_pair ? S : 2 * S);
  const int64_t num_rows = o.next_n ? *o.next_n : *(o.kv_score.dimensions().end() - 2);
  Dims rows{num_rows, o.column ? std::max(width, end_column) : end_column};
  if (o.next_n) rows.insert(rows.begin(), batch);

  DecodeParams p{};
  const auto new_type = data_type_of(selection.kv_score),
             state_type = data_type_of(selection.state);
  const auto stride = [&](const char* name, ffi::AnyBuffer x, const Dims& core) {
    return check.maybe_shared(name, x, ffi::DataType::S32, core) ? static_cast<uint32_t>(batch) : 0;
  };
  check.per_group("state.kv", o.kv, state_type, state_dims);
  check.per_group("state.score", o.score, state_type, state_dims);
  const bool per_group = check.maybe_shared("kv_score", o.kv_score, new_type, rows);
  const bool score_per_group = check.maybe_shared("kv_score[1]", o.new_score, new_type,
                                                  is_pair ? rows : Dims(rows.size(), 0));
  check.require(!is_pair || per_group == score_per_group,
                "kv_score[1]: expected the group dimensions of kv_score");
  p.kv_score_stride = !per_group ? 0 : o.next_n ? static_cast<uint32_t>(batch) : 1;
  p.ape_stride = check.maybe_shared("ape", o.ape, ffi::DataType::F32, {has_ape ? R : 0, S});
  p.kv_tables_stride = stride("kv_tables", o.kv_tables, {batch, max_pages});
  p.score_tables_stride = stride("score_tables", o.score_tables, {batch, max_pages});
  check.per_group("state.kv result", o.kv_out, state_type, state_dims);
  check.per_group("state.score result", o.score_out, state_type, state_dims);
  check.aliases("state", o.kv, o.kv_out);
  check.aliases("state", o.score, o.score_out);
  check.require(o.layer_index == kNoLayer ||
                    (o.layer_index >= 0 && o.layer_index < num_layers && !o.has_layer_operand()),
                "layer: expected an index of one of the state's layers, in the attribute or in the "
                "operand");
  check.require(page_size >= 1 && page_size <= kInt32Max, "page_size: expected 1 to 2^31 - 1");
  const int64_t groups = check.num_groups();
  check.require(product_of({groups, batch}) <= kInt32Max && max_pages <= kInt32Max,
                "kv_tables: requests and max_pages must be below 2^31");
  check.require(product_of({std::max<int64_t>(groups, 1), std::max<int64_t>(num_layers, 1),
                            num_pages, page_size}) <= kMaxRows,
                "state: more than 2^32 - 16 rows");
  const int64_t num_windows = o.next_n ? (num_rows + R - 1) / R : num_rows / R + batch;
  check.require(rows.back() <= kInt32Max, "kv_score: columns must be below 2^31");
  check.require(num_windows <= kInt32Max, "kv_comp: rows must be below 2^31");
  if (!check.ok()) return {};

  const int64_t first_byte =
      std::max<int64_t>(o.layer_index, 0) * num_pages * page_size * S * size_of(selection.state);
  p.kv = static_cast<char*>(o.kv.untyped_data()) + first_byte;
  p.score = static_cast<char*>(o.score.untyped_data()) + first_byte;
  p.kv_score =
      static_cast<const char*>(o.kv_score.untyped_data()) + column * size_of(selection.kv_score);
  p.row_size = static_cast<uint32_t>(rows.back());
  p.score_offset = S;
  if (is_pair) {
    p.score_offset = (reinterpret_cast<intptr_t>(o.new_score.untyped_data()) -
                      reinterpret_cast<intptr_t>(p.kv_score)) /
                     size_of(selection.kv_score);
  }
  p.ape = has_ape ? static_cast<const float*>(o.ape.untyped_data()) : nullptr;
  p.kv_tables = static_cast<const int32_t*>(o.kv_tables.untyped_data());
  p.score_tables = static_cast<const int32_t*>(o.score_tables.untyped_data());
  p.num_groups = static_cast<uint32_t>(groups);
  p.batch = static_cast<uint32_t>(batch);
  p.next_n = static_cast<int32_t>(num_rows);
  p.num_windows = static_cast<int32_t>(num_windows);
  p.num_layers = static_cast<uint32_t>(num_layers);
  p.rows_per_layer = static_cast<uint32_t>(num_pages * page_size);
  p.rows_per_group = static_cast<uint32_t>(num_layers * num_pages * page_size);
  p.paging = {static_cast<uint32_t>(max_pages),
              static_cast<uint32_t>(std::min(num_pages, kInt32Max + 1)),
              Divisor(static_cast<uint32_t>(page_size))};
  return p;
}

// The operands that say how long requests are, and which layer is theirs.
inline void check_requests(OperandChecker& check, const StepOperands& o, DecodeParams& p) {
  const bool lens_per_group =
      check.maybe_shared("kv_lens", o.kv_lens, ffi::DataType::S32, {p.batch});
  p.kv_lens_stride = lens_per_group ? p.batch : 0;
  p.layer_stride =
      check.maybe_shared("layer", o.layer, ffi::DataType::S32, {o.has_layer_operand()});
  p.kv_lens = static_cast<const int32_t*>(o.kv_lens.untyped_data());
  p.layer = o.has_layer_operand() ? static_cast<const int32_t*>(o.layer.untyped_data()) : nullptr;
}

// How many of a request's rows are real: [*G, B] i32, or [*G, 0]: next_n for every request.
inline void check_q_lens(OperandChecker& check, ffi::AnyBuffer q_lens, DecodeParams& p) {
  const bool has_q_lens = q_lens.dimensions().back() != 0;
  const bool per_group =
      check.maybe_shared("q_lens", q_lens, ffi::DataType::S32, {has_q_lens ? p.batch : 0});
  p.q_lens_stride = per_group ? p.batch : 0;
  p.q_lens = has_q_lens ? static_cast<const int32_t*>(q_lens.untyped_data()) : nullptr;
}

// A checked call.
struct DecodeCall {
  Selection selection;
  StateFormat state_format;
  int64_t geometry;
  bool empty;  // no request at all: nothing to do
  DecodeParams params;
};

// Operands, in this order: those of StepOperands, with q_lens before `layer`. Results: kv_comp
// [*G, B, ceil(next_n / R), D], then those of StepOperands.
inline ffi::ErrorOr<DecodeCall> check_decode(ffi::RemainingArgs operands,
                                             ffi::RemainingRets results,
                                             const DecodeAttributes& a) {
  OperandChecker check("paged_kv_compress");
  const auto failure = [&] { return ffi::Unexpected(check.error()); };
  check.require_counts(operands, 10, results, 3);
  if (!check.ok()) return failure();
  const auto arg = [&](size_t i) { return *operands.get<ffi::AnyBuffer>(i); };
  const auto ret = [&](size_t i) { return **results.get<ffi::AnyBuffer>(i); };
  const ffi::AnyBuffer kv_comp = ret(0), q_lens = arg(8);
  const StepOperands o{arg(0), arg(1), arg(2), arg(3), arg(4),   arg(5),  arg(6),
                       arg(7), arg(9), ret(1), ret(2), a.next_n, a.layer, a.state_format};
  check_step_operands(check, o);
  check.require_rank("q_lens", q_lens, 1, "batch");
  check.require_rank("kv_comp", kv_comp, 2, "batch, num_windows, head_dim");
  if (!check.ok()) return failure();

  const int64_t D = kv_comp.dimensions().back();
  DecodeCall call;
  call.selection = {D, a.compress_ratio, a.overlap, a.kv_score_dtype, a.state_dtype, a.out_dtype};
  call.state_format = a.state_format;
  call.geometry = a.geometry;
  const int64_t num_geometries = check_selection(check, call.selection, a.state_format);
  check.require(a.geometry >= kAutoGeometry && a.geometry < num_geometries,
                "geometry: expected -1, or the index of one that is compiled");
  if (!check.ok()) return failure();

  check.set_groups(o.groups());
  DecodeParams& p = call.params;
  p = check_step(check, o, call.selection);
  check_requests(check, o, p);
  check_q_lens(check, q_lens, p);
  check.per_group("kv_comp", kv_comp, data_type_of(a.out_dtype), {p.batch, p.num_windows, D});
  if (!check.ok()) return failure();
  call.empty = p.num_groups * int64_t{p.batch} == 0;
  p.kv_comp = kv_comp.untyped_data();
  return call;
}

}  // namespace jax_dsv4

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::jax_dsv4::DecodeAttributes, ::xla::ffi::StructMember<int64_t>("compress_ratio"),
    ::xla::ffi::StructMember<bool>("overlap"), ::xla::ffi::StructMember<int64_t>("next_n"),
    ::xla::ffi::StructMember<int64_t>("layer"),
    ::xla::ffi::StructMember<::jax_dsv4::DType>("kv_score_dtype"),
    ::xla::ffi::StructMember<::jax_dsv4::StateFormat>("state_format"),
    ::xla::ffi::StructMember<::jax_dsv4::DType>("state_dtype"),
    ::xla::ffi::StructMember<::jax_dsv4::DType>("out_dtype"),
    ::xla::ffi::StructMember<int64_t>("geometry"));
