// From the checked operands of a ragged batch that ends in records to a kernel on a stream, or to
// one for each compressor where these are not a pair that is compiled together.

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "launch.cuh"
#include "ragged_launch.cuh"

namespace jax_dsv4 {
namespace {

// A layer's main compressor and its indexer's in one launch, if they are such a pair.
bool launch_ragged_pair(cudaStream_t stream, const RaggedRecordsCall& a,
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
    const int64_t geometry =
        slots_of_walker<Body>(int64_t{main.params.num_groups} * main.params.num_windows * kLanes,
                              main.params.rule, main.state_format);
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

}  // namespace

const char* launch_ragged_records(cudaStream_t stream, const RaggedRecordsCall* calls, size_t count,
                                  int64_t geometry) {
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
