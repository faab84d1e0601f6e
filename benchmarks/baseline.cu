// The row-at-a-time reduction behind the binding and the checks of the shipped custom call, for
// what the benchmark measures. benchmarks/baseline.py builds it and registers it.

#include <cuda_runtime.h>

#include <cstdint>

#include "baseline.cuh"
#include "config.h"
#include "cuda_error.h"
#include "decode_call.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {
namespace {

using Measured = Config<Kind<512, 128, false>, DTypes<bf16, f32, bf16>>;

ffi::Error decode_row_at_a_time(cudaStream_t stream, ffi::RemainingArgs operands,
                                ffi::RemainingRets results, const DecodeAttributes& attributes) {
  const ffi::ErrorOr<DecodeCall> call = check_decode(operands, results, attributes);
  if (!call) return call.error();
  if (call->empty) return ffi::Error::Success();
  const Selection& s = call->selection;
  const bool is_measured = s.is_of(Kind<512, 128, false>{}) && s.kv_score == DType::kBF16 &&
                           s.state == DType::kF32 && s.out == DType::kBF16 &&
                           call->state_format == StateFormat::kRaw;
  if (!is_measured || call->params.num_windows != 1) {
    return ffi::Error::InvalidArgument(
        "row at a time: expected D 512, R 128, disjoint windows, kv_score bf16, a raw f32 state, "
        "kv_comp bf16, and at most one window per step");
  }
  switch (call->geometry) {
    case 0:
      launch_row_at_a_time<Measured, 1>(stream, call->params);
      break;
    case 1:
      launch_row_at_a_time<Measured, 4>(stream, call->params);
      break;
    default:
      return ffi::Error::InvalidArgument("geometry: expected 0 (1 warp) or 1 (4 warps)");
  }
  return launch_error();
}

}  // namespace
}  // namespace jax_dsv4

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    RowAtATimeCuda, jax_dsv4::decode_row_at_a_time,
    jax_dsv4::bind_call<jax_dsv4::DecodeAttributes>(
        xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>()),
    {xla::ffi::Traits::kCmdBufferCompatible});
