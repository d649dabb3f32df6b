// Loops over blocks of what stands in front of a quantizer, in the arithmetic dtype: h goes to a block that stays in
// the cache, which the loops of activation_loops.h take for x.
#pragma once
#include "activation_front.h"
#include "cpu/blocks.h"
#include "cpu/simd.h"

namespace quantops {

template <bool kNormal, class A>
QUANTOPS_SIMD void front_loop(const A* __restrict x, A* __restrict h, int64_t n, const FrontSettings<A>& settings) {
  const FrontSettings<A> p = settings;
  for (int64_t i = 0; i < n; i++) h[i] = front_and_slope<kNormal>(x[i], p).h;
}

template <bool kNormal, class A>
QUANTOPS_SIMD void front_slope_loop(const A* __restrict x, A* __restrict h, A* __restrict slope, int64_t n,
                                    const FrontSettings<A>& settings) {
  const FrontSettings<A> p = settings;
  for (int64_t i = 0; i < n; i++) {
    const FrontValue<A> v = front_and_slope<kNormal>(x[i], p);
    h[i] = v.h;
    slope[i] = v.slope;
  }
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
  front == kGelu ? front_loop<true>(x, h, n, p) : front_loop<false>(x, h, n, p);
}

template <class A>
void front_slope_block(int64_t front, const A* x, A* h, A* slope, int64_t n) {
  const FrontSettings<A> p = front_settings<A>(front);
  front == kGelu ? front_slope_loop<true>(x, h, slope, n, p) : front_slope_loop<false>(x, h, slope, n, p);
}

}  // namespace quantops
