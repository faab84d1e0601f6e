// A ragged batch that ends in records as a custom call, of one compressor or of several: its
// operands and attributes, and the one function that checks them. Shared by the CPU and CUDA
// handlers.
#pragma once

#include <cstdint>
#include <optional>

#include "decode_records_call.h"
#include "ragged_call.h"
#include "ragged_records.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {

using RaggedRecordsCalls = RecordsCalls<RaggedRecordsParams>;

// What says which new rows are a request's, and which are stored (see DecodeLens).
struct RaggedLens {
  using Params = RaggedRecordsParams;
  static constexpr const char* kOperation = "ragged_records";
  static constexpr size_t kOperands = 2, kAttributes = 2;

  RaggedOperands operands;  // cu_q_lens, num_seqs
  std::optional<int64_t> next_n = std::nullopt;

  template <class Operand, class Attribute>
  static RaggedLens read(Operand&& operand, Attribute&& attribute) {
    return {{operand(0), operand(1), attribute("max_rewind", int64_t{}),
             attribute("resume_every", int64_t{})}};
  }
  void check_operands(OperandChecker& check, const StepOperands& o) const {
    check_ragged_operands(check, operands, o);
  }
  void check_requests(OperandChecker& check, const StepOperands& o, const DecodeParams& step,
                      Params& p) const {
    static_cast<RaggedParams&>(p) = check_ragged_requests(check, operands, o, step);
  }
};

inline ffi::ErrorOr<RaggedRecordsCalls> check_ragged_records(ffi::RemainingArgs operands,
                                                             ffi::RemainingRets results,
                                                             ffi::Dictionary attributes) {
  return check_records<RaggedLens>(operands, results, attributes);
}

}  // namespace jax_dsv4
