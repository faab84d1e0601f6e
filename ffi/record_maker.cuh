// A record made where its value is, by a thread for four channels, in a format that is known at run
// time. Device code only.
#pragma once

#include <cstdint>
#include <type_traits>

#include "config.h"
#include "decode_records.h"
#include "record.h"
#include "record_pool.h"
#include "record_stage.cuh"
#include "vector.cuh"

namespace jax_dsv4 {

// What a kernel is given of a record: its format, known at run time.
struct RecordParams : RecordTarget {
  RecordFormat format;
  int data_bytes, scale_bytes;  // of one record

  RecordParams(const RecordTarget& target, RecordFormat format, int64_t head_dim)
      : RecordTarget(target), format(format) {
    visit_record(format, head_dim, [&](auto record) {
      data_bytes = decltype(record)::Layout::kData;
      scale_bytes = decltype(record)::Layout::kScales;
    });
  }
};

template <class Record, class List>
inline constexpr bool kIsCompiledRecord = false;
template <class Record, class... Compiled>
inline constexpr bool kIsCompiledRecord<Record, TypeList<Compiled...>> =
    (std::is_same_v<Record, Compiled> || ...);

// What the threads that make a record share.
template <int kHeadDim>
struct RecordPlan {
  static constexpr int kThreads = kHeadDim / 4, kRotating = kRopeDim / 4;
  using Stage = RecordStage<kHeadDim, kThreads>;

  alignas(16) float value[kHeadDim];
  // A thread reads what it has copied.
  alignas(16) float weight[kHeadDim];
  alignas(8) float rotation[kRotating][4];  // of the threads that rotate: two pairs of floats
  int32_t page[kThreads];
  typename Stage::Exchange exchange;
  uint64_t barrier;  // for the value
};

// The same where each thread has all that it needs in registers.
template <int kHeadDim>
struct RecordExchange {
  using Stage = typename RecordPlan<kHeadDim>::Stage;
  typename Stage::Exchange exchange;
};

// The same where one warp makes a record: it shares nothing.
template <int kHeadDim>
struct RecordOfWarp {
  using Stage = RecordStage<kHeadDim, 32>;
};

// One thread's part of a record: four channels, or some groups of four.
template <int kHeadDim, class Plan_ = RecordPlan<kHeadDim>>
struct RecordMaker {
  using Plan = Plan_;
  using Stage = typename Plan::Stage;

  const RecordParams& p;
  Plan& plan;
  Stage stage;

  __device__ __forceinline__ RecordMaker(const RecordParams& p, Plan& plan, int thread)
      : p(p), plan(plan), stage{thread} {}

  // Starts copies of all that the record of a window needs but its value.
  __device__ __forceinline__ void start(uint32_t group, uint32_t index, uint32_t window,
                                        uint32_t position) const {
    const uint32_t logical = window / p.pool.page_size;
    const bool has_position = p.cos_sin == nullptr || position < p.num_positions;
    const bool may_exist = has_position && logical < p.max_pages;
    int32_t* const page = &plan.page[stage.lane];
    if (!may_exist) *page = -1;
    copy_if(may_exist, page,
            p.tables + uint64_t{group * p.tables_stride + index} * p.max_pages + logical);
    const int channel = stage.channel(0);
    copy_if<4>(p.norm_weight != nullptr, &plan.weight[channel],
               p.norm_weight + int64_t{group} * p.weight_stride * kHeadDim + channel);
    const bool rotates = p.cos_sin != nullptr && has_position && channel >= kHeadDim - kRopeDim;
    const float* const row = p.cos_sin + (group * p.cos_sin_stride + position) * kRopeDim;
    const int first = channel % kRopeDim / 2;  // of 32 pairs
    float* const rotation = plan.rotation[stage.lane % Plan::kRotating];
    const bool interleaved = p.options.interleaved;
    copy_if<2>(rotates, rotation, row + (interleaved ? 2 * first : first));
    copy_if<2>(rotates, rotation + 2, row + (interleaved ? 2 * first + 2 : first + kRopeDim / 2));
    commit_copies();
  }

