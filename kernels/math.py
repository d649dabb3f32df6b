"""The uniform quantizers per element, in Triton: the statement of csrc/quant_math.h under the same names.

Every operation is rounded on its own: the launches set enable_fp_fusion=False, division is IEEE, and NaN goes its way
through comparisons. A product and a sum are rounded as one where it is written, by product_plus: on the way to a code
or to q only where the product is exact, which gives the same bits. All functions take scalars and blocks alike, in
float32 or float64.
"""

from typing import NamedTuple

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
MAX_BITS = tl.constexpr(16)
INVALID = tl.constexpr(-(2**31))  # integer results of a tensor whose bits, k or scale are out of range
ROUND_CLAMP, FLOOR, NEAREST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # the order of RULES in the reference
DYADIC, FULL, SIGN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # the order of GRIDS; with SIGN codes are signed


class Quantizer(NamedTuple):
    """All that one scale and one (bits, k) fix. Values out of range make offset, steps and outside NaN and put every
    weight outside, and so make every float NaN."""

    scale: tl.tensor  # the weights whose codes differ lie in [low, scale]
    low: tl.tensor
    inv: tl.tensor  # 0.5/s signed, 1/s unsigned and on the sign grid; 0 where s = 0 or 1/s overflows
    slope: tl.tensor  # the same; 1 where that is 0, where no weight has another code than 0
    offset: tl.tensor  # 0.5 signed, 0 unsigned and on the sign grid
    mul: tl.tensor  # 2^n
    top: tl.tensor  # 2^n - 1
    bottom: tl.tensor  # the lowest code of round_clamp: 0, on the sign grid -top; where inv = 0, that of w = 0
    most: tl.tensor  # the highest: top; where inv = 0, that of w = 0
    mul_lo: tl.tensor  # the same of n - k bits
    bottom_lo: tl.tensor
    most_lo: tl.tensor
    count: tl.tensor  # of the codes that are stored: 2^n, on the sign grid twice that
    pow_k: tl.tensor  # 2^k
    a: tl.tensor  # m = a * c + b
    b: tl.tensor
    step: tl.tensor  # q = m * step
    unit_step: tl.tensor  # the step of a scale of one
    code_step: tl.tensor  # the value of one code step, in float64: what |B| is weighed with in the penalty
    inv_scale: tl.tensor  # 1/s; 0 where s = 0 or 1/s overflows
    outside: tl.tensor  # the gradient of a weight outside the scale: 0
    valid: tl.tensor


