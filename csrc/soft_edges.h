// The soft sum of few classes without gates, by the edges between them, per element: for the CPU and the CUDA kernels.
//
// Edges, and x, are counted from the middle of the grid: N = 2 H classes have the edges -H + 1..H - 1 inside, and -H and
// H around them. Edge i has n = H - i classes above it and m = H + i below, at a = x/sigma - beta i. With e = exp(-a),
// t = exp(-beta), W = e of edge -H, Y = 1/e of edge H:
//   P(above i) = (1 - t^n)/(1 - t^N) (1 + W)/(1 + e),  P(below i) = (1 - t^m)/(1 - t^N) (1 + Y) e/(1 + e),
// each to a few units in its last place: numbers of like size are not subtracted. The mean is the class above edge 0,
// with P(above i) of the edges above that, less P(below i) of edge 0 and those below. The mass of the grid is
// (1 - t^N)/((1 + W)(1 + Y)), and dP(above i)/da is that times P(above i) P(below i). So with u = e/(1 + e)^2
//   dmean/d(x/sigma) = sum slope u,  slope = (1 - t^n)(1 - t^m)/(1 - t^N),
// and with h(n) = n/(exp(beta n) - 1), where v = x/alpha does not change,
//   dmean/dbeta = (1 + W)(1 + Y)/(1 - t^N) sum slope u (v - i + h(n) - h(m) + (H - v) Y/(1 + Y) - (H + v) W/(1 + W)).
// One exponential serves all edges, whose e differ by factors that a scale fixes. They are taken in pairs, for which
// one division does; an edge that is not there fills the last pair, with weights of 0.
#pragma once
#include "categorical_math.h"

