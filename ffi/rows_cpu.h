// What is done with rows of a state and with new rows on a CPU: they are stored, reduced to a
// window's value, or merged into prefixes. All of it by loops over channels, which do not depend on
// each other: so a thread may take some of the channels only. No XLA types.
#pragma once

#include <algorithm>
#include <cstdint>

#include "config.h"
#include "numeric.h"
#include "prefix.h"
#include "vectorized.h"

namespace jax_dsv4 {

// Some channels of a value. Of a row they are those, and where windows overlap as many of its
// second half.
struct Channels {
  int first, count;
};

// A row of the state: what is stored, as it is.
template <class State_>
struct StoredRow {
  using State = State_;
  const State* kv;     // [S]
  const State* score;  // [S]

  State kv_at(int c) const { return kv[c]; }
  State score_at(int c) const { return score[c]; }
  StoredRow at(int c) const { return {kv + c, score + c}; }
};

// A new row, as it is or would be stored: kv, and score plus its bias, rounded once.
template <class KvScore, class State_, bool kHasBias>
struct NewRow {
  using State = State_;
  const KvScore* kv;     // [S]
  const KvScore* score;  // [S]
  const float* bias;     // [S], or null: adding 0 would lose the sign of -0

  State kv_at(int c) const { return round_to<State>(to_f32(kv[c])); }
  State score_at(int c) const {
    return round_to<State>(kHasBias ? to_f32(score[c]) + bias[c] : to_f32(score[c]));
  }
  NewRow at(int c) const { return {kv + c, score + c, kHasBias ? bias + c : nullptr}; }
};

// ------------------------------------------------------------------------------- loops of rows

template <class Row>
void store_kv(Row row, int count, typename Row::State* __restrict to) {
  for (int c = 0; c < count; ++c) to[c] = row.kv_at(c);
}
template <class Row>
void store_score(Row row, int count, typename Row::State* __restrict to) {
  for (int c = 0; c < count; ++c) to[c] = row.score_at(c);
}

inline constexpr int kChannelsAtOnce = 32;  // a multiple of every vector, and of a cache line
inline constexpr int kRowsAtOnce = 4;  // what is kept of a channel stays in a register for as long
inline constexpr int kBlockRows = 16;  // of a softmax

enum class Cache : int { kL2 = 2, kL1 = 3 };  // as __builtin_prefetch numbers them

template <Cache kTo, class T>
void prefetch(const T* from) {
  constexpr int kLine = 64;
  for (int i = 0; i < kChannelsAtOnce; i += kLine / sizeof(T)) {
    __builtin_prefetch(from + i, /*rw=*/0, static_cast<int>(kTo));
  }
}

// The maximum with the scores of up to kRowsAtOnce rows.
template <class Row>
void take_max(const Row* rows, int num_rows, int count, float* __restrict max) {
  Row row[kRowsAtOnce];  // the last again, where there are fewer
  for (int i = 0; i < kRowsAtOnce; ++i) row[i] = rows[std::min(i, num_rows - 1)];
  for (int c = 0; c < count; ++c) {
    float highest = max[c];
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const float score = to_f32(row[i].score_at(c));
      highest = highest < score ? score : highest;  // a NaN comes in by its weight
    }
    max[c] = highest;
  }
}

// Scales what was added so far to a new maximum.
inline void rescale(const float* new_max, int count, float* __restrict max, float* __restrict sum,
                    float* __restrict weighted) {
  for (int c = 0; c < count; ++c) {
    const float scale = fast_exp(max[c] - finite(new_max[c]));
    sum[c] *= scale;
    weighted[c] *= scale;
    max[c] = new_max[c];
  }
}

