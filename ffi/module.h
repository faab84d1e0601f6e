// What both extension modules export: their handlers by target name, and the FFI version they were
// built with.
#pragma once

#include <nanobind/nanobind.h>

#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {

namespace nb = nanobind;

inline void export_ffi_version(nb::module_& m) {
  m.attr("FFI_VERSION") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.attr("HANDLERS") = nb::dict();
}

// The same target on both platforms, for one exported program to serve both.
inline void export_handler(nb::module_& m, const char* target, XLA_FFI_Handler* handler) {
  m.attr("HANDLERS")[target] = nb::capsule(reinterpret_cast<void*>(handler));
}

}  // namespace jax_dsv4
