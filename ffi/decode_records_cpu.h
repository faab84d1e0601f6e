// A request's step that ends in records, on a CPU. No XLA types.
#pragma once

#include <cstdint>

#include "config.h"
#include "decode_cpu.h"
#include "decode_records.h"
#include "record_cpu.h"

namespace jax_dsv4 {

// Makes the record of `value` [D], which it works in.
template <RecordFormat kFormat, int D>
void store_record(const RecordTarget& t, uint32_t group, uint32_t position,
                  const RecordPages& pages, const RecordPlace& place, float* value) {
  const float *weight = nullptr, *rotation = nullptr;
  if (t.norm_weight != nullptr) weight = t.norm_weight + int64_t{group} * t.weight_stride * D;
  if (t.cos_sin != nullptr) {
    rotation = t.cos_sin + (group * t.cos_sin_stride + position) * kRopeDim;
  }
  make_record<kFormat>(*reinterpret_cast<float (*)[D]>(value), weight, rotation, t.options,
                       {t.pool, pages, place});
}

// Calls store(position, pages, place, value [D]) for a window of a request, if its record has a
// place; put(value) computes the value.
template <class Config, class Put, class Store>
void put_record(const RecordTarget& t, uint32_t group, uint32_t request, uint32_t window, Put&& put,
                Store&& store) {
  const RecordPages pages = pages_of(t.pool, group);
  const int32_t* table = t.tables + uint64_t{group * t.tables_stride + request} * t.max_pages;
  const uint32_t position = window * Config::kRatio;
  const RecordPlace place = find_record(t, pages, table, window, position);
  if (!place.exists) return;
  float value[Config::kHeadDim];
  put(value);
  store(position, pages, place, value);
}

// Calls store(window, position, pages, place, value [D]) for each window that the step completes
// and whose record has a place.
template <class Config, StateFormat kFormat, class Store>
void step_to_records(const DecodeRecordsParams& p, uint32_t group, uint32_t request,
                     Store&& store) {
  const auto r = request_at<Config>(p, group, request);
  step_request<Config, kFormat>(p, r, kAllChannels<Config>, [&](uint32_t window, auto&& put) {
    put_record<Config>(p.records, group, request, window, put,
                       [&](auto&&... record) { store(window, record...); });
  });
}

// store_record of a format: apart from what computes the value, for not every pair of them to be
// compiled.
using StoreRecord = void (*)(const RecordTarget&, uint32_t group, uint32_t position,
                             const RecordPages&, const RecordPlace&, float* value);
inline StoreRecord store_of(RecordFormat format, int64_t head_dim) {
  StoreRecord store = nullptr;
  visit_record(format, head_dim,
               [&](auto record) { store = store_record<record.kFormat, record.kHeadDim>; });
  return store;
}

}  // namespace jax_dsv4
