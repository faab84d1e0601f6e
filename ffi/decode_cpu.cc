// The decode operation on a CPU: requests, or parts of them, are shared among XLA's threads.

#include "decode_cpu.h"

#include <algorithm>
#include <cstdint>
#include <memory>

#include "config.h"
#include "decode.h"
#include "decode_call.h"
#include "numeric.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {
namespace {

struct Step {
  DecodeParams params;
  Split split;
  void (*run)(const Step&, int64_t request, int part);
  std::shared_ptr<SharedRequests> shared;  // of parts of rows; null: there are none
};

// Of request `index` of G * B.
template <class Config>
Request<Config> request_of(const DecodeParams& p, int64_t index) {
  return request_at<Config>(p, index / p.batch, index % p.batch);
}

template <class Config, StateFormat kFormat>
void decode_request(const Step& step, int64_t index, int part) {
  using Out = typename Config::Out;
  constexpr int D = Config::kHeadDim;
  const DecodeParams& p = step.params;
  const auto r = request_of<Config>(p, index);
  Out* out = static_cast<Out*>(p.kv_comp) + index * p.num_windows * D;
  Out* const end = out + int64_t{p.num_windows} * D;
  const auto put_next = [&](int32_t, auto&& put) {
    put(out);
    out += D;
  };
  Channels channels = kAllChannels<Config>;
  if (step.shared == nullptr) {
    channels = step.split.channels(D, part, 1);
    step_request<Config, kFormat>(p, r, channels, put_next);
  } else if constexpr (kSharesRows<Config, kFormat>) {
    if (!step_shared_rows(p, r, step.split, part, *step.shared, index, put_next)) return;
  }
  for (; out < end; out += D) {
    std::fill_n(out + channels.first, channels.count, round_to<Out>(0.0f));
  }
}

template <class Config, StateFormat kFormat>
Step step_of(const DecodeParams& p, int64_t most_threads) {
  const int64_t num_requests = int64_t{p.num_groups} * p.batch;
  int64_t work = 0;
  for (int64_t i = 0; i < num_requests && threads_worth(work) < most_threads; ++i) {
    work += work_of<Config, kFormat>(request_of<Config>(p, i));
  }
  Step step = {p, Split(num_requests, most_threads, work, Config::kHeadDim),
               decode_request<Config, kFormat>, nullptr};
  if (kSharesRows<Config, kFormat> && step.split.num_parts > 1) {
    step.shared = std::make_shared<SharedRequests>(
        num_requests, p.num_windows * kFloatsOfParts<Config>, step.split.num_parts);
  }
  return step;
}

void run_part(const Step& step, int64_t index) {
  step.run(step, index / step.split.num_parts, index % step.split.num_parts);
}

ffi::Future decode(ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::RemainingRets results,
                   const DecodeAttributes& attributes) {
  const ffi::ErrorOr<DecodeCall> call = check_decode(operands, results, attributes);
  if (!call) return ready(call.error());
  if (call->empty) return ready(ffi::Error::Success());
  Step (*make_step)(const DecodeParams&, int64_t) = nullptr;
  visit_config(call->selection, [&](auto config) {
    visit_format<decltype(config)>(
        call->state_format, [&](auto format) { make_step = step_of<decltype(config), format>; });
  });
  const Step step = make_step(call->params, pool.num_threads());
  const int64_t num_requests = int64_t{call->params.num_groups} * call->params.batch;
  return share_among_threads(pool, step, num_requests * step.split.num_parts,
                             step.split.num_threads, run_part);
}

}  // namespace
}  // namespace jax_dsv4

XLA_FFI_DEFINE_HANDLER_SYMBOL(PagedKvCompressCpu, jax_dsv4::decode,
                              jax_dsv4::bind_call<jax_dsv4::DecodeAttributes>(
                                  xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>()));
