// Ragged batches on a CPU: pieces of them are shared among XLA's threads.

#include "ragged_cpu.h"

#include <algorithm>
#include <cstdint>
#include <memory>

#include "config.h"
#include "numeric.h"
#include "ragged.h"
#include "ragged_call.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {
namespace {

using Batch = std::shared_ptr<RaggedBatch>;

template <class Config, StateFormat kFormat>
void compress_piece(const Batch& batch, int64_t piece) {
  using Out = typename Config::Out;
  constexpr int D = Config::kHeadDim;
  const RaggedParams& p = batch->params();
  Out* const kv_comp = static_cast<Out*>(p.kv_comp);
  batch->run_piece<Config, kFormat>(
      piece, [&](uint32_t group, const auto& r, uint32_t window, auto&& put) {
        const int64_t slot = first_slot<Config>(r.index, r.begin) + (window - r.first_window);
        put(kv_comp + (int64_t{group} * p.num_windows + slot) * D);
      });
  batch->visit_empty_slots<Config>(piece, [&](int64_t first, int64_t last) {
    std::fill(kv_comp + first * D, kv_comp + last * D, round_to<Out>(0.0f));
  });
}

ffi::Future ragged(ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::RemainingRets results,
                   const RaggedAttributes& attributes) {
  const ffi::ErrorOr<RaggedCall> call = check_ragged(operands, results, attributes);
  if (!call) return ready(call.error());
  if (call->empty) return ready(ffi::Error::Success());
  const Batch batch = std::make_shared<RaggedBatch>(call->params);
  void (*run)(const Batch&, int64_t) = nullptr;
  int64_t work = 0;
  visit_config(call->selection, [&](auto config) {
    visit_format<decltype(config)>(call->state_format, [&](auto format) {
      run = compress_piece<decltype(config), format>;
      work = batch->work<decltype(config), format>();
    });
  });
  return share_among_threads(pool, batch, batch->num_pieces(), threads_worth(work), run);
}

}  // namespace
}  // namespace jax_dsv4

XLA_FFI_DEFINE_HANDLER_SYMBOL(RaggedKvCompressCpu, jax_dsv4::ragged,
                              jax_dsv4::bind_call<jax_dsv4::RaggedAttributes>(
                                  xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>()));
