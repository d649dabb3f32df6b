// Uniform quantization of activations per element, for the CPU and the CUDA kernels; the equations are in
// quantops/reference/activation.py. The codes are those of quant_math.h; here all rules are one statement, since which
// one it is comes as data.
#pragma once
#include <cmath>

#include "quant_math.h"

namespace quantops {

// The orders of FRONTS, KEEPS and LEARNS in the reference.
enum Front : int64_t { kNoFront = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };
enum Keep : int64_t { kInput = 0, kBits = 1, kResidual = 2 };
enum Learn : int64_t { kLearnNone = 0, kLearnClip = 1, kLearnStep = 2 };

constexpr int kResiduals = 126;  // numbers of a residual, on either side of kMiddle
constexpr int kMiddle = 128, kBelow = 0, kAbove = 255;

QUANTOPS_INLINE int64_t kept_bytes(int64_t numel, int64_t keep) {
  return keep == kInput ? 0 : keep == kBits ? (numel + 7) / 8 : numel;
}

// All that one scale, one offset and one number of bits fix. Out of range, `step` and `valid_zero` are NaN.
template <class A>
struct Grid {
  A offset;                  // b
  A mul, shift, times;       // y = (v * mul + shift) * times, the code before it is rounded
  A down, top;               // c = clamp(rint(y) less `down` (1 or 0) where that is above y, 0, top)
  A a, b;                    // m = a * c + b
  A step;                    // q = m * step + offset
  A low, high;               // inside
  A per_code;                // rho = (m * step - v) * per_code; 0 with 0 bits
  A first, last, unit_step;  // levels of the ends, step of a scale of one
  A valid_zero;              // 0
  A zero, one;               // as variables, for which CPUs' compilers take maximum and minimum; constants they blend
};

// Scales that leave room for a power of two on either side: 2^n may then be multiplied before x is, with the same bits.
constexpr double kLeastScale = 0x1p-100, kMostScale = 0x1p100;

template <class A>
QUANTOPS_INLINE bool valid_step_scale(A s) {
  return s >= A(kLeastScale) && s <= A(kMostScale);
}

template <class A>
QUANTOPS_INLINE bool finite_offset(A b) {
  return b - b == A(0);
}

template <class A>
QUANTOPS_INLINE Grid<A> make_grid(A s, A offset, int32_t n, int64_t rule, bool is_signed, int64_t front) {
  const bool full = rule != kRoundClamp, in_range = n >= 0 && n <= kMaxBits;
  const bool valid = in_range && valid_step_scale(s) && finite_offset(offset);
  if (!in_range) n = 0;
  const A codes = A(int64_t(1) << n), power = rule == kNearest ? A(1) : codes;
  Grid<A> p;
  p.offset = offset;
  p.mul = (is_signed ? A(0.5) : A(1)) / s * power;
  p.shift = is_signed ? A(0.5) * power : A(0);
  p.top = codes - A(1);
  p.times = rule == kNearest && n > 0 ? p.top : A(1);
  p.down = rule == kFloor ? A(1) : A(0);
  p.a = is_signed && full ? A(2) : A(1);
  p.b = !is_signed || n == 0 ? A(0) : full ? -p.top : A(-0.5) * codes;
  p.unit_step = n == 0 ? A(0) : full ? A(1) / p.top : (is_signed ? A(2) : A(1)) / codes;
  p.step = n == 0 ? A(0) : full ? s / p.top : s * p.unit_step;
  p.low = front == kRelu ? std::numeric_limits<A>::denorm_min() : is_signed ? -s : A(0);  // kRelu: x > 0
  p.high = s;
  p.per_code = n == 0 ? A(0) : A(1) / (p.a * p.step);
  p.first = p.b;
  p.last = p.a * p.top + p.b;
  p.valid_zero = valid ? A(0) : quiet_nan<A>();
  if (!valid) p.step = quiet_nan<A>();
  p.zero = A(0);
  p.one = A(1);
  return p;
}

// rint, half to even, of any v; beyond the integers that codes can be, any number beyond them.
#if defined(__CUDACC__) || defined(QUANTOPS_EMULATE)
template <class A>
QUANTOPS_INLINE A rint_code(A v) {
  return rint_small(at_most(at_least(v, A(-1 << 20)), A(1 << 20)));
}
#else
template <class A>
QUANTOPS_INLINE A rint_code(A v) {
  return rint_small(v);
}
#endif

// m of v = x - offset. As the reference has it, which clamps before it rounds: the ends are integers and rounding keeps
// order, so that either gives the same. kPlain: by round_clamp.
template <bool kPlain, class A>
QUANTOPS_INLINE A grid_level(A v, const Grid<A>& p) {
  const A y = kPlain ? v * p.mul + p.shift : (v * p.mul + p.shift) * p.times, r = rint_code(y);
  const A c = at_most(at_least(kPlain ? r : r - (r > y ? p.down : A(0)), p.zero), p.top);
  return kPlain ? c + p.b : product_plus(p.a, c, p.b);  // exact: a is 1 or 2
}

template <class A>
QUANTOPS_INLINE bool inside(A v, const Grid<A>& p) {
  return (v >= p.low) & (v <= p.high);
}

// rho from m * step.
template <class A>
QUANTOPS_INLINE A residual_of(A value, A v, const Grid<A>& p) {
  return at_most(at_least((value - v) * p.per_code, -p.one), p.one);
}

// The number that is kept of an element, as a float, from m * step. Inside, rho may leave -1..1 by a rounding that this
// one takes back; outside it is not looked at.
template <class A>
QUANTOPS_INLINE A residual_number(A value, A v, const Grid<A>& p) {
  const A number = rint_small(A(kResiduals) * ((value - v) * p.per_code)) + A(kMiddle);
  const A below_or_in = v >= p.low ? number : A(kBelow);
  return v > p.high ? A(kAbove) : below_or_in;
}

// What q of an element that is not inside is compared with: above where it is larger.
template <class A>
QUANTOPS_INLINE A middle_of(const Grid<A>& p) {
  return A(0.5) * (p.first + p.last) * p.step + p.offset;
}

// Sums over elements of g * rho inside (times `kResiduals` where the numbers were kept), and of g above and below.
struct SideSums {
  double inside = 0, above = 0, below = 0;

  QUANTOPS_INLINE void add(const SideSums& o) {
    inside += o.inside;
    above += o.above;
    below += o.below;
  }
};

// dL/ds and dL/db of a scale with `count` elements.
template <class A>
QUANTOPS_INLINE void finish_sums(const SideSums& s, int64_t count, int64_t learn, int64_t keep, const Grid<A>& p,
                                 A& of_scale, A& of_offset) {
  double scale = double(p.last) * s.above + double(p.first) * s.below, offset = s.above + s.below;
  if (learn == kLearnStep) {
    const double inside = keep == kResidual ? s.inside / kResiduals : s.inside;
    const double last = p.last < A(1) ? 1.0 : double(p.last), norm = 1.0 / sqrt(last * double(count > 1 ? count : 1));
    scale = (scale + double(p.a) * inside) * norm;
    offset *= norm;
  }
  of_scale = A(double(p.unit_step) * scale) + p.valid_zero;
  of_offset = A(offset) + p.valid_zero;
}

// Where elements lie: element i of memory belongs to channel (i / run) % count.
struct Channels {
  int64_t count, run;

  QUANTOPS_INLINE int64_t of(int64_t i) const { return count == 1 ? 0 : i / run % count; }
};

}  // namespace quantops
