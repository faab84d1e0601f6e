// What both extension modules export: the FFI version they were built with, and their handlers by
// target name.
#pragma once

#include <nanobind/nanobind.h>

#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {

namespace nb = nanobind;

// The same targets on both platforms, for one exported program to serve both.
inline void export_handlers(nb::module_& m, XLA_FFI_Handler* paged_kv_compress,
                            XLA_FFI_Handler* store_records, XLA_FFI_Handler* dequantize_records,
                            XLA_FFI_Handler* decode_records, XLA_FFI_Handler* ragged_kv_compress,
                            XLA_FFI_Handler* ragged_records) {
  m.attr("FFI_VERSION") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  nb::dict handlers;
  handlers["jax_dsv4_paged_kv_compress"] = nb::capsule(reinterpret_cast<void*>(paged_kv_compress));
  handlers["jax_dsv4_store_records"] = nb::capsule(reinterpret_cast<void*>(store_records));
  handlers["jax_dsv4_dequantize_records"] =
      nb::capsule(reinterpret_cast<void*>(dequantize_records));
  handlers["jax_dsv4_decode_records"] = nb::capsule(reinterpret_cast<void*>(decode_records));
  handlers["jax_dsv4_ragged_kv_compress"] =
      nb::capsule(reinterpret_cast<void*>(ragged_kv_compress));
  handlers["jax_dsv4_ragged_records"] = nb::capsule(reinterpret_cast<void*>(ragged_records));
  m.attr("HANDLERS") = handlers;
}

}  // namespace jax_dsv4
