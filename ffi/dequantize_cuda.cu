// Reading records on a GPU: a thread for four channels.
//
// Command-buffer compatible: the same operands' shapes launch the same work, whatever their values.

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda_error.cuh"
#include "dequantize_call.h"
#include "vector.cuh"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {
namespace {

template <class Record>
__global__ void __launch_bounds__(128)
    dequantize_records_kernel(const __grid_constant__ DequantizeParams p) {
  constexpr uint32_t kThreads = Record::kHeadDim / 4;  // of a slot
  const uint64_t thread = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x;
  if (thread >= uint64_t{p.num_groups} * p.num_slots * kThreads) return;
  const uint32_t index = static_cast<uint32_t>(thread / kThreads);  // of G * N
  const RecordPages pages = pages_of(p.pool, index / p.num_slots);
  const RecordPlace place = find_place(p.pool, pages, p.slots[index], true);
  Vector<float, 4> x = {};
  if (place.exists) {
    const RecordRow<typename Record::Layout> row(p.pool, pages, place);
    read_channels<Record::kFormat, Record::kHeadDim>(row.data, row.scales, p.scales,
                                                     static_cast<int>(thread % kThreads * 4), x.x);
  }
  store(p.values + 4 * thread, x);
}

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
  visit_record(call->format, call->head_dim, [&](auto record) {
    constexpr int64_t kSlots = 128 * 4 / record.kHeadDim;  // of a CTA
    const int64_t count = int64_t{p.num_groups} * p.num_slots;
    const auto ctas = static_cast<uint32_t>((count + kSlots - 1) / kSlots);
    dequantize_records_kernel<decltype(record)><<<ctas, 128, 0, stream>>>(p);
  });
  return launch_error();
}

}  // namespace
}  // namespace jax_dsv4

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DequantizeRecordsCuda, jax_dsv4::dequantize_records,
    jax_dsv4::bind_call<jax_dsv4::DequantizeAttributes>(
        xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>()),
    {xla::ffi::Traits::kCmdBufferCompatible});
