// A request's step on a CPU, for operations that do different things with a window's value.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "config.h"
#include "decode.h"
#include "rows_cpu.h"
#include "split_cpu.h"

namespace jax_dsv4 {

// Where a row is kept.
template <class State>
struct Place {
  State* kv = nullptr;     // [S]; null: nowhere
  State* score = nullptr;  // [S]; null: nowhere

  bool exists() const { return kv != nullptr && score != nullptr; }
};

template <class Config>
auto find_row(const DecodeParams& p, const Request<Config>& r, int32_t position) {
  using State = typename Config::State;
  const auto find = [&](void* pool, const int32_t* table) {
    const uint32_t row = r.row_at(p.paging, look_up(p.paging, table, position));
    return row == kNowhere ? nullptr : static_cast<State*>(pool) + int64_t{row} * Config::kStateDim;
  };
  return Place<State>{find(p.kv, r.kv_table), find(p.score, r.score_table)};
}

// Calls use(std::bool_constant<whether there is a bias>): what a NewRow is depends on it.
template <class Config, class Use>
void visit_bias(const Request<Config>& r, Use&& use) {
  if (r.ape == nullptr) {
    use(std::false_type{});
  } else {
    use(std::true_type{});
  }
}

template <bool kHasBias, class Config>
auto new_row(const DecodeParams& p, const Request<Config>& r, int32_t position) {
  const auto* kv = r.kv_score + int64_t{position - r.first_position} * p.row_size;
  const float* bias = kHasBias ? r.ape + (position % Config::kRatio) * Config::kStateDim : nullptr;
  return NewRow<typename Config::KvScore, typename Config::State, kHasBias>{
      kv, scores_of<Config>(p, kv), bias};
}

template <class Config>
inline constexpr Channels kAllChannels = {0, Config::kHeadDim};

// Calls use(c) with the first of them in each half of a row.
template <class Config, class Use>
void visit_halves(Channels channels, Use&& use) {
  for (int c = channels.first; c < Config::kStateDim; c += Config::kHeadDim) use(c);
}

// Stores a row, whatever of its place exists.
template <class Config, class Row>
void store_row(const Row& row, const Place<typename Config::State>& place, Channels channels) {
  visit_halves<Config>(channels, [&](int c) {
    if (place.kv != nullptr) vectorized<store_kv<Row>>(row.at(c), channels.count, place.kv + c);
    if (place.score != nullptr) {
      vectorized<store_score<Row>>(row.at(c), channels.count, place.score + c);
    }
  });
}

// Stores the new tokens' rows at those positions for which is_own(position).
template <class Config, class IsOwn>
void write_rows(const DecodeParams& p, const Request<Config>& r, Channels channels,
                IsOwn&& is_own) {
  visit_bias(r, [&](auto has_bias) {
    for (int t = std::max(0, -r.first_position); t < r.num_new; ++t) {
      const int32_t position = r.first_position + t;
      if (!is_own(position)) continue;
      store_row<Config>(new_row<has_bias>(p, r, position), find_row(p, r, position), channels);
    }
  });
}

// Of a window: the sums of this part of its stored rows.
template <class Config>
void sum_rows(const DecodeParams& p, const Request<Config>& r, int32_t window, int part,
              Channels channels, Sums<Config::kHeadDim>& sums) {
  constexpr int kRows = Config::kReducedRows / kRowParts<Config>;
  StoredRow<typename Config::State> rows[kRows];  // from the window's channels on
  int num_rows = 0;
  const int32_t end = (window + 1) * Config::kRatio;  // at most kv_len: no overflow
  for (int i = part * kRows; i < (part + 1) * kRows; ++i) {
    const int32_t position = end - Config::kReducedRows + i;
    if (position < 0) continue;  // the window before the first one
    const auto place = find_row(p, r, position);
    if (!place.exists()) continue;
    const int half = Config::kOverlap && i >= Config::kRatio ? Config::kHeadDim : 0;
    rows[num_rows++] = {place.kv + half + channels.first, place.score + half + channels.first};
  }
  sums.clear(channels);
  sums.add(rows, num_rows, channels);
}

// A request's step on a raw state, of these channels: stores its new rows, and calls
// emit(window, put) for each window that they complete, oldest first; put(out) computes the
// window's value, into out [D].
template <class Config, class Emit>
void step_raw(const DecodeParams& p, const Request<Config>& r, Channels channels, Emit&& emit) {
  write_rows(p, r, channels, [](int32_t) { return true; });
  for (int32_t window = r.first_window; window < r.end_window; ++window) {
    emit(window, [&](typename Config::Out* out) {
      Sums<Config::kHeadDim> parts[kRowParts<Config>];
      for (int i = 0; i < kRowParts<Config>; ++i) sum_rows(p, r, window, i, channels, parts[i]);
      put_value<Config>(parts, channels, out);
    });
  }
}

// One part of its rows only: parts_of(window)[part] get their sums.
template <class Config, class PartsOf>
void step_row_part(const DecodeParams& p, const Request<Config>& r, int part, Channels channels,
                   PartsOf&& parts_of) {
  static_assert(!Config::kOverlap, "a row that two windows read is of two parts");
  constexpr int kRows = Config::kRatio / kRowParts<Config>;
  write_rows(p, r, channels,
             [&](int32_t position) { return position % Config::kRatio / kRows == part; });
  for (int32_t window = r.first_window; window < r.end_window; ++window) {
    sum_rows(p, r, window, part, channels, parts_of(window)[part]);
  }
}

// A prefix per channel of a row: of the whole of it, or of its first half.
template <class Config, int kChannels>
struct Prefixes {
  alignas(64) float lse[kChannels];
  alignas(64) float mean[kChannels];
  bool is_empty;  // as cleared

