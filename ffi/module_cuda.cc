// jax_dsv4._cuda: the CUDA handler.

#include "module.h"

XLA_FFI_DECLARE_HANDLER_SYMBOL(PagedKvCompressCuda);

NB_MODULE(_cuda, m) {
  jax_dsv4::export_version(m);
  m.def("handlers", [] {
    jax_dsv4::nb::dict out;
    out["jax_dsv4_paged_kv_compress"] = jax_dsv4::capsule(&PagedKvCompressCuda);
    return out;
  });
}
