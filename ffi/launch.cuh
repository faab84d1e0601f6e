// From checked operands to a kernel on a stream: the choice of a geometry, and the grid. No XLA
// types: the benchmark captures the same launches in CUDA graphs.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "baseline.cuh"
#include "config.h"
#include "decode.cuh"
#include "prefix.cuh"

namespace jax_dsv4 {

// Whether every lane's rows are on one page.
template <class Config, class Geometry>
bool fits_pages(const DecodeParams& p) {
  return Geometry::kBaseline ||
         p.paging.page_size.value % Tile<Config, Geometry>::kRowsPerLane == 0;
}

// Index of the geometry for a call: of those that fit its page size the first, or where there is
// little to do the first from kFew on.
template <class Config>
int64_t choose_geometry(const DecodeParams& p) {
  using Geometries = GeometriesOf<Config::kRatio>;
  const int64_t channels = int64_t{p.num_groups} * p.batch * Config::kHeadDim;
  const int64_t first = channels <= Geometries::kFewChannels ? Geometries::kFew : 0;
  int64_t index = -1;
  visit_any(typename Geometries::List{}, [&](auto geometry) {
    return ++index >= first && fits_pages<Config, decltype(geometry)>(p);
  });
  return index;
}

template <class Config, class Geometry>
void launch_kernel(Geometry, dim3 grid, cudaStream_t stream, const DecodeParams& p) {
  using T = Tile<Config, Geometry>;
  const uint32_t ctas = T::kSlices + (p.next_n + Geometry::kWarps - 1) / Geometry::kWarps;
  grid.x *= ctas;
  paged_kv_compress_kernel<Config, Geometry><<<grid, T::kThreads, 0, stream>>>(p, Divisor(ctas));
}
template <class Config, int kWarps>
void launch_kernel(RowAtATime<kWarps>, dim3 grid, cudaStream_t stream, const DecodeParams& p) {
  using T = Tile<Config, RowAtATime<kWarps>>;
  grid.x *= T::kSlices;
  row_at_a_time_kernel<Config, RowAtATime<kWarps>><<<grid, T::kThreads, 0, stream>>>(p);
}

// On a state of prefixes.
template <class Config>
void launch_prefix_kernel(cudaStream_t stream, const DecodeParams& p) {
  using Token = PrefixTokenTile<Config>;
  using T = PrefixTile<Config>;
  const int64_t channels = int64_t{p.num_groups} * p.batch * Config::kHeadDim;
  // Tables at one address are one to the kernel for few: not if groups share only one of them.
  const bool few = channels <= kFewPrefixChannels &&
                   (p.kv_tables != p.score_tables || p.kv_tables_stride == p.score_tables_stride);
  if (few && p.next_n <= Token::kTokens) {
    const dim3 grid(p.batch * Token::kSlices, 1, p.num_groups);
    const auto kernel = p.paging.max_pages <= Token::kEntries ? prefix_token_kernel<Config, true>
                                                              : prefix_token_kernel<Config, false>;
    kernel<<<grid, Token::kThreads, 0, stream>>>(PrefixTokenParams(p));
  } else {
    const dim3 grid(p.batch * T::kSlices, 1, p.num_groups);
    prefix_kernel<Config><<<grid, T::kThreads, 0, stream>>>(p);
  }
}

// Launches a step on a state of this format; in the geometry of this index, unless the format has
// only one. Returns what is wrong with the call, or null: launch errors proper are left to
// cudaGetLastError.
template <class Config>
const char* launch(cudaStream_t stream, const DecodeParams& p, StateFormat format,
                   int64_t geometry_index) {
  constexpr int64_t kMaxGridX = 2147483647, kMaxGridYZ = 65535;
  if (p.batch > kMaxGridX / (Config::kHeadDim + int64_t{p.next_n}) || p.num_groups > kMaxGridYZ ||
      p.num_windows > kMaxGridYZ) {
    return "batch, next_n: too many requests, rows or groups for one launch";
  }
  if constexpr (may_hold(kDTypeOf<typename Config::State>, StateFormat::kPrefix)) {
    if (format == StateFormat::kPrefix) {
      launch_prefix_kernel<Config>(stream, p);
      return nullptr;
    }
  }
  const char* problem = nullptr;
  int64_t index = 0;
  visit_any(typename GeometriesOf<Config::kRatio>::List{}, [&](auto geometry) {
    using Geometry = decltype(geometry);
    if (index++ != geometry_index) return false;
    if (!fits_pages<Config, Geometry>(p)) {
      problem = "geometry: not for this page size";
    } else if (Geometry::kBaseline && p.num_windows > 1) {
      problem = "geometry: the baselines need next_n <= compress_ratio";
    } else {
      launch_kernel<Config>(geometry, dim3(p.batch, p.num_windows, p.num_groups), stream, p);
    }
    return true;
  });
  return problem;
}

}  // namespace jax_dsv4