  Prefixes() { clear(); }
  void clear() {
    is_empty = true;
    std::fill_n(lse, kChannels, Prefix{}.lse);
    std::fill_n(mean, kChannels, Prefix{}.mean);
  }
  // Calls use(c) as visit_halves does, for the halves that are here.
  template <class Use>
  static void visit(Channels channels, Use&& use) {
    visit_halves<Config>(channels, [&](int c) {
      if (c < kChannels) use(c);
    });
  }
  // That of the row at `position` of the state; a row that is nowhere holds none.
  void read(const DecodeParams& p, const Request<Config>& r, int32_t position, Channels channels) {
    const auto place = find_row(p, r, position);
    if (!place.exists()) return;
    is_empty = false;
    visit(channels, [&](int c) {
      std::copy_n(place.score + c, channels.count, lse + c);
      std::copy_n(place.kv + c, channels.count, mean + c);
    });
  }
  // Merges a row; the result will be stored at `place`, if that exists.
  template <class Row>
  void merge(const Row& row, const Place<float>& place, Channels channels) {
    const Place<float> to = place.exists() ? place : Place<float>{mean, lse};
    visit(channels, [&](int c) {
      const auto run = [&](auto is_first) {
        vectorized<merge_row<Row, is_first>>(row.at(c), channels.count, to.score + c, to.kv + c,
                                             lse + c, mean + c);
      };
      is_empty ? run(std::true_type{}) : run(std::false_type{});
    });
    is_empty = false;
  }
  void copy_first_half(const Prefixes<Config, Config::kStateDim>& row) {
    std::copy_n(row.lse, Config::kHeadDim, lse);
    std::copy_n(row.mean, Config::kHeadDim, mean);
    is_empty = row.is_empty;
  }
  StoredRow<float> as_row() const { return {mean, lse}; }
};

// The value of a window of prefixes `own`; `before`: those of the one before it, where windows
// overlap.
template <class Config>
void put_prefixes(const Prefixes<Config, Config::kHeadDim>& before,
                  const Prefixes<Config, Config::kStateDim>& own, Channels channels,
                  typename Config::Out* out) {
  using Out = typename Config::Out;
  const int first = channels.first, own_first = Config::kStateDim - Config::kHeadDim + first;
  if constexpr (Config::kOverlap) {
    vectorized<put_merged<Out>>(&before.lse[first], &before.mean[first], &own.lse[own_first],
                                &own.mean[own_first], channels.count, out + first);
  } else {
    vectorized<put_prefix<Out>>(&own.lse[own_first], &own.mean[own_first], channels.count,
                                out + first);
  }
}

// The same on a state of prefixes, one token at a time: merges it into the prefix of its window,
// stores that, and emits the window if it completes it. So a row's bits do not depend on which step
// brought it.
template <class Config, class Emit>
void step_prefix(const DecodeParams& p, const Request<Config>& r, Channels channels, Emit&& emit) {
  constexpr int D = Config::kHeadDim, R = Config::kRatio;
  Prefixes<Config, Config::kStateDim> open;  // of the window that the last token is in
  Prefixes<Config, D> before;  // the first half of the window before it, where windows overlap

  const int first = std::max(0, -r.first_position);  // row of kv_score
  const int32_t start = r.first_position + first;    // its position
  if (start % R != 0) open.read(p, r, start - 1, channels);
  if (Config::kOverlap && start >= R) before.read(p, r, start - start % R - 1, channels);

  visit_bias(r, [&](auto has_bias) {
    for (int t = first; t < r.num_new; ++t) {
      const int32_t position = r.first_position + t;
      if (position % R == 0) {
        if (Config::kOverlap && t > first) before.copy_first_half(open);
        open.clear();
      }
      const auto place = find_row(p, r, position);
      if (place.exists()) open.merge(new_row<has_bias>(p, r, position), place, channels);
      store_row<Config>(open.as_row(), place, channels);
      if (position % R != R - 1) continue;
      emit(position / R,
           [&](typename Config::Out* out) { put_prefixes<Config>(before, open, channels, out); });
    }
  });
}

// Calls visit(std::integral_constant) for a state of this format.
template <class Config, class Visit>
void visit_format(StateFormat format, Visit&& visit) {
  if constexpr (may_hold(kDTypeOf<typename Config::State>, StateFormat::kPrefix)) {
    if (format == StateFormat::kPrefix) {
      return visit(std::integral_constant<StateFormat, StateFormat::kPrefix>{});
    }
  }
  visit(std::integral_constant<StateFormat, StateFormat::kRaw>{});
}

// On a state of this format.
template <class Config, StateFormat kFormat, class Emit>
void step_request(const DecodeParams& p, const Request<Config>& r, Channels channels, Emit&& emit) {
  if constexpr (kFormat == StateFormat::kPrefix) {
    step_prefix(p, r, channels, emit);
  } else {
    step_raw(p, r, channels, emit);
  }
}

// Whether threads that share a request have parts of its rows; and what the parts of a window
// leave.
template <class Config, StateFormat kFormat>
inline constexpr bool kSharesRows = kFormat == StateFormat::kRaw && kRowParts<Config> > 1;
template <class Config>
inline constexpr int64_t kFloatsOfParts =
    kRowParts<Config> * sizeof(Sums<Config::kHeadDim>) / sizeof(float);

// One part of request `index`, of which others are other threads'. The last one to be done calls
// emit(window, put), as step_raw does, and returns true.
template <class Config, class Emit>
bool step_shared_rows(const DecodeParams& p, const Request<Config>& r, const Split& split, int part,
                      SharedRequests& shared, int64_t index, Emit&& emit) {
  constexpr int D = Config::kHeadDim, kParts = kRowParts<Config>;
  using Parts = Sums<D>[kParts];
  Parts* const parts = shared.of<Parts>(index);  // [num_windows]
  const auto parts_of = [&](int32_t window) -> Parts& { return parts[window - r.first_window]; };
  step_row_part(p, r, part % kParts, split.channels(D, part, kParts), parts_of);
  if (!shared.was_last_part(index)) return false;
  for (int32_t window = r.first_window; window < r.end_window; ++window) {
    emit(window, [&](typename Config::Out* out) {
      put_value<Config>(parts_of(window), kAllChannels<Config>, out);
    });
  }
  return true;
}

// How much a request's step is, as threads_worth counts it.
template <class Config, StateFormat kFormat>
int64_t work_of(const Request<Config>& r) {
  constexpr int kMerge = 4;  // times what a row of a raw state costs
  const int64_t stored = int64_t{r.num_new} * Config::kStateDim;
  if (kFormat == StateFormat::kPrefix) return kMerge * stored;
  return stored +
         int64_t{r.end_window - r.first_window} * (Config::kReducedRows * Config::kHeadDim);
}

}  // namespace jax_dsv4
