// Storing records on a CPU: values are shared among XLA's threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "numeric.h"
#include "record.h"
#include "store.h"
#include "store_call.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {
namespace {

template <int D>
void round_all(float (&x)[D]) {
  for (float& value : x) value = to_bf16_and_back(value);
}

template <int D>
void normalize(float (&x)[D], const float* weight, float eps) {
  float squares[8] = {};  // side by side
  for (int c = 0; c < D; c += 8) {
    for (int k = 0; k < 8; ++k) squares[k] += x[c + k] * x[c + k];
  }
  float sum = 0;
  for (float square : squares) sum += square;
  const float factor = 1.0f / std::sqrt(sum / D + eps);
  for (int c = 0; c < D; ++c) x[c] = x[c] * factor * weight[c];
}

template <int D>
void rotate(float (&x)[D], const float* row, bool interleaved) {
  for (int i = 0; i < kRopeDim / 2; ++i) {
    const float cos = interleaved ? row[2 * i] : row[i];
    const float sin = interleaved ? row[2 * i + 1] : row[kRopeDim / 2 + i];
    float& even = x[D - kRopeDim + 2 * i];
    float& odd = x[D - kRopeDim + 2 * i + 1];
    const float rotated = even * cos - odd * sin;
    odd = odd * cos + even * sin;
    even = rotated;
  }
}

// The sums and differences of channels kStep apart, then of those 2 kStep apart, and so on.
template <int kStep, int D>
void add_and_subtract(float (&x)[D]) {
  for (int first = 0; first < D; first += 2 * kStep) {
    for (int c = first; c < first + kStep; ++c) {
      const float low = x[c], high = x[c + kStep];
      x[c] = low + high;
      x[c + kStep] = low - high;
    }
  }
  if constexpr (2 * kStep < D) add_and_subtract<2 * kStep>(x);
}

template <int D>
void transform_hadamard(float (&x)[D]) {
  add_and_subtract<1>(x);
  const float factor = 1.0f / std::sqrt(static_cast<float>(D));
  for (float& value : x) value *= factor;
}

// The largest magnitude; NaN counts for nothing. As integers: compilers vectorise their maximum.
template <int kCount>
float amax_of(const float* x, float least) {
  int32_t amax = bits_of(least);
  for (int c = 0; c < kCount; ++c) {
    const int32_t magnitude = bits_of(x[c]) & 0x7fffffffu;
    amax = std::max(amax, magnitude > 0x7f800000 ? 0 : magnitude);
  }
  return float_of(amax);
}

// The bytes of kCount channels and of their scales.
template <RecordFormat kFormat, int kCount>
void quantize(const float* x, const RecordOptions& options, uint8_t* data, uint8_t* scales) {
  constexpr int kBlock = RecordLayout<kFormat, kCount>::kBlock;
  for (int first = 0; first < kCount; first += kBlock) {
    const float amax = amax_of<kBlock>(x + first, least_amax<kFormat>(options));
    const BlockScale scale = scale_of<kFormat>(amax, options);
    if constexpr (kFormat == RecordFormat::kMxfp4) {
      float quotients[kBlock];
      if (scale.exponent < 105) {  // a denormal value may be more than nothing
        for (int c = 0; c < kBlock; ++c) {
          quotients[c] = divide_by_power_of_two(x[first + c], scale.exponent);
        }
      } else {
        for (int c = 0; c < kBlock; ++c) quotients[c] = x[first + c] * scale.reciprocal;
      }
      uint8_t codes[kBlock];
      for (int c = 0; c < kBlock; ++c) codes[c] = to_e2m1(quotients[c]);
      for (int c = 0; c < kBlock; c += 2) data[(first + c) / 2] = codes[c] | codes[c + 1] << 4;
    } else {
      for (int c = 0; c < kBlock; ++c) {
        data[first + c] = static_cast<uint8_t>(to_e4m3(x[first + c] * scale.reciprocal));
      }
    }
    if constexpr (kFormat == RecordFormat::kFp8Block128) {
      const uint32_t word = scale_word(scale, options.scales);
      std::memcpy(scales + first / kBlock * 4, &word, 4);
    } else {
      scales[first / kBlock] = static_cast<uint8_t>(scale.exponent);
    }
  }
}

template <RecordFormat kFormat, int D>
void encode(const float (&x)[D], const RecordOptions& options, uint8_t* data, uint8_t* scales) {
  const auto store_bf16 = [&](uint8_t* to, const float* from, int count) {
    for (int c = 0; c < count; ++c) {
      const bf16 value = round_to<bf16>(from[c]);
      std::memcpy(to + 2 * c, &value, 2);
    }
  };
  if constexpr (kFormat == RecordFormat::kF32) {
    std::memcpy(data, x, sizeof(x));
  } else if constexpr (kFormat == RecordFormat::kBf16) {
    store_bf16(data, x, D);
  } else if constexpr (kFormat == RecordFormat::kFp8) {
    for (int c = 0; c < D; ++c) data[c] = static_cast<uint8_t>(to_e4m3(x[c]));
  } else if constexpr (kFormat == RecordFormat::kFp8DsMla) {
    constexpr int kPlain = D - kRopeDim;
    quantize<kFormat, kPlain>(x, options, data, scales);
    store_bf16(data + kPlain, x + kPlain, kRopeDim);
    scales[kPlain / 64] = 0;
  } else {
    quantize<kFormat, D>(x, options, data, scales);
  }
}

// Value `index` of G * N.
template <RecordFormat kFormat, int D>
void store_record(const StoreParams& p, int64_t index) {
  const auto group = static_cast<uint32_t>(index / p.num_values);
  const auto value = static_cast<uint32_t>(index % p.num_values);
  const RecordPages pages = pages_of(p.pool, group);
  const int32_t slot = p.slots[group * p.slots_stride + value];
  const int32_t position = p.positions[group * p.positions_stride + value];
  const RecordPlace place = find_place(p.pool, pages, slot, p.has_position(position));
  if (!place.exists) return;
  const RecordOptions& options = p.options;
  const int64_t from = (int64_t{group} * p.values_stride + value) * D;
  float x[D];
  for (int c = 0; c < D; ++c) {
    x[c] = p.values_are_bf16 ? to_f32(static_cast<const bf16*>(p.values)[from + c])
                             : static_cast<const float*>(p.values)[from + c];
  }
  const bool round_each = options.rounding == Rounding::kModel;
  if (round_each) round_all(x);
  if (p.norm_weight != nullptr) {
    normalize(x, p.norm_weight + int64_t{group} * p.weight_stride * D, options.rms_norm_eps);
    if (round_each) round_all(x);
  }
  if (p.table != nullptr) {
    const int64_t row = group * p.table_stride + position;
    rotate(x, p.table + row * kRopeDim, options.interleaved);
    if (round_each) round_all(x);
  }
  if (options.hadamard) {
    transform_hadamard(x);
    if (round_each) round_all(x);
  }
  if (kIsQuantized<kFormat> && options.rounding == Rounding::kOnce) round_all(x);
  const RecordRow<RecordLayout<kFormat, D>> row(p.pool, pages, place);
  encode<kFormat>(x, options, row.data, row.scales);
}

ffi::Future store_records(ffi::ThreadPool pool, ffi::RemainingArgs operands,
                          ffi::RemainingRets results, const StoreAttributes& attributes) {
  const ffi::ErrorOr<StoreCall> call = check_store(operands, results, attributes);
  if (!call) return ready(call.error());
  if (call->empty) return ready(ffi::Error::Success());
  void (*store_one)(const StoreParams&, int64_t) = nullptr;
  visit_record(call->format, call->head_dim,
               [&](auto record) { store_one = store_record<record.kFormat, record.kHeadDim>; });
  const int64_t count = int64_t{call->params.num_groups} * call->params.num_values;
  constexpr int64_t kLeastValues = 32;  // a task costs as much
  return share_among_threads(pool, call->params, count, kLeastValues, store_one);
}

}  // namespace
}  // namespace jax_dsv4

XLA_FFI_DEFINE_HANDLER_SYMBOL(StoreRecordsCpu, jax_dsv4::store_records,
                              jax_dsv4::bind_call<jax_dsv4::StoreAttributes>(
                                  xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>()));
