// From a checked call to one kernel on a stream, or to one for each compressor where the
// compressors are not a pair that is compiled together. No XLA types.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
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

// The smaller compressor's CTAs come first: there is little of them, and it must not come last.
template <class First, class Second>
bool launch_two_bodies(cudaStream_t stream, const DecodeRecordsCall& first,
                       const DecodeRecordsCall& second) {
  static_assert(First::kCluster == 1 && Second::kCluster == 1, "a pair has no clusters");
  const DecodeParams& p = second.params;
  const int64_t first_ctas = First::num_ctas(first.params);
  const int64_t ctas = first_ctas + Second::num_ctas(p);
  if (ctas > kMaxGridX || !fits_grid<Second>(p)) return false;
  const dim3 grid(static_cast<unsigned>(ctas), windows_of<First>(p), p.num_groups);
  launch_in_clusters(stream, decode_two_records_kernel<First, Second>, grid,
                     std::max(First::kThreads, Second::kThreads), 1, params_of<First>(first),
                     params_of<Second>(second), static_cast<uint32_t>(first_ctas));
  return true;
}

// The most CTAs that an SM gets of a main compressor, one for a request, and of its indexer, one
// for so many requests. All of them move as many bytes, about: an SM with more than others is the
// last.
inline int64_t ctas_per_sm(const DecodeParams& p, int requests) {
  const int64_t count = int64_t{p.num_groups} * p.batch;
  const int64_t sms = std::max(device_attribute(cudaDevAttrMultiProcessorCount), 1);
  return (count + (count + requests - 1) / requests + sms - 1) / sms;
}

// Both in one launch, if they are such a pair; each in the geometry that it would have alone, but
// for many requests' prefixes the indexer's rows are staged if the main compressor's are.
template <class Types>
bool launch_pair(cudaStream_t stream, const DecodeRecordsCall& main,
                 const DecodeRecordsCall& indexer) {
  using Main = Config<MainKind, Types>;
  using Indexer = Config<IndexerKind, Types>;
  if constexpr (may_hold(kDTypeOf<typename Types::State>, StateFormat::kPrefix)) {
    if (main.state_format == StateFormat::kPrefix) {
      const auto both = [&](auto is) { return is(main.params) && is(indexer.params); };
      using G = PrefixRecordGeometryOf<MainKind>;
      if (is_at_most<MainKind>(main.params, G::kFewPairChannels) && both(fits_few<Main>)) {
        return both(is_staged<Main>)
                   ? launch_two_bodies<FewPrefixRecords<Indexer, true>,
                                       FewPrefixRecords<Main, true>>(stream, indexer, main)
                   : launch_two_bodies<FewPrefixRecords<Indexer, false>,
                                       FewPrefixRecords<Main, false>>(stream, indexer, main);
      }
      if (is_at_most<MainKind>(main.params, G::kPairPartChannels) &&
          fits_parts<Main>(main.params)) {
        return launch_two_bodies<PrefixPartRecords<Indexer>, PrefixPartRecords<Main>>(
            stream, indexer, main);
      }
      const auto launch_many = [&](auto requests) {  // of the indexer's, for a CTA
        return launch_two_bodies<PrefixRecords<Indexer, requests, kStagesRows<Main>>,
                                 ManyPrefixRecords<Main>>(stream, indexer, main);
      };
      constexpr std::integral_constant<int, 2> kTwo;
      constexpr std::integral_constant<int, 4> kFour;
      return ctas_per_sm(main.params, kFour) < ctas_per_sm(main.params, kTwo) ? launch_many(kFour)
                                                                              : launch_many(kTwo);
    }
  }
  const auto launch = [&](auto of_main, auto of_indexer) {
    using M = RawRecords<Main, typename decltype(of_main)::Geometry, false>;
    using I = RawRecords<Indexer, typename decltype(of_indexer)::Geometry, false>;
    if (!fits_page<M>(main.params) || !fits_page<I>(indexer.params)) return false;
    return launch_two_bodies<I, M>(stream, indexer, main);
  };
  return visit_any(typename RecordGeometriesOf<MainKind>::List{}, [&](auto of_main) {
    return visit_any(typename RecordGeometriesOf<IndexerKind>::List{},
                     [&](auto of_indexer) { return launch(of_main, of_indexer); });
  });
}

inline bool launch_as_pair(cudaStream_t stream, const DecodeRecordsCall& a,
                           const DecodeRecordsCall& b) {
  return visit_pair(a, b, [&](auto types, const auto& main, const auto& indexer) {
    return launch_pair<decltype(types)>(stream, main, indexer);
  });
}

// In the geometry of this index, or of our choice where it is negative. Returns what is wrong with
// the call, or null: launch errors proper are left to cudaGetLastError.
inline const char* launch_decode_records(cudaStream_t stream, const DecodeRecordsCall* calls,
                                         size_t count, int64_t geometry) {
  if (count == 2 && geometry < 0 && launch_as_pair(stream, calls[0], calls[1])) return nullptr;
  const auto launch_each = [&](auto launch_one) {
    const char* problem = nullptr;
    for (size_t i = 0; i < count && problem == nullptr; ++i) {
      problem = "geometry: not for this call";
      const DecodeRecordsCall& call = calls[i];
      visit_config<InnerDTypesList>(call.selection, [&](auto config) {
        visit_body<decltype(config)>(call, geometry, [&](auto body) {
          problem = launch_one(body, call);
          return true;
        });
      });
    }
    return problem;
  };
  // Whatever is wrong with one is known before another has stored anything.
  const char* const problem = launch_each([](auto body, const DecodeRecordsCall& call) {
    return fits_grid<decltype(body)>(call.params)
               ? nullptr
               : "batch, next_n: too many requests, rows or groups for one launch";
  });
  if (problem != nullptr) return problem;
  return launch_each([&](auto body, const DecodeRecordsCall& call) -> const char* {
    launch_body<decltype(body)>(stream, call);
    return nullptr;
  });
}

}  // namespace jax_dsv4
