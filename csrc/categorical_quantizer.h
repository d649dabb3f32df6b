// The categorical quantizer per element: one inline statement that the CPU and the CUDA kernels both call.
//
// The quantities are those of quantops/reference/categorical.py, which has the equations: classes i = low..high that
// are in, c the nearest to x among them, z = (x - alpha c)/sigma, beta = alpha/sigma, edges at beta/2 to either side of
// a class. What leads to a class is rounded operation by operation, on every backend alike. Gates are in
// categorical_gates.h, draws in categorical_draw.h, the soft sum in categorical_soft.h, gradients of the winner in
// categorical_backward.h.
#pragma once
#include "exponential.h"

namespace quantops {

constexpr int kMaxSoftBits = 8;

enum Mode : int64_t { kHard = 0, kSoft = 1, kSample = 2 };  // the order of MODES in the reference
enum GradOf : int64_t { kOfWinner = 0, kOfSoft = 1 };       // the order of GRADS

// The levels of one weight that are in, of b bits, and their classes.
struct Levels {
  int count;
  int32_t low, high;
  bool is_signed, valid;
};

template <class A>
QUANTOPS_INLINE bool valid_width(A v) {  // of alpha and sigma
  return v > A(0) && v <= std::numeric_limits<A>::max();
}

template <class A>
QUANTOPS_INLINE bool valid_alpha(A alpha) {
  return valid_width(alpha) && A(1) / alpha <= std::numeric_limits<A>::max();
}

QUANTOPS_INLINE double beta_of(double alpha, double sigma) {
  const double beta = alpha / sigma;
  return beta < 1.0 / 16777216 ? 1.0 / 16777216 : beta > 16777216.0 ? 16777216.0 : beta;
}

// All that alpha and sigma fix. Where they are out of range, alpha is NaN, and so is every result.
template <class A>
struct Bins {
  A alpha, inv_alpha;
  A alpha_head, alpha_tail;  // alpha in two parts, so that x - alpha c is rounded once
  A inv_sigma, beta, half;   // half = beta/2
  A far;                     // the largest |z|: nothing changes beyond
  A low, high;
};

QUANTOPS_INLINE float head_of(float v) { return bits_of<float>(bits_of<uint32_t>(v) & 0xffff0000u); }
QUANTOPS_INLINE double head_of(double v) { return bits_of<double>(bits_of<uint64_t>(v) & ~uint64_t(0xffff)); }
template <class A>
QUANTOPS_INLINE A far_limit() {
  return sizeof(A) == 4 ? A(25) : A(50);
}

template <class A>
QUANTOPS_INLINE Bins<A> make_bins(A alpha, A sigma, const Levels& levels) {
  Bins<A> p;
  const bool valid = levels.valid && valid_alpha(alpha) && valid_width(sigma);
  if (!valid) alpha = sigma = A(1);
  const double beta = beta_of(static_cast<double>(alpha), static_cast<double>(sigma));
  const double inv_sigma = beta / static_cast<double>(alpha);
  const double most = static_cast<double>(std::numeric_limits<A>::max());
  p.alpha = valid ? alpha : quiet_nan<A>();
  p.inv_alpha = A(1) / p.alpha;
  p.alpha_head = head_of(alpha);
  p.alpha_tail = alpha - p.alpha_head;
  p.inv_sigma = static_cast<A>(inv_sigma < most ? inv_sigma : most);
  p.beta = static_cast<A>(beta);
  p.half = A(0.5) * p.beta;
  p.far = p.half + far_limit<A>();
  p.low = static_cast<A>(levels.low);
  p.high = static_cast<A>(levels.high);
  return p;
}

// ------------------------------------------------------------------------------------------------------------- classes

// rint, half to even, for |v| < 2^22, never -0.
template <class A>
QUANTOPS_INLINE A rint_class(A v) {
  return rint_small(v) + A(0);
}

// c = clamp(rint(x / alpha), low, high); NaN where x is.
template <class A>
QUANTOPS_INLINE A nearest_class(A x, const Bins<A>& p) {
  return rint_class(at_most(at_least(x * p.inv_alpha, p.low), p.high));
}
// For gradients, which may be 0 with either sign.
template <class A>
QUANTOPS_INLINE A nearest_class_or_minus_zero(A x, const Bins<A>& p) {
  return rint_small(at_most(at_least(x * p.inv_alpha, p.low), p.high));
}

template <class A>
QUANTOPS_INLINE A clamp_far(A z, const Bins<A>& p) {
  return at_most(at_least(z, -p.far), p.far);
}

// z = (x - alpha c)/sigma.
template <class A>
QUANTOPS_INLINE A offset_of(A x, A c, const Bins<A>& p) {
  return clamp_far(((x - c * p.alpha_head) - c * p.alpha_tail) * p.inv_sigma, p);
}

// (x - alpha c) rate, for gradients.
template <class A>
QUANTOPS_INLINE A scaled_offset(A x, A c, A rate, const Bins<A>& p) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(A) == 4) return product_plus(-c, p.alpha, x) * rate;
#endif
  return ((x - c * p.alpha_head) - c * p.alpha_tail) * rate;
}

}  // namespace quantops
