// The arithmetic of prefixes, on host and device: what a row of state format "prefix" holds, and
// how two of them become one.
#pragma once

#include <cmath>

#include "numeric.h"

namespace jax_dsv4 {

// Some rows of a window, in one channel: the logsumexp of their scores, and the mean of their kv
// weighted by softmax. Of one row: its score and kv; of none: -inf and 0.
struct Prefix {
  float lse = kNegInf;
  float mean = 0.0f;
};

JAX_DSV4_HD float max_or_nan(float x, float y) {
#ifdef __CUDA_ARCH__
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
  return result;
#else
  const float max = x > y ? x : y;  // y, if that is NaN
  return x == x ? max : x;
#endif
}

// y + log(1 + x) for 0 <= x <= 1, by a polynomial: within 2.7e-7, and within 1e-9 below x = 0.01.
// The ratio of one token to a long window is that small, and its error would add up over the rows.
// Estrin's scheme: pairs first, since latency counts.
JAX_DSV4_HD float add_log1p(float x, float y) {
  const float x2 = x * x;
  const float p01 = multiply_add(-0.49997699f, x, 0.99999984f);
  const float p23 = multiply_add(-0.24523585f, x, 0.33280173f);
  const float p45 = multiply_add(-0.10885792f, x, 0.17825505f);
  const float p67 = multiply_add(-0.0087833f, x, 0.04494445f);
  const float p = multiply_add(multiply_add(p67, x2, p45), x2 * x2, multiply_add(p23, x2, p01));
  return multiply_add(p, x, y);
}

// Two sets of rows, a and b, as their logsumexps compare.
struct Balance {
  float difference;  // of b's to a's
  float ratio;       // of the lighter set's weight to the heavier's
  float high;        // the higher logsumexp, or NaN
};
JAX_DSV4_HD Balance weigh(float lse_a, float lse_b) {
  constexpr float kFar = 200.0f;  // exp(-kFar) is 0; also the distance from -inf to -inf
  const float difference = lse_b - lse_a, distance = std::fabs(difference);
  const float ratio = fast_exp(-(distance < kFar ? distance : kFar));
  return {difference, ratio, max_or_nan(lse_a, lse_b)};
}

JAX_DSV4_HD float merge_lse(const Balance& of) { return add_log1p(of.ratio, of.high); }

// The mean moves from the heavier set's towards the other's, which is exact where one has no
// weight, and where both means are equal. As in a softmax over the rows, a score of +inf gives NaN,
// and so does an infinite kv of weight 0.
JAX_DSV4_HD float merge_means(const Balance& of, float mean_a, float mean_b) {
  const float zero_or_nan = 0.0f * max_or_nan(of.high, -kMaxFloat);
  const float weight = fast_quotient(of.ratio, 1.0f + of.ratio) + zero_or_nan;  // of `light`
  const float heavy = of.difference > 0 ? mean_b : mean_a;
  const float light = of.difference > 0 ? mean_a : mean_b;
  const float difference_of_means = light - heavy;
  return std::isfinite(difference_of_means) ? multiply_add(difference_of_means, weight, heavy)
                                            : multiply_add(light, weight, heavy * (1.0f - weight));
}

// Merges two sets of rows. From token to token only the logsumexp is a chain: the means follow
// beside it.
JAX_DSV4_HD Prefix merge(const Prefix& a, const Prefix& b) {
  const Balance balance = weigh(a.lse, b.lse);
  const float mean = merge_means(balance, a.mean, b.mean);
  return {merge_lse(balance), mean};
}

// merge(Prefix{}, first), on a CPU to the bit.
JAX_DSV4_HD Prefix merge_first(const Prefix& first) {
  const float zero_or_nan = 0.0f + 0.0f * max_or_nan(first.lse, -kMaxFloat);
  const float weight = first.lse == kNegInf ? 0.0f : 1.0f;
  return {first.lse + 0.0f, multiply_add(first.mean, weight, zero_or_nan)};
}

// The value of a finished window.
JAX_DSV4_HD float value_of(const Prefix& window) {
  return window.lse == kNegInf ? 0.0f : window.mean;
}

}  // namespace jax_dsv4
