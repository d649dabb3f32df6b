"""tanh and the exponential that it is made of, in Triton: csrc/tanh.h under the same names.

Additions, multiplications and one division, each rounded on its own, so that codes behind them have the same bits as on
every other backend.
"""

import triton
import triton.language as tl

from quantops.kernels import math


@triton.jit
def expm1_tail(r):
    """(e^r - 1 - r) / r^2 for |r| <= ln(2) / 2, by its series."""
    if r.dtype == tl.float64:
        v = tl.full([], 1.0 / 6227020800, tl.float64) * r + 1.0 / 479001600
        v = v * r + 1.0 / 39916800
        v = v * r + 1.0 / 3628800
        v = v * r + 1.0 / 362880
        v = v * r + 1.0 / 40320
        v = v * r + 1.0 / 5040
    else:
        v = tl.full([], 1.0 / 5040, tl.float32)
    v = v * r + 1.0 / 720
    v = v * r + 1.0 / 120
    v = v * r + 1.0 / 24
    v = v * r + 1.0 / 6
    return v * r + 0.5


@triton.jit
def reduced(y):
    """(k and more bits, e^r - 1) of y = k ln(2) + r for 0 <= y < 43 (21 in float32), |r| <= ln(2) / 2."""
    # The sum rounds to the nearest integer, half to even, which is in its lowest bits.
    # ln(2) in two parts, the first with so few bits that its product with k is exact.
    if y.dtype == tl.float64:
        rounded = y * 1.44269504088896340736 + 6755399441055744.0
        k = rounded - 6755399441055744.0
        r = (y - k * 6.93145751953125e-1) - k * 1.42860682030941723212e-6
    else:
        rounded = y * 1.44269504088896340736 + 12582912.0
        k = rounded - 12582912.0
        r = (y - k * 0.693359375) - k * -2.12194440e-4
    return rounded, r + r * r * expm1_tail(r)


@triton.jit
def times_power(v, rounded):
    """v 2^k for a normal v and result. Of NaN some number may come."""
    if v.dtype == tl.float64:
        bits = v.to(tl.int64, bitcast=True) + (rounded.to(tl.int64, bitcast=True) << 52)
        return bits.to(tl.float64, bitcast=True)
    else:
        bits = v.to(tl.int32, bitcast=True) + (rounded.to(tl.int32, bitcast=True) << 23)
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def exponential_of(y):
    """e^y for such y, to a few units in the last place."""
    rounded, small = reduced(y)
    return times_power(small + 1.0, rounded)


@triton.jit
def exponential_minus_one(y):
    """e^y - 1 = 2^k (e^r - 1) + (2^k - 1), likewise. NaN stays NaN."""
    rounded, small = reduced(y)
    power = times_power(tl.full([], 1.0, y.dtype), rounded)
    return power * small + (power - 1.0)


@triton.jit
def tanh_of(x):
    """E / (E + 2) with E = e^(2|x|) - 1, to a few units in the last place."""
    y = tl.abs(x) * 2.0
    if x.dtype == tl.float64:
        y = tl.where(y > 40.0, 40.0, y)
    else:
        y = tl.where(y > 20.0, 20.0, y)
    e = exponential_minus_one(y)
    t = math.divide(e, e + 2.0)
    return tl.where(x < 0.0, -t, t)
