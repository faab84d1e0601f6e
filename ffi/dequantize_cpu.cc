// Reading records on a CPU: slots are shared among XLA's threads.

#include <cstdint>
#include <cstring>

#include "dequantize_call.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {
namespace {

// Slot `index` of G * N.
template <class Record>
void dequantize_record(const DequantizeParams& p, int64_t index) {
  constexpr int D = Record::kHeadDim;
  const RecordPages pages = pages_of(p.pool, static_cast<uint32_t>(index / p.num_slots));
  const RecordPlace place = find_place(p.pool, pages, p.slots[index], true);
  float x[D] = {};
  if (place.exists) {
    const RecordRow<typename Record::Layout> row(p.pool, pages, place);
    for (int c = 0; c < D; c += 4) {
      read_channels<Record::kFormat, D>(row.data, row.scales, p.scales, c, x + c);
    }
  }
  std::memcpy(p.values + index * D, x, sizeof(x));
}

ffi::Future dequantize_records(ffi::ThreadPool pool, ffi::RemainingArgs operands,
                               ffi::RemainingRets results, const DequantizeAttributes& attributes) {
  const ffi::ErrorOr<DequantizeCall> call = check_dequantize(operands, results, attributes);
  if (!call) return ready(call.error());
  if (call->empty) return ready(ffi::Error::Success());
  void (*read_one)(const DequantizeParams&, int64_t) = nullptr;
  visit_record(call->format, call->head_dim,
               [&](auto record) { read_one = dequantize_record<decltype(record)>; });
  const int64_t count = int64_t{call->params.num_groups} * call->params.num_slots;
  return share_among_threads(pool, call->params, count, threads_worth(count * call->head_dim),
                             read_one);
}

}  // namespace
}  // namespace jax_dsv4

XLA_FFI_DEFINE_HANDLER_SYMBOL(DequantizeRecordsCpu, jax_dsv4::dequantize_records,
                              jax_dsv4::bind_call<jax_dsv4::DequantizeAttributes>(
                                  xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>()));
