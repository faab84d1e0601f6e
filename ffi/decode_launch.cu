// From checked operands to a kernel on a stream: the choice of a geometry, and the grid.

#include <cuda_runtime.h>

#include <cstdint>

#include "config.h"
#include "decode_prefix.cuh"
#include "decode_raw.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "tuning.h"

namespace jax_dsv4 {
namespace {

// Whether the last geometry fits every page size, so that there is always a choice.
template <class Config, class... Geometries>
constexpr bool ends_with_any_page(TypeList<Geometries...>) {
  bool any_page = false;
  ((any_page = Tile<Config, Geometries>::kRowsPerLane == 1), ...);
  return any_page;
}

// Launches in the geometry of this index, if every lane's rows are on one page then. Negative: of
// those that fit the page size the first, or where there is little to do the first from kFew on.
template <class Config>
bool launch_raw_kernel(cudaStream_t stream, const DecodeParams& p, int64_t geometry_index) {
  using Geometries = GeometriesOf<typename Config::KindType>;
  static_assert(ends_with_any_page<Config>(typename Geometries::List{}),
                "the last geometry of a list must have one row per lane");
  const int64_t channels = int64_t{p.num_groups} * p.batch * Config::kHeadDim;
  const int64_t first = channels <= Geometries::kFewChannels ? Geometries::kFew : 0;
  const auto launch_in = [&](auto geometry) {
    using Geometry = decltype(geometry);
    using T = Tile<Config, Geometry>;
    if (p.paging.page_size.value % T::kRowsPerLane != 0) return false;
    const uint32_t ctas = T::kSlices + (p.next_n + Geometry::kWarps - 1) / Geometry::kWarps;
    const dim3 grid(p.batch * ctas, p.num_windows, p.num_groups);
    paged_kv_compress_kernel<Config, Geometry><<<grid, T::kThreads, 0, stream>>>(p, Divisor(ctas));
    return true;
  };
  if constexpr (sizeof(typename Config::State) == 2 && Geometries::kFewChannels > 0) {
    const bool few = geometry_index < 0 && channels <= kFewHalfChannels;
    if (few && launch_in(FewHalfGeometry{})) return true;
  }
  int64_t index = 0;
  return visit_any(typename Geometries::List{}, [&](auto geometry) {
    const bool is_candidate = geometry_index < 0 ? index >= first : index == geometry_index;
    ++index;
    return is_candidate && launch_in(geometry);
  });
}

template <class Config, class T>
void launch_prefix_token_kernel(cudaStream_t stream, const DecodeParams& p) {
  const dim3 grid(p.batch * T::kSlices, 1, p.num_groups);
  const auto kernel = p.paging.max_pages <= T::kEntries ? prefix_token_kernel<Config, T, true>
                                                        : prefix_token_kernel<Config, T, false>;
  kernel<<<grid, T::kThreads, 0, stream>>>(PrefixTokenParams(p));
}

template <class Config>
void launch_prefix_kernel(cudaStream_t stream, const DecodeParams& p) {
  using Token = PrefixTokenTile<Config>;
  using T = PrefixTile<Config>;
  const int64_t channels = int64_t{p.num_groups} * p.batch * Config::kHeadDim;
  // To the kernels for few requests, tables at one address are one table: not if groups share only
  // one of them.
  const bool few = channels <= kFewPrefixChannels &&
                   (p.kv_tables != p.score_tables || p.kv_tables_stride == p.score_tables_stride);
  if (few && p.next_n <= Token::kTokens) {
    return launch_prefix_token_kernel<Config, Token>(stream, p);
  }
  if constexpr (!Config::kOverlap && Config::kRatio >= 8) {
    using MoreTokens = PrefixTokenTile<Config, 8>;
    if (few && channels <= kFewPrefixChannelsOfMoreTokens && p.next_n <= MoreTokens::kTokens) {
      return launch_prefix_token_kernel<Config, MoreTokens>(stream, p);
    }
  }
  const dim3 grid(p.batch * T::kSlices, 1, p.num_groups);
  prefix_kernel<Config><<<grid, T::kThreads, 0, stream>>>(p);
}

template <class Config>
const char* launch_kernel(cudaStream_t stream, const DecodeParams& p, StateFormat format,
                          int64_t geometry_index) {
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
  const bool launched = launch_raw_kernel<Config>(stream, p, geometry_index);
  return launched ? nullptr : "geometry: not for this page size";
}

}  // namespace

const char* launch_decode(cudaStream_t stream, const DecodeParams& p, const Selection& selection,
                          StateFormat format, int64_t geometry) {
  const char* problem = nullptr;
  visit_config(selection, [&](auto config) {
    using C = decltype(config);
    problem = p.is_plain(C::kStateDim)
                  ? launch_kernel<typename C::Plain>(stream, p, format, geometry)
                  : launch_kernel<C>(stream, p, format, geometry);
  });
  return problem;
}

}  // namespace jax_dsv4
