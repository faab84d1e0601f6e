// jax_dsv4._cuda: the CUDA handlers.

#include "module.h"

XLA_FFI_DECLARE_HANDLER_SYMBOL(PagedKvCompressCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(StoreRecordsCuda);

NB_MODULE(_cuda, m) {
  jax_dsv4::export_ffi_version(m);
  jax_dsv4::export_handler(m, "jax_dsv4_paged_kv_compress", &PagedKvCompressCuda);
  jax_dsv4::export_handler(m, "jax_dsv4_store_records", &StoreRecordsCuda);
}
