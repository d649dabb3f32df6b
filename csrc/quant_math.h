// The uniform quantizers per element: one inline statement that the CPU and the CUDA kernels both call.
//
// The same arithmetic, operation by operation, as quantops/reference/uniform.py. It is plain C++ in A = float or double
// and counts on the build to round every operation on its own: -ffp-contract=off for the host compiler, -fmad=false
// for nvcc, and no fast-math anywhere. A product and a sum are rounded as one where it is written, by product_plus:
// on the way to a code or to q only where the product is exact, which gives the same bits. Comparisons are written as
// ternaries, which vectorize, where fmin does not.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define QUANTOPS_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__) || defined(__clang__)
#define QUANTOPS_INLINE inline __attribute__((always_inline))
#else
#define QUANTOPS_INLINE inline
#endif

// In front of a loop that need not be fast, on a GPU: without it, the compiler makes code for every turn.
#if defined(__CUDACC__)
#define QUANTOPS_ROLLED _Pragma("unroll 1")
#else
#define QUANTOPS_ROLLED
#endif

namespace quantops {

constexpr int kMaxBits = 16;
constexpr int32_t kInvalid = INT32_MIN;  // integer results of a tensor whose bits, k or scale are out of range

enum Rule : int64_t { kRoundClamp = 0, kFloor = 1, kNearest = 2, kRules };  // the order of RULES in the reference

QUANTOPS_INLINE float absolute_of(float v) { return fabsf(v); }
QUANTOPS_INLINE double absolute_of(double v) { return fabs(v); }

// a * b + c, rounded once. An instruction on GPUs and on CPUs since 2013; on older ones a slow call.
QUANTOPS_INLINE float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}
QUANTOPS_INLINE double fused(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

#if defined(__CUDACC__) || defined(QUANTOPS_EMULATE)
// a * b + c in the fewest instructions: rounded once, or twice. The same where a * b is exact; else of sums and their
// terms alone.
template <class A>
QUANTOPS_INLINE A product_plus(A a, A b, A c) {
  return fused(a, b, c);
}

// Adding this to |v| < 2^22 leaves no room for a fraction: it rounds to an integer, half to even.
template <class A>
constexpr A kRounding = sizeof(A) == 4 ? A(12582912.) : A(6755399441055744.);  // 1.5 * 2^(mantissa bits)

// rint, half to even, for |v| < 2^22; and of a product that is exact.
template <class A>
QUANTOPS_INLINE A rint_small(A v) {
  return (v + kRounding<A>)-kRounding<A>;
}
template <class A>
QUANTOPS_INLINE A rint_product(A a, A b) {
  return fused(a, b, kRounding<A>) - kRounding<A>;
}
template <class A>
QUANTOPS_INLINE A floor_small(A v) {
  A r = rint_small(v);
  return r > v ? r - A(1) : r;
}
#else  // CPUs have instructions for both
template <class A>
QUANTOPS_INLINE A product_plus(A a, A b, A c) {
  return a * b + c;
}
QUANTOPS_INLINE float rint_small(float v) { return __builtin_rintf(v); }
QUANTOPS_INLINE double rint_small(double v) { return __builtin_rint(v); }
template <class A>
QUANTOPS_INLINE A rint_product(A a, A b) {
  return rint_small(a * b);
}
QUANTOPS_INLINE float floor_small(float v) { return __builtin_floorf(v); }
QUANTOPS_INLINE double floor_small(double v) { return __builtin_floor(v); }
#endif

// v, but no more than `top`, no less than `low`; NaN stays NaN. On a GPU one instruction, where the ternary takes two.
template <class A>
QUANTOPS_INLINE A at_most(A v, A top) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(A) == 4) {
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(top));
    return v;
  }
#endif
  return v > top ? top : v;
}

template <class A>
QUANTOPS_INLINE A at_least(A v, A low) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(A) == 4) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(low));
    return v;
  }
#endif
  return v < low ? low : v;
}

template <class A>
QUANTOPS_INLINE A quiet_nan() {
  return std::numeric_limits<A>::quiet_NaN();
}

// Where values lie; the order of GRIDS in the reference. On the sign grid a code has a sign in what follows.
enum GridKind : int64_t { kDyadic = 0, kFull = 1, kSign = 2 };

