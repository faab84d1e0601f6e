// Reading records: a thread for four channels.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels.h"
#include "vector.cuh"

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

}  // namespace

const char* launch_dequantize_records(cudaStream_t stream, const DequantizeParams& p,
                                      RecordFormat format, int64_t head_dim) {
  visit_record(format, head_dim, [&](auto record) {
    constexpr int64_t kSlots = 128 * 4 / record.kHeadDim;  // of a CTA
    const int64_t count = int64_t{p.num_groups} * p.num_slots;
    const auto ctas = static_cast<uint32_t>((count + kSlots - 1) / kSlots);
    dequantize_records_kernel<decltype(record)><<<ctas, 128, 0, stream>>>(p);
  });
  return nullptr;
}

}  // namespace jax_dsv4
