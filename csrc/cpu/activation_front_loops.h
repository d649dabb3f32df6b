// Loops over blocks of what stands in front of a quantizer, in the arithmetic dtype: h goes to a block that stays in
// the cache, which the loops of activation_loops.h take for x.
#pragma once
#include <algorithm>

#include "activation_front.h"
#include "cpu/blocks.h"
#include "cpu/simd.h"

namespace quantops {

constexpr int64_t kPart = 512;  // elements at a time, so that what is between loops stays in the cache

// f(i, h and dh/dx) for elements [0, n), n up to kPart. In a loop for each step: of one for all of them, whose
// operations wait for each other, a processor holds too few elements at once.
template <bool kNormal, class A, class F>
QUANTOPS_INLINE void for_fronts(const A* __restrict x, int64_t n, const FrontSettings<A>& p, const F& f) {
  A u[kPart], v[kPart];
  for (int64_t i = 0; i < n; i++) {
    const Reduced<A> y = reduced(front_exponent<kNormal>(x[i], p));
    u[i] = y.sum;
    v[i] = y.r;
  }
  for (int64_t i = 0; i < n; i++) v[i] = exponential_of(Reduced<A>{u[i], v[i]});
  for (int64_t i = 0; i < n; i++) {
    u[i] = front_bottom<kNormal>(x[i], p);
    v[i] = front_inverse<kNormal>(u[i], v[i]);
  }
  for (int64_t i = 0; i < n; i++) f(i, front_value<kNormal>(x[i], u[i], v[i], p));
}

template <bool kNormal, class A>
QUANTOPS_SIMD void front_loop(const A* __restrict x, A* __restrict h, int64_t n, const FrontSettings<A>& settings) {
  const FrontSettings<A> p = settings;
  for_fronts<kNormal>(x, n, p, [&](int64_t i, const FrontValue<A>& y) QUANTOPS_LANES { h[i] = y.h; });
}

template <bool kNormal, class A>
QUANTOPS_SIMD void front_slope_loop(const A* __restrict x, A* __restrict h, A* __restrict slope, int64_t n,
                                    const FrontSettings<A>& settings) {
  const FrontSettings<A> p = settings;
  for_fronts<kNormal>(x, n, p, [&](int64_t i, const FrontValue<A>& y) QUANTOPS_LANES {
    h[i] = y.h;
    slope[i] = y.slope;
  });
}

// dL/dx from dL/dh; 0 and not -0 outside.
template <class Out, class A>
QUANTOPS_SIMD void front_product_loop(const A* __restrict of_h, const A* __restrict slope, Out* __restrict out,
                                      bool streaming, int64_t n) {
  map_lanes<A>(out, streaming, n, [](A g, A s) QUANTOPS_LANES { return g * s + A(0); }, of_h, slope);
}

// h of a block of x.
template <class A>
void front_block(int64_t front, const A* x, A* h, int64_t n) {
  const FrontSettings<A> p = front_settings<A>(front);
  for (int64_t i = 0; i < n; i += kPart) {
    const int64_t m = std::min(kPart, n - i);
    front == kGelu ? front_loop<true>(x + i, h + i, m, p) : front_loop<false>(x + i, h + i, m, p);
  }
}

template <class A>
void front_slope_block(int64_t front, const A* x, A* h, A* slope, int64_t n) {
  const FrontSettings<A> p = front_settings<A>(front);
  for (int64_t i = 0; i < n; i += kPart) {
    const int64_t m = std::min(kPart, n - i);
    front == kGelu ? front_slope_loop<true>(x + i, h + i, slope + i, m, p)
                   : front_slope_loop<false>(x + i, h + i, slope + i, m, p);
  }
}

}  // namespace quantops
