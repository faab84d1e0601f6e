// Loads, stores and copies, barriers, clusters: all PTX but that of arithmetic. Device code only.
#pragma once

#include <cstdint>
#include <type_traits>

#include "config.h"
#include "paging.h"

namespace jax_dsv4 {

template <class Element, int kSize>
struct alignas(sizeof(Element) * kSize < 16 ? sizeof(Element) * kSize : 16) Vector {
  Element x[kSize];
};

template <class Element, int kSize>
__device__ __forceinline__ Vector<Element, kSize> load(const Element* source) {
  return *reinterpret_cast<const Vector<Element, kSize>*>(source);
}

template <class Element, int kSize>
__device__ __forceinline__ void store(Element* target, const Vector<Element, kSize>& value) {
  *reinterpret_cast<Vector<Element, kSize>*>(target) = value;
}

// Loads 8 or 16 bytes that nothing on this SM reads again.
template <class Element, int kSize>
__device__ __forceinline__ Vector<Element, kSize> load_once(const Element* source) {
  constexpr int kBytes = sizeof(Element) * kSize;
  static_assert(kBytes == 8 || kBytes == 16, "load_once: a lane holds 8 or 16 bytes of a row");
  union {
    uint32_t words[kBytes / 4];
    Vector<Element, kSize> vector;
  } u;
  if constexpr (kBytes == 16) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(u.words[0]), "=r"(u.words[1]), "=r"(u.words[2]), "=r"(u.words[3])
                 : "l"(source));
  } else {
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(u.words[0]), "=r"(u.words[1])
                 : "l"(source));
  }
  return u.vector;
}

// *from, or `otherwise`, without a branch. Before a branch the compiler waits for every load that
// was issued.
template <class Element>
__device__ __forceinline__ Element load_if(bool condition, const Element* from, Element otherwise) {
  static_assert(sizeof(Element) == 4 || sizeof(Element) == 2, "load_if: 2 or 4 bytes");
  using Bits = std::conditional_t<sizeof(Element) == 4, uint32_t, uint16_t>;
  union {
    Element value;
    Bits bits;
  } u{otherwise};
  if constexpr (sizeof(Element) == 4) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.b32 %0, [%1]; }"
                 : "+r"(u.bits)
                 : "l"(from), "r"(static_cast<int>(condition)));
  } else {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.b16 %0, [%1]; }"
                 : "+h"(u.bits)
                 : "l"(from), "r"(static_cast<int>(condition)));
  }
  return u.value;
}

template <class Element, int kSize>
__device__ __forceinline__ Vector<Element, kSize> load_if(bool condition, const Element* from,
                                                          Vector<Element, kSize> otherwise) {
  if constexpr (kSize == 1) return {load_if(condition, from, otherwise.x[0])};
  constexpr int kWords = sizeof(otherwise) / 4;
  static_assert(kSize == 1 || kWords == 1 || kWords == 2 || kWords == 4, "load_if: 2 to 16 bytes");
  union {
    Vector<Element, kSize> value;
    uint32_t words[kWords > 0 ? kWords : 1];
  } u{otherwise};
  if constexpr (kWords == 1) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.b32 %0, [%1]; }"
                 : "+r"(u.words[0])
                 : "l"(from), "r"(static_cast<int>(condition)));
  } else if constexpr (kWords == 2) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; @p ld.global.v2.b32 {%0, %1}, [%2]; }"
                 : "+r"(u.words[0]), "+r"(u.words[1])
                 : "l"(from), "r"(static_cast<int>(condition)));
  } else if constexpr (kWords == 4) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %5, 0; @p ld.global.v4.b32 {%0, %1, %2, %3}, [%4]; }"
        : "+r"(u.words[0]), "+r"(u.words[1]), "+r"(u.words[2]), "+r"(u.words[3])
        : "l"(from), "r"(static_cast<int>(condition)));
  }
  return u.value;
}

