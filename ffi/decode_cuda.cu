// The CUDA handler: checked operands -> configuration -> geometry -> launch.
//
// Command-buffer compatible: the same operands' shapes launch the same work, whatever their values.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "baseline.cuh"
#include "config.h"
#include "decode.cuh"
#include "operands.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {
namespace {

template <class Config>
int64_t choose_geometry(const DecodeParams& p) {
  const int64_t channels = int64_t{p.num_requests} * Config::kHeadDim;
  return channels <= GeometriesOf<Config::kRatio>::kFewChannels ? 0 : 1;
}

ffi::Error launch_error(cudaError_t status) {
  return ffi::Error::Internal(std::string("kernel launch: ") + cudaGetErrorString(status));
}

template <class Config, class Geometry>
auto kernel_of(Geometry) {
  return paged_kv_compress_kernel<Config, Geometry>;
}
template <class Config, int kWarps>
auto kernel_of(RowAtATime<kWarps>) {
  return row_at_a_time_kernel<Config, RowAtATime<kWarps>>;
}

template <class Config, class Geometry>
ffi::Error launch(cudaStream_t stream, const DecodeParams& p) {
  using T = Tile<Config, Geometry>;
  if (Geometry::kBaseline && p.num_windows > 1) {
    // It would read rows back that another CTA writes.
    return ffi::Error::InvalidArgument("geometry: the baselines need next_n <= compress_ratio");
  }
  constexpr int64_t kMaxGridX = 2147483647, kMaxGridY = 65535;
  const int64_t x = int64_t{p.num_requests} * T::kSlices;
  if (x > kMaxGridX) return ffi::Error::InvalidArgument("batch: too many requests for one launch");
  const int64_t y = std::min<int64_t>(p.num_windows, kMaxGridY);
  const dim3 grid(x, y, (p.num_windows + y - 1) / y);
  kernel_of<Config>(Geometry{})<<<grid, T::kThreads, 0, stream>>>(p);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? ffi::Error::Success() : launch_error(status);
}

bool misaligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 != 0; }

ffi::Error decode(cudaStream_t stream, const DecodeCall& call) {
  if (call.attributes.state_format == StateFormat::kPrefix) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented, "state_format: no prefix on CUDA yet");
  }
  return check_and_run(call, [&](auto config, const DecodeParams& p) -> ffi::Error {
    using C = decltype(config);
    if (misaligned(p.kv) || misaligned(p.score) || misaligned(p.kv_score) || misaligned(p.ape) ||
        misaligned(p.kv_comp)) {
      return ffi::Error::InvalidArgument("operands: expected 16-byte aligned buffers");
    }
    const int64_t requested = call.attributes.geometry;
    const int64_t chosen = requested == kAutoGeometry ? choose_geometry<C>(p) : requested;
    int64_t index = 0;
    ffi::Error error = ffi::Error::Success();
    visit_any(typename GeometriesOf<C::kRatio>::List{}, [&](auto geometry) {
      if (index++ != chosen) return false;
      error = launch<C, decltype(geometry)>(stream, p);
      return true;
    });
    return error;
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
