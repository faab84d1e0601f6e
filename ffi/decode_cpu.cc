// The decode operation on a CPU: requests are shared among XLA's threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "config.h"
#include "decode.h"
#include "numeric.h"
#include "operands.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {
namespace {

// Stores the new tokens' rows: kv, and score plus its bias, rounded once to the state's dtype.
template <class Config>
void write_rows(const DecodeParams& p, const Request<Config>& r) {
  using State = typename Config::State;
  constexpr int S = Config::kStateDim;
  for (int t = std::max(0, -r.first_position); t < r.num_new; ++t) {
    const int32_t position = r.first_position + t;
    const auto* kv_in = r.kv_score + int64_t{t} * (2 * S);
    const auto* score_in = kv_in + S;
    const float* ape = r.ape == nullptr ? nullptr : r.ape + (position % Config::kRatio) * S;
    const uint32_t kv_row = r.find_row(p.paging, r.kv_table, position);
    const uint32_t score_row = r.find_row(p.paging, r.score_table, position);
    if (kv_row != kNowhere) {
      State* out = static_cast<State*>(p.kv) + int64_t{kv_row} * S;
      for (int c = 0; c < S; ++c) out[c] = round_to<State>(to_f32(kv_in[c]));
    }
    if (score_row != kNowhere) {
      State* out = static_cast<State*>(p.score) + int64_t{score_row} * S;
      for (int c = 0; c < S; ++c) {
        const float score = to_f32(score_in[c]);
        out[c] = round_to<State>(ape == nullptr ? score : score + ape[c]);  // adding 0 loses -0
      }
    }
  }
}

// Per channel, the softmax of a window's stored scores times its stored kv, into out [D].
template <class Config>
void reduce_window(const DecodeParams& p, const Request<Config>& r, int32_t window,
                   typename Config::Out* out) {
  using State = typename Config::State;
  using Out = typename Config::Out;
  constexpr int D = Config::kHeadDim, S = Config::kStateDim;
  struct Row {
    const State* kv;     // [D]
    const State* score;  // [D]
  };
  Row rows[Config::kReducedRows];
  int num_rows = 0;
  const int32_t end = (window + 1) * Config::kRatio;  // at most kv_len: no overflow
  for (int i = 0; i < Config::kReducedRows; ++i) {
    const int32_t position = end - Config::kReducedRows + i;
    if (position < 0) continue;  // the window before the first one
    const uint32_t kv_row = r.find_row(p.paging, r.kv_table, position);
    const uint32_t score_row = r.find_row(p.paging, r.score_table, position);
    if (kv_row == kNowhere || score_row == kNowhere) continue;
    const int column = Config::kOverlap && i >= Config::kRatio ? D : 0;
    rows[num_rows++] = {static_cast<const State*>(p.kv) + int64_t{kv_row} * S + column,
                        static_cast<const State*>(p.score) + int64_t{score_row} * S + column};
  }
  float max[D], sum[D] = {}, weighted[D] = {};
  std::fill(max, max + D, kNegInf);
  for (int i = 0; i < num_rows; ++i) {
    for (int d = 0; d < D; ++d) max[d] = std::max(max[d], to_f32(rows[i].score[d]));
  }
  for (int d = 0; d < D; ++d) max[d] = finite_or_zero(max[d]);
  for (int i = 0; i < num_rows; ++i) {
    for (int d = 0; d < D; ++d) {
      const float weight = std::exp(to_f32(rows[i].score[d]) - max[d]);
      sum[d] += weight;
      weighted[d] += weight * to_f32(rows[i].kv[d]);
    }
  }
  for (int d = 0; d < D; ++d) out[d] = round_to<Out>(sum[d] == 0 ? 0.0f : weighted[d] / sum[d]);
}

// Request `index` of G * B.
template <class Config>
void decode_request(const DecodeParams& p, int64_t index) {
  using Out = typename Config::Out;
  const auto r = request_at<Config>(p, index / p.batch, index % p.batch);
  write_rows(p, r);
  Out* out = static_cast<Out*>(p.kv_comp) + index * p.num_windows * Config::kHeadDim;
  for (int32_t m = 0; m < p.num_windows; ++m, out += Config::kHeadDim) {
    const int32_t window = r.first_window + m;
    if (window < r.end_window) {
      reduce_window(p, r, window, out);
    } else {
      std::fill(out, out + Config::kHeadDim, round_to<Out>(0.0f));
    }
  }
}

// Splits the requests into a few tasks per thread of XLA's pool; the future completes with the
// last.
template <class Config>
ffi::Future decode_batch(ffi::ThreadPool pool, const DecodeParams& p) {
  const int64_t num_requests = int64_t{p.num_groups} * p.batch;
  const int64_t num_tasks = std::clamp<int64_t>(4 * pool.num_threads(), 1, num_requests);
  ffi::CountDownPromise promise(num_tasks);
  ffi::Future future(promise);
  for (int64_t task = 0; task < num_tasks; ++task) {
    const int64_t begin = num_requests * task / num_tasks;
    const int64_t end = num_requests * (task + 1) / num_tasks;
    pool.Schedule([p, begin, end, promise]() mutable {
      for (int64_t i = begin; i < end; ++i) decode_request<Config>(p, i);
      promise.CountDown();
    });
  }
  return future;
}

ffi::Future ready(ffi::Error error) {
  ffi::Promise promise;
  ffi::Future future(promise);
  if (error.failure()) {
    promise.SetError(error);
  } else {
    promise.SetAvailable();
  }
  return future;
}

ffi::Future decode(ffi::ThreadPool pool, const DecodeCall& call) {
  std::optional<ffi::Future> future;
  ffi::Error error = check_and_run(call, [&](auto config, const DecodeParams& p) {
    future = decode_batch<decltype(config)>(pool, p);
    return ffi::Error::Success();
  });
  return future ? std::move(*future) : ready(error);
}

}  // namespace
}  // namespace jax_dsv4

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    PagedKvCompressCpu, ([](xla::ffi::ThreadPool pool, auto... call) {
      return jax_dsv4::decode(pool, jax_dsv4::decode_call(call...));
    }),
    jax_dsv4::bind_decode(xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>()));
