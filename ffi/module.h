// What both extension modules export: their handler, and the FFI version they were built with.
#pragma once

#include <nanobind/nanobind.h>

#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {

namespace nb = nanobind;

// The same target on both platforms, for one exported program to serve both.
inline void export_handler(nb::module_& m, XLA_FFI_Handler* handler) {
  m.attr("FFI_VERSION") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.attr("TARGET_NAME") = "jax_dsv4_paged_kv_compress";
  m.def("handler", [handler] { return nb::capsule(reinterpret_cast<void*>(handler)); });
}

}  // namespace jax_dsv4