// Adds kRows rows, while as many others, `ahead`, are on their way from memory: each row at a time,
// as memory is read fastest.
template <class Row, int kRows>
void add_weighted(const Row* rows, const Row* ahead, int count, const float* max,
                  float* __restrict sum, float* __restrict weighted) {
  Row row[kRows];
  std::copy_n(rows, kRows, row);
  int channel_ahead = 0;  // of *ahead
  for (int first = 0; first < count; first += kChannelsAtOnce) {
    for (int i = 0; i < kRows; ++i) {
      prefetch<Cache::kL2>(ahead->score + channel_ahead);
      prefetch<Cache::kL2>(ahead->kv + channel_ahead);
      channel_ahead += kChannelsAtOnce;
      const bool is_whole = channel_ahead == count;
      ahead += is_whole;
      channel_ahead = is_whole ? 0 : channel_ahead;
    }
    for (int c = first; c < first + kChannelsAtOnce; ++c) {
      const float subtracted = finite(max[c]);
      float own_sum = sum[c], own_weighted = weighted[c];
      for (int i = 0; i < kRows; ++i) {
        const float weight = fast_exp(to_f32(row[i].score_at(c)) - subtracted);
        own_sum += weight;
        own_weighted += weight * to_f32(row[i].kv_at(c));
      }
      sum[c] = own_sum;
      weighted[c] = own_weighted;
    }
  }
}

template <class Out>
void divide(const float* sum, const float* weighted, int count, Out* __restrict out) {
  for (int c = 0; c < count; ++c) {
    const float quotient = weighted[c] / sum[c];
    out[c] = round_to<Out>(sum[c] == 0 ? 0.0f : quotient);
  }
}

// The same of two parts of the rows.
template <class Out>
void divide_both(const float* max_a, const float* sum_a, const float* weighted_a,
                 const float* max_b, const float* sum_b, const float* weighted_b, int count,
                 Out* __restrict out) {
  for (int c = 0; c < count; ++c) {
    const float highest = finite(max_a[c] < max_b[c] ? max_b[c] : max_a[c]);
    const float scale_a = fast_exp(max_a[c] - highest), scale_b = fast_exp(max_b[c] - highest);
    const float sum = sum_a[c] * scale_a + sum_b[c] * scale_b;
    const float quotient = (weighted_a[c] * scale_a + weighted_b[c] * scale_b) / sum;
    out[c] = round_to<Out>(sum == 0 ? 0.0f : quotient);
  }
}

// --------------------------------------------------------------------------------------- softmax

// Some rows of a window: per channel the highest score, the sum of the rows' weights, relative to
// it, and that of weighted kv. Of such channels only as are named.
template <int D>
struct alignas(64) Sums {
  float max[D], sum[D], weighted[D];

  void clear(Channels channels) {
    std::fill_n(max + channels.first, channels.count, kNegInf);
    std::fill_n(sum + channels.first, channels.count, 0.0f);
    std::fill_n(weighted + channels.first, channels.count, 0.0f);
  }

  // Adds rows, each from the first of these channels on. In blocks, each of which is read from
  // memory once. The first is small: nothing of it was fetched ahead.
  template <class Row>
  void add(const Row* rows, int num_rows, Channels channels) {
    const int count = channels.count;
    float* const own_max = max + channels.first;
    float* const own_sum = sum + channels.first;
    float* const own_weighted = weighted + channels.first;
    alignas(64) float new_max[D];
    for (int begin = 0, end = 0; begin < num_rows; begin = end) {
      end = std::min(begin + (begin == 0 ? kRowsAtOnce : kBlockRows), num_rows);
      std::copy_n(own_max, count, new_max);
      for (int i = begin; i < end; i += kRowsAtOnce) {
        vectorized<take_max<Row>>(rows + i, end - i, count, new_max);
      }
      vectorized<rescale>(new_max, count, own_max, own_sum, own_weighted);
      for (int i = begin; i < end;) {
        const bool several = i + kRowsAtOnce <= end;
        const Row* ahead = rows + (i + kBlockRows + kRowsAtOnce <= num_rows ? i + kBlockRows : i);
        if (several) {
          vectorized<add_weighted<Row, kRowsAtOnce>>(rows + i, ahead, count, own_max, own_sum,
                                                     own_weighted);
        } else {
          vectorized<add_weighted<Row, 1>>(rows + i, ahead, count, own_max, own_sum, own_weighted);
        }
        i += several ? kRowsAtOnce : 1;
      }
    }
  }
};

