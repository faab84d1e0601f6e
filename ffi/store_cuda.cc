// Storing records on a GPU.
//
// Command-buffer compatible: the same operands' shapes launch the same work, whatever their values.

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda_error.h"
#include "kernels.h"
#include "store_call.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {
namespace {

ffi::Error store_records(cudaStream_t stream, ffi::RemainingArgs operands,
                         ffi::RemainingRets results, const StoreAttributes& attributes) {
  const ffi::ErrorOr<StoreCall> call = check_store(operands, results, attributes);
  if (!call) return call.error();
  if (call->empty) return ffi::Error::Success();
  const StoreParams& p = call->params;
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  if ((address(p.values) | address(p.norm_weight) | address(p.table)) % 16 != 0 ||
      address(p.pool.data) % 4 != 0) {
    return ffi::Error::InvalidArgument("operands: expected 16-byte aligned buffers");
  }
  const char* const problem = launch_store_records(stream, p, call->format, call->head_dim);
  if (problem != nullptr) return ffi::Error::InvalidArgument(problem);
  return launch_error();
}

}  // namespace
}  // namespace jax_dsv4

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    StoreRecordsCuda, jax_dsv4::store_records,
    jax_dsv4::bind_call<jax_dsv4::StoreAttributes>(
        xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>()),
    {xla::ffi::Traits::kCmdBufferCompatible});