// All that one scale and one (bits, k) fix. Out-of-range values make `offset`, the steps and `outside` NaN and put
// every weight outside, so every float that is computed from them is NaN too; integer results ask `valid`.
template <class A>
struct Quantizer {
  A scale, low;    // the weights whose codes differ lie in [low, scale]
  A silent;        // a weight whose B is 0
  A inv;           // 0.5/s signed, 1/s unsigned and on the sign grid; 0 where s = 0 or 1/s overflows
  A slope;         // the same, but 1 there
  A offset;        // 0.5 signed, 0 unsigned and on the sign grid
  A mul, top;      // 2^n, 2^n - 1
  A bottom, most;  // round_clamp's codes lie between 0 (sign grid: -top) and top; where inv = 0, both are that of w = 0
  A mul_lo, bottom_lo, most_lo, pow_k;  // the same of n - k bits; 2^k
  A count;                              // of the codes that are stored: 2^n, on the sign grid twice that
  A a, b;                               // m = a * c + b
  A step;                               // q = m * step
  A unit_step;                          // the step of a scale of one
  A inv_scale;                          // 1/s, 0 where s = 0 or 1/s overflows
  A outside;                            // the gradient of a weight outside the scale: 0
  bool is_signed, valid;
};

// A sign is a bit of the code besides.
QUANTOPS_INLINE int64_t most_bits(GridKind grid) { return grid == kSign ? kMaxBits - 1 : kMaxBits; }

// Bits of a code that is stored, of n bits.
QUANTOPS_INLINE int64_t code_bits(int64_t n, GridKind grid) { return n + (grid == kSign && n > 0); }

QUANTOPS_INLINE bool valid_bits(int64_t n, int64_t k, GridKind grid) {
  return n >= 0 && n <= most_bits(grid) && (k == 0 || (k >= 1 && k < n));
}

template <class A>
QUANTOPS_INLINE bool valid_scale(A s) {
  return s >= A(0) && s <= std::numeric_limits<A>::max();
}

template <class A>
QUANTOPS_INLINE Quantizer<A> make_quantizer(A s, int64_t n, int64_t k, GridKind grid, bool is_signed) {
  Quantizer<A> p;
  const bool full = grid == kFull, centred = is_signed && grid != kSign;  // centred: w = 0 has u = 0.5
  s = s + A(0);                                                           // -0 is 0
  p.valid = valid_bits(n, k, grid) && valid_scale(s);
  p.is_signed = is_signed;
  p.scale = s;
  p.low = is_signed ? -s : A(0);
  p.silent = grid == kSign ? A(0) : p.low;
  if (!p.valid) n = k = 0;
  A inv_scale = A(1) / s;
  bool degenerate = !(inv_scale <= std::numeric_limits<A>::max());
  p.inv_scale = degenerate ? A(0) : inv_scale;
  p.inv = degenerate ? A(0) : (centred ? A(0.5) : A(1)) / s;
  p.mul = A(int64_t(1) << n);
  p.top = p.mul - A(1);
  p.slope = degenerate ? A(1) : p.inv;
  p.mul_lo = A(int64_t(1) << (n - k));
  p.pow_k = A(int64_t(1) << k);
  p.most = p.top;
  p.most_lo = p.mul_lo - A(1);
  p.bottom = grid == kSign ? -p.most : A(0);
  p.bottom_lo = grid == kSign ? -p.most_lo : A(0);
  if (degenerate) {
    const bool half = centred && n > 0;
    p.bottom = p.most = half ? A(0.5) * p.mul : A(0);
    p.bottom_lo = p.most_lo = half ? A(0.5) * p.mul_lo : A(0);
  }
  p.count = A(int64_t(1) << code_bits(n, grid));
  p.a = (is_signed && full) ? A(2) : A(1);
  p.b = !centred || n == 0 ? A(0) : (full ? -p.top : -A(int64_t(1) << (n - 1)));
  if (full) {
    p.unit_step = n == 0 ? A(0) : A(1) / p.top;
    p.step = n == 0 ? A(0) : s / p.top;
  } else {
    p.unit_step = n == 0 ? A(0) : (centred ? A(2) : A(1)) / p.mul;
    p.step = n == 0 ? A(0) : s * p.unit_step;
  }
  p.offset = centred ? A(0.5) : A(0);
  p.outside = A(0);
  if (!p.valid) p.scale = p.low = p.offset = p.step = p.unit_step = p.outside = quiet_nan<A>();
  return p;
}

// u for the codes of round_clamp, not clamped, since codes are; NaN where w is NaN.
template <class A>
QUANTOPS_INLINE A round_clamp_unit(A w, const Quantizer<A>& p) {
  return w * p.slope + p.offset;
}