@triton.jit
def widen(v, T: tl.constexpr):
    """A stored value in the dtype of the arithmetic; exact."""
    if INTERPRETED and v.dtype == tl.bfloat16:  # the interpreter's own conversion loses denormals
        return (v.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(T)
    else:
        return v.to(T)


@triton.jit
def narrow(v, T: tl.constexpr):
    """A result in the dtype of its storage, rounded to nearest even; float64 goes through float32, as in torch."""
    if v.dtype == tl.float64 and (T == tl.bfloat16 or T == tl.float16):
        v = v.to(tl.float32)
    if INTERPRETED and T == tl.bfloat16:  # the interpreter's own conversion truncates
        bits = v.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(v == v, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return v.to(T)


@triton.jit
def divide(x, y):
    """x / y in IEEE rounding, which plain / is in float64 only."""
    if y.dtype == tl.float64:
        return x / y
    else:
        return tl.math.div_rn(x, y)


@triton.jit
def product_plus(a, b, c):
    """a * b + c, rounded once: the same where a * b is exact; else of sums and their terms alone."""
    return tl.fma(a, b, c)


@triton.jit
def rint_small(v):
    """rint, half to even, for |v| < 2^22: adding 1.5 * 2^(mantissa bits) leaves no room for a fraction."""
    if v.dtype == tl.float64:
        return (v + 6755399441055744.0) - 6755399441055744.0
    else:
        return (v + 12582912.0) - 12582912.0


@triton.jit
def rint_product(a, b):
    """The same of a product that is exact."""
    if b.dtype == tl.float64:
        return product_plus(a, b, 6755399441055744.0) - 6755399441055744.0
    else:
        return product_plus(a, b, 12582912.0) - 12582912.0


@triton.jit
def floor_small(v):
    r = rint_small(v)
    return tl.where(r > v, r - 1.0, r)


@triton.jit
def pow2(n, T: tl.constexpr):
    return (tl.full([], 1, tl.int32) << n).to(T)


@triton.jit
def code_bits(n, GRID: tl.constexpr):
    """Bits of a code that is stored, of n bits."""
    if GRID == SIGN:
        n = n + (n > 0).to(tl.int32)
    return n


@triton.jit
def valid_bits(n, k, GRID: tl.constexpr):
    most: tl.constexpr = MAX_BITS - 1 if GRID == SIGN else MAX_BITS
    return (n >= 0) & (n <= most) & ((k == 0) | ((k >= 1) & (k < n)))


@triton.jit
def valid_scale(s):
    return (s >= 0.0) & (s < float("inf"))


@triton.jit
def make_quantizer(s, n, k, GRID: tl.constexpr, SIGNED: tl.constexpr):
    T: tl.constexpr = s.dtype
    CENTRED: tl.constexpr = SIGNED and GRID != SIGN  # w = 0 has u = 0.5
    s = s + 0.0  # -0 is 0
    in_range = valid_bits(n, k, GRID)
    n = tl.where(in_range, n, 0)
    k = tl.where(in_range, k, 0)
    valid = in_range & valid_scale(s)
    zero = tl.zeros([], T)
    # 1/s overflows exactly where 0.5/s reaches 2^127 (2^1023): halving is exact there, and saves a second division.
    if CENTRED:
        inv = divide(0.5, s)
        if T == tl.float64:
            degenerate = inv >= 8.98846567431158e307
        else:
            degenerate = inv >= 1.7014118346046923e38
    else:
        inv = divide(1.0, s)
        degenerate = inv == float("inf")
    slope = tl.where(degenerate, 1.0, inv)
    inv = tl.where(degenerate, 0.0, inv)
    inv_scale = tl.where(degenerate, 0.0, divide(1.0, s))
    mul = pow2(n, T)
    top = mul - 1.0
    mul_lo = pow2(n - k, T)
    top_lo = mul_lo - 1.0
    if CENTRED:
        bottom, bottom_lo = zero, zero
        middle, middle_lo = tl.where(n > 0, 0.5 * mul, 0.0), tl.where(n > 0, 0.5 * mul_lo, 0.0)
    else:
        if GRID == SIGN:
            bottom, bottom_lo = 0.0 - top, 0.0 - top_lo
        else:
            bottom, bottom_lo = zero, zero
        middle, middle_lo = zero, zero
    bottom, most = tl.where(degenerate, middle, bottom), tl.where(degenerate, middle, top)
    bottom_lo, most_lo = tl.where(degenerate, middle_lo, bottom_lo), tl.where(degenerate, middle_lo, top_lo)
    if not CENTRED:
        a, b = zero + 1.0, zero
    elif GRID == FULL:
        a, b = zero + 2.0, 0.0 - top
    else:
        a, b = zero + 1.0, tl.where(n == 0, zero, 0.0 - pow2(tl.maximum(n - 1, 0), T))
    if GRID == FULL:
        unit_step = tl.where(n == 0, 0.0, divide(1.0, top))
        step = tl.where(n == 0, 0.0, divide(s, top))
    else:
        if CENTRED:
            unit_step = tl.where(n == 0, 0.0, divide(2.0, mul))
        else:
            unit_step = tl.where(n == 0, 0.0, divide(1.0, mul))
        step = s * unit_step
    step = tl.where(valid, step, float("nan"))
    if CENTRED:
        offset = tl.where(valid, zero + 0.5, float("nan"))
    else:
        offset = tl.where(valid, zero, float("nan"))
    unit_step = tl.where(valid, unit_step, float("nan"))
    code_step = tl.where(n > 1, step.to(tl.float64) * a.to(tl.float64), 0.0)  # at one bit no LSBs: inf * 0 there
    outside = tl.where(valid, zero, float("nan"))
    scale = tl.where(valid, s, float("nan"))
    low = 0.0 - scale if SIGNED else outside
    return Quantizer(scale, low, inv, slope, offset, mul, top, bottom, most, mul_lo, bottom_lo, most_lo,
                     pow2(code_bits(n, GRID), T), pow2(k, T), a, b, step, unit_step, code_step, inv_scale, outside,
                     valid)


@triton.jit
def unit(w, p):
    """u in [0, 1]; NaN where w is NaN."""
    t = w * p.inv
    t = tl.where((t != t) & (w == w), 0.0, t)  # inf * 0
    u = t + p.offset
    u = tl.where(u < 0.0, 0.0, u)
    return tl.where(u > 1.0, 1.0, u)


@triton.jit
def round_clamp_unit(w, p):
    """u for the codes of round_clamp, not clamped, since codes are; NaN where w is NaN."""
    return w * p.slope + p.offset


@triton.jit
def _clamped(c, bottom, most):
    c = tl.minimum(c, most, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(c, bottom, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def round_clamp_code(u, p):
    """It may be -0, which ``level`` makes 0."""
    return _clamped(rint_product(p.mul, u), p.bottom, p.most)


@triton.jit
def code(w, p, RULE: tl.constexpr):
    """The code of a weight, as a float; NaN where w is NaN."""
    if RULE == NEAREST:
        return rint_small(p.top * unit(w, p))
    elif RULE == FLOOR:
        c = floor_small(p.mul * unit(w, p))
        return tl.where(c > p.top, p.top, c)
    else:
        return round_clamp_code(round_clamp_unit(w, p), p)


@triton.jit
def to_int(c, valid):
    """An integer result: 0 for NaN."""
    return tl.where(valid, tl.where(c == c, c, 0.0).to(tl.int32), INVALID)


@triton.jit
def stored_code(c, p):
    """A code as it is stored, with a sign in the bit above its magnitude; 0 for NaN. No other grid has one."""
    return to_int(tl.where(c < 0.0, p.mul - c, c), p.valid)


@triton.jit
def code_of_stored(c, p):
    return tl.where(c < p.mul, c, p.mul - c)


@triton.jit
def level(c, p):
    return product_plus(p.a, c, p.b)  # exact: a is 1 or 2


@triton.jit
def lsb_residual(u, c, p):
    """B_k of the weight with unit u and code c, as a float; 0 where it is NaN."""
    low = _clamped(rint_product(p.mul_lo, u), p.bottom_lo, p.most_lo)
    b = product_plus(0.0 - p.pow_k, low, c)  # exact: pow_k is a power of two
    return tl.where(b == b, b, 0.0)


@triton.jit
def sign(v):
    return tl.where(v > 0.0, 1.0, tl.where(v < 0.0, -1.0, 0.0)).to(v.dtype)


@triton.jit
def inside(w, p, SIGNED: tl.constexpr):
    if SIGNED:
        return tl.abs(w) <= p.scale
    else:
        return (w >= p.low) & (w <= p.scale)


@triton.jit
def lsb_sign(w, p):
    u = round_clamp_unit(w, p)
    return sign(lsb_residual(u, round_clamp_code(u, p), p))


@triton.jit
def scale_grad_term(w, p, SIGNED: tl.constexpr):
    """dq/ds per element."""
    ratio = level(round_clamp_code(round_clamp_unit(w, p), p), p) * p.unit_step
    return product_plus(tl.where(inside(w, p, SIGNED), 0.0 - w, 0.0), p.inv_scale, ratio)


@triton.jit
def grad_weight(w, g, r, p, SIGNED: tl.constexpr):
    """dL/dw from g = dL/dq and r = dL/dR."""
    v = product_plus(r, lsb_sign(w, p), g)  # exact: a sign
    return tl.where(inside(w, p, SIGNED), v, p.outside)


@triton.jit
def add_penalty_slope(w, g, r, p, SIGNED: tl.constexpr):
    """g + r * sign(B) * inside: dL/dR added to a gradient."""
    return product_plus(tl.where(inside(w, p, SIGNED), r, p.outside), lsb_sign(w, p), g)  # exact: a sign
