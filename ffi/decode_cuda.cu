// The CUDA handler: checked operands -> configuration -> geometry -> launch.
//
// Command-buffer compatible: the same operands' shapes launch the same work, whatever their values.

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "config.h"
#include "launch.cuh"
#include "operands.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {
namespace {

bool misaligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 != 0; }

ffi::Error decode(cudaStream_t stream, const DecodeCall& call) {
  return check_and_run(call, [&](auto config, const DecodeParams& p) -> ffi::Error {
    using C = decltype(config);
    if (misaligned(p.kv) || misaligned(p.score) || misaligned(p.kv_score) || misaligned(p.ape) ||
        misaligned(p.kv_comp)) {
      return ffi::Error::InvalidArgument("operands: expected 16-byte aligned buffers");
    }
    const Attributes& a = call.attributes;
    const int64_t geometry = a.geometry == kAutoGeometry ? choose_geometry<C>(p) : a.geometry;
    const char* problem = launch<C>(stream, p, a.state_format, geometry);
    if (problem != nullptr) return ffi::Error::InvalidArgument(problem);
    const cudaError_t status = cudaGetLastError();
    if (status == cudaSuccess) return ffi::Error::Success();
    return ffi::Error::Internal(std::string("kernel launch: ") + cudaGetErrorString(status));
  });
}

}  // namespace
}  // namespace jax_dsv4

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    PagedKvCompressCuda, ([](cudaStream_t stream, auto... call) {
      return jax_dsv4::decode(stream, jax_dsv4::decode_call(call...));
    }),
    jax_dsv4::bind_decode(xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>()),
    {xla::ffi::Traits::kCmdBufferCompatible});
