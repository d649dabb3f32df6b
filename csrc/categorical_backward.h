// The winner's backward per element: gradients of r_j of the class j that was chosen.
#pragma once
#include "categorical_soft.h"

namespace quantops {

// From r times T = dlog(r_j)/dx sigma and r times Q = dlog(r_j)/dalpha sigma, edges counted from class j, which is at
// distance (alpha j - x)/sigma.
template <class A>
QUANTOPS_INLINE Factors<A> winner_factors(A j, A rt, A rq, A distance, const Bins<A>& p) {
  const A factor = j * p.beta;
  return {factor * rt, j + factor * (rq - j * rt), factor * (distance * rt - p.beta * rq)};
}

// The case without gates, where the winner is the nearest class c and D the mass of the one interval low..high.
//
// Mirrored, so that the end of the grid nearer to class c lies above, let b = exp(-distance of x to the upper edge of
// c, in sigmas) and t = exp(-beta), so that t/b is the same of the lower edge. The bin's tails are n1 = b/(1 + b) and
// n2 = t/(b + t), pi = 1 - n1 - n2 = (1 - t) b/P with P = (1 + b)(b + t), T = n2 - n1 = (t - b^2)/P and
// 2 Q = n1 + n2 + 2 t/(1 - t). The whole grid is a bin like that, too: B = b exp(-beta k) of the upper end, k classes
// above c, and F/b with F = t exp(-beta l) of the lower one, l classes below: D = (1 - theta)/((1 + B)(1 + F/b)).
// Exponents are those of 2. No end counts that is more than a number of sigmas away from the bin.
//
// For all of that one exponential, one division, and what depends on the class alone.

// log2 of exp(-beta k), at least; below it is 0.
template <class A>
QUANTOPS_INLINE A least_decay() {
  return sizeof(A) == 4 ? A(-25.25) : A(-55);
}
// log2 of b, at most: nothing changes beyond.
template <class A>
QUANTOPS_INLINE A most_beyond() {
  return sizeof(A) == 4 ? A(36) : A(72);
}
// log2 of 1/b in the middle of a bin, at most: wider ones lack as much of their middle, where nothing changes.
template <class A>
QUANTOPS_INLINE A most_half() {
  return sizeof(A) == 4 ? A(40) : A(160);
}

template <class A>
struct OneInterval {
  A rate, half, beyond;    // log2(e)/sigma, log2(e) beta/2, the largest w of mirrored_offset
  A decay;                 // log2(e) beta
  A t, sharp, most_q;      // exp(-beta), not below 2^(-2 most_half); 1 - t; 1 + 2 t/(1 - t)
  A ratio, scale;          // (1 - t)/(1 - theta), beta times that
  A spread;                // 2/(1 - theta)
  A middle, half_classes;  // (low + high)/2, (high - low + 1)/2
};

template <class A>
QUANTOPS_INLINE OneInterval<A> make_one_interval(const Bins<A>& p) {
  const double beta = static_cast<double>(p.beta), classes = static_cast<double>(p.high - p.low + A(1));
  const double sharp = one_minus_exp(beta), open = one_minus_exp(beta * classes), log2_e = 1.4426950408889634;
  const double t = exp(-beta), least = exp2(-2.0 * most_half<A>()), most = std::numeric_limits<A>::max();
  const double rate = log2_e * p.inv_sigma;
  OneInterval<A> k;
  k.rate = static_cast<A>(rate < most ? rate : most);
  k.half = static_cast<A>(0.5 * log2_e * beta);
  k.beyond = k.half + most_beyond<A>();
  k.decay = static_cast<A>(log2_e * beta);
  k.t = static_cast<A>(t < least ? least : t);
  k.sharp = static_cast<A>(sharp);
  k.most_q = static_cast<A>(1 + 2 * t / sharp);
  k.ratio = static_cast<A>(sharp / open);
  k.scale = static_cast<A>(beta * sharp / open);
  k.spread = static_cast<A>(2 / open);
  k.middle = A(0.5) * (p.low + p.high);
  k.half_classes = static_cast<A>(0.5 * classes);
  return k;
}

// Bins of at most most_half, on a grid of more than one class: in them fewer operations give the same bits.
template <class A>
QUANTOPS_INLINE bool is_plain(const OneInterval<A>& k) {
  return k.half < most_half<A>() - A(1) && k.half_classes > A(0.5);
}

// v with the sign changed where class c is below the middle of the grid.
template <class A>
QUANTOPS_INLINE A mirrored(A v, A c, const OneInterval<A>& k) {
  return change_sign(v, c - k.middle);
}

// w = log2(e) z, mirrored.
template <bool kPlain, class A>
QUANTOPS_INLINE A mirrored_offset(A x, A c, const Bins<A>& p, const OneInterval<A>& k) {
  const A z = scaled_offset(x, c, k.rate, p);
  const A w = at_most(mirrored(z, c, k), k.beyond);
  return kPlain ? w : at_least(w, -k.beyond);
}

// b of that w.
template <bool kPlain, class A>
QUANTOPS_INLINE A edge_power(A w, const OneInterval<A>& k) {
  const A above = w - k.half;
  if (kPlain) return power_of_two(above);
  return power_of_two(at_least(above, at_most((w + k.half) - A(2) * most_half<A>(), -most_half<A>())));
}

// exp(-beta n), 0 where that cannot be felt.
template <class A>
QUANTOPS_INLINE A decay_exponent(A n, const OneInterval<A>& k) {
  return -k.decay * n;
}
template <class A>
QUANTOPS_INLINE A decay_of(A n, const OneInterval<A>& k) {
  const A exponent = decay_exponent(n, k), decay = power_of_two(at_least(exponent, A(2) * least_decay<A>()));
  return exponent < least_decay<A>() ? A(0) : decay;
}

template <class A>
QUANTOPS_INLINE A from_middle(A c, const OneInterval<A>& k) {
  const A side = c - k.middle;
  return change_sign(side, side);
}
template <class A>
QUANTOPS_INLINE A classes_to_near_end(A c, const OneInterval<A>& k) {
  return (k.half_classes - A(0.5)) - from_middle(c, k);
}
template <class A>
QUANTOPS_INLINE A classes_to_far_end(A c, const OneInterval<A>& k) {
  return (k.half_classes - A(0.5)) + from_middle(c, k);
}

// What the ends of the grid are for a class: N = exp(-beta k) of the nearer and its derivative by -beta, times
// 2/(1 - theta); F of the farther, and by what its derivative exceeds it.
template <class A>
struct alignas(16) Ends {
  A near, far, near_slope, far_slope;
};

template <class A>
QUANTOPS_INLINE Ends<A> make_ends(A near, A far, A away, const OneInterval<A>& k) {
  return {near, far, ((k.half_classes - away) * k.spread) * near, (k.half_classes + away) * k.spread};
}

template <bool kFar, class A>
QUANTOPS_INLINE Ends<A> ends_of(A c, const OneInterval<A>& k) {
  const A near = decay_of(classes_to_near_end(c, k), k);
  return make_ends(near, kFar ? k.t * decay_of(classes_to_far_end(c, k), k) : A(0), from_middle(c, k), k);
}

// The class n from an end, or in the middle where it has passed that.
template <class A>
QUANTOPS_INLINE A class_from_end(A n, const OneInterval<A>& k) {
  return k.middle + at_least(k.half_classes - A(0.5) - n, A(0));
}

// Whether the farther end is felt from any class.
template <class A>
QUANTOPS_INLINE bool feels_far_end(const OneInterval<A>& k) {
  return decay_exponent(k.half_classes - (k.half_classes < A(1) ? A(0.5) : A(0)), k) >= least_decay<A>();
}

// r T and 2 r Q, mirrored and without the factor `ratio`. kNear, kFar: that end may be felt; without, the same bits.
template <class A>
struct Slopes {
  A rt, rq;
};

template <bool kNear, bool kFar, class A>
QUANTOPS_INLINE Slopes<A> winner_of_one(A b, const Ends<A>& ends, const OneInterval<A>& k) {
  const A inv = reciprocal((A(1) + b) * (b + k.t)), pi = b * inv;
  const A t = product_plus(-b, b, k.t) * inv, q = product_plus(-k.sharp, pi, k.most_q);
  if (!kNear) return {pi * t, pi * q};
  const A outer = b * ends.near, whole = A(1) + outer, of_t = product_plus(t, whole, outer);
  if (!kFar) return {pi * of_t, pi * product_plus(-b, ends.near_slope, q * whole)};
  const A sum = b + ends.far, r = sum * inv, far = (ends.far * inv) * whole;
  const A of_q = product_plus(-sum, ends.near_slope, q * whole);
  return {product_plus(r, of_t, -far), product_plus(r, of_q, -(far * (ends.far_slope * whole)))};
}

// What an element adds to the sums that the gradients of alpha and sigma are made of, with u = g c and t = u r T/ratio:
// winner_factors, term by term. Gives its dL/dx.
template <bool kScales, class A>
QUANTOPS_INLINE A add_winner(A g, A c, A w, const Slopes<A>& s, const OneInterval<A>& k, A& of_u, A& of_q, A& of_c,
                             A& of_w) {
  const A u = g * c, v = u * s.rt, t = mirrored(v, c, k);
  if (kScales) {
    of_u += u;
    of_q = product_plus(u, s.rq, of_q);
    of_c = product_plus(t, c, of_c);
    of_w = product_plus(v, w, of_w);
  }
  return k.scale * t;
}

// The gradients of alpha and sigma from these sums.
template <class A>
QUANTOPS_INLINE A winner_alpha(A of_u, A of_q, A of_c, A beta, A ratio) {
  return product_plus(beta * ratio, product_plus(A(0.5), of_q, -of_c), of_u);
}
template <class A>
QUANTOPS_INLINE A winner_sigma(A of_q, A of_w, A beta, A ratio) {
  return -(beta * ratio) * product_plus(A(0.69314718055994531), of_w, (A(0.5) * beta) * of_q);
}

// The factors that these slopes come to, at an element with its c and w.
template <class A>
QUANTOPS_INLINE Factors<A> factors_of_one(A c, A w, const Slopes<A>& s, const Bins<A>& p, const OneInterval<A>& k) {
  return winner_factors(c, k.ratio * mirrored(s.rt, c, k), A(0.5) * (k.ratio * s.rq),
                        mirrored(w, c, k) * A(-0.69314718055994531), p);
}

// D and its derivatives, level by level from the lowest.
template <class A>
struct Masses {
  A total, by_x, by_alpha;
  Edge<A> top, bottom;
};

template <class A>
QUANTOPS_INLINE Masses<A> no_masses() {
  return {A(0), A(0), A(0), {A(0), A(0)}, {A(0), A(0)}};
}

// Adds level k for an element at (c, z) whose class is j; gives the mass of the level's own classes times G_t.
template <bool kFirst, bool kSigned, class A>
QUANTOPS_INLINE A add_level(Masses<A>& m, const Level<A>& k, A c, A z, A j, const Bins<A>& p) {
  const Edge<A> top = edge_at(p.beta * (k.top + A(0.5) - c) - z);
  const Edge<A> bottom = edge_at(p.beta * (k.bottom - A(0.5) - c) - z);
  A mass = (top.s * (kFirst ? bottom.n : m.top.n)) * k.own;
  if (kSigned && !kFirst) mass += (m.bottom.s * bottom.n) * k.own;
  mass *= k.weight;
  const A over = top.s * top.n, under = bottom.s * bottom.n;
  m.total += mass;
  m.by_x += k.step * (under - over);
  m.by_alpha += k.step * ((k.top + A(0.5) - j) * over + (j + A(0.5) - k.bottom) * under);
  m.top = top;
  m.bottom = bottom;
  return mass;
}

// The winner's factors for any class j, with weight G_j; r_j as well.
template <class A>
QUANTOPS_INLINE Factors<A> winner_of_many(const Masses<A>& m, A c, A z, A j, A weight, A sharp, const Bins<A>& p,
                                          A& r) {
  const A distance = p.beta * (j - c) - z, inv = A(1) / m.total;
  const Edge<A> a = edge_at(distance + p.half), b = edge_at(distance - p.half);
  r = ((weight * sharp) * (a.s * b.n)) * inv;
  const A t = (a.s - b.n) - m.by_x * inv;
  const A q = A(0.5) * (a.n / b.n + b.s / a.s) / sharp - m.by_alpha * inv;
  return winner_factors(j, r * t, r * q, distance, p);
}

}  // namespace quantops
