// What launches have in common.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "config.h"

namespace jax_dsv4 {

inline constexpr int64_t kMaxGridX = 2147483647, kMaxGridYZ = 65535;

// What is compiled to run together: a layer's main compressor and its indexer's, of the same
// dtypes.
using MainKind = Kind<512, 4, true>;
using IndexerKind = Kind<128, 4, true>;

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// Without clusters a chip runs the kernels that need none.
inline bool has_clusters() { return device_attribute(cudaDevAttrClusterLaunch) != 0; }

template <class Kernel, class... Params>
void launch_in_clusters(cudaStream_t stream, Kernel kernel, dim3 grid, int threads, int cluster,
                        const Params&... params) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, params...);
}

}  // namespace jax_dsv4
