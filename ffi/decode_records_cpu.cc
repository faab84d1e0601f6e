// A decode step that ends in records on a CPU: requests of all compressors are shared among XLA's
// threads.

#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "config.h"
#include "decode_cpu.h"
#include "decode_records.h"
#include "decode_records_call.h"
#include "record_cpu.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {
namespace {

// One compressor's step. The functions know its configuration and its records' format: apart, for
// not every pair of them to be compiled.
struct Step {
  DecodeRecordsParams params;
  void (*run)(const Step&, uint32_t group, uint32_t request);
  void (*store)(const RecordTarget&, uint32_t group, uint32_t position, const RecordPages&,
                const RecordPlace&, float* value);
};

// Makes the record of `value` [D], which it works in.
template <RecordFormat kFormat, int D>
void store_record(const RecordTarget& t, uint32_t group, uint32_t position,
                  const RecordPages& pages, const RecordPlace& place, float* value) {
  const float *weight = nullptr, *rotation = nullptr;
  if (t.norm_weight != nullptr) weight = t.norm_weight + int64_t{group} * t.weight_stride * D;
  if (t.cos_sin != nullptr) {
    rotation = t.cos_sin + (group * t.cos_sin_stride + position) * kRopeDim;
  }
  make_record<kFormat>(*reinterpret_cast<float (*)[D]>(value), weight, rotation, t.options,
                       {t.pool, pages, place});
}

template <class Config, StateFormat kFormat>
void run_request(const Step& step, uint32_t group, uint32_t request) {
  const DecodeRecordsParams& p = step.params;
  const RecordTarget& t = p.records;
  const RecordPages pages = pages_of(t.pool, group);
  const int32_t* table = t.tables + uint64_t{group * t.tables_stride + request} * t.max_pages;
  const auto r = request_at<Config>(p, group, request);
  step_request<Config, kFormat>(p, r, [&](uint32_t window, auto&& put) {
    const uint32_t position = window * Config::kRatio;
    const RecordPlace place = find_record(t, pages, table, window, position);
    if (!place.exists) return;
    float value[Config::kHeadDim];
    put(value);
    step.store(t, group, position, pages, place, value);
  });
}

Step step_of(const DecodeRecordsCall& call) {
  Step step{call.params, nullptr, nullptr};
  visit_config(call.selection, [&](auto config) {
    using C = decltype(config);
    if constexpr (std::is_same_v<typename C::Out, f32>) {
      step.run = run_request<C, StateFormat::kRaw>;
      if constexpr (may_hold(kDTypeOf<typename C::State>, StateFormat::kPrefix)) {
        if (call.state_format == StateFormat::kPrefix) {
          step.run = run_request<C, StateFormat::kPrefix>;
        }
      }
    }
  });
  visit_record(call.format, call.selection.head_dim,
               [&](auto record) { step.store = store_record<record.kFormat, record.kHeadDim>; });
  return step;
}

using Steps = std::shared_ptr<const std::vector<Step>>;

// Step `index` of G * B * compressors, those of a request side by side: their cost differs.
void run_step(const Steps& steps, int64_t index) {
  const auto count = static_cast<int64_t>(steps->size());
  const Step& step = (*steps)[index % count];
  const int64_t request = index / count;
  step.run(step, request / step.params.batch, request % step.params.batch);
}

ffi::Future decode_records(ffi::ThreadPool pool, ffi::RemainingArgs operands,
                           ffi::RemainingRets results, ffi::Dictionary attributes) {
  const ffi::ErrorOr<DecodeRecordsCalls> calls =
      check_decode_records(operands, results, attributes);
  if (!calls) return ready(calls.error());
  if (calls->empty) return ready(ffi::Error::Success());
  std::vector<Step> steps;
  for (const DecodeRecordsCall& call : calls->each) steps.push_back(step_of(call));
  const DecodeParams& p = steps.front().params;
  const int64_t count = int64_t{p.num_groups} * p.batch * static_cast<int64_t>(steps.size());
  const Steps shared = std::make_shared<const std::vector<Step>>(std::move(steps));
  return share_among_threads(pool, shared, count, 1, run_step);
}

}  // namespace
}  // namespace jax_dsv4

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DecodeRecordsCpu, jax_dsv4::decode_records,
    jax_dsv4::bind_call<xla::ffi::Dictionary>(xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>()));