// Both: load_once, or `otherwise`.
template <class Element, int kSize>
__device__ __forceinline__ Vector<Element, kSize> load_once_if(bool condition, const Element* from,
                                                               Vector<Element, kSize> otherwise) {
  constexpr int kWords = sizeof(otherwise) / 4;
  if constexpr (kWords < 2) return load_if(condition, from, otherwise);
  static_assert(kWords <= 2 || kWords == 4, "load_once_if: at most 16 bytes");
  union {
    Vector<Element, kSize> value;
    uint32_t words[kWords > 0 ? kWords : 1];
  } u{otherwise};
  if constexpr (kWords == 2) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %3, 0;"
        "  @p ld.global.L1::no_allocate.v2.b32 {%0, %1}, [%2]; }"
        : "+r"(u.words[0]), "+r"(u.words[1])
        : "l"(from), "r"(static_cast<int>(condition)));
  } else if constexpr (kWords == 4) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %5, 0;"
        "  @p ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4]; }"
        : "+r"(u.words[0]), "+r"(u.words[1]), "+r"(u.words[2]), "+r"(u.words[3])
        : "l"(from), "r"(static_cast<int>(condition)));
  }
  return u.value;
}

// look_up where `wanted`; elsewhere a page that does not exist.
__device__ __forceinline__ TableEntry look_up_if(bool wanted, const Paging& paging,
                                                 const int32_t* table, int32_t position) {
  const uint32_t n = static_cast<uint32_t>(position);
  const uint32_t page = n / paging.page_size;
  return {static_cast<uint32_t>(load_if(wanted && page < paging.max_pages, table + page, -1)),
          n - page * paging.page_size.value};
}

__device__ __forceinline__ void prefetch_l1(const void* from) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(from));
}
__device__ __forceinline__ void prefetch_l2_if(bool condition, const void* from) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %1, 0; @p prefetch.global.L2 [%0]; }" ::"l"(from),
               "r"(static_cast<int>(condition)));
}

// Starts a copy of kSize elements into shared memory: 4, 8 or 16 bytes. A thread waits for the
// copies that it asked for, in groups: all up to a commit_copies() are one.
template <int kSize = 1, class Element>
__device__ __forceinline__ void copy_if(bool condition, Element* to, const Element* from) {
  constexpr int kBytes = kSize * sizeof(Element);
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "copy_if: 4, 8 or 16 bytes");
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %2, 0; @p cp.async.ca.shared.global [%0], [%1], %3; }" ::"r"(
          static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(static_cast<int>(condition)), "n"(kBytes)
      : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for all groups but the last `kPending`.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Hides how a base address in global memory came about, so that the compiler keeps it in registers:
// the address of an element is then one instruction.
template <class Element>
__device__ __forceinline__ Element* opaque(Element* pointer) {
  asm("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// Moves two values into ordinary registers. As uniform ones they are parameters that stop the warp
// while they come into the constant cache.
__device__ __forceinline__ void keep_in_registers(uint32_t& x, uint32_t& y) {
  asm volatile("" : "+r"(x), "+r"(y));
}

// ------------------------------------------------------------------ threads that wait for others

// Of so many threads of a CTA, by the number of one of its 16 barriers: those that come to it wait
// for all; those that only arrive do not.
template <int kThreads>
__device__ __forceinline__ void wait_at_barrier(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}
template <int kThreads>
__device__ __forceinline__ void arrive_at_barrier(int barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

// Clusters of CTAs read and write each other's shared memory. Chips before sm_90 have none: what is
// compiled for them is never launched.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ uint32_t rank_in_cluster() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// Threads that have ended count as arrived.
__device__ __forceinline__ void arrive_at_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// A barrier in shared memory that waits for so many bytes, once.
__device__ __forceinline__ void expect_bytes(uint64_t* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;"
      "fence.mbarrier_init.release.cluster;"
      "{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(
          shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}
__device__ __forceinline__ void wait_for_bytes(const uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .pred done;"
      "  again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;"
      "  @!done bra again; }" ::"r"(shared_address(barrier))
      : "memory");
#endif
}

// Stores into the shared memory of a CTA of the cluster, where `to` and `barrier` are as they are
// here, and tells its barrier.
__device__ __forceinline__ void send(float* to, float x, uint64_t* barrier, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .b32 there, bar;"
      "  mapa.shared::cluster.u32 there, %0, %3;"
      "  mapa.shared::cluster.u32 bar, %2, %3;"
      "  st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], %1, [bar]; }" ::"r"(
          shared_address(to)),
      "f"(x), "r"(shared_address(barrier)), "r"(rank)
      : "memory");
#endif
}

}  // namespace jax_dsv4
