// What the CUDA kernels expect of addresses.
#pragma once

#include <cstdint>

#include "config.h"
#include "decode_records.h"

namespace jax_dsv4 {

// Whether a CUDA kernel can load what a compressor is given in vectors.
template <class Params>
bool is_aligned(const RecordsCall<Params>& call) {
  const Params& p = call.params;
  const void* const vectors[] = {
      p.kv, p.score, p.kv_score, p.ape, p.records.norm_weight, p.records.cos_sin};
  uintptr_t addresses = 0;
  for (const void* pointer : vectors) addresses |= reinterpret_cast<uintptr_t>(pointer);
  // `kv_score` is at its column already.
  const int64_t element = size_of(call.selection.kv_score);
  return addresses % 16 == 0 && p.score_offset * element % 16 == 0 &&
         p.row_size * element % 16 == 0 &&
         reinterpret_cast<uintptr_t>(p.records.pool.data) % 4 == 0;
}

}  // namespace jax_dsv4
