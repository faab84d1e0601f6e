// From a checked call to one kernel on a stream, or to one for each compressor where the
// compressors are not a pair that is compiled together.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "decode_records_launch.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "tuning.h"

namespace jax_dsv4 {
namespace {

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
int64_t ctas_per_sm(const DecodeParams& p, int requests) {
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

bool launch_as_pair(cudaStream_t stream, const DecodeRecordsCall& a, const DecodeRecordsCall& b) {
  return visit_pair(a, b, [&](auto types, const auto& main, const auto& indexer) {
    return launch_pair<decltype(types)>(stream, main, indexer);
  });
}

}  // namespace

const char* launch_decode_records(cudaStream_t stream, const DecodeRecordsCall* calls, size_t count,
                                  int64_t geometry) {
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
