// Reading records on a GPU: checked operands -> launch.
//
// Command-buffer compatible: the same operands' shapes launch the same work, whatever their values.

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda_error.h"
#include "dequantize_call.h"
#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {
namespace {

ffi::Error dequantize_records(cudaStream_t stream, ffi::RemainingArgs operands,
                              ffi::RemainingRets results, const DequantizeAttributes& attributes) {
  const ffi::ErrorOr<DequantizeCall> call = check_dequantize(operands, results, attributes);
  if (!call) return call.error();
  if (call->empty) return ffi::Error::Success();
  const DequantizeParams& p = call->params;
  if (reinterpret_cast<uintptr_t>(p.values) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(p.pool.data) % 4 != 0) {
    return ffi::Error::InvalidArgument("operands: expected 16-byte aligned buffers");
  }
  const char* const problem = launch_dequantize_records(stream, p, call->format, call->head_dim);
  if (problem != nullptr) return ffi::Error::InvalidArgument(problem);
  return launch_error();
}

}  // namespace
}  // namespace jax_dsv4

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DequantizeRecordsCuda, jax_dsv4::dequantize_records,
    jax_dsv4::bind_call<jax_dsv4::DequantizeAttributes>(
        xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>()),
    {xla::ffi::Traits::kCmdBufferCompatible});
