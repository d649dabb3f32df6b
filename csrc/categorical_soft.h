// The soft sum and its gradients per element, in two ways that agree within the bound that
// quantops/reference/categorical.py states: over the classes near to x, which serves all scales, gates and dtypes, and
// by a spline, which serves long rows in float32 without gates at a cost that depends on nothing.
#pragma once
#include "categorical_gates.h"

namespace quantops {

// What dL/dq is multiplied by in the gradients of x, alpha and sigma.
template <class A>
struct Factors {
  A x, alpha, sigma;
};

// ---------------------------------------------------------------------------------------------------- over the classes

// The soft sum runs outward from c, n = 1, 2, ... classes up and down at once. With y = exp(z - half) and
// w = exp(-z - half), the edges beyond c are at y exp(-beta n) and w exp(-beta n). pi_i = sharp u_i.

// The farthest class from c that can be felt: G u falls like exp(-beta n), from no less than the least gate.
template <class A>
QUANTOPS_INLINE int soft_reach(const Levels& l, const A* gates, A beta) {
  const double felt = (sizeof(A) == 4 ? 21.0 : 44.0) - log(cumulative_gate(gates, l.count));
  const double n = ceil(felt / static_cast<double>(beta) + 0.5);
  const int most = l.high - l.low;
  return n < most ? static_cast<int>(n) : most;
}

// Two classes' u and |T|, n classes up and down: `inner`, `outer` = exp(-beta (n - 1)), exp(-beta n).
template <class A>
struct Pair {
  A up, down, up_slope, down_slope;
};

template <class A>
QUANTOPS_INLINE Pair<A> soft_pair(A y, A w, A inner, A outer) {
  const A y0 = y * inner, y1 = y * outer, w0 = w * inner, w1 = w * outer;
  const A of_up = (A(1) + y0) * (A(1) + y1), of_down = (A(1) + w0) * (A(1) + w1), inv = A(1) / (of_up * of_down);
  const A up = inv * of_down, down = inv * of_up;
  return {y0 * up, w0 * down, (A(1) - y0 * y1) * up, (A(1) - w0 * w1) * down};
}

// Of the class at c itself: u, and T with its sign.
template <class A>
struct Center {
  A u, slope;
};

template <class A>
QUANTOPS_INLINE Center<A> soft_center(A y, A w) {
  const A u = A(1) / ((A(1) + y) * (A(1) + w));
  return {u, (w - y) * u};
}

// First pass: sum w and sum w n, of weights w = G u. Gates of 0 leave a class out.
template <class A>
struct SoftSums {
  A weight, first;
};

template <class A>
QUANTOPS_INLINE void add_pair(SoftSums<A>& s, const Pair<A>& u, A n, A up_gate, A down_gate) {
  const A up = up_gate * u.up, down = down_gate * u.down;
  s.weight += up + down;
  s.first += n * (up - down);
}

// Second pass, with deviations d = w (n - mean): sum d T and sum d V, V = pi/2 + n T, which are covariances under r.
template <class A>
struct SoftSlopes {
  A by_x, by_width;
};

template <class A>
QUANTOPS_INLINE SoftSlopes<A> center_slopes(const Center<A>& at, A gate, A mean, A sharp, A& deviation) {
  deviation = -(gate * at.u) * mean;
  return {deviation * at.slope, deviation * (A(0.5) * sharp * at.u)};
}

template <class A>
QUANTOPS_INLINE void add_slopes(SoftSlopes<A>& s, const Pair<A>& u, A n, A mean, A up_gate, A down_gate, A sharp, A& up,
                                A& down) {
  up = (up_gate * u.up) * (n - mean);
  down = (down_gate * u.down) * (-n - mean);
  s.by_x += up * u.up_slope - down * u.down_slope;
  s.by_width += up * (A(0.5) * sharp * u.up + n * u.up_slope) + down * (A(0.5) * sharp * u.down + n * u.down_slope);
}

template <class A>
QUANTOPS_INLINE Factors<A> soft_factors(const SoftSlopes<A>& s, A c, A z, A mean, A inv_weight, const Bins<A>& p) {
  const A in_x = p.beta * (s.by_x * inv_weight), in_width = p.beta * (s.by_width * inv_weight);
  return {in_x, c * (A(1) - in_x) + (mean - in_width), p.beta * in_width - z * in_x};
}

// ---------------------------------------------------------------------------------------------------------- by a
// spline

// Without gates the soft sum and its gradients are functions of z, and of c by its distances to the ends of the grid.
// Ends are not felt from more than a number of sigmas away, and the grid is symmetric. So, mirrored so that the end
// nearer to c lies above, they are those of a few classes: the one at that end, beyond which x may be, and the next
// ones, the last of which stands for all further inward. Each class has a number of intervals, in which a polynomial
// of degree 7 through the values at 8 Chebyshev nodes is exact to 2e-7 of the largest value of a function of gradients,
// and to 2e-8 of a class of the mean. The values at the nodes are those of the sum over the classes.
constexpr int kMostIntervals = 48;       // of 96 bytes: what a warp of each kernel on a GPU can have in shared memory
constexpr int kSplineOrder = 8;          // coefficients
constexpr int64_t kLeastSplined = 1024;  // elements of a row: for fewer the table would take longer than the sums

template <class A>
struct Spline {
  int intervals, per_class;  // intervals: of all classes together; 0 where the sum is taken over the classes
  int cells;                 // classes with intervals of their own
  A rate, shift;             // y rate + shift: the place of y = z, mirrored, among the intervals of its class
  A first, turns;            // classes from the middle to the first of these cells; per_class
  A most;                    // of y: nothing changes beyond
  A middle;                  // (low + high)/2
};

// `elements`: of the run that shares the scale.
template <class A>
QUANTOPS_INLINE Spline<A> make_spline(const Bins<A>& p, const Levels& l, int64_t elements) {
  Spline<A> k = {};
  const int half = (l.high - l.low + 1) / 2;
  // Narrower bins have too many cells, and wider ones few classes that are felt.
  const bool fits = sizeof(A) == 4 && half > 0 && p.alpha == p.alpha && p.beta > A(0.25) && p.beta < A(32);
  if (!fits || elements < kLeastSplined) return k;
  k.per_class = 1 + static_cast<int>(p.beta * A(1 / 1.2));
  k.cells = 1 + static_cast<int>(A(20) / p.beta) + 1;
  if (k.cells > half) k.cells = half;
  k.turns = static_cast<A>(k.per_class);
  k.rate = k.turns / p.beta * A(1 - 1.0 / 4096);  // the intervals cover a bin with its rounding
  k.shift = A(0.5) * k.turns - A(0.5);
  const int beyond = 1 + static_cast<int>(A(17) * k.rate);
  k.most = (k.shift + static_cast<A>(beyond)) / k.rate;
  k.first = static_cast<A>(half - k.cells) + A(0.5);
  k.middle = A(0.5) * (p.low + p.high);
  k.intervals = k.cells * k.per_class + beyond;
  if (k.intervals > kMostIntervals) k.intervals = 0;
  return k;
}

// A node of an interval: its class, and z.
template <class A>
struct SplineNode {
  A c, z;
};

// cos(pi (2 i + 1)/16)
QUANTOPS_INLINE float chebyshev_node(int i) {
  const int j = i < 4 ? i : 7 - i;
  const float size = j == 0 ? 0.980785280f : j == 1 ? 0.831469612f : j == 2 ? 0.555570233f : 0.195090322f;
  return i < 4 ? size : -size;
}

template <class A>
QUANTOPS_INLINE SplineNode<A> spline_node(int interval, int node, const Spline<A>& k, const Bins<A>& p) {
  const int of_class = interval / k.per_class, cell = of_class < k.cells ? of_class : k.cells - 1;
  const A place = static_cast<A>(interval - cell * k.per_class) + A(0.5) * chebyshev_node(node);
  return {p.high - static_cast<A>(k.cells - 1 - cell), (place - k.shift) / k.rate};
}

// What the spline interpolates: mirrored, the factors of soft_factors but for c, and the mean of the class less c.
constexpr int kSplineFunctions = 4;
template <class A>
struct SplineValues {
  A x, alpha, sigma, mean;
};

template <class A>
QUANTOPS_INLINE SplineValues<A> spline_values(const SoftSlopes<A>& s, A z, A mean, A inv_weight, const Bins<A>& p) {
  const Factors<A> f = soft_factors(s, A(0), z, mean, inv_weight, p);
  return {f.x, f.alpha, f.sigma, mean};
}

// Values at the 8 nodes to coefficients of t^0..t^7, t = -1/2..1/2, by way of those of the Chebyshev polynomials: these
// have small errors, since values are averaged.
template <class A>
QUANTOPS_INLINE void to_coefficients(A* v) {
  const A c1 = A(0.98078528040323), c2 = A(0.92387953251129), c3 = A(0.83146961230255), c4 = A(0.70710678118655);
  const A c5 = A(0.55557023301960), c6 = A(0.38268343236509), c7 = A(0.19509032201613), quarter = A(0.25);
  const A e0 = quarter * (v[0] + v[7]), e1 = quarter * (v[1] + v[6]);
  const A e2 = quarter * (v[2] + v[5]), e3 = quarter * (v[3] + v[4]);
  const A o0 = quarter * (v[0] - v[7]), o1 = quarter * (v[1] - v[6]);
  const A o2 = quarter * (v[2] - v[5]), o3 = quarter * (v[3] - v[4]);
  const A a0 = A(0.5) * ((e0 + e3) + (e1 + e2)), a4 = c4 * ((e0 + e3) - (e1 + e2));
  const A a2 = c2 * (e0 - e3) + c6 * (e1 - e2), a6 = c6 * (e0 - e3) - c2 * (e1 - e2);
  const A a1 = (c1 * o0 + c3 * o1) + (c5 * o2 + c7 * o3), a3 = (c3 * o0 - c7 * o1) - (c1 * o2 + c5 * o3);
  const A a5 = (c5 * o0 - c1 * o1) + (c7 * o2 + c3 * o3), a7 = (c7 * o0 - c5 * o1) + (c3 * o2 - c1 * o3);
  v[0] = (a0 - a2) + (a4 - a6);
  v[1] = A(2) * ((a1 - A(3) * a3) + (A(5) * a5 - A(7) * a7));
  v[2] = A(4) * (A(2) * a2 - (A(8) * a4 - A(18) * a6));
  v[3] = A(8) * (A(4) * a3 - (A(20) * a5 - A(56) * a7));
  v[4] = A(16) * (A(8) * a4 - A(48) * a6);
  v[5] = A(32) * (A(16) * a5 - A(112) * a7);
  v[6] = A(64) * (A(32) * a6);
  v[7] = A(128) * (A(64) * a7);
}

// Where x is: the interval, which is one of those there are whatever x, and t in it; NaN where x is.
template <class A>
struct SplinePlace {
  A t;
  uint32_t interval;
};

// `side`: of c from the middle of the grid.
template <class A>
QUANTOPS_INLINE SplinePlace<A> spline_place(A side, A z, const Spline<A>& k) {
  const A y = at_most(change_sign(z, side), k.most);
  const A j = rint_small(product_plus(y, k.rate, k.shift));
  const A cell = at_least(change_sign(side, side) - k.first, A(0));
  const uint32_t interval = index_of(product_plus(cell, k.turns, j)), last = static_cast<uint32_t>(k.intervals) - 1;
  return {product_plus(y, k.rate, k.shift - j), interval < last ? interval : last};
}

template <class A>
QUANTOPS_INLINE A spline_value(const A* coefficients, A t) {
  A v = coefficients[kSplineOrder - 1];
  for (int i = kSplineOrder - 2; i >= 0; --i) v = product_plus(v, t, coefficients[i]);
  return v;
}

}  // namespace quantops
