// What both extension modules export: their handlers, and the FFI version they were built with.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>

#include <utility>

#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {

namespace nb = nanobind;

inline nb::capsule capsule(XLA_FFI_Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

inline void export_version(nb::module_& m) {
  m.attr("FFI_VERSION") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
}

}  // namespace jax_dsv4
