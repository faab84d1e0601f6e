// From a position of a sequence to a row of the paged pool, or to nowhere. Host and device.
#pragma once

#include <cstdint>

#include "config.h"

namespace jax_dsv4 {

// Division of any n < 2^31 by a divisor known only at run time, without a divide instruction
// (Granlund and Montgomery, 1994): page sizes need not be powers of two.
struct Divisor {
  uint32_t value = 1;
  uint32_t multiplier = 1;
  uint32_t shift = 0;

  Divisor() = default;
  explicit Divisor(uint32_t divisor) : value(divisor) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    const uint64_t numerator = ((uint64_t{1} << shift) - divisor) << 32;
    multiplier = static_cast<uint32_t>(numerator / divisor + 1);
  }
};

JAX_DSV4_HD uint32_t operator/(uint32_t n, const Divisor& d) {
#ifdef __CUDA_ARCH__
  const uint32_t high = __umulhi(n, d.multiplier);
#else
  const auto high = static_cast<uint32_t>((uint64_t{n} * d.multiplier) >> 32);
#endif
  return (high + n) >> d.shift;
}

// Rows are counted over all groups and layers; they are few enough for 32 bits (decode_call.h), but
// their elements are not.
inline constexpr uint32_t kNowhere = ~0u;

struct Paging {
  uint32_t max_pages;  // of one request's table
  uint32_t num_pages;  // of a layer; at most 2^31, so a negative id never passes as unsigned
  Divisor page_size;
};

// Where a position is in a request's table: what is loaded, before anything waits for it.
struct TableEntry {
  uint32_t page;  // an id, checked by no one yet
  uint32_t slot;
};

// The entry of `table` ([max_pages]) for `position` >= 0; past its end, a page that does not exist.
JAX_DSV4_HD TableEntry look_up(const Paging& paging, const int32_t* table, int32_t position) {
  const uint32_t n = static_cast<uint32_t>(position);
  const uint32_t page = n / paging.page_size;
  return {page < paging.max_pages ? static_cast<uint32_t>(table[page]) : ~0u,
          n - page * paging.page_size.value};
}

}  // namespace jax_dsv4
