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

// Calls visit(DTypes, main, indexer) for two calls that are such a pair; false: they are not, or it
// returned so.
template <class Call, class Visit>
bool visit_pair(const Call& a, const Call& b, Visit&& visit) {
  const bool main_is_first = a.selection.head_dim > b.selection.head_dim;
  const Call &main = main_is_first ? a : b, &indexer = main_is_first ? b : a;
  return main.selection.is_of(MainKind{}) && indexer.selection.is_of(IndexerKind{}) &&
         main.state_format == indexer.state_format && visit_any(InnerDTypesList{}, [&](auto types) {
           using Types = decltype(types);
           return is_of<Types>(main.selection) && is_of<Types>(indexer.selection) &&
                  visit(types, main, indexer);
         });
}

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
