// Loops over a block of elements that share one quantizer. Each is compiled for three instruction sets (simd.h).
#pragma once
#include <cstdlib>
#include <cstring>

#include "cpu/blocks.h"
#include "cpu/simd.h"
#include "quant_math.h"

namespace quantops {

// What the LSB sums of a part of a weight come to.
struct LsbSums {
  double penalty = 0;  // sum |B| * step
  int64_t nonzero = 0;
  double sq_error = 0;
};

// The arithmetic of round_clamp again, in forms with the same bits in fewer operations.
enum Form {
  kGeneral,      // of any quantizer: the functions of quant_math.h
  kShort,        // of one that has_short_form
  kShortInside,  // the same, of weights that are all inside the scale: none of them NaN, no code below 0
};

// All but tiny scales on the dyadic and the sign grid have one.
QUANTOPS_INLINE bool has_short_form(const Quantizer<float>& p) {
  return p.a == 1 && p.inv > 0 && p.mul * p.inv <= std::numeric_limits<float>::max();
}

// f(the shortest form of the arithmetic): float32 ones are worth a loop of their own. `covered`: all weights are inside
// the scale. `wanted`: what a loop's short form asks for besides.
template <class A, class F>
void with_form(const Quantizer<A>& p, bool wanted, bool covered, const F& f) {
  if constexpr (sizeof(A) == 4) {
    if (wanted && has_short_form(p)) {
      if (covered && p.bottom == 0) return f(std::integral_constant<Form, kShortInside>());
      return f(std::integral_constant<Form, kShort>());
    }
  }
  f(std::integral_constant<Form, kGeneral>());
}

// Adding this rounds to an integer, half to even, and leaves it in the low bits of the sum.
constexpr float kIntegers = 12582912.f;  // 1.5 * 2^23
constexpr int32_t kZeroBits = 0x4b400000;

QUANTOPS_INLINE int32_t bits_of(float v) {
  int32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
QUANTOPS_INLINE float float_of(int32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

// 2^n * u, not clamped; NaN where w is NaN. A power of two multiplies exactly, before the other operations as after
// them, but where w * inv is so small that the code is that of w = 0 either way.
QUANTOPS_INLINE float scaled_unit(float w, const Quantizer<float>& p) { return w * (p.mul * p.inv) + p.mul * p.offset; }

// kZeroBits and the nearest integer to v, between bottom and top; either for NaN. Every step is monotone, so that
// clamping here does for clamping the weight, and integers are compared at twice the rate of floats.
template <Form form>
QUANTOPS_INLINE int32_t code_bits(float v, float bottom, float top) {
  const int32_t bits = bits_of(v + kIntegers);
  return at_most(form == kShort ? at_least(bits, kZeroBits + static_cast<int32_t>(bottom)) : bits,
                 kZeroBits + static_cast<int32_t>(top));
}

// m of the code with such bits.
QUANTOPS_INLINE float level_of_bits(int32_t bits, const Quantizer<float>& p) {
  return float_of(bits) - (kIntegers - p.b);
}

// Elements are read and written as they are stored.

// m of a weight; NaN where it is NaN.
template <Form form, class A>
QUANTOPS_INLINE A level_element(A w, const Quantizer<A>& p) {
  if constexpr (form == kGeneral) {
    return level(round_clamp_code(round_clamp_unit(w, p), p), p);
  } else if constexpr (form == kShort) {
    return at_most(at_least(scaled_unit(w, p) + kIntegers, kIntegers + p.bottom), kIntegers + p.top) -
           (kIntegers - p.b);
  } else {
    return level_of_bits(code_bits<form>(scaled_unit(w, p), p.bottom, p.top), p);
  }
}

template <Form form, class In, class Out, class A>
QUANTOPS_SIMD void quantize_loop(const In* __restrict w, Out* __restrict q, bool streaming, int64_t n,
                                 const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  map_lanes<In>(q, streaming, n, [&](A x) QUANTOPS_LANES { return level_element<form>(x, p) * p.step; }, w);
}

template <class In, class Out, class A>
void quantize_loop(const In* w, Out* q, bool streaming, int64_t n, const Quantizer<A>& p, bool covered) {
  with_form(p, true, covered, [&](auto form) { quantize_loop<form.value>(w, q, streaming, n, p); });
}

// One weight of msq: q, |B| and the squared error. With k = 1, the usual case, |B| is the parity of the code: half of
// the work. In the short forms q and |B| are those of a number for NaN too.
template <Form form, bool kOne, class A>
QUANTOPS_INLINE void msq_element(A x, const Quantizer<A>& p, A& q, int32_t& size, A& error) {
  if constexpr (form == kGeneral) {
    A u = round_clamp_unit(number_of(x, p), p), c = round_clamp_code(u, p), y = level(c, p) * p.step;
    size = kOne ? static_cast<int32_t>(c) & 1 : std::abs(static_cast<int32_t>(lsb_residual(u, c, p)));
    q = x == x ? y : x;
  } else {
    const int32_t c = code_bits<form>(scaled_unit(x, p), p.bottom, p.top);
    size = c & 1;
    q = level_of_bits(c, p) * p.step;
  }
  error = (q - x) * (q - x);
}

// In the place of results that nobody wants.
struct Nothing {};

QUANTOPS_INLINE int32_t sum_lanes(const int32_t* lanes) {
  int32_t sum = 0;
  for (int j = 0; j < kLanes; j++) sum += lanes[j];
  return sum;
}

// In eight sums, which do not wait for each other.
template <class A>
QUANTOPS_INLINE double sum_lanes_in_double(const A* lanes) {
  double sum[8] = {};
  for (int k = 0; k < kLanes; k += 8)
    for (int j = 0; j < 8; j++) sum[j] += lanes[k + j];
  return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

// |B| is below 2^16 and a block has 2^11 elements, so an int32 holds their sum; blocks add up in double. Lanes are
// written in runs: while they are, sums cannot stay in registers.
template <Form form, bool kOne, class In, class Out, class A>
QUANTOPS_SIMD void msq_loop(const In* __restrict w, Out* __restrict q, bool streaming, int64_t n,
                            const Quantizer<A>& quantizer, LsbSums& sums) {
  const Quantizer<A> p = quantizer;
  constexpr bool kWrites = !std::is_same_v<Out, Nothing>;
  constexpr bool kPairs = kWrites ? kAllPairs<In, Out> : kAllPairs<In>;
  alignas(64) Out run[kRun];
  A error[kLanes] = {};
  int32_t total[kLanes] = {}, nonzero[kLanes] = {};
  int64_t i = 0;
  for (; i + kRun <= n; i += kRun) {
    for (int k = 0; k < kRun; k += kLanes) {
      const Elements<In, kPairs> x(w + i + k);
      Results<In, Out, kPairs> y(run + k);
      for (int j = 0; j < kLanes; j++) {
        A value, e;
        int32_t size;
        msq_element<form, kOne>(x[j], p, value, size, e);
        if constexpr (kWrites) y.set(j, value);
        total[j] += size;
        if (!kOne) nonzero[j] += size < 1 ? size : 1;
        error[j] += e;
      }
      if constexpr (kWrites) y.finish();
    }
    if constexpr (kWrites)
      for (int k = 0; k < kRun; k += kLanes) put_lanes(q + i + k, run + k, streaming);
  }
  for (int j = 0; i < n; i++, j = (j + 1) % kLanes) {
    A y, e;
    int32_t size;
    msq_element<form, kOne>(widen(w[i]), p, y, size, e);
    if constexpr (kWrites) narrow_from<In>(y, q[i]);
    total[j] += size;
    if (!kOne) nonzero[j] += size < 1 ? size : 1;
    error[j] += e;
  }
  const int32_t b = sum_lanes(total);
  sums.nonzero += kOne ? b : sum_lanes(nonzero);
  sums.sq_error += sum_lanes_in_double(error);
  sums.penalty += b * double(p.step);
}

template <class In, class Out, class A>
void msq_loop(const In* w, Out* q, bool streaming, int64_t n, const Quantizer<A>& p, bool covered, LsbSums& sums) {
  if (p.pow_k != A(2)) return msq_loop<kGeneral, false>(w, q, streaming, n, p, sums);
  LsbSums part;
  with_form(p, true, covered, [&](auto form) {
    msq_loop<form.value, true>(w, q, streaming, n, p, part);
    if (part.sq_error == part.sq_error) return;
    part = {};  // there was a NaN
    msq_loop<kGeneral, true>(w, q, streaming, n, p, part);
  });
  sums.penalty += part.penalty;
  sums.nonzero += part.nonzero;
  sums.sq_error += part.sq_error;
}

template <Rule rule, class In, class A>
QUANTOPS_SIMD void encode_loop(const In* __restrict w, int32_t* __restrict codes, bool streaming, int64_t n,
                               const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  map_lanes<In>(codes, streaming, n, [&](A x) QUANTOPS_LANES { return stored_code(code(x, rule, p), p); }, w);
}

// B_k; 0 for NaN.
template <Form form, class A>
QUANTOPS_INLINE int32_t lsb_element(A w, const Quantizer<A>& p) {
  if constexpr (form == kGeneral) {
    const A u = round_clamp_unit(w, p);
    return to_int(lsb_residual(u, round_clamp_code(u, p), p), p.valid);
  } else {
    const A t = scaled_unit(number_of(w, p), p);
    const A high = float_of(code_bits<kShort>(t * (p.mul_lo / p.mul), p.bottom_lo, p.most_lo)) - kIntegers;
    return code_bits<kShort>(t, p.bottom, p.top) - kZeroBits - static_cast<int32_t>(p.pow_k * high);
  }
}

template <Form form, class In, class A>
QUANTOPS_SIMD void lsb_loop(const In* __restrict w, int32_t* __restrict b, bool streaming, int64_t n,
                            const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  map_lanes<In>(b, streaming, n, [&](A x) QUANTOPS_LANES { return lsb_element<form>(x, p); }, w);
}

template <class In, class A>
void lsb_loop(const In* w, int32_t* b, bool streaming, int64_t n, const Quantizer<A>& p) {
  with_form(p, true, false, [&](auto form) { lsb_loop<form.value>(w, b, streaming, n, p); });
}

// No result is NaN: on a CPU, what would make one has raised by now.
template <class Code, class Out, class A>
QUANTOPS_SIMD void decode_loop(const Code* __restrict codes, Out* __restrict q, bool streaming, int64_t n,
                               const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  map_lanes<Out>(
      q, streaming, n,
      [&](int32_t c) QUANTOPS_LANES { return level(code_of_stored(static_cast<A>(c), p), p) * p.step; }, codes);
}

// The union of the bits of codes: below a power of two if all of them are.
QUANTOPS_SIMD inline uint32_t union_loop(const int32_t* __restrict codes, int64_t n) {
  uint32_t seen = 0;
  for (int64_t i = 0; i < n; i++) seen |= static_cast<uint32_t>(codes[i]);
  return seen;
}

template <class A>
QUANTOPS_INLINE A grad_element(A w, A g, const Quantizer<A>& p) {
  return inside(w, p) ? g : A(0);
}

template <class In, class G, class A>
QUANTOPS_SIMD void grad_loop(const In* __restrict w, const G* __restrict g, In* __restrict out, bool streaming,
                             int64_t n, const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  map_lanes<G>(out, streaming, n, [&](A x, A y) QUANTOPS_LANES { return grad_element(x, y, p); }, w, g);
}

// sign(B) of a weight inside the scale; of others any number.
template <Form form, class A>
QUANTOPS_INLINE A slope_element(A w, const Quantizer<A>& p) {
  if constexpr (form == kGeneral) {
    return lsb_sign(w, p);
  } else {  // B_1 itself
    const A t = scaled_unit(w, p);
    const A c = float_of(code_bits<kShort>(t, p.bottom, p.top));
    const A half = float_of(code_bits<kShort>(t * A(0.5), p.bottom_lo, p.most_lo));
    return (c - (half + half)) + kIntegers;
  }
}

template <Form form, class In, class G, class A>
QUANTOPS_SIMD void grad_penalty_loop(const In* __restrict w, const G* __restrict g, In* __restrict out, bool streaming,
                                     int64_t n, const Quantizer<A>& quantizer, A strength) {
  const Quantizer<A> p = quantizer;
  const A r = strength == strength ? strength : quiet_nan<A>();
  map_lanes<G>(
      out, streaming, n, [&](A x, A y) QUANTOPS_LANES { return grad_element(x, y + r * slope_element<form>(x, p), p); },
      w, g);
}

template <class In, class G, class A>
void grad_penalty_loop(const In* w, const G* g, In* out, bool streaming, int64_t n, const Quantizer<A>& p, A r) {
  with_form(p, p.pow_k == A(2), false,
            [&](auto form) { grad_penalty_loop<form.value>(w, g, out, streaming, n, p, r); });
}

// g += r * sign(B) * inside
template <Form form, class In, class G, class A>
QUANTOPS_SIMD void add_lsb_grad_loop(const In* __restrict w, G* __restrict g, int64_t n, const Quantizer<A>& quantizer,
                                     A strength) {
  const Quantizer<A> p = quantizer;
  const A r = strength == strength ? strength : quiet_nan<A>();
  map_lanes<G>(
      g, false, n,
      [&](A x, A y) QUANTOPS_LANES {
        const A slope = slope_element<form>(x, p);
        return y + r * (inside(x, p) ? slope : A(0));
      },
      w, g);
}

template <class In, class G, class A>
void add_lsb_grad_loop(const In* w, G* g, int64_t n, const Quantizer<A>& p, A r) {
  with_form(p, p.pow_k == A(2), false, [&](auto form) { add_lsb_grad_loop<form.value>(w, g, n, p, r); });
}

// dq/ds per element.
template <Form form, class A>
QUANTOPS_INLINE A scale_grad_element(A w, const Quantizer<A>& p) {
  return level_element<form>(w, p) * p.unit_step - (inside(w, p) ? w * p.inv_scale : A(0));
}

template <Form form, class In, class G, class A>
QUANTOPS_SIMD double scale_grad_loop(const In* __restrict w, const G* __restrict g, int64_t n,
                                     const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  A sum[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Elements<In, kAllPairs<In, G>> x(w + i);
    const Elements<G, kAllPairs<In, G>> y(g + i);
    for (int j = 0; j < kLanes; j++) sum[j] += y[j] * scale_grad_element<form>(x[j], p);
  }
  for (int j = 0; i < n; i++, j++) sum[j] += widen(g[i]) * scale_grad_element<form>(widen(w[i]), p);
  double total = 0;
  for (int j = 0; j < kLanes; j++) total += sum[j];
  return total;
}

template <class In, class G, class A>
double scale_grad_loop(const In* w, const G* g, int64_t n, const Quantizer<A>& p) {
  double sum;
  with_form(p, true, false, [&](auto form) { sum = scale_grad_loop<form.value>(w, g, n, p); });
  return sum;
}

// grad_loop and scale_grad_loop in one, the same sums: what is computed then hides behind memory. Runs as in msq_loop.
template <Form form, class In, class G, class A>
QUANTOPS_SIMD double grad_and_scale_loop(const In* __restrict w, const G* __restrict g, In* __restrict out,
                                         bool streaming, int64_t n, const Quantizer<A>& quantizer) {
  const Quantizer<A> p = quantizer;
  constexpr bool kPairs = kAllPairs<In, G>;
  alignas(64) In run[kRun];
  A sum[kLanes] = {};
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t whole = std::min<int64_t>(kRun, (n - begin) / kLanes * kLanes);
    for (int64_t k = 0; k < whole; k += kLanes) {
      const Elements<In, kPairs> x(w + begin + k);
      const Elements<G, kPairs> y(g + begin + k);
      Results<G, In, kPairs> result(run + k);
      for (int j = 0; j < kLanes; j++) {
        result.set(j, grad_element(x[j], y[j], p));
        sum[j] += y[j] * scale_grad_element<form>(x[j], p);
      }
      result.finish();
    }
    for (int64_t k = 0; k < whole; k += kLanes) put_lanes(out + begin + k, run + k, streaming);
    const int64_t end = std::min<int64_t>(n, begin + kRun);
    for (int64_t i = begin + whole, j = 0; i < end; i++, j++) {
      narrow_from<G>(grad_element(widen(w[i]), widen(g[i]), p), out[i]);
      sum[j] += widen(g[i]) * scale_grad_element<form>(widen(w[i]), p);
    }
  }
  double total = 0;
  for (int j = 0; j < kLanes; j++) total += sum[j];
  return total;
}

template <class In, class G, class A>
double grad_and_scale_loop(const In* w, const G* g, In* out, bool streaming, int64_t n, const Quantizer<A>& p) {
  double sum;
  with_form(p, true, false, [&](auto form) { sum = grad_and_scale_loop<form.value>(w, g, out, streaming, n, p); });
  return sum;
}

// The bits of max|w|, NaN if there is one, for any element type: as integers, the bits of magnitudes are in their order
// and NaN stands above infinity.
template <class Bits>
QUANTOPS_SIMD Bits absmax_loop(const char* __restrict w, int64_t n) {
  Bits most = 0;
  constexpr Bits magnitude = static_cast<Bits>(~Bits(0)) >> 1;
  for (int64_t i = 0; i < n; i++) {
    Bits bits;
    std::memcpy(&bits, w + i * int64_t(sizeof(Bits)), sizeof(Bits));
    bits &= magnitude;
    most = bits > most ? bits : most;
  }
  return most;
}

QUANTOPS_INLINE float absolute(float v) { return __builtin_fabsf(v); }
QUANTOPS_INLINE double absolute(double v) { return __builtin_fabs(v); }

template <class A, class In>
QUANTOPS_SIMD double abs_sum_loop(const In* __restrict w, int64_t n) {
  A sum[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Elements<In, kAllPairs<In>> x(w + i);
    for (int j = 0; j < kLanes; j++) sum[j] += absolute(x[j]);
  }
  for (int j = 0; i < n; i++, j++) sum[j] += absolute(widen(w[i]));
  double total = 0;
  for (int j = 0; j < kLanes; j++) total += sum[j];
  return total;
}

}  // namespace quantops
