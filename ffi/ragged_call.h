// A ragged batch as a custom call: operands, results and attributes, and the one function that
// checks them and fills RaggedParams. Shared by the CPU and CUDA handlers; and its checks of what
// says which rows are a request's, by other operations on ragged batches.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "config.h"
#include "decode_call.h"
#include "operands.h"
#include "ragged.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {

struct RaggedAttributes {
  int64_t compress_ratio;
  bool overlap;
  int64_t layer;  // as in DecodeAttributes
  DType kv_score_dtype;
  StateFormat state_format;
  DType state_dtype;
  DType out_dtype;
  int64_t max_rewind;    // kStoreAll: all rows are stored
  int64_t resume_every;  // kNoResume: no step starts at its multiples
  int64_t geometry;      // as in ragged_launch.cuh; kAutoGeometry: ours to choose
};
inline constexpr int64_t kStoreAll = -1, kNoResume = 0;

// What says which of the new rows are a request's, and which of them are stored; of all compressors
// of a call.
struct RaggedOperands {
  ffi::AnyBuffer cu_q_lens;  // [*G, B + 1] i32
  ffi::AnyBuffer num_seqs;   // [*G, 1] i32, or [*G, 0]: B
  // Attributes.
  int64_t max_rewind;
  int64_t resume_every;
};

// All that can be said before configuration and groups are known, but for check_step_operands: call
// that first.
inline void check_ragged_operands(OperandChecker& check, const RaggedOperands& r,
                                  const StepOperands& o) {
  check.require_rank("cu_q_lens", r.cu_q_lens, 1, "batch + 1");
  check.require_rank("num_seqs", r.num_seqs, 1, "0 or 1");
  check.require(r.max_rewind >= kStoreAll && r.max_rewind <= kInt32Max,
                "max_rewind: expected -1 to 2^31 - 1");
  check.require(r.resume_every >= kNoResume && r.resume_every <= kInt32Max,
                "resume_every: expected 0 to 2^31 - 1");
  if (!check.ok()) return;
  check.require(*(o.kv_score.dimensions().end() - 2) <= kInt32Max,
                "kv_score: rows must be below 2^31");
  check.require(o.kv_lens.dimensions().back() < kInt32Max,
                "kv_lens: requests must be below 2^31 - 1");
}

// The same once the groups are known. `step`: from check_step.
inline RaggedParams check_ragged_requests(OperandChecker& check, const RaggedOperands& r,
                                          const StepOperands& o, const DecodeParams& step) {
  RaggedParams p{};
  static_cast<DecodeParams&>(p) = step;
  const int64_t batch = o.kv_lens.dimensions().back();
  const bool has_num_seqs = r.num_seqs.dimensions().back() != 0;
  check_requests(check, o, p);
  const bool per_group =
      check.maybe_shared("cu_q_lens", r.cu_q_lens, ffi::DataType::S32, {batch + 1});
  p.cu_q_lens_stride = per_group ? static_cast<uint32_t>(batch + 1) : 0;
  p.num_seqs_stride =
      check.maybe_shared("num_seqs", r.num_seqs, ffi::DataType::S32, {has_num_seqs});
  check.require(product_of({check.num_groups(), batch + 1}) <= kInt32Max,
                "cu_q_lens: entries must be below 2^31");
  p.cu_q_lens = static_cast<const int32_t*>(r.cu_q_lens.untyped_data());
  p.num_seqs = has_num_seqs ? static_cast<const int32_t*>(r.num_seqs.untyped_data()) : nullptr;
  p.rule.all = r.max_rewind == kStoreAll;
  p.rule.resumes = r.resume_every != kNoResume;
  p.rule.max_rewind = static_cast<int32_t>(std::max<int64_t>(r.max_rewind, 0));
  p.rule.resume_every = Divisor(static_cast<uint32_t>(std::max<int64_t>(r.resume_every, 1)));
  return p;
}

// A checked call.
struct RaggedCall {
  Selection selection;
  StateFormat state_format;
  int64_t geometry;
  bool empty;  // nothing to do, not even zeros to write
  RaggedParams params;
};

// Operands, in this order: those of StepOperands, with cu_q_lens and num_seqs before `layer`.
// Results: kv_comp [*G, T / R + B, D], then those of StepOperands.
inline ffi::ErrorOr<RaggedCall> check_ragged(ffi::RemainingArgs operands,
                                             ffi::RemainingRets results,
                                             const RaggedAttributes& a) {
  OperandChecker check("ragged_kv_compress");
  const auto failure = [&] { return ffi::Unexpected(check.error()); };
  check.require_counts(operands, 11, results, 3);
  if (!check.ok()) return failure();
  const auto arg = [&](size_t i) { return *operands.get<ffi::AnyBuffer>(i); };
  const auto ret = [&](size_t i) { return **results.get<ffi::AnyBuffer>(i); };
  const ffi::AnyBuffer kv_comp = ret(0);
  const StepOperands o{arg(0), arg(1),  arg(2), arg(3), arg(4),       arg(5),  arg(6),
                       arg(7), arg(10), ret(1), ret(2), std::nullopt, a.layer, a.state_format};
  const RaggedOperands r{arg(8), arg(9), a.max_rewind, a.resume_every};
  check_step_operands(check, o);
  check_ragged_operands(check, r, o);
  check.require_rank("kv_comp", kv_comp, 2, "rows, head_dim");
  check.require(a.geometry >= kAutoGeometry, "geometry: expected -1 or more");
  if (!check.ok()) return failure();

  const int64_t D = kv_comp.dimensions().back();
  RaggedCall call;
  call.selection = {D, a.compress_ratio, a.overlap, a.kv_score_dtype, a.state_dtype, a.out_dtype};
  call.state_format = a.state_format;
  call.geometry = a.geometry;
  check_selection(check, call.selection, a.state_format);
  if (!check.ok()) return failure();

  check.set_groups(o.groups());
  RaggedParams& p = call.params;
  p = check_ragged_requests(check, r, o, check_step(check, o, call.selection));
  check.per_group("kv_comp", kv_comp, data_type_of(a.out_dtype), {p.num_windows, D});
  if (!check.ok()) return failure();
  call.empty = p.num_groups * int64_t{p.num_windows} == 0;  // and then, no request has a row
  p.kv_comp = kv_comp.untyped_data();
  return call;
}

}  // namespace jax_dsv4

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::jax_dsv4::RaggedAttributes, ::xla::ffi::StructMember<int64_t>("compress_ratio"),
    ::xla::ffi::StructMember<bool>("overlap"), ::xla::ffi::StructMember<int64_t>("layer"),
    ::xla::ffi::StructMember<::jax_dsv4::DType>("kv_score_dtype"),
    ::xla::ffi::StructMember<::jax_dsv4::StateFormat>("state_format"),
    ::xla::ffi::StructMember<::jax_dsv4::DType>("state_dtype"),
    ::xla::ffi::StructMember<::jax_dsv4::DType>("out_dtype"),
    ::xla::ffi::StructMember<int64_t>("max_rewind"),
    ::xla::ffi::StructMember<int64_t>("resume_every"),
    ::xla::ffi::StructMember<int64_t>("geometry"));
