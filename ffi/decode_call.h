// The decode operation as a custom call: its operands, results and attributes, and the one function
// that checks them and fills DecodeParams. Shared by the CPU and CUDA handlers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>

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

// In the order of the call. *G: any number of leading group dimensions; a read-only operand has
// either the state's, or all ones where the groups share it. `layers` is there if the call names a
// layer, by its attribute or its operand.
struct DecodeBuffers {
  ffi::AnyBuffer kv_score;      // [*G, B, next_n, 2 S], or kv alone [*G, B, next_n, S]
  ffi::AnyBuffer new_score;     // like kv alone, and its scores; else [*G, 0, 0, 0]
  ffi::AnyBuffer ape;           // [*G, R, S] f32, or [*G, 0, S]: no bias
  ffi::AnyBuffer kv;            // [*G, (layers,) num_pages, page_size, S]  state
  ffi::AnyBuffer score;         // [*G, (layers,) num_pages, page_size, S]  state
  ffi::AnyBuffer kv_tables;     // [*G, B, max_pages] i32
  ffi::AnyBuffer score_tables;  // [*G, B, max_pages] i32
  ffi::AnyBuffer kv_lens;       // [*G, B] i32
  ffi::AnyBuffer q_lens;        // [*G, B] i32, or [*G, 0]: next_n for every request
  ffi::AnyBuffer layer;         // [*G, 1] i32, or [*G, 0]: none, or the attribute
  // Results.
  ffi::AnyBuffer kv_comp;    // [*G, B, ceil(next_n / R), D]
  ffi::AnyBuffer kv_out;     // aliases kv
  ffi::AnyBuffer score_out;  // aliases score
};

// A checked call.
struct DecodeCall {
  Selection selection;
  StateFormat state_format;
  int64_t geometry;
  bool empty;  // no request at all: nothing to do
  DecodeParams params;
};

