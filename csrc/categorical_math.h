// The categorical quantizer per element: one inline statement that the CPU and the CUDA kernels both call.
//
// The quantities are those of quantops/reference/categorical.py, which has the equations: classes i = low..high that
// are in, c the nearest to x among them, z = (x - alpha c)/sigma, beta = alpha/sigma, edges at beta/2 to either side of
// a class. As everywhere, each operation is rounded on its own, so the CPU and the emulated CUDA kernels agree bit for
// bit; exp and log are written out for that reason, and because a call of libm does not vectorize.
#pragma once
#include <cmath>
#include <cstring>

#include "quant_math.h"

namespace quantops {

constexpr int kMaxSoftBits = 8;
constexpr double kLeastGate = 1.0 / 18446744073709551616.0;  // 2^-64: a cumulative gate below counts as 0

enum Mode : int64_t { kHard = 0, kSoft = 1, kSample = 2 };  // the order of MODES in the reference
enum GradOf : int64_t { kOfWinner = 0, kOfSoft = 1 };       // the order of GRADS

// ------------------------------------------------------------------------------------------------------- exp and log

template <class To, class From>
QUANTOPS_INLINE To bits_of(From v) {
  static_assert(sizeof(To) == sizeof(From), "");
  To r;
  memcpy(&r, &v, sizeof(To));
  return r;
}

// exp(x) to less than 1 ulp for -87 <= x <= 88, and `exponential` 0 below. Reduced as in Cephes (S. Moshier, expf):
// x = n ln 2 + r, with a minimax polynomial for exp(r) to 0.06 ulp, in the order with the shortest chains.
// NaN stays NaN on a CPU; a GPU's NaN may become a number, but the class or alpha of such an element is NaN as well.
QUANTOPS_INLINE float exponential_in_range(float x) {
  const float shifted = x * 1.44269504f + 12582912.f;  // its lowest bits are the integer n nearest to x / ln 2
  const float n = shifted - 12582912.f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f, square = r * r;
  const float low = 0.49999994f + 0.16666521f * r, high = 0.041668393f + 0.0083687454f * r;
  const float p = low + square * (high + square * 0.0013814532f);
  const float y = (p * square + r) + 1.f;
  return bits_of<float>(bits_of<uint32_t>(y) + (bits_of<uint32_t>(shifted) << 23));  // y 2^n
}
QUANTOPS_INLINE double exponential_in_range(double x) { return exp(x); }

// 2^r 2^n to less than 1.3 ulp for |r| <= 1/2, with a minimax polynomial for 2^r to 0.02 ulp. The integer n is in the
// lowest bits of `shifted`. NaN as above.
QUANTOPS_INLINE float scaled_power(float r, float shifted) {
  const float square = r * r;
  const float low = 0.24022652f + 0.0555031039f * r, high = 0.00961769279f + 0.00134066434f * r;
  const float p = low + square * (high + square * 0.000155946778f);
  const float y = (p * square + 0.693147242f * r) + 1.f;
  return bits_of<float>(bits_of<uint32_t>(y) + (bits_of<uint32_t>(shifted) << 23));
}

// 2^x for -125 <= x <= 127.
QUANTOPS_INLINE float power_of_two(float x) {
  const float shifted = x + 12582912.f;  // its lowest bits are the integer nearest to x
  return scaled_power(x - (shifted - 12582912.f), shifted);
}
QUANTOPS_INLINE double power_of_two(double x) { return exp2(x); }

// 2^(high + low), where low is what high lacks.
QUANTOPS_INLINE float power_of_two(float high, float low) {
  const float shifted = (high + low) + 12582912.f;
  return scaled_power((high - (shifted - 12582912.f)) + low, shifted);
}
QUANTOPS_INLINE double power_of_two(double high, double low) { return exp2(high + low); }

QUANTOPS_INLINE float exponential(float x) {
  const float y = exponential_in_range(x);
  return x < -87.f ? 0.f : y;
}
QUANTOPS_INLINE double exponential(double x) { return exp(x); }

// log(x) to less than 1 ulp for positive normal x. Polynomial of Cephes (logf).
QUANTOPS_INLINE float logarithm(float x) {
  const int32_t bits = bits_of<int32_t>(x);
  const int32_t e = (bits - 0x3f3504f3) >> 23;  // x = 2^e m, sqrt(1/2) <= m < sqrt(2)
  const float m = bits_of<float>(bits - e * 8388608) - 1.f, n = static_cast<float>(e), square = m * m;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const float y = ((m * square) * p - n * 2.12194440e-4f) - 0.5f * square;
  return (m + y) + n * 0.693359375f;
}
QUANTOPS_INLINE double logarithm(double x) { return log(x); }

// 1 - exp(-x), in double whatever A, once per scale.
QUANTOPS_INLINE double one_minus_exp(double x) { return -expm1(-x); }

// ------------------------------------------------------------------------------------------------------------ philox

// Philox4x32-10 (Salmon et al. 2011) of a 64-bit key and counter: the first two of its four words.
struct Words {
  uint32_t first, second;
};

QUANTOPS_INLINE Words philox(uint64_t seed, uint64_t index) {
  uint32_t c0 = uint32_t(index), c1 = uint32_t(index >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c1 = uint32_t(b);
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1};
}

// ------------------------------------------------------------------------------------------ what gates and scales fix

QUANTOPS_INLINE int32_t top_of_level(int t, bool is_signed) { return (int32_t(1) << (is_signed ? t - 1 : t)) - 1; }

// G_t = gates[1] ... gates[t-1], in double; 0 below 2^-64. Without gates 1.
template <class A>
QUANTOPS_INLINE double cumulative_gate(const A* gates, int t) {
  double g = 1;
  if (gates)
    QUANTOPS_ROLLED
    for (int i = 1; i < t; ++i) g *= static_cast<double>(gates[i]);
  return g < kLeastGate ? 0 : g;
}

// The levels of one weight that are in, of b bits, and their classes.
struct Levels {
  int count;
  int32_t low, high;
  bool is_signed, valid;
};

// gate_count: -1 without gates.
template <class A>
QUANTOPS_INLINE Levels make_levels(const A* gates, int64_t gate_count, int64_t bits, int most_bits, bool is_signed) {
  Levels l{1, 0, 0, is_signed, bits >= 0 && bits <= most_bits && (gate_count < 0 || gate_count == bits)};
  if (l.valid && gates)
    QUANTOPS_ROLLED
    for (int i = 0; i < bits; ++i) l.valid = l.valid && gates[i] >= A(0) && gates[i] <= A(1);
  if (!l.valid || bits == 0) return l;
  QUANTOPS_ROLLED
  while (l.count < bits && cumulative_gate(gates, l.count + 1) > 0) ++l.count;
  l.high = top_of_level(l.count, is_signed);
  l.low = is_signed ? -l.high - 1 : 0;
  return l;
}

// The level, counted from 1, of class i.
QUANTOPS_INLINE int level_of(int32_t i, bool is_signed) {
  const uint32_t m = static_cast<uint32_t>(i < 0 ? ~i : i);
#if defined(__CUDA_ARCH__)
  const int width = 32 - __clz(static_cast<int>(m));
#else
  int width = 0;
  for (uint32_t v = m; v; v >>= 1) ++width;
#endif
  return is_signed ? width + 1 : width > 0 ? width : 1;
}

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
QUANTOPS_INLINE A far_limit() { return sizeof(A) == 4 ? A(25) : A(50); }

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

// The hard class with gates. A class is 1/(cosh(beta/2) + cosh(beta (i - v))) likely, which is log-concave in v, so the
// winner never falls while v rises: the top class of level t, or one below it, wins exactly up to some v = T_t, and
// where none of these bounds holds, the nearest class does. Below 0 the same is true of -1 - v, the mirrored value.

// Where, going up, the classes first..last, 1/ratio as likely by their gate, begin to win against class `top` below
// them.
QUANTOPS_INLINE double crossing(double ratio, double beta, double top, double first, double last) {
  if (ratio == 1 && first == top + 1) return top + 0.5;
  const double h = 0.5 * beta, inverse = 1 / ratio;
  // Half way between two of its classes a level is least likely. It wins there from `reach`/beta above `top` on, which
  // is cosh(reach) = cosh(h) (2 ratio - 1); the first point where it wins belongs to that class or the one below.
  const double x = log(2 * ratio - 1) + (h + log(0.5 + 0.5 * exp(-2 * h)));
  const double reach = x > 30 ? x + 0.69314718055994531 : log(exp(x) + sqrt(exp(2 * x) - 1));
  double i = rint(top + reach / beta), best = std::numeric_limits<double>::infinity();
  i = !(i > first) ? first : i > last ? last : i;
  for (int n = 0; n < 2; ++n) {
    const double delta = 0.5 * beta * (i - top), e = exp(-2 * delta), a = inverse - e;  // a y^2 - 2 b y = c
    const double b = 0.5 * (1 - inverse) * (exp(h - delta) + exp(-h - delta)), c = 1 - e * inverse;
    if (a > 0) {
      const double at = 0.5 * (i + top) + log((b + sqrt(b * b + a * c)) / a) / beta;
      if (at < best) best = at;
    }
    if (i > first) i -= 1;
  }
  return best;
}

// The least number of type A that is not below v.
QUANTOPS_INLINE float round_up(double v, float) {
  const float r = static_cast<float>(v);
  return static_cast<double>(r) < v ? bits_of<float>(bits_of<uint32_t>(r) + 1) : r;
}
QUANTOPS_INLINE double round_up(double v, double) { return v; }

// T_1..T_(count-1) into bound[0..]. Levels enter from the lowest; a new one cuts off what is above its first win.
template <class A>
QUANTOPS_INLINE void hard_bounds(const A* gates, const Levels& levels, A alpha, A sigma, A* bound) {
  const double beta = beta_of(static_cast<double>(alpha), static_cast<double>(sigma));
  for (int u = 2; u <= levels.count; ++u) {
    const double first = top_of_level(u - 1, levels.is_signed) + 1, last = top_of_level(u, levels.is_signed);
    const double weight = cumulative_gate(gates, u);
    int s = u - 1;
    A at = A(0);
    for (;; --s) {  // down to the level that level u first wins against
      const double ratio = cumulative_gate(gates, s) / weight;
      at = round_up(crossing(ratio, beta, top_of_level(s, levels.is_signed), first, last), A());
      if (s == 1 || at > bound[s - 2]) break;
    }
    for (; s < u; ++s) bound[s - 1] = at;
  }
}

// The mirrored value and class of x, class c >= 0 being itself and c < 0 being -1 - c; `below` = 1 for those, else 0.
template <class A>
struct Mirrored {
  A value, c, below;
};

// Where x begins to count: at 0 without classes below.
template <class A>
QUANTOPS_INLINE A lowest_value(const Bins<A>& p) {
  return p.low < A(0) ? std::numeric_limits<A>::lowest() : A(0);
}

// `lowest`: lowest_value(p).
template <class A>
QUANTOPS_INLINE Mirrored<A> mirror(A x, const Bins<A>& p, A lowest) {
  const A v = at_least(x * p.inv_alpha, lowest), below = v < A(0) ? A(1) : A(0);
  const A size = v < A(0) ? -v : v + A(0);  // not -0
  // size - below is exact where it matters: from 1/2 up. Infinity counts as the largest number, below an infinite
  // bound.
  const A value = at_most(size - below, std::numeric_limits<A>::max());
  return {value, rint_small(at_most(size, p.high + below)) - below, below};
}

// Applies T_t: the class is at most `top` below it. Called from the highest t to the lowest, so that the least counts;
// `most` is infinite before.
template <class A>
QUANTOPS_INLINE A bounded(A value, A most, A bound, A top) {
  return value < bound ? top : most;
}

template <class A>
QUANTOPS_INLINE A unmirrored(A c, A below) {
  return c * (A(1) - A(2) * below) - below;
}

// --------------------------------------------------------------------------------------------------- winner's backward

// What dL/dq is multiplied by in the gradients of x, alpha and sigma.
template <class A>
struct Factors {
  A x, alpha, sigma;
};

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
// n2 = t/(b + t), pi = 1 - n1 - n2 = (1 - t) b/P with P = (1 + b)(b + t), T = n2 - n1 and
// 2 Q = n1 + n2 + 2 t/(1 - t). The whole grid is a bin like that, too: B = b exp(-beta k) of the upper end, k classes
// above c, and F/b with F = t exp(-beta l) of the lower one, l classes below: D = (1 - theta)/((1 + B)(1 + F/b)).
// Exponents are those of 2. No end counts that is more than a number of sigmas away from the bin.
//
// For all of that one exponential, one division, and what depends on the class alone.
template <class A>
QUANTOPS_INLINE A least_decay() { return sizeof(A) == 4 ? A(-25.25) : A(-55); }  // of exp(-beta k): log2, or it is 0
template <class A>
QUANTOPS_INLINE A most_beyond() { return sizeof(A) == 4 ? A(36) : A(72); }  // of b: log2; nothing changes beyond
// log2 of 1/b in the middle of a bin, at most: wider ones lack as much of their middle, where nothing changes.
template <class A>
QUANTOPS_INLINE A most_half() { return sizeof(A) == 4 ? A(40) : A(160); }

template <class A>
struct OneInterval {
  A rate, half, beyond;    // log2(e)/sigma, log2(e) beta/2, the largest w of mirrored_offset
  A decay;                 // log2(e) beta
  A t, twice;              // exp(-beta), not below 2^(-2 most_half); 2 t/(1 - t)
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
  k.twice = static_cast<A>(2 * t / sharp);
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
QUANTOPS_INLINE float change_sign(float v, float by) {
  return bits_of<float>(bits_of<uint32_t>(v) ^ (bits_of<uint32_t>(by) & 0x80000000u));
}
QUANTOPS_INLINE double change_sign(double v, double by) {
  return bits_of<double>(bits_of<uint64_t>(v) ^ (bits_of<uint64_t>(by) & 0x8000000000000000u));
}
template <class A>
QUANTOPS_INLINE A mirrored(A v, A c, const OneInterval<A>& k) { return change_sign(v, c - k.middle); }

// w = log2(e) z, mirrored.
template <bool kPlain, class A>
QUANTOPS_INLINE A mirrored_offset(A x, A c, const Bins<A>& p, const OneInterval<A>& k) {
  const A z = ((x - c * p.alpha_head) - c * p.alpha_tail) * k.rate;
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
QUANTOPS_INLINE A decay_exponent(A n, const OneInterval<A>& k) { return -k.decay * n; }
template <class A>
QUANTOPS_INLINE A decay_of(A n, const OneInterval<A>& k) {
  const A exponent = decay_exponent(n, k), decay = power_of_two(at_least(exponent, A(2) * least_decay<A>()));
  return exponent < least_decay<A>() ? A(0) : decay;
}

// What the ends of the grid are for class c: exp(-beta k) of the nearer, F of the farther.
template <class A>
struct Ends {
  A near, far;
};

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

template <bool kFar, class A>
QUANTOPS_INLINE Ends<A> ends_of(A c, const OneInterval<A>& k) {
  const A near = decay_of(classes_to_near_end(c, k), k);
  return {near, kFar ? k.t * decay_of(classes_to_far_end(c, k), k) : A(0)};
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
QUANTOPS_INLINE Slopes<A> winner_of_one(A c, A b, const Ends<A>& ends, const OneInterval<A>& k) {
  const A over = A(1) + b, under = b + k.t, inv = A(1) / (over * under), pi = b * inv;
  const A n1 = pi * under, n2 = k.t * (over * inv), t = n2 - n1, q = (n1 + n2) + k.twice;
  if (!kNear) return {pi * t, pi * q};
  const A away = from_middle(c, k), outer = b * ends.near, whole = A(1) + outer;
  const A spread = (k.half_classes - away) * k.spread;
  if (!kFar) return {pi * (t * whole + outer), pi * (q * whole - spread * outer)};
  const A sum = b + ends.far, r = sum * inv, far = (ends.far * inv) * whole;
  return {r * (t * whole + outer) - far,
          r * (q * whole - spread * (ends.near * sum)) - far * (((k.half_classes + away) * k.spread) * whole)};
}

// The factors that these slopes come to, at an element with its c and w.
template <class A>
QUANTOPS_INLINE Factors<A> factors_of_one(A c, A w, const Slopes<A>& s, const Bins<A>& p, const OneInterval<A>& k) {
  return winner_factors(c, k.ratio * mirrored(s.rt, c, k), A(0.5) * (k.ratio * s.rq),
                        mirrored(w, c, k) * A(-0.69314718055994531), p);
}

// S at an edge and at minus that edge.
template <class A>
struct Edge {
  A s, n;
};

template <class A>
QUANTOPS_INLINE Edge<A> edge_at(A a) {
  const A e = exponential(a < A(0) ? a : -a), inv = A(1) / (A(1) + e), other = e * inv;
  return {a < A(0) ? other : inv, a < A(0) ? inv : other};
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

// Constants of level t. Its own classes are those above the level before it and, signed, those below.
template <class A>
struct Level {
  A top, bottom, weight, step;  // weight = G_t, step = G_t - G_(t+1)
  A own, whole;                 // 1 - exp(-beta n) of the n classes of its own on one side, of all from bottom to top
};

template <class A>
QUANTOPS_INLINE Level<A> make_level(const A* gates, const Levels& l, int t, A beta) {
  const int32_t top = top_of_level(t, l.is_signed), before = t > 1 ? top_of_level(t - 1, l.is_signed) : 0;
  const A weight = static_cast<A>(cumulative_gate(gates, t));
  const A next = t < l.count ? static_cast<A>(cumulative_gate(gates, t + 1)) : A(0);
  const double width = static_cast<double>(beta), classes = l.is_signed ? 2.0 * top + 2 : top + 1.0;
  const A whole = static_cast<A>(one_minus_exp(width * classes));
  return {static_cast<A>(top), l.is_signed ? static_cast<A>(-top - 1) : A(0), weight, weight - next,
          t == 1 ? whole : static_cast<A>(one_minus_exp(width * (top - before))), whole};
}

// All classes as one level: what there is without gates.
template <class A>
QUANTOPS_INLINE Level<A> make_only_level(const Levels& l, A beta) {
  const A whole = static_cast<A>(one_minus_exp(static_cast<double>(beta) * (l.high - l.low + 1.0)));
  return {static_cast<A>(l.high), static_cast<A>(l.low), A(1), A(1), whole, whole};
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

// ---------------------------------------------------------------------------------------------------------------- draw

// The mass of [lo_t, hi_t] times its step: the part that it has in the mixture r.
template <class A>
QUANTOPS_INLINE A interval_mass(const Level<A>& k, A c, A z, const Bins<A>& p) {
  const Edge<A> top = edge_at(p.beta * (k.top + A(0.5) - c) - z);
  const Edge<A> bottom = edge_at(p.beta * (k.bottom - A(0.5) - c) - z);
  return k.step * ((top.s * bottom.n) * k.whole);
}

template <class A>
QUANTOPS_INLINE A unit_of(uint32_t word) {  // [0, 1)
  return static_cast<A>(static_cast<int32_t>(word >> 8)) * A(1.0 / 16777216);
}

// A class of [lo_t, hi_t] drawn from pi by inverting the logistic distribution; (c, z) of the element.
template <class A>
QUANTOPS_INLINE A draw_inside(uint32_t word, const Level<A>& k, A c, A z, const Bins<A>& p) {
  const A half_step = A(1.0 / 33554432);
  const A u = unit_of<A>(word) + half_step, rest = unit_of<A>(~word) + half_step;
  const A near = at_most(at_least(c, k.bottom), k.top);
  const A at = clamp_far(z + p.beta * (c - near), p);
  const Edge<A> a = edge_at(p.beta * (k.top + A(0.5) - near) - at);
  const Edge<A> b = edge_at(p.beta * (k.bottom - A(0.5) - near) - at);
  const A below = rest * b.s + u * a.s, above = rest * b.n + u * a.n;
  const A steps = ((logarithm(below) - logarithm(above)) + at) / p.beta;
  const A i = near + rint_small(at_most(at_least(steps, k.bottom - k.top), k.top - k.bottom));
  return at_most(at_least(i, k.bottom), k.top) + A(0);
}

// ---------------------------------------------------------------------------------------------- soft, over the classes

// Where it is not taken over the edges (soft_edges.h), the soft sum runs outward from c, n = 1, 2, ... classes up and
// down at once. With y = exp(z - half) and w = exp(-z - half), the edges beyond c are at y exp(-beta n) and
// w exp(-beta n). pi_i = sharp u_i.

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

}  // namespace quantops
