// A ragged batch on a CPU, for operations that do different things with a window's value: how it is
// cut into pieces that threads can take in any order, and a run of a request's windows. No XLA
// types.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "config.h"
#include "decode_cpu.h"
#include "ragged.h"
#include "rows_cpu.h"

namespace jax_dsv4 {

// A request of a ragged batch.
template <class Config>
struct RaggedRequest : Request<Config> {
  uint32_t index;
  int32_t begin;   // its first row of the batch
  int32_t start;   // the position of its first new row that is not ignored
  int32_t length;  // after the call; 0 for an inactive request

  // One past the last window that has new rows.
  uint32_t end_open_window() const {
    return (static_cast<uint32_t>(length) + Config::kRatio - 1) / Config::kRatio;
  }
  // One past the last window that may read rows of the state. These windows are the request's head:
  // rows that the request stores elsewhere may take the place of those that they read.
  uint32_t end_head() const {
    const bool reads = start > 0 && (Config::kOverlap || start % Config::kRatio != 0);
    const uint32_t end = this->first_window + (reads ? 1 + Config::kOverlap : 0);
    return std::min(end, end_open_window());
  }
  bool is_new(int32_t position) const { return position >= start; }
};

template <class Config>
RaggedRequest<Config> find_request(const RaggedParams& p, const int32_t* starts, uint32_t group,
                                   uint32_t index) {
  const int32_t length = p.kv_lens[group * p.kv_lens_stride + index];
  const uint32_t layer = p.layer_of(group);
  RaggedRequest<Config> r{
      ragged_request_at<Config>(p, group, index, length, starts[index], starts[index + 1], layer),
      index, starts[index], 0, 0};
  r.start = std::max(r.first_position, 0);
  r.length = r.num_new > 0 ? length : 0;
  return r;
}

// Whether a new row counts in its window.
template <class Config>
bool counts(const RaggedParams& p, const RaggedRequest<Config>& r, int32_t position) {
  if (!p.rule.all) return true;
  return find_row(p, r, position).exists();
}

// The value of a finished window whose old rows, if any, are raw: per channel, the softmax of the
// scores times kv, into out [D].
template <class Config>
void reduce_rows(const RaggedParams& p, const RaggedRequest<Config>& r, uint32_t window,
                 typename Config::Out* out) {
  constexpr int D = Config::kHeadDim, R = Config::kRatio;
  constexpr int kRows = Config::kReducedRows / kRowParts<Config>;
  constexpr Channels kAll = kAllChannels<Config>;
  Sums<D> parts[kRowParts<Config>];
  const int32_t end = (window + 1) * R;  // at most kv_len: no overflow
  for (int part = 0; part < kRowParts<Config>; ++part) {
    visit_bias(r, [&](auto has_bias) {
      // From the window's channels on.
      StoredRow<typename Config::State> old_rows[kRows];
      NewRow<typename Config::KvScore, typename Config::State, has_bias> new_rows[kRows];
      int num_old = 0, num_new = 0;
      for (int i = part * kRows; i < (part + 1) * kRows; ++i) {
        const int32_t position = end - Config::kReducedRows + i;
        const int half = Config::kOverlap && i >= R ? D : 0;
        if (position < 0) continue;  // the window before the first one
        if (r.is_new(position)) {
          if (counts(p, r, position)) {
            new_rows[num_new++] = new_row<has_bias>(p, r, position).at(half);
          }
        } else {
          const auto place = find_row(p, r, position);
          if (place.exists()) old_rows[num_old++] = {place.kv + half, place.score + half};
        }
      }
      parts[part].clear(kAll);
      parts[part].add(old_rows, num_old, kAll);  // they come before the new ones
      parts[part].add(new_rows, num_new, kAll);
    });
  }
  put_value<Config>(parts, kAll, out);
}

// The positions of a window's new rows.
template <class Config>
struct NewPositions {
  int32_t begin, end;
  NewPositions(const RaggedRequest<Config>& r, uint32_t window)
      : begin(std::max<int64_t>(int64_t{window} * Config::kRatio, r.start)),
        end(std::min<int64_t>((int64_t{window} + 1) * Config::kRatio, r.length)) {}
};

// Of windows begin <= w < end of a request on a raw state: calls emit(window, put) for each that is
// finished, oldest first, then stores new rows; put(out) computes the window's value, into out [D].
// Values first: a row that is stored may take the place of one that they read.
template <class Config, class Emit>
void run_raw(const RaggedParams& p, const RaggedRequest<Config>& r, int32_t begin, int32_t end,
             Emit&& emit) {
  for (int32_t window = begin; window < end && window < r.end_window; ++window) {
    emit(window, [&](typename Config::Out* out) { reduce_rows(p, r, window, out); });
  }
  const int32_t last = NewPositions(r, end - 1).end;
  visit_bias(r, [&](auto has_bias) {
    for (int32_t position = NewPositions(r, begin).begin; position < last; ++position) {
      if (!is_stored<Config, StateFormat::kRaw>(p.rule, position, r.length)) continue;
      store_row<Config>(new_row<has_bias>(p, r, position), find_row(p, r, position),
                        kAllChannels<Config>);
    }
  });
}

// Merges a new row into the prefixes of those before it, if it counts; the result will be stored at
// `place`, if that exists.
template <class Config, int kChannels>
void merge_new_row(const RaggedParams& p, const RaggedRequest<Config>& r, int32_t position,
                   const Place<float>& place, Prefixes<Config, kChannels>& prefixes) {
  if (!counts(p, r, position)) return;
  visit_bias(r, [&](auto has_bias) {
    prefixes.merge(new_row<has_bias>(p, r, position), place, kAllChannels<Config>);
  });
}

// The same on a state of prefixes. What is stored is merged one token at a time, so that a row's
// bits do not depend on which call brought it; other windows' values are those of their new rows.
template <class Config, class Emit>
void run_prefix(const RaggedParams& p, const RaggedRequest<Config>& r, int32_t begin, int32_t end,
                Emit&& emit) {
  using Out = typename Config::Out;
  constexpr int D = Config::kHeadDim, R = Config::kRatio;
  constexpr bool kOverlap = Config::kOverlap;
  constexpr Channels kAll = kAllChannels<Config>;
  const auto is_row_stored = [&](int32_t position) {
    return is_stored<Config, StateFormat::kPrefix>(p.rule, position, r.length);
  };
  Prefixes<Config, Config::kStateDim> open;  // of the window
  Prefixes<Config, D> before;  // the first half of the one before it, where windows overlap
  bool has_before = false;     // whether `before` is there
  const int32_t first = int64_t{begin} * R;
  if (begin == r.first_window && r.start > 0) {
    if (r.start != first) open.read(p, r, r.start - 1, kAll);
    if (kOverlap && first > 0) before.read(p, r, first - 1, kAll);
    has_before = true;
  }
  for (int32_t window = begin; window < end; ++window) {
    const NewPositions<Config> rows(r, window);
    const bool is_finished = window < r.end_window;
    const int64_t first_read = (int64_t{window} - (kOverlap && window > 0)) * R;
    bool any_is_stored = false;
    for (int32_t q = rows.begin; q < rows.end; ++q) any_is_stored |= is_row_stored(q);
    if (!any_is_stored && first_read >= r.start) {
      if (is_finished) emit(window, [&](Out* out) { reduce_rows(p, r, window, out); });
      has_before = false;
      continue;
    }
    if (kOverlap && !has_before) {
      before.clear();
      for (int64_t q = first_read; q < rows.begin; ++q) merge_new_row(p, r, q, {}, before);
    }
    if (rows.begin % R == 0) open.clear();
    for (int32_t q = rows.begin; q < rows.end; ++q) {
      const auto place = is_row_stored(q) ? find_row(p, r, q) : Place<float>{};
      merge_new_row(p, r, q, place, open);
      store_row<Config>(open.as_row(), place, kAll);
    }
    if (is_finished) {
      emit(window, [&](Out* out) { put_prefixes<Config>(before, open, kAll, out); });
    }
    if (kOverlap) before.copy_first_half(open);
    has_before = true;
  }
}

template <class Config, StateFormat kFormat, class Emit>
void run_windows(const RaggedParams& p, const RaggedRequest<Config>& r, uint32_t begin,
                 uint32_t end, Emit&& emit) {
  if (begin >= end) return;
  if constexpr (kFormat == StateFormat::kPrefix) {
    run_prefix(p, r, begin, end, emit);
  } else {
    run_raw(p, r, begin, end, emit);
  }
}

// A batch and the pieces that its work comes in. Threads may take pieces in any order; what a piece
// is does not depend on how many threads there are, nor does a window's value on the pieces.
//
// First come all requests' heads, of which any thread takes the next: no row may be stored before
// those in whose place it may be were read.
class RaggedBatch {
 public:
  explicit RaggedBatch(const RaggedParams& params) : params_(params) {
    const int64_t B = params.batch;
    starts_.resize(params.num_groups * (B + 1));
    for (uint32_t group = 0; group < params.num_groups; ++group) {
      const int32_t* entries = params.cu_q_lens + uint64_t{group} * params.cu_q_lens_stride;
      int32_t* const starts = starts_.data() + group * (B + 1);
      const int32_t num_seqs = params.num_seqs_of(group);
      int32_t start = 0;
      for (int64_t b = 0; b <= B; ++b) {
        if (b <= num_seqs) start = std::max(start, params.clamped(entries[b]));
        starts[b] = start;  // requests that are not there have no rows
      }
    }
    const int64_t rows = std::max(params.next_n, params.num_windows);
    const int64_t rows_per_piece = std::clamp<int64_t>(rows / 256, 1, 64);
    pieces_per_group_ = (rows + rows_per_piece - 1) / rows_per_piece;
  }

