// Loops over a part of a row for the soft sum over the edges. Each is compiled for three instruction sets (simd.h).
#pragma once
#include "cpu/categorical_loops.h"
#include "soft_edges.h"

namespace quantops {

template <class A>
struct alignas(64) EdgePart {
  A v[kPart];      // x from the middle of the grid, over alpha
  A power[kPart];  // e there
  A upper[kPart], lower[kPart], by_x[kPart], by_width[kPart];  // sums over the edges
};

// kSlopes, here and below: gradients are wanted.
template <bool kSlopes, class A>
QUANTOPS_SIMD void middle_power_loop(const A* __restrict x, EdgePart<A>& part, int64_t n, const SoftEdges<A>& edges,
                                     A inv_alpha) {
  const SoftEdges<A> k = edges;
  for (int64_t i = 0; i < n; i++) {
    const A offset = offset_from_middle(x[i], k);
    part.power[i] = middle_power(offset, k);
    part.v[i] = offset * inv_alpha;
  }
  for (int64_t i = 0; i < n; i++) part.upper[i] = part.lower[i] = A(0);
  if (!kSlopes) return;
  for (int64_t i = 0; i < n; i++) part.by_x[i] = part.by_width[i] = A(0);
}

// `parts`: the sum of P that the pair adds to.
template <bool kLower, bool kSlopes, class A>
QUANTOPS_SIMD void edge_pair_loop(EdgePart<A>& part, A* __restrict parts, int64_t n, const EdgePair<A>& edges) {
  const EdgePair<A> pair = edges;
  for (int64_t i = 0; i < n; i++) {
    const EdgeShares<A> shares = edge_shares(part.power[i], pair);
    parts[i] += edge_parts<kLower>(shares, pair);
    if (kSlopes) {
      const EdgeSlopes<A> slopes = edge_slopes(shares, pair, part.v[i]);
      part.by_x[i] += slopes.by_x;
      part.by_width[i] += slopes.by_width;
    }
  }
}

template <class A>
QUANTOPS_SIMD void edge_value_loop(const EdgePart<A>& part, A* __restrict q, int64_t n, const SoftEdges<A>& edges,
                                   A alpha) {
  const SoftEdges<A> k = edges;
  for (int64_t i = 0; i < n; i++) {
    const A v = part.v[i], mean = edge_mean(part.upper[i], part.lower[i], outer_edges(part.power[i], k), k);
    q[i] = alpha * (v == v ? mean : v);
  }
}

template <class A>
QUANTOPS_SIMD void edge_gradient_loop(const EdgePart<A>& part, const A* __restrict g, A* __restrict out, int64_t n,
                                      const SoftEdges<A>& edges, const Bins<A>& bins, ScaleSums& sums) {
  const SoftEdges<A> k = edges;
  const Bins<A> p = bins;
  gradient_lanes(g, out, n, sums, [&](int64_t i) QUANTOPS_LANES {
    const A v = part.v[i];
    const OuterEdges<A> outer = outer_edges(part.power[i], k);
    const EdgeSlopes<A> slopes = {v == v ? part.by_x[i] : v, part.by_width[i]};
    return edge_factors(v, edge_mean(part.upper[i], part.lower[i], outer, k), slopes, outer, k, p);
  });
}

}  // namespace quantops
