// From checked operands to the kernel of a format.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels.h"
#include "launch.cuh"
#include "record_pool.h"
#include "store_launch.cuh"

namespace jax_dsv4 {

const char* launch_store_records(cudaStream_t stream, const StoreParams& p, RecordFormat format,
                                 int64_t head_dim) {
  if (p.num_groups > kMaxGridYZ) return "records: too many groups for one launch";
  if (int64_t{p.num_values} * 32 > kMaxGridX) return "values: too many for one launch";
  visit_record(format, head_dim,
               [&](auto record) { launch_store_records<decltype(record)>(stream, p); });
  return nullptr;
}

}  // namespace jax_dsv4
