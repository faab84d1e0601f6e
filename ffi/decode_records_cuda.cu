// A decode step that ends in records on a GPU: checked operands -> one launch for all compressors.
//
// Command-buffer compatible: the same operands' shapes launch the same work, whatever their values.

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda_error.cuh"
#include "decode_records_call.h"
#include "decode_records_launch.cuh"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {
namespace {

bool is_aligned(const DecodeRecordsCall& call) {
  const DecodeRecordsParams& p = call.params;
  const void* const vectors[] = {
      p.kv, p.score, p.kv_score, p.ape, p.records.norm_weight, p.records.cos_sin};
  uintptr_t addresses = 0;
  for (const void* pointer : vectors) addresses |= reinterpret_cast<uintptr_t>(pointer);
  // `kv_score` is at its column already.
  const int64_t element = size_of(call.selection.kv_score);
  return addresses % 16 == 0 && p.score_offset * element % 16 == 0 &&
         p.row_size * element % 16 == 0 &&
         reinterpret_cast<uintptr_t>(p.records.pool.data) % 4 == 0;
}

ffi::Error decode_records(cudaStream_t stream, ffi::RemainingArgs operands,
                          ffi::RemainingRets results, ffi::Dictionary attributes) {
  const ffi::ErrorOr<DecodeRecordsCalls> calls =
      check_decode_records(operands, results, attributes);
  if (!calls) return calls.error();
  if (calls->empty) return ffi::Error::Success();
  for (const DecodeRecordsCall& call : calls->each) {
    if (!is_aligned(call)) {
      return ffi::Error::InvalidArgument("operands: expected 16-byte aligned buffers");
    }
  }
  const char* const problem =
      launch_decode_records(stream, calls->each.data(), calls->each.size(), calls->geometry);
  if (problem != nullptr) return ffi::Error::InvalidArgument(problem);
  return launch_error();
}

}  // namespace
}  // namespace jax_dsv4

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DecodeRecordsCuda, jax_dsv4::decode_records,
    jax_dsv4::bind_call<xla::ffi::Dictionary>(
        xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>()),
    {xla::ffi::Traits::kCmdBufferCompatible});
