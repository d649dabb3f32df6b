// tanh and the exponential that it is made of, per element: additions, multiplications and one division, each rounded
// on its own, so that codes behind them have the same bits on every backend. The statement of
// quantops/reference/tanh.py.
#pragma once
#include "exponential.h"

namespace quantops {

// (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2, by its series.
QUANTOPS_INLINE float expm1_tail(float r) {
  float v = float(1. / 5040);
  v = v * r + float(1. / 720);
  v = v * r + float(1. / 120);
  v = v * r + float(1. / 24);
  v = v * r + float(1. / 6);
  return v * r + 0.5f;
}
QUANTOPS_INLINE double expm1_tail(double r) {
  double v = 1. / 6227020800;
  v = v * r + 1. / 479001600;
  v = v * r + 1. / 39916800;
  v = v * r + 1. / 3628800;
  v = v * r + 1. / 362880;
  v = v * r + 1. / 40320;
  v = v * r + 1. / 5040;
  v = v * r + 1. / 720;
  v = v * r + 1. / 120;
  v = v * r + 1. / 24;
  v = v * r + 1. / 6;
  return v * r + 0.5;
}

// ln(2) in two parts, the first with so few bits that its product with k is exact.
template <class A>
struct Ln2;
template <>
struct Ln2<float> {
  static constexpr float high = 0.693359375f, low = -2.12194440e-4f;
};
template <>
struct Ln2<double> {
  static constexpr double high = 6.93145751953125e-1, low = 1.42860682030941723212e-6;
};

// Adding this to 0 <= v < 2^22 rounds to the nearest integer, half to even, which is in the lowest bits of the sum.
template <class A>
constexpr A kRoundingPower = sizeof(A) == 4 ? A(12582912.) : A(6755399441055744.);  // 1.5 * 2^(mantissa bits)

// y = k ln(2) + r for 0 <= y < 43 (21 in float), |r| <= ln(2) / 2.
template <class A>
struct Reduced {
  A sum, r;  // sum: k + kRoundingPower
};

template <class A>
QUANTOPS_INLINE Reduced<A> reduced(A y) {
  const A sum = y * A(1.44269504088896340736) + kRoundingPower<A>, k = sum - kRoundingPower<A>;
  return {sum, (y - k * Ln2<A>::high) - k * Ln2<A>::low};
}

// e^r - 1 for such r.
template <class A>
QUANTOPS_INLINE A small_exponential_minus_one(A r) {
  return r + r * r * expm1_tail(r);
}

// v 2^k for a normal v and result. Of NaN some number may come.
QUANTOPS_INLINE float times_power(float v, float sum) {
  return bits_of<float>(bits_of<uint32_t>(v) + (bits_of<uint32_t>(sum) << 23));
}
QUANTOPS_INLINE double times_power(double v, double sum) {
  return bits_of<double>(bits_of<uint64_t>(v) + (bits_of<uint64_t>(sum) << 52));
}

// e^y for such y, to a few units in the last place.
template <class A>
QUANTOPS_INLINE A exponential_of(const Reduced<A>& v) {
  return times_power(small_exponential_minus_one(v.r) + A(1), v.sum);
}
template <class A>
QUANTOPS_INLINE A exponential_of(A y) {
  return exponential_of(reduced(y));
}

// e^y - 1 = 2^k (e^r - 1) + (2^k - 1), likewise. NaN stays NaN.
template <class A>
QUANTOPS_INLINE A exponential_minus_one(A y) {
  const Reduced<A> v = reduced(y);
  const A power = times_power(A(1), v.sum);
  return power * small_exponential_minus_one(v.r) + (power - A(1));
}

// E / (E + 2) with E = e^(2|x|) - 1, to a few units in the last place. Beyond the limit it is 1.
template <class A>
QUANTOPS_INLINE A tanh_of(A x) {
  const A e = exponential_minus_one(at_most((x < A(0) ? -x : x) * A(2), A(sizeof(A) == 4 ? 20 : 40)));
  const A t = e / (e + A(2));
  return x < A(0) ? -t : t;
}

}  // namespace quantops
