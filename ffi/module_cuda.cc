// jax_dsv4._cuda: the CUDA handlers.

#include "module.h"

XLA_FFI_DECLARE_HANDLER_SYMBOL(PagedKvCompressCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(StoreRecordsCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(DequantizeRecordsCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(DecodeRecordsCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(RaggedKvCompressCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(RaggedRecordsCuda);

NB_MODULE(_cuda, m) {
  jax_dsv4::export_handlers(m, &PagedKvCompressCuda, &StoreRecordsCuda, &DequantizeRecordsCuda,
                            &DecodeRecordsCuda, &RaggedKvCompressCuda, &RaggedRecordsCuda);
}
