// Truncation per element, on top of the uniform quantizers: one inline statement for the CPU and the CUDA kernels.
//
// The same arithmetic, operation by operation, as quantops/reference/truncate.py.
#pragma once
#include "tanh.h"

namespace quantops {

// -------------------------------------------------------------------------------------------------------- companding

// What dL/dw is multiplied by under companding, from t = tanh(w).
template <class A>
QUANTOPS_INLINE A tanh_slope(A t) {
  return A(1) - t * t;
}

// ---------------------------------------------------------------------------------------------------------- widths

// The quantizer of the base width, whose codes are those of tanh(w) with scale tanh(s) under companding; `inside` asks
// for |w| <= s either way. inv_scale becomes the factor of dq/ds, see the reference.
template <class A>
QUANTOPS_INLINE Quantizer<A> make_base_quantizer(A s, int64_t base, bool tanh) {
  if (!tanh) return make_quantizer<A>(s, base, 0, kFull, true);
  const A v = tanh_of(s + A(0));
  Quantizer<A> p = make_quantizer<A>(v, base, 0, kFull, true);
  p.valid = p.valid && valid_scale(s);
  if (!p.valid) p.offset = quiet_nan<A>();
  p.inv_scale = p.inv_scale * tanh_slope(v);
  p.scale = s + A(0);
  p.low = -p.scale;
  return p;
}

// The code of the base width, as a float; NaN where x is. x is the weight, or its tanh. Clamping the weight takes
// infinities out before they meet an inverse of 0; clamping the code does for the rest.
template <class A>
QUANTOPS_INLINE A base_code(A x, Rule rule, const Quantizer<A>& p) {
  const A u = at_most(at_least(x, p.low), p.scale) * p.inv + p.offset;
  const A v = (rule == kNearest ? p.top : p.mul) * u;
  return at_most(at_least(rule == kFloor ? floor_small(v) : rint_small(v), A(0)), p.top);
}

// A width that is cut from codes of a base width, on the full grid.
template <class A>
struct Width {
  A mul;        // 2^-shift
  A down;       // half of it - 1/2: what makes the nearest integer of c * mul the one below
  A top;        // 2^m - 1
  A step;       // q = level * step
  A unit_step;  // the step of a scale of one
};

QUANTOPS_INLINE bool valid_width(int64_t n, int64_t base) { return n >= 1 && n <= base && base <= kMaxBits; }

// A width, base width or scale out of range makes the steps NaN, so every result is.
template <class A>
QUANTOPS_INLINE Width<A> make_width(A out_scale, int64_t n, int64_t base) {
  const bool valid = valid_width(n, base) && valid_scale(out_scale);
  if (!valid) n = base = 1;
  Width<A> v;
  v.mul = A(1) / A(int64_t(1) << (base - n));
  v.down = A(0.5) * v.mul - A(0.5);
  v.top = A((int64_t(1) << n) - 1);
  v.step = valid ? (out_scale + A(0)) / v.top : quiet_nan<A>();  // -0 is 0
  v.unit_step = valid ? A(1) / v.top : quiet_nan<A>();
  return v;
}

// 2 (c >> shift) - (2^m - 1)
template <class A>
QUANTOPS_INLINE A odd_level(A c, const Width<A>& v) {
#if defined(__CUDACC__) || defined(QUANTOPS_EMULATE)
  return fused(A(2), rint_small(fused(c, v.mul, v.down)), -v.top);  // exact: c has 16 bits, and the power as few
#else
  const A m = floor_small(c * v.mul);
  return (m + m) - v.top;
#endif
}

// (x/s) * inside, where x is w, or tanh(w) under companding.
template <class A>
QUANTOPS_INLINE A inner_term(A w, A x, const Quantizer<A>& p) {
  return inside(w, p) ? x * p.inv_scale : A(0);
}

}  // namespace quantops
