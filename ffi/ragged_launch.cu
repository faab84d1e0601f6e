// From the checked operands of a ragged batch that ends in values to a kernel on a stream.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels.h"
#include "ragged_launch.cuh"

namespace jax_dsv4 {

const char* launch_ragged(cudaStream_t stream, const RaggedParams& p, const Selection& selection,
                          StateFormat format, int64_t geometry) {
  const ValueTarget target = {p.kv_comp, selection.out == DType::kBF16};
  return visit_inner_config(selection, [&](auto config) {
    return visit_ragged_format<decltype(config), false>(
        p, format, target, geometry, [&](auto body, const auto& params) {
          return launch_ragged_body<decltype(body)>(stream, params);
        });
  });
}

}  // namespace jax_dsv4