inline ffi::ErrorOr<DecodeCall> check_decode(ffi::RemainingArgs operands,
                                             ffi::RemainingRets results,
                                             const DecodeAttributes& a) {
  constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();
  // Rows are numbered in 32 bits, over all groups and layers; kNowhere is none of them, nor is a
  // row of a page that starts near it.
  constexpr int64_t kMaxRows = (int64_t{1} << 32) - 16;
  OperandChecker check("paged_kv_compress");
  const auto failure = [&] { return ffi::Unexpected(check.error()); };
  check.require_counts(operands, 10, results, 3);
  if (!check.ok()) return failure();
  const auto arg = [&](size_t i) { return *operands.get<ffi::AnyBuffer>(i); };
  const auto ret = [&](size_t i) { return **results.get<ffi::AnyBuffer>(i); };
  const DecodeBuffers b{arg(0), arg(1), arg(2), arg(3), arg(4), arg(5), arg(6),
                        arg(7), arg(8), arg(9), ret(0), ret(1), ret(2)};

  // Ranks first: all sizes are read from the operands.
  check.require_rank("kv_lens", b.kv_lens, 1, "batch");
  check.require_rank("layer", b.layer, 1, "0 or 1");
  check.require_rank("kv_tables", b.kv_tables, 2, "batch, max_pages");
  check.require_rank("ape", b.ape, 2, "compress_ratio, state_dim");
  check.require_rank("q_lens", b.q_lens, 1, "batch");
  check.require_rank("kv_score", b.kv_score, 3, "batch, next_n, 2 state_dim");
  check.require_rank("kv_comp", b.kv_comp, 2, "batch, num_windows, head_dim");
  if (!check.ok()) return failure();
  const bool has_layer_operand = b.layer.dimensions().back() != 0;
  const bool has_layers = has_layer_operand || a.layer != kNoLayer;
  const int pool_rank = has_layers ? 4 : 3;
  check.require_rank(
      "state.kv", b.kv, pool_rank,
      has_layers ? "layers, num_pages, page_size, state_dim" : "num_pages, page_size, state_dim");
  check.require(a.next_n >= 1 && a.next_n <= kInt32Max, "next_n: expected 1 to 2^31 - 1");
  check.require(static_cast<size_t>(a.state_format) < std::size(kStateFormatNames),
                "state_format: expected 0 (raw) or 1 (prefix)");
  if (!check.ok()) return failure();

  // The configuration.
  const int64_t D = b.kv_comp.dimensions().back(), R = a.compress_ratio;
  DecodeCall call;
  call.state_format = a.state_format;
  call.geometry = a.geometry;
  call.selection = {D, R, a.overlap, a.kv_score_dtype, a.state_dtype, a.out_dtype};
  int64_t num_geometries = 0;
  const bool is_compiled = visit_config(call.selection, [&](auto config) {
    num_geometries = GeometriesOf<typename decltype(config)::KindType>::List::kSize;
  });
  check.require(is_compiled, "no compiled configuration for head_dim ", D, ", compress_ratio ", R,
                ", overlap ", a.overlap ? "true" : "false", ", kv_score ", a.kv_score_dtype,
                ", state ", a.state_dtype, ", kv_comp ", a.out_dtype,
                "; jax_dsv4._cpu.KINDS and DTYPES are compiled");
  if (!check.ok()) return failure();
  check.require(may_hold(a.state_dtype, a.state_format),
                "state_dtype: expected F32 in this state_format, got ", a.state_dtype);
  check.require(a.geometry >= kAutoGeometry && a.geometry < num_geometries,
                "geometry: expected -1, or the index of one that is compiled");

  // Shapes and dtypes.
  const int64_t S = call.selection.state_dim();
  const Dims kv_dims = dims_of(b.kv);
  check.set_groups({kv_dims.begin(), kv_dims.end() - pool_rank});
  Dims state_dims(kv_dims.end() - pool_rank, kv_dims.end());  // of one group
  state_dims.back() = S;
  const int64_t num_layers = has_layers ? state_dims.front() : 1;
  const int64_t num_pages = *(state_dims.end() - 3), page_size = *(state_dims.end() - 2);
  const int64_t batch = b.kv_lens.dimensions().back();
  const int64_t max_pages = b.kv_tables.dimensions().back();
  const int64_t num_windows = (a.next_n + R - 1) / R;
  const bool has_ape = b.ape.dimensions()[b.ape.dimensions().size() - 2] != 0;
  const bool has_q_lens = b.q_lens.dimensions().back() != 0;
  const bool is_pair = b.kv_score.dimensions().back() == S;
  const Dims rows{batch, a.next_n, is_pair ? S : 2 * S};

  DecodeParams& p = call.params;
  const auto new_type = data_type_of(a.kv_score_dtype), state_type = data_type_of(a.state_dtype);
  const auto stride = [&](const char* name, ffi::AnyBuffer x, const Dims& core, int64_t size) {
    return check.maybe_shared(name, x, ffi::DataType::S32, core) ? static_cast<uint32_t>(size) : 0;
  };
  check.per_group("state.kv", b.kv, state_type, state_dims);
  check.per_group("state.score", b.score, state_type, state_dims);
  const bool per_group = check.maybe_shared("kv_score", b.kv_score, new_type, rows);
  const bool score_per_group =
      check.maybe_shared("kv_score[1]", b.new_score, new_type, is_pair ? rows : Dims{0, 0, 0});
  check.require(!is_pair || per_group == score_per_group,
                "kv_score[1]: expected the group dimensions of kv_score");
  p.kv_score_stride = per_group ? static_cast<uint32_t>(batch) : 0;
  p.ape_stride = check.maybe_shared("ape", b.ape, ffi::DataType::F32, {has_ape ? R : 0, S});
  p.kv_tables_stride = stride("kv_tables", b.kv_tables, {batch, max_pages}, batch);
  p.score_tables_stride = stride("score_tables", b.score_tables, {batch, max_pages}, batch);
  p.kv_lens_stride = stride("kv_lens", b.kv_lens, {batch}, batch);
  p.q_lens_stride = stride("q_lens", b.q_lens, {has_q_lens ? batch : 0}, batch);
  p.layer_stride = stride("layer", b.layer, {has_layer_operand}, 1);
  check.per_group("kv_comp", b.kv_comp, data_type_of(a.out_dtype), {batch, num_windows, D});
  check.per_group("state.kv result", b.kv_out, state_type, state_dims);
  check.per_group("state.score result", b.score_out, state_type, state_dims);
  check.aliases("state", b.kv, b.kv_out);
  check.aliases("state", b.score, b.score_out);
  check.require(a.layer == kNoLayer || (a.layer >= 0 && a.layer < num_layers && !has_layer_operand),
                "layer: expected an index of one of the state's layers, in the attribute or in the "
                "operand");
  check.require(page_size >= 1 && page_size <= kInt32Max, "page_size: expected 1 to 2^31 - 1");
  const int64_t groups = check.num_groups();
  check.require(product_of({groups, batch}) <= kInt32Max && max_pages <= kInt32Max,
                "kv_tables: requests and max_pages must be below 2^31");
  check.require(product_of({std::max<int64_t>(groups, 1), std::max<int64_t>(num_layers, 1),
                            num_pages, page_size}) <= kMaxRows,
                "state: more than 2^32 - 16 rows");
  if (!check.ok()) return failure();

  const int64_t first_byte =
      std::max<int64_t>(a.layer, 0) * num_pages * page_size * S * size_of(a.state_dtype);
  call.empty = groups * batch == 0;
  p.kv = static_cast<char*>(b.kv.untyped_data()) + first_byte;
  p.score = static_cast<char*>(b.score.untyped_data()) + first_byte;
  p.kv_score = b.kv_score.untyped_data();
  p.row_size = static_cast<uint32_t>(rows.back());
  p.score_offset = S;
  if (is_pair) {
    p.score_offset = (reinterpret_cast<intptr_t>(b.new_score.untyped_data()) -
                      reinterpret_cast<intptr_t>(p.kv_score)) /
                     size_of(a.kv_score_dtype);
  }
  p.ape = has_ape ? static_cast<const float*>(b.ape.untyped_data()) : nullptr;
  p.kv_tables = static_cast<const int32_t*>(b.kv_tables.untyped_data());
  p.score_tables = static_cast<const int32_t*>(b.score_tables.untyped_data());
  p.kv_lens = static_cast<const int32_t*>(b.kv_lens.untyped_data());
  p.q_lens = has_q_lens ? static_cast<const int32_t*>(b.q_lens.untyped_data()) : nullptr;
  p.layer = has_layer_operand ? static_cast<const int32_t*>(b.layer.untyped_data()) : nullptr;
  p.kv_comp = b.kv_comp.untyped_data();
  p.num_groups = static_cast<uint32_t>(groups);
  p.batch = static_cast<uint32_t>(batch);
  p.next_n = static_cast<int32_t>(a.next_n);
  p.num_windows = static_cast<int32_t>(num_windows);
  p.num_layers = static_cast<uint32_t>(num_layers);
  p.rows_per_layer = static_cast<uint32_t>(num_pages * page_size);
  p.rows_per_group = static_cast<uint32_t>(num_layers * num_pages * page_size);
  p.paging = {static_cast<uint32_t>(max_pages),
              static_cast<uint32_t>(std::min(num_pages, kInt32Max + 1)),
              Divisor(static_cast<uint32_t>(page_size))};
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
