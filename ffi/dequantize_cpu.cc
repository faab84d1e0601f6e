// Reading records on a CPU: slots are shared among XLA's threads.

#include <algorithm>
#include <cstdint>

#include "dequantize_call.h"
#include "threads.h"
#include "vectorized.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {
namespace {

template <class Record>
void read_record(RecordBytes row, Scales scales, float* __restrict x) {
  for (int c = 0; c < Record::kHeadDim; c += 4) {
    read_channels<Record::kFormat, Record::kHeadDim>(row.data, row.scales, scales, c, x + c);
  }
}

// Slot `index` of G * N.
template <class Record>
void dequantize_record(const DequantizeParams& p, int64_t index) {
  constexpr int D = Record::kHeadDim;
  const RecordPages pages = pages_of(p.pool, static_cast<uint32_t>(index / p.num_slots));
  const RecordPlace place = find_place(p.pool, pages, p.slots[index], true);
  float* const x = p.values + index * D;
  if (place.exists) {
    const RecordRow<typename Record::Layout> row(p.pool, pages, place);
    vectorized<read_record<Record>>(RecordBytes(row), p.scales, x);
  } else {
    std::fill_n(x, D, 0.0f);
  }
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
