// Storing records on a GPU.
//
// Command-buffer compatible: the same operands' shapes launch the same work, whatever their values.

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda_error.cuh"
#include "launch.cuh"
#include "operands.h"
#include "store.h"
#include "store_call.h"
#include "store_launch.cuh"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {
namespace {

ffi::Error store_records(cudaStream_t stream, ffi::RemainingArgs operands,
                         ffi::RemainingRets results, const StoreAttributes& attributes) {
  const ffi::ErrorOr<StoreCall> call = check_store(operands, results, attributes);
  if (!call) return call.error();
  if (call->empty) return ffi::Error::Success();
  const StoreParams& p = call->params;
  if (p.num_groups > kMaxGridYZ) {
    return ffi::Error::InvalidArgument("records: too many groups for one launch");
  }
  if (int64_t{p.num_values} * 32 > kInt32Max) {
    return ffi::Error::InvalidArgument("values: too many for one launch");
  }
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  if ((address(p.values) | address(p.norm_weight) | address(p.table)) % 16 != 0 ||
      address(p.pool.data) % 4 != 0) {
    return ffi::Error::InvalidArgument("operands: expected 16-byte aligned buffers");
  }
  visit_record(call->format, call->head_dim,
               [&](auto record) { launch_store_records<decltype(record)>(stream, p); });
  return launch_error();
}

}  // namespace
}  // namespace jax_dsv4

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    StoreRecordsCuda, jax_dsv4::store_records,
    jax_dsv4::bind_call<jax_dsv4::StoreAttributes>(
        xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>()),
    {xla::ffi::Traits::kCmdBufferCompatible});
