// A ragged batch that ends in records on a GPU: checked operands -> launch.
//
// Command-buffer compatible: the same operands' shapes launch the same work, whatever their values.

#include <cuda_runtime.h>

#include <cstdint>

#include "aligned.h"
#include "cuda_error.h"
#include "kernels.h"
#include "ragged_records_call.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {
namespace {

ffi::Error ragged_records(cudaStream_t stream, ffi::RemainingArgs operands,
                          ffi::RemainingRets results, ffi::Dictionary attributes) {
  const ffi::ErrorOr<RaggedRecordsCalls> calls =
      check_ragged_records(operands, results, attributes);
  if (!calls) return calls.error();
  if (calls->empty) return ffi::Error::Success();
  for (const RaggedRecordsCall& call : calls->each) {
    if (!is_aligned(call)) {
      return ffi::Error::InvalidArgument("operands: expected 16-byte aligned buffers");
    }
  }
  const char* const problem =
      launch_ragged_records(stream, calls->each.data(), calls->each.size(), calls->geometry);
  if (problem != nullptr) return ffi::Error::InvalidArgument(problem);
  return launch_error();
}

}  // namespace
}  // namespace jax_dsv4

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    RaggedRecordsCuda, jax_dsv4::ragged_records,
    jax_dsv4::bind_call<xla::ffi::Dictionary>(
        xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>()),
    {xla::ffi::Traits::kCmdBufferCompatible});