  const RaggedParams& params() const { return params_; }
  int64_t num_pieces() const { return params_.num_groups * pieces_per_group_; }

  // How much all of it is, as threads_worth counts it.
  template <class Config, StateFormat kFormat>
  int64_t work() const {
    int64_t work = 0;
    for (uint32_t group = 0; group < params_.num_groups; ++group) {
      for (uint32_t index = 0; index < params_.batch; ++index) {
        work +=
            work_of<Config, kFormat>(find_request<Config>(params_, starts_of(group), group, index));
      }
    }
    return work;
  }

  // Calls emit(group, request, window, put) for each window that the piece's requests finish.
  template <class Config, StateFormat kFormat, class Emit>
  void run_piece(int64_t index, Emit&& emit) {
    finish_heads<Config, kFormat>(emit);
    const uint32_t group = index / pieces_per_group_;
    const int64_t piece = index % pieces_per_group_;
    const int32_t begin = params_.next_n * piece / pieces_per_group_;
    const int32_t end = params_.next_n * (piece + 1) / pieces_per_group_;
    if (begin == end) return;
    const int32_t* starts = starts_of(group);
    const int32_t* const last = starts + params_.batch;
    const int32_t* at = std::upper_bound(starts, last + 1, begin);
    for (at -= at != starts; at < last && *at < end; ++at) {
      const auto r = find_request<Config>(params_, starts, group, at - starts);
      if (r.num_new == 0) continue;
      // The first window whose new rows all are at this row of the batch or behind it.
      const auto window_from = [&](int64_t row) {
        const int64_t position = r.first_position + (row - r.begin);
        return position <= r.start
                   ? r.first_window
                   : static_cast<uint32_t>((position + Config::kRatio - 1) / Config::kRatio);
      };
      run_windows<Config, kFormat>(
          params_, r, std::max(window_from(begin), r.end_head()),
          std::min(window_from(end), r.end_open_window()),
          [&](uint32_t window, auto&& put) { emit(group, r, window, put); });
    }
  }

