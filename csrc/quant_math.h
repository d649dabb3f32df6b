// The uniform quantizers per element: one inline statement that the CPU and the CUDA kernels both call.
//
// The same arithmetic, operation by operation, as quantops/reference/uniform.py. It is plain C++ in A = float or double
// and counts on the build to round every operation on its own: -ffp-contract=off for the host compiler, -fmad=false
// for nvcc, and no fast-math anywhere. Comparisons are written as ternaries, which vectorize, where fmin does not.
#pragma once
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

enum Rule : int64_t { kRoundClamp = 0, kFloor = 1, kNearest = 2 };  // the order of RULES in the reference

// rint, half to even, for 0 <= v < 2^22: adding 1.5 * 2^(mantissa bits) leaves no room for a fraction.
#if defined(__CUDACC__) || defined(QUANTOPS_EMULATE)
QUANTOPS_INLINE float rint_small(float v) { return (v + 12582912.f) - 12582912.f; }
QUANTOPS_INLINE double rint_small(double v) { return (v + 6755399441055744.) - 6755399441055744.; }
template <class A>
QUANTOPS_INLINE A floor_small(A v) {
  A r = rint_small(v);
  return r > v ? r - A(1) : r;
}
#else  // CPUs have instructions for both
QUANTOPS_INLINE float rint_small(float v) { return __builtin_rintf(v); }
QUANTOPS_INLINE double rint_small(double v) { return __builtin_rint(v); }
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

// All that one scale and one (bits, k) fix. Out-of-range values make `offset` and `step` NaN, so every float that is
// computed from them is NaN too; integer results and gradients ask `valid`.
template <class A>
struct Quantizer {
  A scale, low;   // the weights whose codes differ lie in [low, scale]
  A inv;          // 0.5/s signed, 1/s unsigned; 0 where s = 0 or 1/s overflows
  A offset;       // 0.5 signed, 0 unsigned
  A mul, top;     // 2^n, 2^n - 1
  A mul_lo, top_lo, pow_k;  // 2^(n-k), 2^(n-k) - 1, 2^k
  A a, b;         // m = a * c + b
  A step;         // q = m * step
  A unit_step;    // the step of a scale of one
  A inv_scale;    // 1/s, 0 where s = 0 or 1/s overflows
  bool is_signed, valid;
};

QUANTOPS_INLINE bool valid_bits(int64_t n, int64_t k) {
  return n >= 0 && n <= kMaxBits && (k == 0 || (k >= 1 && k < n));
}

template <class A>
QUANTOPS_INLINE bool valid_scale(A s) {
  return s >= A(0) && s <= std::numeric_limits<A>::max();
}

template <class A>
QUANTOPS_INLINE Quantizer<A> make_quantizer(A s, int64_t n, int64_t k, bool full, bool is_signed) {
  Quantizer<A> p;
  s = s + A(0);  // -0 is 0
  p.valid = valid_bits(n, k) && valid_scale(s);
  p.is_signed = is_signed;
  p.scale = s;
  p.low = is_signed ? -s : A(0);
  if (!p.valid) n = k = 0;
  A inv_scale = A(1) / s;
  bool degenerate = !(inv_scale <= std::numeric_limits<A>::max());
  p.inv_scale = degenerate ? A(0) : inv_scale;
  p.inv = degenerate ? A(0) : (is_signed ? A(0.5) : A(1)) / s;
  p.mul = A(int64_t(1) << n);
  p.top = p.mul - A(1);
  p.mul_lo = A(int64_t(1) << (n - k));
  p.top_lo = p.mul_lo - A(1);
  p.pow_k = A(int64_t(1) << k);
  p.a = (is_signed && full) ? A(2) : A(1);
  p.b = !is_signed || n == 0 ? A(0) : (full ? -p.top : -A(int64_t(1) << (n - 1)));
  if (full) {
    p.unit_step = n == 0 ? A(0) : A(1) / p.top;
    p.step = n == 0 ? A(0) : s / p.top;
  } else {
    p.unit_step = n == 0 ? A(0) : (is_signed ? A(2) : A(1)) / p.mul;
    p.step = n == 0 ? A(0) : s * p.unit_step;
  }
  p.offset = is_signed ? A(0.5) : A(0);
  if (!p.valid) p.offset = p.step = p.unit_step = quiet_nan<A>();
  return p;
}

