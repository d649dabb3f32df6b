// Loops over a part of a row: the soft sum and its gradients. Each is compiled for three instruction sets (simd.h).
#pragma once
#include "categorical_soft.h"
#include "cpu/categorical_quantizer_loops.h"

namespace quantops {

// What a run of elements adds to the gradients of alpha and sigma.
struct ScaleSums {
  double alpha = 0, sigma = 0;
};

template <class A>
struct Lanes {
  A alpha[kLanes] = {}, sigma[kLanes] = {};

  // g dq/dx of an element.
  QUANTOPS_INLINE A add(int lane, A g, const Factors<A>& f) {
    alpha[lane] += g * f.alpha;
    sigma[lane] += g * f.sigma;
    return g * f.x;
  }

  void add_to(ScaleSums& sums) const {
    for (int j = 0; j < kLanes; j++) {
      sums.alpha += alpha[j];
      sums.sigma += sigma[j];
    }
  }
};

// Gradients of the elements, and the sums of those of alpha and sigma; `factors(i)`, marked QUANTOPS_LANES, of one.
template <class A, class F>
QUANTOPS_INLINE void gradient_lanes(const A* __restrict g, A* __restrict out, int64_t n, ScaleSums& sums,
                                    const F& factors) {
  Lanes<A> lanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; j++) out[i + j] = lanes.add(j, g[i + j], factors(i + j));
  for (int j = 0; i < n; i++, j++) out[i] = lanes.add(j, g[i], factors(i));
  lanes.add_to(sums);
}

// ---------------------------------------------------------------------------------------------- soft, over the classes

// ---------------------------------------------------------------------------------------------------- over the classes

// G of a class: weight[0] in the lowest of kMaxSoftBits nested intervals, weight[t] outside of the t lowest; so of
// levels, and 0 outside of all.
template <class A>
struct GateSteps {
  A bottom[kMaxSoftBits], top[kMaxSoftBits], weight[kMaxSoftBits + 1];
};

// Of the kSteps lowest intervals.
template <int kSteps, class A>
QUANTOPS_INLINE A gate_of(A i, const GateSteps<A>& gates) {
  if (kSteps == 1) return A((i <= gates.top[0]) & (i >= gates.bottom[0]));  // G_1 = 1; a ternary would become a branch
  A g = gates.weight[0];
  for (int t = 0; t < kSteps; t++) g = ((i > gates.top[t]) | (i < gates.bottom[t])) ? gates.weight[t + 1] : g;
  return g;
}

// The soft sums of a part's elements.
template <class A>
struct alignas(64) SoftPart {
  Places<A> at;
  A y[kPart], w[kPart];
  A weight[kPart], first[kPart];  // after the first pass: 1/weight and the mean
  A by_x[kPart], by_width[kPart];
  A gate[kPart];                // G of c
  A up[kPart], down[kPart];     // deviations of the pair at hand
  A tail[kMaxSoftBits][kPart];  // sums of deviations over the levels above t
};

template <int kSteps, class A>
QUANTOPS_SIMD void soft_start_loop(SoftPart<A>& s, int64_t n, const GateSteps<A>& gates, const Bins<A>& bins) {
  const Bins<A> p = bins;
  const GateSteps<A> steps = gates;
  for (int64_t i = 0; i < n; i++) {
    s.y[i] = exponential(s.at.z[i] - p.half);
    s.w[i] = exponential(-s.at.z[i] - p.half);
  }
  for (int64_t i = 0; i < n; i++) {
    s.gate[i] = gate_of<kSteps>(s.at.c[i], steps);
    s.weight[i] = s.gate[i] * soft_center(s.y[i], s.w[i]).u;
    s.first[i] = A(0);
  }
}

// Adds the classes `step` up and down.
template <int kSteps, class A>
QUANTOPS_SIMD void soft_pair_loop(SoftPart<A>& s, int64_t n, A step, A inner, A outer, const GateSteps<A>& gates) {
  const GateSteps<A> steps = gates;
  for (int64_t i = 0; i < n; i++) {
    SoftSums<A> sums = {s.weight[i], s.first[i]};
    add_pair(sums, soft_pair(s.y[i], s.w[i], inner, outer), step, gate_of<kSteps>(s.at.c[i] + step, steps),
             gate_of<kSteps>(s.at.c[i] - step, steps));
    s.weight[i] = sums.weight;
    s.first[i] = sums.first;
  }
}

template <class A>
QUANTOPS_SIMD void soft_value_loop(const SoftPart<A>& s, A* __restrict q, int64_t n, A alpha) {
  for (int64_t i = 0; i < n; i++) q[i] = alpha * (s.at.c[i] + s.first[i] / s.weight[i]);
}