namespace quantops {

constexpr int kMostEdgePairs = 8;

template <class A>
struct EdgePair {
  A factor[2];          // e in the middle of the grid
  A least[2], most[2];  // of e over the factor: beyond, e is not felt, or out of range
  A part[2];            // of P(above i) where i > 0, else of P(below i): what is fixed, but for W and Y
  A slope[2];
  A at[2];              // i - h(n) + h(m)
};

template <class A>
struct SoftEdges {
  int lower, upper;              // pairs of edges i <= 0, and of the others
  A half_classes, inv_open;      // H, 1/(1 - t^N)
  A above_middle, middle;        // the class above the middle of the grid, and the middle, which is half a class less
  A at_head, at_tail;            // alpha middle, in two parts
  A rate, rate_head, rate_tail;  // -log2(e)/sigma, and in two parts
  A farthest;                    // nothing changes where x is further from the middle
  EdgePair<A> outer;             // edges -H and H
};

// Whether the soft sum may be taken so: edges are few, nothing that counts is out of range, and bins are neither so narrow
// that what is summed for beta cancels, nor so wide that the gradient of sigma feels the rounding of v.
template <class A>
QUANTOPS_INLINE bool has_soft_edges(A alpha, A sigma, const Levels& l) {
  const int classes = l.high - l.low + 1;
  if (!l.valid || !valid_alpha(alpha) || !valid_width(sigma)) return false;
  const double beta = beta_of(static_cast<double>(alpha), static_cast<double>(sigma));
  const double unit = static_cast<double>(alpha), most = static_cast<double>(std::numeric_limits<A>::max());
  return classes >= 2 && classes <= 2 * kMostEdgePairs && beta >= 1.0 / 16 && beta <= (sizeof(A) == 4 ? 7.0 : 250.0) &&
         beta * (classes + 1) <= (sizeof(A) == 4 ? 122.0 : 1300.0) && 1.4426950408889634 * (beta / unit) <= most &&
         unit * (classes + far_limit<A>() / beta) <= most;
}

// What e of an edge comes from, at `place` of its pair.
template <class A>
QUANTOPS_INLINE void set_factor(EdgePair<A>& pair, int place, double edge, double beta) {
  const double most = static_cast<double>(std::numeric_limits<A>::max());
  const double factor = exp(beta * edge), limit = (sizeof(A) == 4 ? 8e18 : 1e150) / factor;
  pair.factor[place] = static_cast<A>(factor);
  pair.least[place] = static_cast<A>((sizeof(A) == 4 ? 1e-30 : 1e-200) / factor);
  pair.most[place] = static_cast<A>(limit < most ? limit : most);
}

// All constants of edge i.
template <class A>
QUANTOPS_INLINE void set_edge(EdgePair<A>& pair, int place, int i, int half_classes, double beta, double open) {
  const double n = half_classes - i, m = half_classes + i;
  const double of_n = one_minus_exp(beta * n), of_m = one_minus_exp(beta * m), slope = of_n * of_m / open;
  set_factor(pair, place, i, beta);
  pair.part[place] = static_cast<A>((i > 0 ? of_n : of_m) / open);
  pair.slope[place] = static_cast<A>(slope);
  pair.at[place] = static_cast<A>(i - n * (1 - of_n) / of_n + m * (1 - of_m) / of_m);
}

// Pair number p from the lowest.
template <class A>
QUANTOPS_INLINE EdgePair<A> make_edge_pair(int p, int half_classes, double beta) {
  const int lower = (half_classes + 1) / 2, end = p < lower ? 0 : half_classes - 1;
  const int first = p < lower ? 1 - half_classes + 2 * p : 1 + 2 * (p - lower);
  const double open = one_minus_exp(beta * (2 * half_classes));
  EdgePair<A> pair = {};
  set_edge(pair, 0, first, half_classes, beta, open);
  if (first < end) set_edge(pair, 1, first + 1, half_classes, beta, open);
  return pair;
}

QUANTOPS_INLINE int half_of_classes(const Levels& l) { return (l.high - l.low + 1) / 2; }

template <class A>
QUANTOPS_INLINE SoftEdges<A> make_soft_edges(A alpha, double beta, const Levels& l) {
  const int half = half_of_classes(l);
  const double unit = static_cast<double>(alpha), rate = -1.4426950408889634 * (beta / unit);
  const double middle = l.low + half - 0.5, at = middle * unit;
  SoftEdges<A> k;
  k.lower = (half + 1) / 2;
  k.upper = half / 2;
  k.half_classes = static_cast<A>(half);
  k.inv_open = static_cast<A>(1 / one_minus_exp(beta * (2 * half)));
  k.above_middle = static_cast<A>(middle + 0.5);
  k.middle = static_cast<A>(middle);
  k.at_head = static_cast<A>(at);
  k.at_tail = static_cast<A>(at - static_cast<double>(k.at_head));
  k.rate = static_cast<A>(rate);
  k.rate_head = head_of(k.rate);
  k.rate_tail = static_cast<A>(rate - static_cast<double>(k.rate_head));
  k.farthest = static_cast<A>(unit * (half + far_limit<A>() / beta));
  k.outer = {};
  set_factor(k.outer, 0, -half, beta);
  set_factor(k.outer, 1, half, beta);
  return k;
}

// x from the middle of the grid, where something changes.
template <class A>
QUANTOPS_INLINE A offset_from_middle(A x, const SoftEdges<A>& k) {
  return at_most(at_least((x - k.at_head) - k.at_tail, -k.farthest), k.farthest);
}

// e in the middle of the grid, from that.
template <class A>
QUANTOPS_INLINE A middle_power(A x, const SoftEdges<A>& k) {
  const A head = head_of(x);
  return power_of_two(head * k.rate_head, head * k.rate_tail + (x - head) * k.rate);
}

// A positive number, at least `least` and at most `most`; anything for NaN. A CPU compares integers at twice the rate.
QUANTOPS_INLINE float between(float v, float least, float most) {
#if defined(__CUDA_ARCH__)
  return at_most(at_least(v, least), most);
#else
  const int32_t bits = bits_of<int32_t>(v), low = bits_of<int32_t>(least), high = bits_of<int32_t>(most);
  return bits_of<float>(at_most(at_least(bits, low), high));
#endif
}
QUANTOPS_INLINE double between(double v, double least, double most) { return at_most(at_least(v, least), most); }

// e of an edge.
template <class A>
QUANTOPS_INLINE A edge_of(A power, const EdgePair<A>& pair, int place) {
  return between(power, pair.least[place], pair.most[place]) * pair.factor[place];
}

// 1/(1 + e) and e/(1 + e) of two edges.
template <class A>
struct EdgeShares {
  A above[2], below[2];
};

template <class A>
QUANTOPS_INLINE EdgeShares<A> edge_shares(A power, const EdgePair<A>& pair) {
  const A e0 = edge_of(power, pair, 0), e1 = edge_of(power, pair, 1);
  const A d0 = A(1) + e0, d1 = A(1) + e1, inv = A(1) / (d0 * d1), above0 = inv * d1, above1 = inv * d0;
  return {{above0, above1}, {e0 * above0, e1 * above1}};
}

// What a pair adds to a sum of P, of lower edges to that of P(below i), of upper ones to that of P(above i).
template <bool kLower, class A>
QUANTOPS_INLINE A edge_parts(const EdgeShares<A>& s, const EdgePair<A>& pair) {
  if (kLower) return pair.part[0] * s.below[0] + pair.part[1] * s.below[1];
  return pair.part[0] * s.above[0] + pair.part[1] * s.above[1];
}

// To the sums of slope u, and of that times v - at.
template <class A>
struct EdgeSlopes {
  A by_x, by_width;
};

template <class A>
QUANTOPS_INLINE EdgeSlopes<A> edge_slopes(const EdgeShares<A>& s, const EdgePair<A>& pair, A v) {
  const A s0 = pair.slope[0] * (s.above[0] * s.below[0]), s1 = pair.slope[1] * (s.above[1] * s.below[1]);
  return {s0 + s1, s0 * (v - pair.at[0]) + s1 * (v - pair.at[1])};
}

// W, Y, 1 + W and 1 + Y.
template <class A>
struct OuterEdges {
  A below, above, of_above, of_below;
};

template <class A>
QUANTOPS_INLINE OuterEdges<A> outer_edges(A power, const SoftEdges<A>& k) {
  const A below = edge_of(power, k.outer, 0), above = A(1) / edge_of(power, k.outer, 1);
  return {below, above, A(1) + below, A(1) + above};
}

// From the sums of P over the upper and the lower edges, without W and Y.
template <class A>
QUANTOPS_INLINE A edge_mean(A upper, A lower, const OuterEdges<A>& o, const SoftEdges<A>& k) {
  return (o.of_above * upper - o.of_below * lower) + k.above_middle;
}

// `slopes`: NaN where x is.
template <class A>
QUANTOPS_INLINE Factors<A> edge_factors(A v, A mean, const EdgeSlopes<A>& slopes, const OuterEdges<A>& o,
                                        const SoftEdges<A>& k, const Bins<A>& p) {
  const A ends = (k.half_classes - v) * (o.above * o.of_above) - (k.half_classes + v) * (o.below * o.of_below);
  const A by_width = (ends * slopes.by_x + (o.of_above * o.of_below) * slopes.by_width) * k.inv_open;
  const A in_x = p.beta * slopes.by_x, in_width = p.beta * by_width;
  return {in_x, (mean - (v + k.middle) * in_x) + in_width, -(p.beta * in_width)};
}

// ------------------------------------------------------------------------------------------------ of a scale, together

template <class A>
struct EdgeTable {
  SoftEdges<A> edges;
  EdgePair<A> pair[kMostEdgePairs];  // lower ones first, in all as many as half of the classes
};

// The part of number `place`, of which kMostEdgePairs are enough for all: on a GPU, that of one lane.
template <class A>
QUANTOPS_INLINE void fill_edge_table(EdgeTable<A>& table, A alpha, A sigma, const Levels& l, int place) {
  const int half = half_of_classes(l);
  const double beta = beta_of(static_cast<double>(alpha), static_cast<double>(sigma));
  if (place == 0) table.edges = make_soft_edges(alpha, beta, l);
  if (place < half) table.pair[place] = make_edge_pair<A>(place, half, beta);
}

template <class A>
QUANTOPS_INLINE EdgeTable<A> make_edge_table(A alpha, A sigma, const Levels& l) {
  EdgeTable<A> table = {};
  for (int place = 0; place < half_of_classes(l); ++place) fill_edge_table(table, alpha, sigma, l, place);
  return table;
}

// ------------------------------------------------------------------------------------------------------ of one element

template <class A>
struct EdgeSums {
  A lower, upper;
  EdgeSlopes<A> slopes;
};

template <bool kLower, bool kSlopes, class A>
QUANTOPS_INLINE void add_edges(EdgeSums<A>& sums, A power, A v, const EdgePair<A>* pair, int count) {
  QUANTOPS_ROLLED
  for (int i = 0; i < count; ++i) {
    const EdgeShares<A> shares = edge_shares(power, pair[i]);
    (kLower ? sums.lower : sums.upper) += edge_parts<kLower>(shares, pair[i]);
    if (kSlopes) {
      const EdgeSlopes<A> slopes = edge_slopes(shares, pair[i], v);
      sums.slopes.by_x += slopes.by_x;
      sums.slopes.by_width += slopes.by_width;
    }
  }
}

template <bool kSlopes, class A>
QUANTOPS_INLINE EdgeSums<A> edge_sums(A power, A v, const EdgeTable<A>& table) {
  EdgeSums<A> sums = {A(0), A(0), {A(0), A(0)}};
  add_edges<true, kSlopes>(sums, power, v, table.pair, table.edges.lower);
  add_edges<false, kSlopes>(sums, power, v, table.pair + table.edges.lower, table.edges.upper);
  return sums;
}

template <class A>
QUANTOPS_INLINE A edge_value(A x, const EdgeTable<A>& table, const Bins<A>& p) {
  const SoftEdges<A>& k = table.edges;
  const A power = middle_power(offset_from_middle(x, k), k);
  const EdgeSums<A> sums = edge_sums<false>(power, A(0), table);
  const A mean = edge_mean(sums.upper, sums.lower, outer_edges(power, k), k);
  return p.alpha * (x == x ? mean : x);
}

template <class A>
QUANTOPS_INLINE Factors<A> edge_gradients(A x, const EdgeTable<A>& table, const Bins<A>& p) {
  const SoftEdges<A>& k = table.edges;
  const A offset = offset_from_middle(x, k), power = middle_power(offset, k), v = offset * p.inv_alpha;
  EdgeSums<A> sums = edge_sums<true>(power, v, table);
  if (v != v) sums.slopes.by_x = v;
  const OuterEdges<A> outer = outer_edges(power, k);
  return edge_factors(v, edge_mean(sums.upper, sums.lower, outer, k), sums.slopes, outer, k, p);
}

}  // namespace quantops
