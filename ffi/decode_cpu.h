// A request's step on a CPU, for operations that do different things with a window's value.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "config.h"
#include "decode.h"
#include "numeric.h"
#include "prefix.h"

namespace jax_dsv4 {

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

// A request's step on a raw state: stores its new rows, and calls emit(window, put) for each window
// that they complete, oldest first; put(out) computes the window's value, into out [D].
template <class Config, class Emit>
void step_raw(const DecodeParams& p, const Request<Config>& r, Emit&& emit) {
  write_rows(p, r);
  for (int32_t window = r.first_window; window < r.end_window; ++window) {
    emit(window, [&](typename Config::Out* out) { reduce_window(p, r, window, out); });
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

// The same on a state of prefixes, one token at a time: merges it into the prefix of its window,
// stores that, and emits the window if it completes it. So a row's bits do not depend on which step
// brought it.
template <class Config, class Emit>
void step_prefix(const DecodeParams& p, const Request<Config>& r, Emit&& emit) {
  using Out = typename Config::Out;
  constexpr int D = Config::kHeadDim, R = Config::kRatio, S = Config::kStateDim;
  constexpr int kOwn = S - D;  // the first channel that a window contributes to its own value
  Prefix open[S];              // of the window that the last token is in
  Prefix before[D];            // the first half of the window before it, where windows overlap

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
    emit(position / R, [&](Out* out) {
      for (int d = 0; d < D; ++d) {
        const Prefix own = open[kOwn + d];
        out[d] = round_to<Out>(value_of(Config::kOverlap ? merge(before[d], own) : own));
      }
    });
  }
}

// On a state of this format.
template <class Config, StateFormat kFormat, class Emit>
void step_request(const DecodeParams& p, const Request<Config>& r, Emit&& emit) {
  if constexpr (kFormat == StateFormat::kPrefix) {
    step_prefix(p, r, emit);
  } else {
    step_raw(p, r, emit);
  }
}

}  // namespace jax_dsv4