// Between the passes.
template <class A>
QUANTOPS_SIMD void soft_mean_loop(SoftPart<A>& s, int64_t n, A sharp) {
  for (int64_t i = 0; i < n; i++) {
    const A inv = A(1) / s.weight[i], mean = s.first[i] * inv;
    A deviation;
    const SoftSlopes<A> slopes = center_slopes(soft_center(s.y[i], s.w[i]), s.gate[i], mean, sharp, deviation);
    s.by_x[i] = slopes.by_x;
    s.by_width[i] = slopes.by_width;
    s.up[i] = deviation;
    s.down[i] = A(0);
    s.weight[i] = inv;
    s.first[i] = mean;
  }
}

template <int kSteps, class A>
QUANTOPS_SIMD void soft_slope_loop(SoftPart<A>& s, int64_t n, A step, A inner, A outer, const GateSteps<A>& gates,
                                   A sharp) {
  const GateSteps<A> steps = gates;
  for (int64_t i = 0; i < n; i++) {
    SoftSlopes<A> slopes = {s.by_x[i], s.by_width[i]};
    A up, down;
    add_slopes(slopes, soft_pair(s.y[i], s.w[i], inner, outer), step, s.first[i],
               gate_of<kSteps>(s.at.c[i] + step, steps), gate_of<kSteps>(s.at.c[i] - step, steps), sharp, up, down);
    s.by_x[i] = slopes.by_x;
    s.by_width[i] = slopes.by_width;
    if (kSteps > 1) {
      s.up[i] = up;
      s.down[i] = down;
    }
  }
}

// Adds the deviations of the pair at hand to the sums over the levels above t, whose classes are beyond bottom..top.
template <class A>
QUANTOPS_SIMD void soft_tail_loop(const A* __restrict c, const A* __restrict of_up, const A* __restrict of_down,
                                  A* __restrict tail, int64_t n, A step, A bottom, A top) {
  for (int64_t i = 0; i < n; i++) {
    const A i_up = c[i] + step, i_down = c[i] - step;
    const A up = ((i_up > top) | (i_up < bottom)) ? of_up[i] : A(0);
    const A down = ((i_down > top) | (i_down < bottom)) ? of_down[i] : A(0);
    tail[i] += up + down;
  }
}

template <class A>
QUANTOPS_SIMD void soft_gradient_loop(const SoftPart<A>& s, const A* __restrict g, A* __restrict out, int64_t n,
                                      const Bins<A>& bins, ScaleSums& sums) {
  const Bins<A> p = bins;
  gradient_lanes(g, out, n, sums, [&](int64_t i) QUANTOPS_LANES {
    const SoftSlopes<A> slopes = {s.by_x[i], s.by_width[i]};
    return soft_factors(slopes, s.at.c[i], s.at.z[i], s.first[i], s.weight[i], p);
  });
}

// The sum of g dq/dG over the levels above t, times G.
template <class A>
QUANTOPS_SIMD double soft_gate_loop(const SoftPart<A>& s, const A* __restrict tail, const A* __restrict g, int64_t n,
                                    A alpha) {
  A sum[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; j++) sum[j] += (g[i + j] * alpha) * (tail[i + j] * s.weight[i + j]);
  for (int j = 0; i < n; i++, j++) sum[j] += (g[i] * alpha) * (tail[i] * s.weight[i]);
  double total = 0;
  for (int j = 0; j < kLanes; j++) total += sum[j];
  return total;
}

// ---------------------------------------------------------------------------------------------------------- by a
// spline

// The coefficients of a scale. A row of those of t^(2 m) and t^(2 m + 1) of all functions is one load of 8 numbers:
// eight such loads for two elements, and a few operations on each, take less time than gathering, where that exists.
template <class A>
struct SplineTable {
  static constexpr int kRow = 2 * kSplineFunctions, kRows = kSplineOrder / 2;
  Spline<A> spline;
  alignas(64) A row[kMostIntervals * kRows * kRow];

  // The coefficients of function f in an interval, from t^0.
  void set(int interval, int f, const A* coefficients) {
    for (int i = 0; i < kSplineOrder; i++)
      row[(interval * kRows + i / 2) * kRow + i % 2 * kSplineFunctions + f] = coefficients[i];
  }
};

template <class A, int kCount>
using Vector __attribute__((vector_size(kCount * sizeof(A)))) = A;

// Elements of a, counted on in b.
template <int... kAt, class V>
QUANTOPS_INLINE void pick(V& to, const V& a, const V& b) {
#if defined(__clang__)
  to = __builtin_shufflevector(a, b, kAt...);
#else
  to = __builtin_shuffle(a, b, decltype(a == b){kAt...});
#endif
}

template <class A>
using SplineRow = Vector<A, SplineTable<A>::kRow>;

// Of x, alpha, sigma and mean the even part, then the odd part over t, at t^2.
template <class V, class A>
QUANTOPS_INLINE void spline_parts(V& v, const A* rows, A square) {
  constexpr int kRow = SplineTable<A>::kRow;
  V w;
  std::memcpy(&v, rows + 3 * kRow, sizeof(v));
  for (int m = 2; m >= 0; m--) {
    std::memcpy(&w, rows + m * kRow, sizeof(w));
    v = v * square + w;
  }
}

