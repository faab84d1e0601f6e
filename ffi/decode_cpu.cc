// The decode operation on a CPU: requests are shared among XLA's threads.

#include "decode_cpu.h"

#include <algorithm>
#include <cstdint>

#include "config.h"
#include "decode.h"
#include "decode_call.h"
#include "numeric.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {
namespace {

// Request `index` of G * B.
template <class Config, StateFormat kFormat>
void decode_request(const DecodeParams& p, int64_t index) {
  using Out = typename Config::Out;
  constexpr int D = Config::kHeadDim;
  const auto r = request_at<Config>(p, index / p.batch, index % p.batch);
  Out* out = static_cast<Out*>(p.kv_comp) + index * p.num_windows * D;
  Out* const end = out + int64_t{p.num_windows} * D;
  step_request<Config, kFormat>(p, r, [&](int32_t, auto&& put) {
    put(out);
    out += D;
  });
  std::fill(out, end, round_to<Out>(0.0f));
}

ffi::Future decode(ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::RemainingRets results,
                   const DecodeAttributes& attributes) {
  const ffi::ErrorOr<DecodeCall> call = check_decode(operands, results, attributes);
  if (!call) return ready(call.error());
  if (call->empty) return ready(ffi::Error::Success());
  void (*decode_one)(const DecodeParams&, int64_t) = nullptr;
  visit_config(call->selection, [&](auto config) {
    using C = decltype(config);
    decode_one = decode_request<C, StateFormat::kRaw>;
    if constexpr (may_hold(kDTypeOf<typename C::State>, StateFormat::kPrefix)) {
      if (call->state_format == StateFormat::kPrefix) {
        decode_one = decode_request<C, StateFormat::kPrefix>;
      }
    }
  });
  const int64_t num_requests = int64_t{call->params.num_groups} * call->params.batch;
  return share_among_threads(pool, call->params, num_requests, 1, decode_one);
}

}  // namespace
}  // namespace jax_dsv4

XLA_FFI_DEFINE_HANDLER_SYMBOL(PagedKvCompressCpu, jax_dsv4::decode,
                              jax_dsv4::bind_call<jax_dsv4::DecodeAttributes>(
                                  xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>()));
