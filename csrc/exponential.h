// What sums, probabilities and gradients are made of, per element, for the CPU and the CUDA kernels: exp and log, signs
// and inverses. exp and log are written out so that the CPU and the emulated CUDA kernels agree bit for bit, and
// because a call of libm does not vectorize.
#pragma once
#include <cmath>
#include <cstring>

#include "quant_math.h"

namespace quantops {

template <class To, class From>
QUANTOPS_INLINE To bits_of(From v) {
  static_assert(sizeof(To) == sizeof(From), "");
  To r;
  memcpy(&r, &v, sizeof(To));
  return r;
}

// v with the sign changed where `by` is negative.
QUANTOPS_INLINE float change_sign(float v, float by) {
  return bits_of<float>(bits_of<uint32_t>(v) ^ (bits_of<uint32_t>(by) & 0x80000000u));
}
QUANTOPS_INLINE double change_sign(double v, double by) {
  return bits_of<double>(bits_of<uint64_t>(v) ^ (bits_of<uint64_t>(by) & 0x8000000000000000u));
}

// 1/v for gradients, of normal numbers whose inverse is one: on a GPU to 1 ulp, by an approximation and a Newton step.
QUANTOPS_INLINE float reciprocal(float v) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return product_plus(r, product_plus(-v, r, 1.f), r);
#else
  return 1.f / v;
#endif
}
QUANTOPS_INLINE double reciprocal(double v) { return 1 / v; }

// An integer 0 <= v < 2^23 as one: it is in the lowest bits of the sum. NaN and what is out of range give some integer.
QUANTOPS_INLINE uint32_t index_of(float v) { return bits_of<uint32_t>(v + 8388608.f) & 0x7fffff; }
QUANTOPS_INLINE uint32_t index_of(double v) { return index_of(static_cast<float>(v)); }

// exp(x) to less than 1 ulp for -87 <= x <= 88, and `exponential` 0 below. Reduced as in Cephes (S. Moshier, expf):
// x = n ln 2 + r, with a minimax polynomial for exp(r) to 0.06 ulp, in the order with the shortest chains.
// NaN stays NaN on a CPU; a GPU's NaN may become a number, but the class or alpha of such an element is NaN as well.
QUANTOPS_INLINE float exponential_in_range(float x) {
  const float shifted = x * 1.44269504f + 12582912.f;  // its lowest bits are the integer n nearest to x / ln 2
  const float n = shifted - 12582912.f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f, square = r * r;
  const float low = 0.49999994f + 0.16666521f * r, high = 0.041668393f + 0.0083687454f * r;
  const float p = low + square * (high + square * 0.0013814532f);
  const float y = (p * square + r) + 1.f;
  return bits_of<float>(bits_of<uint32_t>(y) + (bits_of<uint32_t>(shifted) << 23));  // y 2^n
}
QUANTOPS_INLINE double exponential_in_range(double x) { return exp(x); }

// 2^x for -125 <= x <= 127, for gradients, to less than 1.3 ulp, where products and sums are fused 1.02: a minimax
// polynomial for 2^r, |r| <= 1/2, to 0.02 ulp, with the fewest operations.
// On a GPU its own, to 2 ulp. NaN as above.
QUANTOPS_INLINE float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float shifted = x + 12582912.f;  // its lowest bits are the integer nearest to x
  const float r = x - (shifted - 12582912.f);
  float y = 0.000155946778f * r + 0.00134066434f;
  y = y * r + 0.00961769279f;
  y = y * r + 0.0555031039f;
  y = y * r + 0.24022652f;
  y = y * r + 0.693147242f;
  y = y * r + 1.f;
  return bits_of<float>(bits_of<uint32_t>(y) + (bits_of<uint32_t>(shifted) << 23));
#endif
}
QUANTOPS_INLINE double power_of_two(double x) { return exp2(x); }

QUANTOPS_INLINE float exponential(float x) {
  const float y = exponential_in_range(x);
  return x < -87.f ? 0.f : y;
}
QUANTOPS_INLINE double exponential(double x) { return exp(x); }

// log(x) to less than 1 ulp for positive normal x. Polynomial of Cephes (logf).
QUANTOPS_INLINE float logarithm(float x) {
  const int32_t bits = bits_of<int32_t>(x);
  const int32_t e = (bits - 0x3f3504f3) >> 23;  // x = 2^e m, sqrt(1/2) <= m < sqrt(2)
  const float m = bits_of<float>(bits - e * 8388608) - 1.f, n = static_cast<float>(e), square = m * m;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const float y = ((m * square) * p - n * 2.12194440e-4f) - 0.5f * square;
  return (m + y) + n * 0.693359375f;
}
QUANTOPS_INLINE double logarithm(double x) { return log(x); }

// log(1 + x) for x >= 0: what rounding 1 + x leaves out is put right by a factor.
QUANTOPS_INLINE float logarithm_above_one(float x) {
  const float y = 1.f + x, rounded = y - 1.f;
  return rounded > 0.f ? logarithm(y) * (x / rounded) : x;
}
QUANTOPS_INLINE double logarithm_above_one(double x) { return log1p(x); }

// 1 - exp(-x), in double whatever A, once per scale.
QUANTOPS_INLINE double one_minus_exp(double x) { return -expm1(-x); }

}  // namespace quantops
