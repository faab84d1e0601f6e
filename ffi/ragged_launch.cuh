// Which kernel a ragged batch has, and its grid.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "config.h"
#include "launch.cuh"
#include "ragged.cuh"
#include "ragged.h"
#include "ragged_records.h"
#include "tuning.h"

namespace jax_dsv4 {

inline constexpr const char* kTooManyRows =
    "kv_score, cu_q_lens: too many rows, requests or groups for one launch";
inline constexpr int64_t kMostSlotsOfWalker = 1024;
inline constexpr const char* kWrongRaggedGeometry =
    "geometry: expected -1; or of long windows 0, or 2 or 4 row groups; or of short ones 1 to "
    "1024 slots of a walker";

// How many slots each walker has, of a call that takes so many threads with one slot each: so many
// that no more CTAs of walkers are on an SM than is best (tuning.h).
template <class Body>
int64_t slots_of_walker(int64_t threads, const StoreRule& rule, StateFormat format) {
  const bool is_raw = format == StateFormat::kRaw;
  const int64_t on_sms =
      int64_t{Body::kThreads} * std::max(device_attribute(cudaDevAttrMultiProcessorCount), 1);
  if (is_raw && threads <= Body::kMinCtas * on_sms) return 1;
  const int live_ctas = Body::kEndsInRecords ? kWalkerCtasOfRecords : kWalkerCtas;
  const int64_t at_once = (rule.all ? Body::kMinCtas : live_ctas) * on_sms;
  const int64_t needed = (threads + at_once - 1) / at_once;
  int64_t most = kMostSlotsOfWalker;
  if (rule.all && is_raw) {
    most = kStoringSlotsOfRaw;
  } else if (rule.all && !Body::kEndsInRecords) {
    most = kStoringSlotsOfPrefix;
  } else if (rule.all && needed > kStoringSlotsAtOnce) {
    most = kStoringSlotsOfPrefixRecords;
  }
  const int64_t slots = std::clamp<int64_t>(needed, 1, most);
  // A walker's warps make the records of as many windows in one turn.
  constexpr int kOfTurn = Body::kEndsInRecords ? Body::kWarps : 1;
  if (slots <= kOfTurn || slots >= kManyTurns * kOfTurn) return slots;
  return (slots + kOfTurn - 1) / kOfTurn * kOfTurn;
}

// Whether CTAs with all channels of a window of many rows are compiled: with two row groups, and
// where they end in records with four, too. For what was measured: more kernels build longer.
template <class Config>
inline constexpr bool kHasWide =
    Config::kHeadDim == 512 && std::is_same_v<typename Config::KvScore, bf16> &&
    std::is_same_v<typename Config::State, float>;

// Of long windows: how many row groups share one, in a CTA that has all of its channels; or 0,
// where CTAs have a slice of them. Measured (benchmarks/notes.md): where windows are few, slices
// are on more SMs; where all rows are stored, nothing else counts; and values need no
// cluster, so that they take slices, too, where a last turn of windows would leave SMs without one.
template <class Config, StateFormat kFormat, bool kRecords>
int row_groups_of(const RaggedParams& p) {
  if (!kHasWide<Config> || p.rule.all) return 0;
  const int64_t windows = int64_t{p.num_groups} * (p.next_n / Config::kRatio);  // or a few more
  const int64_t sms = std::max(device_attribute(cudaDevAttrMultiProcessorCount), 1);
  if (kRecords) return windows > sms ? 2 : 3 * windows > 2 * sms ? 4 : 0;
  const int64_t at_once = WideTile<Config, 2>::kMinCtas * sms;
  const int64_t last_turn = windows % at_once;
  return windows > 0 && (last_turn == 0 || 4 * last_turn > 3 * at_once) ? 2 : 0;
}

// Calls visit(Body, params) for the kernel of a call; `geometry`: as row_groups_of for long
// windows, so many slots of a walker for short ones, or our choice where it is negative. Returns
// what is wrong, or what `visit` returns.
template <class Config, StateFormat kFormat, bool kRecords, class Visit>
const char* visit_ragged_body(const RaggedParams& p, const ResultOf<kRecords>& result,
                              int64_t geometry, Visit&& visit) {
  if constexpr (Config::kReducedRows > 32) {
    if (geometry < 0) geometry = row_groups_of<Config, kFormat, kRecords>(p);
    if constexpr (kHasWide<Config>) {
      const auto visit_wide = [&](auto row_groups) {
        using Body = RaggedWide<Config, kFormat, kRecords, row_groups>;
        return visit(Body{}, typename Body::Params(p, result));
      };
      if (geometry == 2) return visit_wide(std::integral_constant<int, 2>{});
      if constexpr (kRecords) {
        if (geometry == 4) return visit_wide(std::integral_constant<int, 4>{});
      }
    }
    if (geometry != 0) return kWrongRaggedGeometry;
    const auto visit_long = [&](auto stores_all) {
      using Body = RaggedLong<Config, kFormat, kRecords, stores_all>;
      const bool has_clusters = !kRecords || Body::T::kSlices == 1 || jax_dsv4::has_clusters();
      return visit(Body{}, typename Body::Params(p, result, has_clusters ? 1 : Body::T::kSlices));
    };
    if constexpr (kFormat == StateFormat::kPrefix) {
      if (p.rule.all) return visit_long(std::true_type{});
    }
    return visit_long(std::false_type{});
  } else {
    using Body = RaggedShort<Config, kFormat, kRecords>;
    if (geometry < 0) {
      geometry = slots_of_walker<Body>(int64_t{p.num_groups} * p.num_windows * Body::T::kLanes,
                                       p.rule, kFormat);
    }
    if (geometry < 1 || geometry > kMostSlotsOfWalker) return kWrongRaggedGeometry;
    return visit(Body{}, typename Body::Params(p, result, static_cast<int32_t>(geometry)));
  }
}

template <class Config, bool kRecords, class Visit>
const char* visit_ragged_format(const RaggedParams& p, StateFormat format,
                                const ResultOf<kRecords>& result, int64_t geometry, Visit&& visit) {
  if constexpr (may_hold(kDTypeOf<typename Config::State>, StateFormat::kPrefix)) {
    if (format == StateFormat::kPrefix) {
      return visit_ragged_body<Config, StateFormat::kPrefix, kRecords>(p, result, geometry, visit);
    }
  }
  return visit_ragged_body<Config, StateFormat::kRaw, kRecords>(p, result, geometry, visit);
}

// As many CTAs, or one more, which does nothing: an SM that alone gets one more than all others
// gets it early, a walker more than any other has.
inline unsigned padded(int64_t ctas) {
  const int sms = std::max(device_attribute(cudaDevAttrMultiProcessorCount), 2);
  return static_cast<unsigned>(ctas + (ctas % sms == 1));
}

inline const char* problem_of_grid(const RaggedParams& p, int64_t ctas) {
  return ctas >= kMaxGridX || p.num_groups > kMaxGridYZ ? kTooManyRows : nullptr;
}

template <class Body>
const char* launch_ragged_body(cudaStream_t stream, const typename Body::Params& params) {
  const int64_t ctas = params.num_ctas();
  if (const char* problem = problem_of_grid(params, ctas)) return problem;
  if (ctas == 0) return nullptr;
  const dim3 grid(Body::kMayBePadded ? padded(ctas) : static_cast<unsigned>(ctas), 1,
                  params.num_groups);
  launch_in_clusters(stream, ragged_kernel<Body>, grid, Body::kThreads, params.cluster(), params);
  return nullptr;
}

// Returns visit(Config) for a selection, whatever its kv_comp.
template <class Visit>
const char* visit_inner_config(Selection selection, Visit&& visit) {
  selection.out = DType::kF32;
  const char* problem = "no compiled configuration";
  visit_config<InnerDTypesList>(selection, [&](auto config) { problem = visit(config); });
  return problem;
}

}  // namespace jax_dsv4
