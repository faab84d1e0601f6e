// What a ragged batch works on, once checked: requests that bring any number of new rows each, all
// in one array, and one request's view of them. Host and device; no XLA types.
#pragma once

#include <cstdint>

#include "config.h"
#include "decode.h"
#include "paging.h"

namespace jax_dsv4 {

// Which new rows are stored: all, or those that a later step may read. Such a step starts at a
// length of kv_len - max_rewind or more, or at a multiple of `resume_every`.
struct StoreRule {
  bool all;
  bool resumes;          // whether there is a `resume_every`
  int32_t max_rewind;    // 0 or more
  Divisor resume_every;  // 1 or more
};

// Whether the new row at `position` of a request of this `length` is stored.
template <class Config, StateFormat kFormat>
JAX_DSV4_HD bool is_stored(const StoreRule& rule, int32_t position, int32_t length) {
  constexpr int R = Config::kRatio;
  if (rule.all) return true;
  const bool ends_window = position % R == R - 1;
  if (ends_window && !Config::kOverlap) return false;  // no step reads on in a window that ended
  const int32_t shortest = length > rule.max_rewind ? length - rule.max_rewind : 0;
  const int64_t next_resume =
      rule.resumes ? (int64_t{position / rule.resume_every} + 1) * rule.resume_every.value : 0;
  const bool may_resume = rule.resumes && next_resume <= length;
  if constexpr (kFormat == StateFormat::kRaw) {
    // A step reads from the start of its window on, or of the one before.
    const auto reads = [&](int64_t start) {
      return (start / R - Config::kOverlap) * R <= position;
    };
    return reads(shortest) || (may_resume && reads(next_resume));
  } else {
    // Read by steps that start behind the row: behind the last one of a window, by those of the
    // whole next window.
    const int64_t last_start = int64_t{position} + (ends_window ? R : 1);
    return last_start >= shortest || (may_resume && last_start >= next_resume);
  }
}

// The operands of a ragged call. Of those of a decode step, `next_n` is T, the rows of `kv_score`
// [G or 1, T, row_size]; `kv_score_stride` is in arrays of them, 1 or 0; `num_windows` is
// T / R + B, the rows of `kv_comp` [G, T / R + B, D]; `q_lens` is null.
struct RaggedParams : DecodeParams {
  const int32_t* cu_q_lens;   // [G or 1, B + 1]
  const int32_t* num_seqs;    // [G or 1]; null: B
  uint32_t cu_q_lens_stride;  // from one group to the next, in entries: B + 1 or 0
  uint32_t num_seqs_stride;   // 1 or 0
  StoreRule rule;

  // How many requests of a group are there.
  JAX_DSV4_HD int32_t num_seqs_of(uint32_t group) const {
    return clamped_num_seqs(num_seqs == nullptr ? 0 : num_seqs[group * num_seqs_stride]);
  }
  // The same, by the group's entry of `num_seqs`, if that is there.
  JAX_DSV4_HD int32_t clamped_num_seqs(int32_t given) const {
    const int32_t most = static_cast<int32_t>(batch);
    if (num_seqs == nullptr) return most;
    return given < 0 ? 0 : given < most ? given : most;
  }
  // The layer that a group's call works on, where that is an operand.
  JAX_DSV4_HD uint32_t layer_of(uint32_t group) const {
    return layer == nullptr ? 0 : layer[group * layer_stride];
  }
  // An entry of `cu_q_lens`, of which a running maximum is to be taken.
  JAX_DSV4_HD int32_t clamped(int32_t entry) const {
    return entry < 0 ? 0 : entry < next_n ? entry : next_n;
  }
};

// The row of `kv_comp` that holds the first window which request `index` completes: no two
// requests' windows collide. `begin`: its first row of `kv_score`.
template <class Config>
JAX_DSV4_HD int32_t first_slot(int32_t index, int32_t begin) {
  return begin / Config::kRatio + index;
}

// Request `index`, of this length, whose new rows are begin <= row < end of `kv_score`; `layer`:
// p.layer_of(group).
template <class Config>
JAX_DSV4_HD Request<Config> ragged_request_at(const RaggedParams& p, uint32_t group, uint32_t index,
                                              int32_t length, int32_t begin, int32_t end,
                                              uint32_t layer) {
  using KvScore = typename Config::KvScore;
  int32_t n = end - begin;
  Request<Config> r;
  r.pool_row = group * p.rows_per_group;
  if (p.layer != nullptr) {
    if (layer >= p.num_layers) n = 0;  // a layer that does not exist: nothing is active
    r.pool_row += layer * p.rows_per_layer;
  }
  const bool active = length > 0 && n > 0;
  r.num_new = active ? n : 0;
  r.first_position = active ? length - n : 0;
  const uint32_t start = r.first_position > 0 ? r.first_position : 0;
  r.first_window = start / Config::kRatio;
  r.end_window = (active ? static_cast<uint32_t>(length) : 0) / Config::kRatio;
  const uint64_t first_row =
      uint64_t{group * p.kv_score_stride} * static_cast<uint32_t>(p.next_n) + begin;
  r.kv_score = static_cast<const KvScore*>(p.kv_score) + first_row * p.row_size;
  r.ape = p.ape;
  if (p.ape != nullptr) {
    r.ape += uint64_t{group * p.ape_stride} * (Config::kRatio * Config::kStateDim);
  }
  r.kv_table = p.kv_tables + uint64_t{group * p.kv_tables_stride + index} * p.paging.max_pages;
  r.score_table =
      p.score_tables + uint64_t{group * p.score_tables_stride + index} * p.paging.max_pages;
  return r;
}

}  // namespace jax_dsv4