// Windows of many rows are reduced in so many parts of their rows, which threads may share: each
// then reads pages of its own.
template <class Config>
inline constexpr int kRowParts = Config::kReducedRows >= 64 ? 2 : 1;

// The value of a window: per channel, the softmax of its rows' scores times their kv, into out [D].
// 0 where there is no row, or every score is -inf.
template <class Config>
void put_value(const Sums<Config::kHeadDim> (&parts)[kRowParts<Config>], Channels channels,
               typename Config::Out* out) {
  using Out = typename Config::Out;
  const int first = channels.first;
  const auto& a = parts[0];
  if constexpr (kRowParts<Config> == 1) {
    vectorized<divide<Out>>(a.sum + first, a.weighted + first, channels.count, out + first);
  } else {
    const auto& b = parts[1];
    vectorized<divide_both<Out>>(a.max + first, a.sum + first, a.weighted + first, b.max + first,
                                 b.sum + first, b.weighted + first, channels.count, out + first);
  }
}

// -------------------------------------------------------------------------------------- prefixes

// Calls put(i, merge({lse_a[i], mean_a[i]}, {lse_b(i), mean_b(i)})) for kChannelsAtOnce channels.
// In two loops: one chain of everything is longer than what a core looks ahead.
template <class Lse, class Mean, class Put>
void merge_channels(const float* lse_a, const float* mean_a, Lse&& lse_b, Mean&& mean_b,
                    Put&& put) {
  alignas(64) float difference[kChannelsAtOnce], ratio[kChannelsAtOnce], high[kChannelsAtOnce];
  for (int i = 0; i < kChannelsAtOnce; ++i) {
    const Balance balance = weigh(lse_a[i], lse_b(i));
    difference[i] = balance.difference;
    ratio[i] = balance.ratio;
    high[i] = balance.high;
  }
  for (int i = 0; i < kChannelsAtOnce; ++i) {
    const Balance balance = {difference[i], ratio[i], high[i]};
    const float mean = merge_means(balance, mean_a[i], mean_b(i));
    put(i, Prefix{merge_lse(balance), mean});
  }
}

// Merges a row, the first of them or another one, while `place_lse` and `place_mean`, where the
// result will be stored, are on their way from memory.
template <class Row, bool kIsFirst>
void merge_row(Row row, int count, const float* place_lse, const float* place_mean,
               float* __restrict lse, float* __restrict mean) {
  for (int c = 0; c < count; c += kChannelsAtOnce) {
    prefetch<Cache::kL1>(place_lse + c);
    prefetch<Cache::kL1>(place_mean + c);
    const auto score = [&](int i) { return to_f32(row.score_at(c + i)); };
    const auto kv = [&](int i) { return to_f32(row.kv_at(c + i)); };
    const auto put = [&](int i, const Prefix& merged) {
      lse[c + i] = merged.lse;
      mean[c + i] = merged.mean;
    };
    if constexpr (kIsFirst) {
      for (int i = 0; i < kChannelsAtOnce; ++i) put(i, merge_first({score(i), kv(i)}));
    } else {
      merge_channels(lse + c, mean + c, score, kv, put);
    }
  }
}

template <class Out>
void put_prefix(const float* lse, const float* mean, int count, Out* __restrict out) {
  for (int c = 0; c < count; ++c) out[c] = round_to<Out>(value_of({lse[c], mean[c]}));
}

template <class Out>
void put_merged(const float* lse_a, const float* mean_a, const float* lse_b, const float* mean_b,
                int count, Out* __restrict out) {
  for (int c = 0; c < count; c += kChannelsAtOnce) {
    merge_channels(
        lse_a + c, mean_a + c, [&](int i) { return lse_b[c + i]; },
        [&](int i) { return mean_b[c + i]; },
        [&](int i, const Prefix& merged) { out[c + i] = round_to<Out>(value_of(merged)); });
  }
}

}  // namespace jax_dsv4