  // Calls clear(first, last) for the piece's rows of `kv_comp` that hold no window's value.
  template <class Config, class Clear>
  void visit_empty_slots(int64_t index, Clear&& clear) const {
    const uint32_t group = index / pieces_per_group_;
    const int64_t piece = index % pieces_per_group_;
    const int64_t first = params_.num_windows * piece / pieces_per_group_;
    const int64_t last = params_.num_windows * (piece + 1) / pieces_per_group_;
    const int64_t origin = int64_t{group} * params_.num_windows;
    const int32_t* starts = starts_of(group);
    const auto slot_of = [&](int64_t request) -> int64_t {
      return request == params_.batch ? params_.num_windows
                                      : first_slot<Config>(request, starts[request]);
    };
    int64_t low = 0, high = params_.batch;  // the first request whose slots begin behind `first`
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (slot_of(middle) > first) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    int64_t slot = first;
    if (low == 0) {  // no request's
      const int64_t end = std::min(slot_of(0), last);
      if (slot < end) clear(origin + slot, origin + end);
    }
    for (int64_t request = std::max<int64_t>(low - 1, 0);
         request < params_.batch && slot_of(request) < last; ++request) {
      const auto r = find_request<Config>(params_, starts, group, request);
      slot = std::max(first, slot_of(request) + (r.end_window - r.first_window));
      const int64_t end = std::min(slot_of(request + 1), last);
      if (slot < end) clear(origin + slot, origin + end);
    }
  }

 private:
  static constexpr int64_t kHeadsAtOnce = 4;

  const int32_t* starts_of(uint32_t group) const {
    return starts_.data() + int64_t{group} * (int64_t{params_.batch} + 1);
  }

  // Takes heads until there are none, then waits for those that other threads took.
  template <class Config, StateFormat kFormat, class Emit>
  void finish_heads(Emit&& emit) {
    const int64_t count = int64_t{params_.num_groups} * params_.batch;
    while (next_head_.load(std::memory_order_relaxed) < count) {
      const int64_t first = next_head_.fetch_add(kHeadsAtOnce, std::memory_order_relaxed);
      const int64_t last = std::min(first + kHeadsAtOnce, count);
      for (int64_t i = first; i < last; ++i) {
        const uint32_t group = i / params_.batch;
        const auto r = find_request<Config>(params_, starts_of(group), group, i % params_.batch);
        if (r.num_new == 0) continue;
        run_windows<Config, kFormat>(
            params_, r, r.first_window, r.end_head(),
            [&](uint32_t window, auto&& put) { emit(group, r, window, put); });
      }
      if (first < last) heads_done_.fetch_add(last - first, std::memory_order_release);
    }
    while (heads_done_.load(std::memory_order_acquire) < count) std::this_thread::yield();
  }

  RaggedParams params_;
  std::vector<int32_t> starts_;  // [G, B + 1], the running maximum of cu_q_lens
  int64_t pieces_per_group_;
  std::atomic<int64_t> next_head_{0}, heads_done_{0};
};

}  // namespace jax_dsv4
