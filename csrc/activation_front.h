// What stands in front of a quantizer of activations in the same pass, per element: h = x * S(x). The statement of
// quantops/reference/activation_front.py, operation by operation.
#pragma once
#include "activation_math.h"
#include "tanh.h"

namespace quantops {

constexpr bool is_smooth(int64_t front) { return front > kRelu; }

// All that a front fixes.
template <class A>
struct FrontSettings {
  A limit;                 // S is 0 or 1 beyond it
  A first, second, third;  // of the logistic ones: z = x (first + second x^2), dz/dx = first + third x^2
};

template <class A>
QUANTOPS_INLINE FrontSettings<A> front_settings(int64_t front) {
  constexpr double kFirst = 1.5957691216057308, kSecond = 0.044715 * kFirst;  // 2 sqrt(2/pi), and of the cube
  constexpr bool kWide = sizeof(A) == 8;
  if (front == kGelu) return {kWide ? A(8.9) : A(6.3), A(0), A(0), A(0)};
  if (front == kGeluTanh) return {kWide ? A(7.4) : A(5.5), A(kFirst), A(kSecond), A(3 * kSecond)};
  return {kWide ? A(40) : A(20), A(1), A(0), A(0)};
}

// 1 - Phi(a) = e^(-a^2/2) N(a) / D(a) for a >= 0; N and D.
QUANTOPS_INLINE float ratio_top(float a) {
  float v = 0.010964697f;
  v = v * a + 0.09170872f;
  v = v * a + 0.30915305f;
  return v * a + 0.5f;
}
QUANTOPS_INLINE double ratio_top(double a) {
  double v = 1.6340836231568907e-05;
  v = v * a + 0.00038274213147210007;
  v = v * a + 0.00418754169025583;
  v = v * a + 0.02759843455554332;
  v = v * a + 0.11834790381922601;
  v = v * a + 0.3325228627380732;
  v = v * a + 0.5754773975873952;
  return v * a + 0.5;
}
QUANTOPS_INLINE float ratio_bottom(float a) {
  float v = 0.02753867f;
  v = v * a + 0.22875787f;
  v = v * a + 0.8133775f;
  v = v * a + 1.4161904f;
  return v * a + 1.0f;
}
QUANTOPS_INLINE double ratio_bottom(double a) {
  double v = 4.096045105108279e-05;
  v = v * a + 0.0009593894769804296;
  v = v * a + 0.010537647064287944;
  v = v * a + 0.07013704950355816;
  v = v * a + 0.3070865166274703;
  v = v * a + 0.9005947532839803;
  v = v * a + 1.7199945590957622;
  v = v * a + 1.948839355977655;
  return v * a + 1.0;
}

// h, and dh/dx, which is 0 where x is NaN.
template <class A>
struct FrontValue {
  A h, slope;
};

// kNormal: S is the normal distribution, else logistic. In steps: of which exponential, what it is divided by, and h.
template <bool kNormal, class A>
QUANTOPS_INLINE A front_exponent(A x, const FrontSettings<A>& p) {
  const A t = at_most(at_least(x, -p.limit), p.limit), square = t * t;
  if constexpr (kNormal) return square * A(0.5);
  return absolute_of(t * (p.first + p.second * square));
}

template <bool kNormal, class A>
QUANTOPS_INLINE A front_bottom(A x, const FrontSettings<A>& p) {
  if constexpr (!kNormal) return A(1);
  return ratio_bottom(absolute_of(at_most(at_least(x, -p.limit), p.limit)));
}

template <bool kNormal, class A>
QUANTOPS_INLINE A front_inverse(A bottom, A exponential) {
  return A(1) / (kNormal ? bottom * exponential : exponential + bottom);
}

template <bool kNormal, class A>
QUANTOPS_INLINE FrontValue<A> front_value(A x, A bottom, A inverse, const FrontSettings<A>& p) {
  const A low = at_least(x, -p.limit), t = at_most(low, p.limit);
  A small = inverse, density;  // 1 - S(|x|), S'(x)
  if constexpr (kNormal) {
    small = ratio_top(absolute_of(t)) * inverse;
    density = bottom * inverse * A(0.3989422804014327);
  } else {
    density = small * (A(1) - small) * (p.first + p.third * (t * t));
  }
  const A gate = t < A(0) ? small : A(1) - small;
  return {low * gate, x == x ? gate + t * density : A(0)};
}

template <bool kNormal, class A>
QUANTOPS_INLINE FrontValue<A> front_and_slope(A x, const FrontSettings<A>& p) {
  const A bottom = front_bottom<kNormal>(x, p), exponential = exponential_of(front_exponent<kNormal>(x, p));
  return front_value<kNormal>(x, bottom, front_inverse<kNormal>(bottom, exponential), p);
}

}  // namespace quantops
