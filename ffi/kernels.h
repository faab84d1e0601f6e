// The CUDA kernels from outside: a function for each operation, which launches a checked call. What
// the handlers, the fuzz and the benchmarks call. No XLA types.
//
// Each returns what is wrong with the call, or null: launch errors proper are left to
// cudaGetLastError. `geometry`: the index of one of those in which an operation can be launched;
// negative: our choice.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "config.h"
#include "decode.h"
#include "decode_records.h"
#include "dequantize.h"
#include "ragged.h"
#include "ragged_records.h"
#include "record.h"
#include "store.h"

namespace jax_dsv4 {

const char* launch_decode(cudaStream_t stream, const DecodeParams& p, const Selection& selection,
                          StateFormat format, int64_t geometry);

const char* launch_store_records(cudaStream_t stream, const StoreParams& p, RecordFormat format,
                                 int64_t head_dim);
const char* launch_dequantize_records(cudaStream_t stream, const DequantizeParams& p,
                                      RecordFormat format, int64_t head_dim);

const char* launch_decode_records(cudaStream_t stream, const DecodeRecordsCall* calls, size_t count,
                                  int64_t geometry);

const char* launch_ragged(cudaStream_t stream, const RaggedParams& p, const Selection& selection,
                          StateFormat format, int64_t geometry);
const char* launch_ragged_records(cudaStream_t stream, const RaggedRecordsCall* calls, size_t count,
                                  int64_t geometry);

}  // namespace jax_dsv4
