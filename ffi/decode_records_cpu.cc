// A decode step that ends in records on a CPU: requests of all compressors are shared among XLA's
// threads.

#include "decode_records_cpu.h"

#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "config.h"
#include "decode_records.h"
#include "decode_records_call.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {
namespace {

// One compressor's step.
struct Step {
  DecodeRecordsParams params;
  void (*run)(const Step&, uint32_t group, uint32_t request);
  StoreRecord store;
};

template <class Config, StateFormat kFormat>
void run_request(const Step& step, uint32_t group, uint32_t request) {
  step_to_records<Config, kFormat>(
      step.params, group, request,
      [&](uint32_t, uint32_t position, const RecordPages& pages, const RecordPlace& place,
          float* value) { step.store(step.params.records, group, position, pages, place, value); });
}

Step step_of(const DecodeRecordsCall& call) {
  Step step{call.params, nullptr, store_of(call.format, call.selection.head_dim)};
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
