// From the checked operands of a ragged batch to a kernel on a stream, or to one for each
// compressor where these are not a pair that is compiled together. No XLA types: the benchmark and
// the fuzz launch the same.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
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
int64_t slots_of_walker(int64_t threads, const StoreRule& rule) {
  const int64_t on_sms =
      int64_t{Body::kThreads} * std::max(device_attribute(cudaDevAttrMultiProcessorCount), 1);
  if (Body::Rows::kFormat == StateFormat::kRaw && threads <= Body::kMinCtas * on_sms) return 1;
  const int live_ctas = Body::kEndsInRecords ? kWalkerCtasOfRecords : kWalkerCtas;
  const int64_t at_once = (rule.all ? Body::kMinCtas : live_ctas) * on_sms;
  return std::clamp<int64_t>((threads + at_once - 1) / at_once, 1, kMostSlotsOfWalker);
}

// Whether CTAs with all channels of a window of many rows are compiled: with two row groups, and
// where they end in records with four, too. For what was measured: more kernels build longer.
template <class Config>
inline constexpr bool kHasWide =
    Config::kHeadDim == 512 && std::is_same_v<typename Config::KvScore, bf16> &&
    std::is_same_v<typename Config::State, float>;

// Of long windows: how many row groups share one, in a CTA that has all of its channels; or 0,
// where CTAs have a slice of them. Measured (benchmarks/notes.md): where windows are few, slices
// are on more SMs; where all rows of raw states are stored, nothing else counts; and values need no
// cluster, so that they take slices, too, where a last turn of windows would leave SMs without one.
template <class Config, StateFormat kFormat, bool kRecords>
int row_groups_of(const RaggedParams& p) {
  if (!kHasWide<Config> || (kFormat == StateFormat::kRaw && p.rule.all)) return 0;
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
    using Body = RaggedLong<Config, kFormat, kRecords>;
    const bool has_clusters = !kRecords || Body::T::kSlices == 1 || jax_dsv4::has_clusters();
    return visit(Body{}, typename Body::Params(p, result, has_clusters ? 1 : Body::T::kSlices));
  } else {
    using Body = RaggedShort<Config, kFormat, kRecords>;
    if (geometry < 0) {
      geometry =
          slots_of_walker<Body>(int64_t{p.num_groups} * p.num_windows * Body::T::kLanes, p.rule);
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

// Launches a batch that ends in values.
template <class Config>
const char* launch_ragged(cudaStream_t stream, const RaggedParams& p, StateFormat format,
                          const ValueTarget& target, int64_t geometry) {
  return visit_ragged_format<Config, false>(
      p, format, target, geometry, [&](auto body, const auto& params) {
        return launch_ragged_body<decltype(body)>(stream, params);
      });
}

// Returns visit(Config) for a selection, whatever its kv_comp.
template <class Visit>
const char* visit_inner_config(Selection selection, Visit&& visit) {
  selection.out = DType::kF32;
  const char* problem = "no compiled configuration";
  visit_config<InnerDTypesList>(selection, [&](auto config) { problem = visit(config); });
  return problem;
}

// Returns what is wrong with the call, or null: launch errors proper are left to cudaGetLastError.
inline const char* launch_ragged(cudaStream_t stream, const RaggedParams& p,
                                 const Selection& selection, StateFormat format, int64_t geometry) {
  const ValueTarget target = {p.kv_comp, selection.out == DType::kBF16};
  return visit_inner_config(selection, [&](auto config) {
    return launch_ragged<decltype(config)>(stream, p, format, target, geometry);
  });
}

// A layer's main compressor and its indexer's in one launch, if they are such a pair.
inline bool launch_ragged_pair(cudaStream_t stream, const RaggedRecordsCall& a,
                               const RaggedRecordsCall& b) {
  const auto records_of = [](const RaggedRecordsCall& call) {
    return RecordParams(call.params.records, call.format, call.selection.head_dim);
  };
  return visit_pair(a, b, [&](auto types, const auto& main, const auto& indexer) {
    using Types = decltype(types);
    using Main = Config<MainKind, Types>;
    using Indexer = Config<IndexerKind, Types>;
    using Body = RaggedShort<Main, StateFormat::kRaw, true>;
    constexpr int kLanes = Body::T::kLanes + ShortTile<Indexer>::kLanes;
    const int64_t geometry = slots_of_walker<Body>(
        int64_t{main.params.num_groups} * main.params.num_windows * kLanes, main.params.rule);
    return visit_ragged_format<Indexer, true>(
               indexer.params, indexer.state_format, records_of(indexer), geometry,
               [&](auto first, const auto& first_params) {
                 return visit_ragged_format<Main, true>(
                     main.params, main.state_format, records_of(main), geometry,
                     [&](auto second, const auto& second_params) -> const char* {
                       using First = decltype(first);
                       using Second = decltype(second);
                       if constexpr (First::Rows::kFormat == Second::Rows::kFormat) {
                         const int64_t first_ctas = first_params.num_ctas();
                         const int64_t ctas = first_ctas + second_params.num_ctas();
                         if (const char* problem = problem_of_grid(main.params, ctas)) {
                           return problem;
                         }
                         if (ctas == 0) return nullptr;
                         const dim3 grid(padded(ctas), 1, main.params.num_groups);
                         launch_in_clusters(stream, ragged_two_kernel<First, Second>, grid,
                                            First::kThreads, 1, first_params, second_params,
                                            static_cast<uint32_t>(first_ctas));
                       }
                       return nullptr;
                     });
               }) == nullptr;
  });
}

// Launches a batch that ends in records.
inline const char* launch_ragged_records(cudaStream_t stream, const RaggedRecordsCall* calls,
                                         size_t count, int64_t geometry) {
  if (count == 2 && geometry < 0 && launch_ragged_pair(stream, calls[0], calls[1])) return nullptr;
  const auto launch_each = [&](auto launch_one) {
    const char* problem = nullptr;
    for (size_t i = 0; i < count && problem == nullptr; ++i) {
      const RaggedRecordsCall& call = calls[i];
      problem = visit_inner_config(call.selection, [&](auto config) {
        using C = decltype(config);
        const RecordParams records(call.params.records, call.format, C::kHeadDim);
        return visit_ragged_format<C, true>(call.params, call.state_format, records, geometry,
                                            launch_one);
      });
    }
    return problem;
  };
  // Whatever is wrong with one is known before another has stored anything.
  const char* const problem = launch_each(
      [](auto, const auto& params) { return problem_of_grid(params, params.num_ctas()); });
  if (problem != nullptr) return problem;
  return launch_each([&](auto body, const auto& params) {
    return launch_ragged_body<decltype(body)>(stream, params);
  });
}

}  // namespace jax_dsv4
