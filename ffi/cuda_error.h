// What a CUDA handler returns after a launch.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {

inline ::xla::ffi::Error launch_error() {
  const cudaError_t status = cudaGetLastError();
  if (status == cudaSuccess) return ::xla::ffi::Error::Success();
  return ::xla::ffi::Error::Internal(std::string("kernel launch: ") + cudaGetErrorString(status));
}

}  // namespace jax_dsv4