// u for the codes of round_clamp; NaN where w is NaN. It clamps w, not u: that takes infinities out before they meet
// an inverse of 0, and leaves u at most a rounding error outside [0, 1], which rint and the clamp of the code remove.
template <class A>
QUANTOPS_INLINE A round_clamp_unit(A w, const Quantizer<A>& p) {
  A v = at_most(at_least(w, p.low), p.scale);
  return v * p.inv + p.offset;
}

// u in [0, 1] as any code rule takes it; NaN where w is NaN.
template <class A>
QUANTOPS_INLINE A unit(A w, const Quantizer<A>& p) {
  A t = w * p.inv;
  t = ((t != t) & (w == w)) ? A(0) : t;  // inf * 0
  A u = t + p.offset;
  u = u < A(0) ? A(0) : u;
  return u > A(1) ? A(1) : u;
}

template <class A>
QUANTOPS_INLINE A round_clamp_code(A u, A mul, A top) {
  return at_most(rint_small(mul * u), top);
}

template <class A>
QUANTOPS_INLINE A code(A u, Rule rule, const Quantizer<A>& p) {
  if (rule == kNearest) return rint_small(p.top * u);
  if (rule == kRoundClamp) return round_clamp_code(u, p.mul, p.top);
  A c = floor_small(p.mul * u);
  return c > p.top ? p.top : c;
}

template <class A>
QUANTOPS_INLINE A level(A c, const Quantizer<A>& p) {
  return p.a * c + p.b;
}

// B_k of the weight with unit u and code c, as a float; NaN where w is, which magnitude and to_int take for 0.
template <class A>
QUANTOPS_INLINE A lsb_residual(A u, A c, const Quantizer<A>& p) {
  return c - p.pow_k * round_clamp_code(u, p.mul_lo, p.top_lo);
}

// |b|, 0 for NaN. As a sum of two maxima, since compilers make branches of the shorter forms and do not vectorize them.
template <class A>
QUANTOPS_INLINE A magnitude(A b) {
#if defined(__CUDA_ARCH__)
  return fmax(fabs(b), A(0));  // NaN loses
#endif
  return (b > A(0) ? b : A(0)) + (b < A(0) ? -b : A(0));
}

// The sign of an integer b; NaN stays NaN.
template <class A>
QUANTOPS_INLINE A sign(A b) {
  return at_most(at_least(b, A(-1)), A(1));
}

template <class A>
QUANTOPS_INLINE bool inside(A w, const Quantizer<A>& p) {
  return (w >= p.low) & (w <= p.scale);
}

// As round_clamp_unit, but NaN counts as the lowest weight, whose B is 0.
template <class A>
QUANTOPS_INLINE A round_clamp_unit_of_number(A w, const Quantizer<A>& p) {
  A v = w > p.low ? w : p.low;
  return at_most(v, p.scale) * p.inv + p.offset;
}

// The sign of B; 0 for NaN.
template <class A>
QUANTOPS_INLINE A lsb_sign(A w, const Quantizer<A>& p) {
  A u = round_clamp_unit_of_number(w, p);
  return sign(lsb_residual(u, round_clamp_code(u, p.mul, p.top), p));
}

// sign(B) * inside, the derivative of R.
template <class A>
QUANTOPS_INLINE A penalty_slope(A w, const Quantizer<A>& p) {
  A b = lsb_sign(w, p);
  return inside(w, p) ? b : A(0);
}

// dL/dw from g = dL/dq and r = dL/dR.
template <class A>
QUANTOPS_INLINE A grad_weight(A w, A g, A r, const Quantizer<A>& p) {
  A v = g + r * lsb_sign(w, p);
  v = inside(w, p) ? v : A(0);
  return p.valid ? v : quiet_nan<A>();
}

// dq/ds per element.
template <class A>
QUANTOPS_INLINE A scale_grad_term(A w, const Quantizer<A>& p) {
  A ratio = level(round_clamp_code(round_clamp_unit(w, p), p.mul, p.top), p) * p.unit_step;
  return ratio - (inside(w, p) ? w * p.inv_scale : A(0));
}

// An integer result: 0 for NaN.
template <class A>
QUANTOPS_INLINE int32_t to_int(A c, bool valid) {
  A v = c == c ? c : A(0);
  return valid ? static_cast<int32_t>(v) : kInvalid;
}

}  // namespace quantops
