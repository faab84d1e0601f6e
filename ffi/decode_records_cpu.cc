// A decode step that ends in records on a CPU: requests of all compressors, or parts of their
// channels, are shared among XLA's threads.

#include "decode_records_cpu.h"

#include <algorithm>
#include <atomic>
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

// The values of requests whose channels are shared among threads, until the last of its threads
// makes a request's records of them.
class SharedValues {
 public:
  SharedValues(int64_t num_requests, int64_t request_size, int num_parts)
      : request_size_(request_size),
        values_(num_requests * request_size),
        parts_left_(num_requests) {
    for (auto& left : parts_left_) left.store(num_parts, std::memory_order_relaxed);
  }
  float* of(int64_t request) { return values_.data() + request * request_size_; }
  bool was_last_part(int64_t request) { return parts_left_[request].fetch_sub(1) == 1; }

 private:
  int64_t request_size_;
  std::vector<float> values_;  // [G * B, num_windows, D]
  std::vector<std::atomic<int>> parts_left_;
};

// One compressor's step.
struct Step {
  DecodeRecordsParams params;
  StoreRecord store;
  void (*run)(const Step&, const Split&, int64_t request, int part);
  int64_t work;                          // of all requests
  std::unique_ptr<SharedValues> values;  // null: each request's are one thread's
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
  if (step.values == nullptr) {
    return step_to_records<Config, kFormat>(p, group, request,
                                            [&](uint32_t, auto&&... record) { store(record...); });
  }
  const auto r = request_at<Config>(p, group, request);
  float* const values = step.values->of(index);
  const auto value_of = [&](uint32_t window) {
    return values + int64_t{window - r.first_window} * D;
  };
  step_request<Config, kFormat>(p, r, split.channels(D, part),
                                [&](uint32_t window, auto&& put) { put(value_of(window)); });
  if (!step.values->was_last_part(index)) return;
  for (int32_t window = r.first_window; window < r.end_window; ++window) {
    put_record<Config>(
        p.records, group, request, window,
        [&](float* value) { std::copy_n(value_of(window), D, value); }, store);
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
  Step step{call.params, store_of(call.format, call.selection.head_dim), nullptr, 0, nullptr};
  visit_config<InnerDTypesList>(call.selection, [&](auto config) {
    using C = decltype(config);
    visit_format<C>(call.state_format, [&](auto format) {
      step.run = run_request<C, format>;
      step.work = total_work<C, format>(call.params);
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
    for (size_t i = 0; i < steps.size(); ++i) {
      const int64_t request_size = steps[i].params.num_windows * calls->each[i].selection.head_dim;
      steps[i].values = std::make_unique<SharedValues>(num_requests, request_size, split.num_parts);
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
