// Which kernel a step that ends in records has, and its grid.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <type_traits>

#include "config.h"
#include "decode_records.cuh"
#include "decode_records.h"
#include "launch.cuh"
#include "tuning.h"

namespace jax_dsv4 {

// A CTA for each window, and others for the rows: for how many requests, and what they must be.
template <class Kind>
bool is_at_most(const DecodeParams& p, int64_t channels) {
  return int64_t{p.num_groups} * p.batch * Kind::kHeadDim <= channels;
}
template <class Config>
bool fits_few(const DecodeParams& p) {
  // As for the decode operation alone: to these kernels, tables at one address are one table.
  return p.next_n <= PrefixTokenTile<Config>::kTokens &&
         (p.kv_tables != p.score_tables || p.kv_tables_stride == p.score_tables_stride);
}
template <class Config>
bool is_staged(const DecodeParams& p) {
  return p.paging.max_pages <= PrefixTokenTile<Config>::kEntries;
}
template <class Config>
using ManyPrefixRecords = PrefixRecords<Config, 1, kStagesRows<Config>>;
template <class Config, bool kStaged>
using FewPrefixRecords =
    PrefixTokenRecords<Config, kStaged,
                       PrefixRecordGeometryOf<typename Config::KindType>::kThreads>;
template <class Config>
bool fits_parts(const DecodeParams& p) {
  return !Config::kOverlap || p.next_n <= Config::kRatio;
}

// Calls visit(Body) for the kernel of a call in the geometry of this index, or of our choice where
// it is negative; false: there is none. 0: few requests, 1: more, 2: many whose windows overlap.
template <class Config, class Visit>
bool visit_prefix_body(const DecodeParams& p, int64_t geometry, Visit&& visit) {
  using Kind = typename Config::KindType;
  using G = PrefixRecordGeometryOf<Kind>;
  const bool few = fits_few<Config>(p), parts = fits_parts<Config>(p);
  if (geometry < 0) {
    geometry = few && is_at_most<Kind>(p, G::kFewChannels)      ? 0
               : parts && is_at_most<Kind>(p, G::kPartChannels) ? 1
                                                                : 2;
  }
  if (geometry == 0 && few) {
    return is_staged<Config>(p) ? visit(FewPrefixRecords<Config, true>{})
                                : visit(FewPrefixRecords<Config, false>{});
  }
  if (geometry == 1 && parts) return visit(PrefixPartRecords<Config>{});
  if constexpr (Config::kOverlap) {
    if (geometry == 2) return visit(ManyPrefixRecords<Config>{});
  }
  return false;
}

template <class Body>
bool fits_page(const DecodeParams& p) {
  return p.paging.page_size.value % Body::T::kRowsPerLane == 0;
}

template <class Config, class Visit, class... Items>
bool visit_raw_body(TypeList<Items...> list, const DecodeParams& p, int64_t geometry,
                    Visit&& visit) {
  constexpr int64_t kAnyPage = decltype(list)::kSize;  // the index of the last one's other kernel
  const int64_t channels = int64_t{p.num_groups} * p.batch * Config::kHeadDim;
  const bool clusters = has_clusters();
  const auto visit_first = [&](auto is_candidate) {
    int64_t index = 0;
    return visit_any(list, [&](auto item) {
      using Body = RawRecords<Config, typename decltype(item)::Geometry, false>;
      if (!is_candidate(item, index++) || !fits_page<Body>(p)) return false;
      return (Body::kCluster == 1 || clusters) && visit(Body{});
    });
  };
  if (geometry < 0) {
    const auto is_meant = [&](auto item, int64_t) { return channels <= item.kMostChannels; };
    if (visit_first(is_meant) || visit_first([](auto, int64_t) { return true; })) return true;
  } else if (geometry != kAnyPage) {
    return visit_first([&](auto, int64_t index) { return index == geometry; });
  }
  using Last = std::tuple_element_t<kAnyPage - 1, std::tuple<Items...>>;
  using Body = RawRecords<Config, typename Last::Geometry, true>;
  static_assert(Body::kCluster == 1, "the last geometry serves chips without clusters, too");
  return visit(Body{});
}

template <class Config, class Visit>
bool visit_body(const DecodeRecordsCall& call, int64_t geometry, Visit&& visit) {
  if constexpr (may_hold(kDTypeOf<typename Config::State>, StateFormat::kPrefix)) {
    if (call.state_format == StateFormat::kPrefix) {
      return visit_prefix_body<Config>(call.params, geometry, visit);
    }
  }
  using Geometries = RecordGeometriesOf<typename Config::KindType>;
  return visit_raw_body<Config>(typename Geometries::List{}, call.params, geometry, visit);
}

template <class Body>
typename Body::Params params_of(const DecodeRecordsCall& call) {
  return {call.params, RecordParams(call.params.records, call.format, Body::D)};
}

template <class Body>
unsigned windows_of(const DecodeParams& p) {
  return Body::kHasWindows ? p.num_windows : 1;
}

template <class Body>
bool fits_grid(const DecodeParams& p) {
  return Body::num_ctas(p) <= kMaxGridX && p.num_groups <= kMaxGridYZ &&
         p.num_windows <= kMaxGridYZ;
}

template <class Body>
void launch_body(cudaStream_t stream, const DecodeRecordsCall& call) {
  const DecodeParams& p = call.params;
  const dim3 grid(static_cast<unsigned>(Body::num_ctas(p)), windows_of<Body>(p), p.num_groups);
  launch_in_clusters(stream, decode_records_kernel<Body>, grid, Body::kThreads, Body::kCluster,
                     params_of<Body>(call));
}

}  // namespace jax_dsv4