  // All that the record needs but its value, in registers: where a parameter is first used, it may
  // stop the warp.
  struct Ready {
    typename Stage::Operands operands;
    RecordBytes row;
    float eps;
    uint32_t flags;
  };
  enum Flag : uint32_t {
    kFormat = 0xf,  // the format's value
    kRounding = 0x30,
    kScales = 0xc0,
    kHasNorm = 0x100,
    kHasRotation = 0x200,
    kHadamard = 0x400,
    kScaleFloor = 0x800,
    kExists = 0x1000,
    kIsAligned = 0x2000,
  };

  // What all records of a call have in common, of all that Ready has.
  struct Settings {
    float eps;
    uint32_t flags;
  };
  static __device__ __forceinline__ Settings settings_of(const RecordParams& p) {
    Settings s = {
        p.options.rms_norm_eps,
        static_cast<uint32_t>(p.format) | static_cast<uint32_t>(p.options.rounding) << 4 |
            static_cast<uint32_t>(p.options.scales) << 6 |
            (p.norm_weight != nullptr ? kHasNorm : 0) | (p.cos_sin != nullptr ? kHasRotation : 0) |
            (p.options.hadamard ? kHadamard : 0) | (p.options.scale_floor ? kScaleFloor : 0) |
            (p.pool.is_16b_aligned ? kIsAligned : 0)};
    asm volatile("" : "+r"(s.flags), "+f"(s.eps));
    return s;
  }

  // All but the operands. get_page(): of the window, by its table.
  template <class GetSettings, class GetPage>
  __device__ __forceinline__ Ready ready_at(uint32_t group, uint32_t window,
                                            GetSettings&& get_settings, GetPage&& get_page) const {
    const RecordPages pages = pages_of(p.pool, group);
    const uint32_t row = window - window / p.pool.page_size * p.pool.page_size.value;
    const Settings settings = get_settings();
    const auto page = static_cast<uint32_t>(get_page());
    const bool exists = page < pages.count;
    const RecordPlace place = {exists, exists ? page : 0, exists ? row : 0};
    return {{},
            RecordBytes(p.pool, pages, place, p.data_bytes, p.scale_bytes),
            settings.eps,
            settings.flags | (exists ? kExists : 0)};
  }

