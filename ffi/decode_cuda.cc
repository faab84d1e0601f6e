// A decode step on a GPU: checked operands -> launch.
//
// Command-buffer compatible: the same operands' shapes launch the same work, whatever their values.

#include <cuda_runtime.h>

#include <cstdint>

#include "config.h"
#include "cuda_error.h"
#include "decode_call.h"
#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {
namespace {

ffi::Error decode(cudaStream_t stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                  const DecodeAttributes& attributes) {
  const ffi::ErrorOr<DecodeCall> call = check_decode(operands, results, attributes);
  if (!call) return call.error();
  if (call->empty) return ffi::Error::Success();
  const DecodeParams& p = call->params;
  const void* const vectors[] = {p.kv, p.score, p.kv_score, p.ape, p.kv_comp};
  bool aligned = p.score_offset * size_of(call->selection.kv_score) % 16 == 0;
  for (const void* pointer : vectors) aligned &= reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  if (!aligned) {
    return ffi::Error::InvalidArgument("operands: expected 16-byte aligned buffers");
  }
  const char* const problem =
      launch_decode(stream, p, call->selection, call->state_format, call->geometry);
  if (problem != nullptr) return ffi::Error::InvalidArgument(problem);
  return launch_error();
}

}  // namespace
}  // namespace jax_dsv4

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    PagedKvCompressCuda, jax_dsv4::decode,
    jax_dsv4::bind_call<jax_dsv4::DecodeAttributes>(
        xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>()),
    {xla::ffi::Traits::kCmdBufferCompatible});