// u in [0, 1] as the other code rules take it; NaN where w is NaN.
template <class A>
QUANTOPS_INLINE A unit(A w, const Quantizer<A>& p) {
  A t = w * p.inv;
  t = ((t != t) & (w == w)) ? A(0) : t;  // inf * 0
  A u = t + p.offset;
  u = u < A(0) ? A(0) : u;
  return u > A(1) ? A(1) : u;
}

// It may be -0, which `level` makes 0.
template <class A>
QUANTOPS_INLINE A round_clamp_code(A u, const Quantizer<A>& p) {
  return at_least(at_most(rint_product(p.mul, u), p.most), p.bottom);
}

template <class A>
QUANTOPS_INLINE A code(A w, Rule rule, const Quantizer<A>& p) {
  if (rule == kRoundClamp) return round_clamp_code(round_clamp_unit(w, p), p);
  const A u = unit(w, p);
  if (rule == kNearest) return rint_small(p.top * u);
  A c = floor_small(p.mul * u);
  return c > p.top ? p.top : c;
}

// An integer result: 0 for NaN.
template <class A>
QUANTOPS_INLINE int32_t to_int(A c, bool valid) {
  A v = c == c ? c : A(0);
  return valid ? static_cast<int32_t>(v) : kInvalid;
}

// A code as it is stored, with a sign in the bit above its magnitude; 0 for NaN. And back: neither has an effect on
// other grids.
template <class A>
QUANTOPS_INLINE int32_t stored_code(A c, const Quantizer<A>& p) {
  return to_int(c < A(0) ? p.mul - c : c, p.valid);
}

template <class A>
QUANTOPS_INLINE A code_of_stored(A c, const Quantizer<A>& p) {
  return c < p.mul ? c : p.mul - c;
}

template <class A>
QUANTOPS_INLINE A level(A c, const Quantizer<A>& p) {
  return product_plus(p.a, c, p.b);  // exact: a is 1 or 2
}

// B_k of the weight with unit u and code c, as a float; NaN where w is, which magnitude and to_int take for 0.
template <class A>
QUANTOPS_INLINE A lsb_residual(A u, A c, const Quantizer<A>& p) {
  const A low = at_least(at_most(rint_product(p.mul_lo, u), p.most_lo), p.bottom_lo);
  return product_plus(-p.pow_k, low, c);  // exact: pow_k is a power of two
}

// |b|, 0 for NaN. As a sum of two maxima, since compilers make branches of the shorter forms and do not vectorize them.
template <class A>
QUANTOPS_INLINE A magnitude(A b) {
#if defined(__CUDA_ARCH__)
  return fmax(fabs(b), A(0));  // NaN loses
#endif
  return (b > A(0) ? b : A(0)) + (b < A(0) ? -b : A(0));
}

// The sign of an integer b; 1 for NaN.
template <class A>
QUANTOPS_INLINE A sign(A b) {
#if defined(__CUDA_ARCH__)
  return fmax(fmin(b, A(1)), A(-1));  // NaN loses
#endif
  const A v = b < A(1) ? b : A(1);
  return v > A(-1) ? v : A(-1);
}

template <class A>
QUANTOPS_INLINE bool inside(A w, const Quantizer<A>& p) {
  return (w >= p.low) & (w <= p.scale);
}

// The weight, or for NaN one whose B is 0.
template <class A>
QUANTOPS_INLINE A number_of(A w, const Quantizer<A>& p) {
  return w == w ? w : p.silent;
}

// The sign of B; 1 for NaN, which is not inside.
template <class A>
QUANTOPS_INLINE A lsb_sign(A w, const Quantizer<A>& p) {
  const A u = round_clamp_unit(w, p);
  return sign(lsb_residual(u, round_clamp_code(u, p), p));
}

// g + r * sign(B) * inside: dL/dR added to a gradient.
template <class A>
QUANTOPS_INLINE A add_penalty_slope(A w, A g, A r, const Quantizer<A>& p) {
  return product_plus(inside(w, p) ? r : p.outside, lsb_sign(w, p), g);  // exact: a sign
}

// dL/dw from g = dL/dq and r = dL/dR.
template <class A>
QUANTOPS_INLINE A grad_weight(A w, A g, A r, const Quantizer<A>& p) {
  const A v = product_plus(r, lsb_sign(w, p), g);  // exact: a sign
  return inside(w, p) ? v : p.outside;
}

// dq/ds per element.
template <class A>
QUANTOPS_INLINE A scale_grad_term(A w, const Quantizer<A>& p) {
  const A ratio = level(round_clamp_code(round_clamp_unit(w, p), p), p) * p.unit_step;
  return product_plus(inside(w, p) ? -w : A(0), p.inv_scale, ratio);
}

}  // namespace quantops
