// A decode step that ends in records on a CPU: requests of all compressors, or parts of them, are
// shared among XLA's threads.

#include "decode_records_cpu.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
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
  StoreRecord store;
  void (*run)(const Step&, const Split&, int64_t request, int part);
  int64_t work;                            // of all requests
  int64_t floats_each;                     // that the parts of a request leave
  std::unique_ptr<SharedRequests> shared;  // null: each request is one thread's
};

template <class Config, StateFormat kFormat>
void run_request(const Step& step, const Split& split, int64_t index, int part) {
  constexpr int D = Config::kHeadDim;
  const DecodeRecordsParams& p = step.params;
  const auto group = static_cast<uint32_t>(index / p.batch);
  const auto request = static_cast<uint32_t>(index % p.batch);
  const auto store = [&](uint32_t position, const RecordPages& pages, const RecordPlace& place,
                         float* value) {
    step.store(p.records, group, position, pages, place, value);
  };
  if (step.shared == nullptr) {
    return step_to_records<Config, kFormat>(p, group, request,
                                            [&](uint32_t, auto&&... record) { store(record...); });
  }
  const auto r = request_at<Config>(p, group, request);
  const auto make_record = [&](uint32_t window, auto&& put) {
    put_record<Config>(p.records, group, request, window, put, store);
  };
  if constexpr (kSharesRows<Config, kFormat>) {
    step_shared_rows(p, r, split, part, *step.shared, index, make_record);
  } else {
    float* const values = step.shared->of<float>(index);  // [num_windows, D]
    const auto value_of = [&](uint32_t window) {
      return values + int64_t{window - r.first_window} * D;
    };
    step_request<Config, kFormat>(p, r, split.channels(D, part, 1),
                                  [&](uint32_t window, auto&& put) { put(value_of(window)); });
    if (!step.shared->was_last_part(index)) return;
    for (int32_t window = r.first_window; window < r.end_window; ++window) {
      make_record(window, [&](float* value) { std::copy_n(value_of(window), D, value); });
    }
  }
}

template <class Config, StateFormat kFormat>
int64_t total_work(const DecodeParams& p) {
  int64_t work = 0;
  for (uint32_t group = 0; group < p.num_groups; ++group) {
    for (uint32_t request = 0; request < p.batch; ++request) {
      work += work_of<Config, kFormat>(request_at<Config>(p, group, request));
    }
  }
  return work;
}

Step step_of(const DecodeRecordsCall& call) {
  Step step{call.params, store_of(call.format, call.selection.head_dim), nullptr, 0, 0, nullptr};
  visit_config<InnerDTypesList>(call.selection, [&](auto config) {
    using C = decltype(config);
    visit_format<C>(call.state_format, [&](auto format) {
      step.run = run_request<C, format>;
      step.work = total_work<C, format>(call.params);
      step.floats_each = call.params.num_windows *
                         (kSharesRows<C, format> ? kFloatsOfParts<C> : int64_t{C::kHeadDim});
    });
  });
  return step;
}

struct Steps {
  std::vector<Step> steps;  // of each compressor
  Split split;

  // Part `index`: those of a request side by side, for the compressors' cost differs.
  void run(int64_t index) const {
    const auto count = static_cast<int64_t>(steps.size());
    const int64_t request = index / (count * split.num_parts);
    const Step& step = steps[index % count];
    step.run(step, split, request, index / count % split.num_parts);
  }
};

ffi::Future decode_records(ffi::ThreadPool pool, ffi::RemainingArgs operands,
                           ffi::RemainingRets results, ffi::Dictionary attributes) {
  const ffi::ErrorOr<DecodeRecordsCalls> calls =
      check_decode_records(operands, results, attributes);
  if (!calls) return ready(calls.error());
  if (calls->empty) return ready(ffi::Error::Success());
  std::vector<Step> steps;
  int64_t work = 0, least_head_dim = std::numeric_limits<int64_t>::max();
  for (const DecodeRecordsCall& call : calls->each) {
    steps.push_back(step_of(call));
    work += steps.back().work;
    least_head_dim = std::min(least_head_dim, call.selection.head_dim);
  }
  const DecodeParams& p = steps.front().params;
  const int64_t num_requests = int64_t{p.num_groups} * p.batch;
  const auto count = num_requests * static_cast<int64_t>(steps.size());
  const Split split(count, pool.num_threads(), work, least_head_dim);
  if (split.num_parts > 1) {
    for (Step& step : steps) {
      step.shared =
          std::make_unique<SharedRequests>(num_requests, step.floats_each, split.num_parts);
    }
  }
  const auto shared = std::make_shared<const Steps>(Steps{std::move(steps), split});
  return share_among_threads<std::shared_ptr<const Steps>>(
      pool, shared, count * split.num_parts, split.num_threads,
      [](const std::shared_ptr<const Steps>& all, int64_t index) { all->run(index); });
}

}  // namespace
}  // namespace jax_dsv4

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DecodeRecordsCpu, jax_dsv4::decode_records,
    jax_dsv4::bind_call<xla::ffi::Dictionary>(xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>()));
