// Storing records on a CPU: values are shared among XLA's threads.

#include <cstdint>

#include "numeric.h"
#include "record_cpu.h"
#include "store.h"
#include "store_call.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {
namespace {

// Value `index` of G * N.
template <RecordFormat kFormat, int D>
void store_record(const StoreParams& p, int64_t index) {
  const auto group = static_cast<uint32_t>(index / p.num_values);
  const auto value = static_cast<uint32_t>(index % p.num_values);
  const RecordPages pages = pages_of(p.pool, group);
  const int32_t slot = p.slots[group * p.slots_stride + value];
  const int32_t position = p.positions[group * p.positions_stride + value];
  const RecordPlace place = find_place(p.pool, pages, slot, p.has_position(position));
  if (!place.exists) return;
  const int64_t from = (int64_t{group} * p.values_stride + value) * D;
  float x[D];
  for (int c = 0; c < D; ++c) {
    x[c] = p.values_are_bf16 ? to_f32(static_cast<const bf16*>(p.values)[from + c])
                             : static_cast<const float*>(p.values)[from + c];
  }
  const float *weight = nullptr, *rotation = nullptr;
  if (p.norm_weight != nullptr) {
    weight = p.norm_weight + int64_t{group} * p.weight_stride * D;
  }
  if (p.table != nullptr) {
    rotation = p.table + (group * p.table_stride + position) * kRopeDim;
  }
  make_record<kFormat>(x, weight, rotation, p.options, {p.pool, pages, place});
}

ffi::Future store_records(ffi::ThreadPool pool, ffi::RemainingArgs operands,
                          ffi::RemainingRets results, const StoreAttributes& attributes) {
  const ffi::ErrorOr<StoreCall> call = check_store(operands, results, attributes);
  if (!call) return ready(call.error());
  if (call->empty) return ready(ffi::Error::Success());
  void (*store_one)(const StoreParams&, int64_t) = nullptr;
  visit_record(call->format, call->head_dim,
               [&](auto record) { store_one = store_record<record.kFormat, record.kHeadDim>; });
  const int64_t count = int64_t{call->params.num_groups} * call->params.num_values;
  return share_among_threads(pool, call->params, count, threads_worth(count * call->head_dim),
                             store_one);
}

}  // namespace
}  // namespace jax_dsv4

XLA_FFI_DEFINE_HANDLER_SYMBOL(StoreRecordsCpu, jax_dsv4::store_records,
                              jax_dsv4::bind_call<jax_dsv4::StoreAttributes>(
                                  xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>()));
