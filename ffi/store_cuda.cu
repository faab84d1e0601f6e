// Storing records on a GPU: a warp for each value.
//
// Command-buffer compatible: the same operands' shapes launch the same work, whatever their values.

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda_error.cuh"
#include "record_stage.cuh"
#include "store.h"
#include "store_call.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {
namespace {

template <class Record>
__device__ __forceinline__ void load_value(const StoreParams& p, int64_t first,
                                           float (&x)[Record::kHeadDim / 32]) {
  constexpr int kChannels = Record::kHeadDim / 32;
  if (p.values_are_bf16) {
    const bf16* from = static_cast<const bf16*>(p.values) + first;
    constexpr int kVector = kChannels < 8 ? kChannels : 8;
#pragma unroll
    for (int k = 0; k < kChannels; k += kVector) {
      const auto part = load<bf16, kVector>(from + k);
#pragma unroll
      for (int v = 0; v < kVector; ++v) x[k + v] = to_f32(part.x[v]);
    }
  } else {
    const float* from = static_cast<const float*>(p.values) + first;
#pragma unroll
    for (int k = 0; k < kChannels; k += 4) {
      const auto part = load<float, 4>(from + k);
#pragma unroll
      for (int v = 0; v < 4; ++v) x[k + v] = part.x[v];
    }
  }
}

// One warp for each value of a group.
template <class Record>
__global__ void __launch_bounds__(128) store_records_kernel(const __grid_constant__ StoreParams p) {
  using Stage = RecordStage<Record::kFormat, Record::kHeadDim>;
  constexpr int D = Record::kHeadDim, kChannels = Stage::kChannels;
  const int lane = threadIdx.x % 32;
  const uint32_t group = blockIdx.y;
  const uint32_t index = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (index >= p.num_values) return;

  Stage stage;
  typename Stage::Operands operands;
  const int64_t value = int64_t{group} * p.values_stride + index;
  load_value<Record>(p, value * D + lane * kChannels, stage.x);
  if (p.norm_weight != nullptr) {
    Stage::load_weight(p.norm_weight + int64_t{group} * p.weight_stride * D, lane, operands);
  }
  const RecordPlace place = place_of(p, group, index);
  if (place.page == nullptr) return;
  if (p.table != nullptr) {
    const float* row = p.table + (group * p.table_stride + place.position) * kRopeDim;
    Stage::load_rotation(row, p.options.interleaved, lane, operands);
  }
  const int64_t scales = int64_t{p.page_size.value} * Record::Layout::kData;
  const bool aligned = (p.page_bytes | reinterpret_cast<uintptr_t>(p.pool)) % 16 == 0;
  stage.finish(operands, p.norm_weight != nullptr, p.table != nullptr, p.options, lane,
               {place.page + int64_t{place.row} * Record::Layout::kData,
                place.page + scales + int64_t{place.row} * Record::Layout::kScales, aligned});
}

ffi::Error store_records(cudaStream_t stream, ffi::RemainingArgs operands,
                         ffi::RemainingRets results, const StoreAttributes& attributes) {
  const ffi::ErrorOr<StoreCall> call = check_store(operands, results, attributes);
  if (!call) return call.error();
  if (call->empty) return ffi::Error::Success();
  const StoreParams& p = call->params;
  constexpr uint32_t kMaxGridY = 65535;
  if (p.num_groups > kMaxGridY) {
    return ffi::Error::InvalidArgument("records: too many groups for one launch");
  }
  if (reinterpret_cast<uintptr_t>(p.values) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(p.pool) % 4 != 0) {
    return ffi::Error::InvalidArgument("operands: expected 16-byte aligned buffers");
  }
  // Few values are spread over the whole chip; of many, a CTA takes several.
  constexpr uint32_t kFewValues = 1024;
  const uint32_t warps = p.num_groups * int64_t{p.num_values} <= kFewValues ? 1 : 4;
  const dim3 grid((p.num_values + warps - 1) / warps, p.num_groups);
  visit_record(call->format, call->head_dim, [&](auto record) {
    store_records_kernel<decltype(record)><<<grid, 32 * warps, 0, stream>>>(p);
  });
  return launch_error();
}

}  // namespace
}  // namespace jax_dsv4

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    StoreRecordsCuda, jax_dsv4::store_records,
    jax_dsv4::bind_call<jax_dsv4::StoreAttributes>(
        xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>()),
    {xla::ffi::Traits::kCmdBufferCompatible});
