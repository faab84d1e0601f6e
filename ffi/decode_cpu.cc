// The decode operation on a CPU: requests are shared among XLA's threads.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "config.h"
#include "decode.h"
#include "decode_call.h"
#include "numeric.h"
#include "prefix.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {
namespace {

template <class State>
struct Row {
  State* kv;     // [S]; null: nowhere
  State* score;  // [S]; null: nowhere
};

template <class Config>
auto find_row(const DecodeParams& p, const Request<Config>& r, int32_t position) {
  using State = typename Config::State;
  const auto find = [&](void* pool, const int32_t* table) {
    const uint32_t row = r.row_at(p.paging, look_up(p.paging, table, position));
    return row == kNowhere ? nullptr : static_cast<State*>(pool) + int64_t{row} * Config::kStateDim;
  };
  return Row<State>{find(p.kv, r.kv_table), find(p.score, r.score_table)};
}

// Stores the new tokens' rows: kv, and score plus its bias, rounded once to the state's dtype.
template <class Config>
void write_rows(const DecodeParams& p, const Request<Config>& r) {
  using State = typename Config::State;
  constexpr int S = Config::kStateDim;
  for (int t = std::max(0, -r.first_position); t < r.num_new; ++t) {
    const int32_t position = r.first_position + t;
    const auto* kv_in = r.kv_score + int64_t{t} * p.row_size;
    const auto* score_in = scores_of<Config>(p, kv_in);
    const float* ape = r.ape == nullptr ? nullptr : r.ape + (position % Config::kRatio) * S;
    const auto [kv, score] = find_row(p, r, position);
    if (kv != nullptr) {
      for (int c = 0; c < S; ++c) kv[c] = round_to<State>(to_f32(kv_in[c]));
    }
    if (score != nullptr) {
      for (int c = 0; c < S; ++c) {
        const float raw = to_f32(score_in[c]);
        score[c] = round_to<State>(ape == nullptr ? raw : raw + ape[c]);  // adding 0 loses -0
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
  constexpr int D = Config::kHeadDim;
  Row<const State> rows[Config::kReducedRows];  // the window's columns of each
  int num_rows = 0;
  const int32_t end = (window + 1) * Config::kRatio;  // at most kv_len: no overflow
  for (int i = 0; i < Config::kReducedRows; ++i) {
    const int32_t position = end - Config::kReducedRows + i;
    if (position < 0) continue;  // the window before the first one
    const auto [kv, score] = find_row(p, r, position);
    if (kv == nullptr || score == nullptr) continue;
    const int column = Config::kOverlap && i >= Config::kRatio ? D : 0;
    rows[num_rows++] = {kv + column, score + column};
  }
  float max[D], sum[D] = {}, weighted[D] = {};
  std::fill(max, max + D, kNegInf);
  for (int i = 0; i < num_rows; ++i) {
    for (int d = 0; d < D; ++d) max[d] = std::max(max[d], to_f32(rows[i].score[d]));
  }
  for (int d = 0; d < D; ++d) max[d] = finite(max[d]);
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
void decode_raw(const DecodeParams& p, int64_t index) {
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

// Reads the first kChannels of the row at `position` of a state of prefixes; a row that is nowhere
// holds none.
template <class Config, int kChannels>
void read_row(const DecodeParams& p, const Request<Config>& r, int32_t position,
              Prefix (&out)[kChannels]) {
  const auto [kv, score] = find_row(p, r, position);
  if (kv == nullptr || score == nullptr) return;
  for (int c = 0; c < kChannels; ++c) out[c] = {score[c], kv[c]};
}

// One token at a time: merges it into the prefix of its window, stores that, and emits the value of
// a window that it completes. So a row's bits do not depend on which step brought it.
template <class Config>
void decode_prefix(const DecodeParams& p, int64_t index) {
  using Out = typename Config::Out;
  constexpr int D = Config::kHeadDim, R = Config::kRatio, S = Config::kStateDim;
  const auto r = request_at<Config>(p, index / p.batch, index % p.batch);
  constexpr int kOwn = S - D;  // the first channel that a window contributes to its own value
  Out* out = static_cast<Out*>(p.kv_comp) + index * p.num_windows * D;
  Prefix open[S];    // of the window that the last token is in
  Prefix before[D];  // the first half of the window before it, where windows overlap

  const int first = std::max(0, -r.first_position);  // row of kv_score
  const int32_t start = r.first_position + first;    // its position
  if (start % R != 0) read_row(p, r, start - 1, open);
  if (Config::kOverlap && start >= R) read_row(p, r, start - start % R - 1, before);

  for (int t = first; t < r.num_new; ++t) {
    const int32_t position = r.first_position + t;
    if (position % R == 0) {
      if (Config::kOverlap && t > first) std::copy_n(open, D, before);
      std::fill(open, open + S, Prefix{});
    }
    const auto [kv, score] = find_row(p, r, position);
    if (kv != nullptr && score != nullptr) {
      const auto* kv_in = r.kv_score + int64_t{t} * p.row_size;
      const auto* score_in = scores_of<Config>(p, kv_in);
      const float* ape = r.ape == nullptr ? nullptr : r.ape + (position % R) * S;
      for (int c = 0; c < S; ++c) {
        const float biased = to_f32(score_in[c]) + (ape == nullptr ? 0.0f : ape[c]);
        open[c] = merge(open[c], {biased, to_f32(kv_in[c])});
      }
    }
    if (kv != nullptr) {
      for (int c = 0; c < S; ++c) kv[c] = open[c].mean;
    }
    if (score != nullptr) {
      for (int c = 0; c < S; ++c) score[c] = open[c].lse;
    }
    if (position % R != R - 1) continue;
    for (int d = 0; d < D; ++d) {
      const Prefix own = open[kOwn + d];
      *out++ = round_to<Out>(value_of(Config::kOverlap ? merge(before[d], own) : own));
    }
  }
  std::fill(out, static_cast<Out*>(p.kv_comp) + (index + 1) * p.num_windows * D,
            round_to<Out>(0.0f));
}

ffi::Future decode(ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::RemainingRets results,
                   const DecodeAttributes& attributes) {
  const ffi::ErrorOr<DecodeCall> call = check_decode(operands, results, attributes);
  if (!call) return ready(call.error());
  if (call->empty) return ready(ffi::Error::Success());
  void (*decode_request)(const DecodeParams&, int64_t) = nullptr;
  visit_config(call->selection, [&](auto config) {
    using C = decltype(config);
    decode_request = decode_raw<C>;
    if constexpr (may_hold(kDTypeOf<typename C::State>, StateFormat::kPrefix)) {
      if (call->state_format == StateFormat::kPrefix) decode_request = decode_prefix<C>;
    }
  });
  const int64_t num_requests = int64_t{call->params.num_groups} * call->params.batch;
  return share_among_threads(pool, call->params, num_requests, 1, decode_request);
}

}  // namespace
}  // namespace jax_dsv4

XLA_FFI_DEFINE_HANDLER_SYMBOL(PagedKvCompressCpu, jax_dsv4::decode,
                              jax_dsv4::bind_call<jax_dsv4::DecodeAttributes>(
                                  xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>()));
