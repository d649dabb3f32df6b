// Loops over a block of elements that share one base quantizer. Each is compiled for three instruction sets (simd.h).
#pragma once
#include <vector>

#include "cpu/blocks.h"
#include "cpu/simd.h"
#include "truncate_math.h"

namespace quantops {

// Elements are read and written as they are stored; codes are floats in a buffer.

template <bool kTanh, class A>
QUANTOPS_INLINE A companded(A w) {
  if constexpr (kTanh)
    return tanh_of(w);
  else
    return w;
}

// kPairs: in the order of kAllPairs, for results that are bfloat16 as the weights are.
template <bool kPairs, bool kTanh, class In, class A>
QUANTOPS_SIMD void code_loop(const In* __restrict w, A* __restrict c, int64_t n, const Quantizer<A>& quantizer,
                             Rule rule) {
  const Quantizer<A> p = quantizer;
  if (rule == kRoundClamp)
    map_lanes<In, kPairs>(
        c, false, n, [&](A x) QUANTOPS_LANES { return base_code(companded<kTanh>(x), kRoundClamp, p); }, w);
  else if (rule == kFloor)
    map_lanes<In, kPairs>(
        c, false, n, [&](A x) QUANTOPS_LANES { return base_code(companded<kTanh>(x), kFloor, p); }, w);
  else
    map_lanes<In, kPairs>(
        c, false, n, [&](A x) QUANTOPS_LANES { return base_code(companded<kTanh>(x), kNearest, p); }, w);
}

template <bool kPairs, class In, class A>
void code_loop(const In* w, A* c, int64_t n, const Quantizer<A>& p, Rule rule, bool tanh) {
  tanh ? code_loop<kPairs, true>(w, c, n, p, rule) : code_loop<kPairs, false>(w, c, n, p, rule);
}

// In: of the weights that the codes come from, which are in the order of kAllPairs where it is that of both.
template <class In, class Out, class A>
QUANTOPS_SIMD void cut_loop(const A* __restrict c, Out* __restrict q, bool streaming, int64_t n,
                            const Width<A>& width) {
  const Width<A> v = width;
  map_lanes<In, kAllPairs<In, Out>>(q, streaming, n, [&](A x) QUANTOPS_LANES { return odd_level(x, v) * v.step; }, c);
}

enum GradKind { kCovered, kInside, kTanhInside };

// dL/dw of one element from the sum of its gradients.
template <GradKind kKind, class A>
QUANTOPS_INLINE A grad_element(A w, A total, const Quantizer<A>& p) {
  if constexpr (kKind == kTanhInside) total = total * tanh_slope(tanh_of(w));
  return inside(w, p) ? total : A(0);
}

constexpr int kSummed = 4;  // gradients that a pass adds up: the paper's widths

// kBlock times -0, in the place of a gradient that is not there: g + -0 is g, also where that is -0.
template <class G>
const G* minus_zeros() {
  static const std::vector<G> block = [] {
    G zero;
    narrow(-widen(G{}), zero);
    return std::vector<G>(kBlock, zero);
  }();
  return block.data();
}

// out = (g[0] + g[1] + g[2] + g[3]) * inside [* slope], added in that order. kCovered: the sum alone, w is not read.
template <GradKind kKind, class In, class G, class A>
QUANTOPS_SIMD void grad_loop(const In* __restrict w, const G* const* g, In* __restrict out, bool streaming, int64_t n,
                             const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  const G* __restrict g0 = g[0], * __restrict g1 = g[1], * __restrict g2 = g[2], * __restrict g3 = g[3];
  map_lanes<G>(
      out, streaming, n,
      [&](A x, A y0, A y1, A y2, A y3) QUANTOPS_LANES {
        const A total = ((y0 + y1) + y2) + y3;
        return kKind == kCovered ? total : grad_element<kKind>(x, total, p);
      },
      w, g0, g1, g2, g3);
}

template <class A>
QUANTOPS_SIMD void add_loop(const A* __restrict g, A* __restrict sum, int64_t n) {
  for (int64_t i = 0; i < n; i++) sum[i] += g[i];
}

// (x/s) * inside
template <bool kTanh, class In, class A>
QUANTOPS_SIMD void inner_loop(const In* __restrict w, A* __restrict inner, int64_t n, const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  for (int64_t i = 0; i < n; i++) inner[i] = inner_term(widen(w[i]), companded<kTanh>(widen(w[i])), p);
}

// Sums of g * q / out_scale, and of g * (x/s) * inside.
struct ScaleSums {
  double level = 0, inner = 0;
};

template <class G, class A>
QUANTOPS_SIMD void scale_loop(const A* __restrict c, const A* __restrict inner, const G* __restrict g, int64_t n,
                              const Width<A>& width, ScaleSums& sums) {
  const Width<A> v = width;
  A level[kLanes] = {}, inners[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; j++) {
      level[j] += widen(g[i + j]) * (odd_level(c[i + j], v) * v.unit_step);
      inners[j] += widen(g[i + j]) * inner[i + j];
    }
  for (int j = 0; i < n; i++, j++) {
    level[j] += widen(g[i]) * (odd_level(c[i], v) * v.unit_step);
    inners[j] += widen(g[i]) * inner[i];
  }
  for (int j = 0; j < kLanes; j++) {
    sums.level += level[j];
    sums.inner += inners[j];
  }
}

}  // namespace quantops
