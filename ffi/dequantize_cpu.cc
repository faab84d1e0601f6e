// Reading records on a CPU: slots are shared among XLA's threads.

#include <cstdint>
#include <cstring>

#include "dequantize_call.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {
namespace {

template <class Record>
void dequantize_record(const DequantizeParams& p, int64_t index) {
  float* const values = p.values + index * Record::kHeadDim;
  for (int first = 0; first < Record::kHeadDim; first += 4) {
    float x[4];
    dequantize<Record>(p, static_cast<uint32_t>(index), first, x);
    std::memcpy(values + first, x, sizeof(x));
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
  constexpr int64_t kLeastSlots = 32;  // a task costs as much
  return share_among_threads(pool, call->params, count, kLeastSlots, read_one);
}

}  // namespace
}  // namespace jax_dsv4

XLA_FFI_DEFINE_HANDLER_SYMBOL(DequantizeRecordsCpu, jax_dsv4::dequantize_records,
                              jax_dsv4::bind_call<jax_dsv4::DequantizeAttributes>(
                                  xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>()));
