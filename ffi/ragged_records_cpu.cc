// Ragged batches that end in records on a CPU: pieces of all compressors' batches are shared among
// XLA's threads.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "config.h"
#include "decode_records_cpu.h"
#include "ragged_cpu.h"
#include "ragged_records.h"
#include "ragged_records_call.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {
namespace {

// One compressor's batch.
struct Work {
  RaggedBatch batch;
  RecordTarget records;
  void (*run)(Work&, int64_t piece);
  StoreRecord store;
  int64_t amount = 0;  // as threads_worth counts it

  explicit Work(const RaggedRecordsCall& call);
};

template <class Config, StateFormat kFormat>
void run_piece(Work& work, int64_t piece) {
  work.batch.run_piece<Config, kFormat>(
      piece, [&](uint32_t group, const auto& r, uint32_t window, auto&& put) {
        put_record<Config>(work.records, group, r.index, window, put,
                           [&](auto&&... record) { work.store(work.records, group, record...); });
      });
}

Work::Work(const RaggedRecordsCall& call)
    : batch(call.params),
      records(call.params.records),
      run(nullptr),
      store(store_of(call.format, call.selection.head_dim)) {
  visit_config<InnerDTypesList>(call.selection, [&](auto config) {
    using C = decltype(config);
    visit_format<C>(call.state_format, [&](auto format) {
      run = run_piece<C, format>;
      amount = batch.work<C, format>();
    });
  });
}

using Works = std::vector<std::shared_ptr<Work>>;

// Piece `index`: the compressors' pieces of the same rows side by side, for their cost differs.
void run_piece_of_all(const Works& works, int64_t index) {
  const auto count = static_cast<int64_t>(works.size());
  Work& work = *works[index % count];
  if (index / count < work.batch.num_pieces()) work.run(work, index / count);
}

ffi::Future ragged_records(ffi::ThreadPool pool, ffi::RemainingArgs operands,
                           ffi::RemainingRets results, ffi::Dictionary attributes) {
  const ffi::ErrorOr<RaggedRecordsCalls> calls =
      check_ragged_records(operands, results, attributes);
  if (!calls) return ready(calls.error());
  if (calls->empty) return ready(ffi::Error::Success());
  Works works;
  int64_t most_pieces = 0, amount = 0;
  for (const RaggedRecordsCall& call : calls->each) {
    works.push_back(std::make_shared<Work>(call));
    most_pieces = std::max(most_pieces, works.back()->batch.num_pieces());
    amount += works.back()->amount;
  }
  const int64_t count = most_pieces * static_cast<int64_t>(works.size());
  return share_among_threads(pool, works, count, threads_worth(amount), run_piece_of_all);
}

}  // namespace
}  // namespace jax_dsv4

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    RaggedRecordsCpu, jax_dsv4::ragged_records,
    jax_dsv4::bind_call<xla::ffi::Dictionary>(xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>()));