template <class A>
struct alignas(64) SplinePart {
  A c[kPart], t[kPart], square[kPart], g[kPart];  // t^2; g of the mirrored element
  A value[kPart];                                 // a function there
  int32_t at[kPart];                              // of the rows in the table
};

// kSlopes, here and below: gradients are wanted. In two loops, of which the processor has more under way than of one.
template <bool kSlopes, class A>
QUANTOPS_FUSED_SIMD void spline_place_loop(const A* __restrict x, const A* __restrict g, SplinePart<A>& part, int64_t n,
                                           const Bins<A>& bins, const Spline<A>& spline) {
  const Bins<A> p = bins;
  const Spline<A> k = spline;
  for (int64_t i = 0; i < n; i++) {
    const A c = nearest_class(x[i], p), side = c - k.middle;
    const SplinePlace<A> place = spline_place(side, scaled_offset(x[i], c, p.inv_sigma, p), k);
    part.c[i] = c;
    part.t[i] = place.t;
    part.square[i] = place.t * place.t;
    part.at[i] = static_cast<int32_t>(place.interval) * (SplineTable<A>::kRows * SplineTable<A>::kRow);
    if (kSlopes) part.g[i] = change_sign(g[i], side);
  }
}

// The mean of elements 2 kPair and 2 kPair + 1 from i on, or the factors of their gradients; adds their functions times
// g, side by side: so two elements take the operations of one.
template <bool kSlopes, int kPair, class V, class A>
QUANTOPS_INLINE void spline_pair(const A* table, SplinePart<A>& part, int64_t i, const V& t, const V& g, V& sum) {
  constexpr int kFunction = kSlopes ? 0 : 3, kOne = 2 * kPair, kTwo = kOne + 1;
  V one, two, even, odd, of_each;
  spline_parts(one, table + part.at[i + kOne], part.square[i + kOne]);
  spline_parts(two, table + part.at[i + kTwo], part.square[i + kTwo]);
  pick<0, 1, 2, 3, 8, 9, 10, 11>(even, one, two);
  pick<4, 5, 6, 7, 12, 13, 14, 15>(odd, one, two);
  pick<kOne, kOne, kOne, kOne, kTwo, kTwo, kTwo, kTwo>(of_each, t, t);
  const V f = odd * of_each + even;
  part.value[i + kOne] = f[kFunction];
  part.value[i + kTwo] = f[kSplineFunctions + kFunction];
  if (!kSlopes) return;
  pick<kOne, kOne, kOne, kOne, kTwo, kTwo, kTwo, kTwo>(of_each, g, g);
  sum += f * of_each;
}

// The same of all; what is missing of the last 8 elements adds nothing. sums: of every eighth element.
template <bool kSlopes, class A>
QUANTOPS_FUSED_SIMD void spline_loop(const A* __restrict table, SplinePart<A>& part, int64_t n,
                                     A (&sums)[8][kSplineFunctions]) {
  SplineRow<A> t, g = {}, sum[4] = {};
  for (; n % 8; n++) part.t[n] = part.square[n] = part.g[n] = A(0), part.at[n] = 0;
  for (int64_t i = 0; i < n; i += 8) {
    std::memcpy(&t, part.t + i, sizeof(t));
    if (kSlopes) std::memcpy(&g, part.g + i, sizeof(g));
    spline_pair<kSlopes, 0>(table, part, i, t, g, sum[0]);
    spline_pair<kSlopes, 1>(table, part, i, t, g, sum[1]);
    spline_pair<kSlopes, 2>(table, part, i, t, g, sum[2]);
    spline_pair<kSlopes, 3>(table, part, i, t, g, sum[3]);
  }
  std::memcpy(sums, sum, sizeof(sums));
}

template <class A>
QUANTOPS_FUSED_SIMD void spline_value_loop(const SplinePart<A>& part, A* __restrict q, int64_t n, A alpha, A middle) {
  for (int64_t i = 0; i < n; i++) q[i] = alpha * (part.c[i] + change_sign(part.value[i], part.c[i] - middle));
}

// dL/dx; gives the sum over the lanes of what c adds to dL/dalpha.
template <class A>
QUANTOPS_FUSED_SIMD double spline_gradient_loop(const SplinePart<A>& part, const A* __restrict g, A* __restrict out,
                                                int64_t n) {
  A sum[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; j++) {
      const A v = g[i + j] * part.value[i + j];
      sum[j] += (g[i + j] - v) * part.c[i + j];
      out[i + j] = v;
    }
  for (int j = 0; i < n; i++, j++) {
    const A v = g[i] * part.value[i];
    sum[j] += (g[i] - v) * part.c[i];
    out[i] = v;
  }
  double total = 0;
  for (int j = 0; j < kLanes; j++) total += sum[j];
  return total;
}

}  // namespace quantops
