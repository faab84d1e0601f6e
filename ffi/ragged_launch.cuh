// From checked operands of a ragged batch to a kernel on a stream. No XLA types: benchmarks and the
// fuzz launch the same.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "config.h"
#include "ragged.cuh"
#include "ragged.h"
#include "tuning.h"

namespace jax_dsv4 {

template <class Config, StateFormat kFormat>
const char* launch_ragged_format(cudaStream_t stream, const RaggedParams& p,
                                 const ValueTarget& target, int64_t geometry) {
  constexpr int64_t kMaxGridX = 2147483647, kMaxGridZ = 65535;
  constexpr const char* kTooMany =
      "kv_score, cu_q_lens: too many rows, requests or groups for one launch";
  constexpr int64_t kMostSlots = 1024;
  constexpr const char* kWrongGeometry =
      "geometry: expected -1, or 0 for long windows, or 1 to 1024 slots of a walker for short ones";
  if (p.num_groups > kMaxGridZ) return kTooMany;
  if constexpr (Config::kReducedRows > 32) {
    using T = LongTile<Config>;
    if (geometry > 0) return kWrongGeometry;
    const int64_t ctas = int64_t{p.num_windows} * T::kSlices;
    if (ctas > kMaxGridX) return kTooMany;
    if (ctas == 0) return nullptr;
    const dim3 grid(static_cast<unsigned>(ctas), 1, p.num_groups);
    ragged_long_kernel<Config, kFormat><<<grid, T::kThreads, 0, stream>>>(p, target);
    return nullptr;
  } else {
    using T = ShortTile<Config>;
    const int64_t slots = int64_t{p.num_windows} * p.num_groups;
    int64_t per_walker = geometry;
    if (geometry < 0) {
      const int64_t threads = slots * T::kLanes;
      per_walker = std::clamp<int64_t>((threads + kRaggedWalkerThreads - 1) / kRaggedWalkerThreads,
                                       1, kMostSlotsPerWalker);
    }
    if (per_walker < 1 || per_walker > kMostSlots) return kWrongGeometry;
    const RaggedShortParams params(p, target, static_cast<int32_t>(per_walker));
    const int64_t ctas = (int64_t{params.num_walkers()} + T::kWalkers - 1) / T::kWalkers;
    if (ctas > kMaxGridX) return kTooMany;
    if (ctas == 0) return nullptr;
    const dim3 grid(static_cast<unsigned>(ctas), 1, p.num_groups);
    ragged_short_kernel<Config, kFormat><<<grid, T::kThreads, 0, stream>>>(params);
    return nullptr;
  }
}

template <class Config>
const char* launch_ragged(cudaStream_t stream, const RaggedParams& p, StateFormat format,
                          const ValueTarget& target, int64_t geometry) {
  if constexpr (may_hold(kDTypeOf<typename Config::State>, StateFormat::kPrefix)) {
    if (format == StateFormat::kPrefix) {
      return launch_ragged_format<Config, StateFormat::kPrefix>(stream, p, target, geometry);
    }
  }
  return launch_ragged_format<Config, StateFormat::kRaw>(stream, p, target, geometry);
}

// Launches a batch; `geometry`: so many workers for long windows, slots of a walker for short ones,
// or our choice where it is negative. Returns what is wrong with the call, or null: launch errors
// proper are left to cudaGetLastError.
inline const char* launch_ragged(cudaStream_t stream, const RaggedParams& p,
                                 const Selection& selection, StateFormat format, int64_t geometry) {
  const char* problem = "no compiled configuration";
  const ValueTarget target = {p.kv_comp, selection.out == DType::kBF16};
  Selection inner = selection;
  inner.out = DType::kF32;
  visit_any(Kinds{}, [&](auto kind) {
    return inner.is_of(kind) && visit_any(InnerDTypesList{}, [&](auto types) {
             using Types = decltype(types);
             if (!is_of<Types>(inner)) return false;
             problem =
                 launch_ragged<Config<decltype(kind), Types>>(stream, p, format, target, geometry);
             return true;
           });
  });
  return problem;
}

}  // namespace jax_dsv4