  // Waits for the copies.
  __device__ __forceinline__ Ready prepare(uint32_t group, uint32_t window) const {
    Ready ready = ready_at(
        group, window, [&] { return settings_of(p); },
        [&] {
          wait_for_copies<0>();
          return plan.page[stage.lane];
        });
    ready.operands.weight[0] = load<float, 4>(&plan.weight[stage.channel(0)]);
    if (stage.channel(0) >= kHeadDim - kRopeDim) {
      const float* const rotation = plan.rotation[stage.lane % Plan::kRotating];
      stage.set_rotation(load<float, 2>(rotation), load<float, 2>(rotation + 2),
                         p.options.interleaved, ready.operands, 0);
    }
    return ready;
  }
  // The same without shared memory: starts the loads, and later takes what they brought.
  struct Loaded {
    int32_t page;
    Vector<float, 4> weight[Stage::kGroups];
    Vector<float, 2> low, high;  // of the row of the table
  };
  // kWeight: also of the weight, or load_weight() later. Here that is not called: with these loads
  // in another order RaggedWide has other registers, and takes 5 % longer.
  template <bool kWeight = true>
  __device__ __forceinline__ Loaded load_all(bool wanted, uint32_t group, uint32_t index,
                                             uint32_t window, uint32_t position) const {
    static_assert(Stage::kRotated == 1 && (!kWeight || Stage::kGroups == 1),
                  "load_all: several groups are rotated, or have a weight");
    const uint32_t logical = window / p.pool.page_size;
    const bool has_position = p.cos_sin == nullptr || position < p.num_positions;
    const int channel = stage.channel(0);
    const float* const row = p.cos_sin + (group * p.cos_sin_stride + position) * kRopeDim;
    const int first = channel % kRopeDim / 2;  // of 32 pairs
    const bool rotates = wanted && p.cos_sin != nullptr && has_position;
    const bool interleaved = p.options.interleaved;
    return {
        load_if(wanted && has_position && logical < p.max_pages,
                p.tables + uint64_t{group * p.tables_stride + index} * p.max_pages + logical, -1),
        {kWeight ? load_if(wanted && p.norm_weight != nullptr,
                           p.norm_weight + int64_t{group} * p.weight_stride * kHeadDim + channel,
                           Vector<float, 4>{})
                 : Vector<float, 4>{}},
        load_if(rotates, row + (interleaved ? 2 * first : first), Vector<float, 2>{}),
        load_if(rotates, row + (interleaved ? 2 * first + 2 : first + kRopeDim / 2),
                Vector<float, 2>{})};
  }
  __device__ __forceinline__ void load_weight(uint32_t group, Loaded& loaded) const {
    const float* const weight = p.norm_weight + int64_t{group} * p.weight_stride * kHeadDim;
#pragma unroll
    for (int j = 0; j < Stage::kGroups; ++j) {
      loaded.weight[j] =
          load_if(p.norm_weight != nullptr, weight + stage.channel(j), Vector<float, 4>{});
    }
  }
  __device__ __forceinline__ Ready take(const Loaded& loaded, uint32_t group,
                                        uint32_t window) const {
    return take(loaded, group, window, [&] { return settings_of(p); });
  }
  template <class GetSettings>
  __device__ __forceinline__ Ready take(const Loaded& loaded, uint32_t group, uint32_t window,
                                        GetSettings&& get_settings) const {
    Ready ready = ready_at(group, window, get_settings, [&] { return loaded.page; });
#pragma unroll
    for (int j = 0; j < Stage::kGroups; ++j) ready.operands.weight[j] = loaded.weight[j];
    stage.set_rotation(loaded.low, loaded.high, p.options.interleaved, ready.operands, 0);
    return ready;
  }

  __device__ __forceinline__ typename Stage::Exchange* exchange() const {
    if constexpr (Stage::kWarps == 1) {
      return nullptr;
    } else {
      return &plan.exchange;
    }
  }
  // Makes the record of the value in `stage`.
  __device__ __forceinline__ void finish(const Ready& ready) {
    const auto has = [&](Flag flag) { return (ready.flags & flag) != 0; };
    RecordOptions options = {};
    options.rms_norm_eps = ready.eps;
    options.rounding = static_cast<Rounding>((ready.flags & kRounding) >> 4);
    options.scales = static_cast<Scales>((ready.flags & kScales) >> 6);
    options.hadamard = has(kHadamard);
    options.scale_floor = has(kScaleFloor);
    const auto format = static_cast<RecordFormat>(ready.flags & kFormat);
    stage.transform(ready.operands, has(kHasNorm), has(kHasRotation), options,
                    options.rounding == Rounding::kModel, format > RecordFormat::kBf16, exchange());
    const auto store_in = [&](auto record) {
      using Record = decltype(record);
      if constexpr (kIsCompiledRecord<Record, Records>) {
        stage.template store<Record::kFormat>(options, has(kExists), ready.row, has(kIsAligned));
      }
    };
    using F = RecordFormat;
    switch (format) {
      case F::kF32:
        return store_in(Record<F::kF32, kHeadDim>{});
      case F::kBf16:
        return store_in(Record<F::kBf16, kHeadDim>{});
      case F::kFp8:
        return store_in(Record<F::kFp8, kHeadDim>{});
      case F::kFp8DsMla:
        return store_in(Record<F::kFp8DsMla, kHeadDim>{});
      case F::kFp8Block128:
        return store_in(Record<F::kFp8Block128, kHeadDim>{});
      case F::kMxfp4:
        return store_in(Record<F::kMxfp4, kHeadDim>{});
    }
  }
};

}  // namespace jax_dsv4
