"""What sums, probabilities and gradients are made of, in Triton: csrc/exponential.h under the same names.

In float32, exp and log are made of additions and multiplications, so that they have the same bits as on every other
backend; in float64 they are the device's own.
"""

import triton
import triton.language as tl

from quantops.kernels import math
from quantops.kernels.tanh import exponential_minus_one

MOST32, MOST64 = tl.constexpr(3.4028234663852886e38), tl.constexpr(1.7976931348623157e308)


@triton.jit
def at_most(v, top):
    return tl.where(v > top, top, v)


@triton.jit
def at_least(v, low):
    return tl.where(v < low, low, v)


@triton.jit
def change_sign(v, by):
    """v, negated where ``by`` is below 0."""
    return tl.where(by < 0.0, -v, v)


@triton.jit
def exponential_in_range(x):
    """exp(x) to less than 1 ulp for -87 <= x <= 88; NaN stays NaN or becomes a number that meets NaN elsewhere."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        shifted = x * 1.44269504 + 12582912.0  # its lowest bits are the integer n nearest to x / ln 2
        n = shifted - 12582912.0
        r = (x - n * 0.693359375) + n * 2.12194440e-4
        square = r * r
        low = 0.49999994 + 0.16666521 * r
        high = 0.041668393 + 0.0083687454 * r
        p = low + square * (high + square * 0.0013814532)
        y = (p * square + r) + 1.0
        bits = y.to(tl.uint32, bitcast=True) + (shifted.to(tl.uint32, bitcast=True) << 23)  # y 2^n
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(x):
    """2^x for -125 <= x <= 127, for gradients: the device's own, to 2 ulp."""
    return tl.exp2(x)


@triton.jit
def exponential(x):
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.where(x < -87.0, 0.0, exponential_in_range(x))


@triton.jit
def logarithm(x):
    """log(x) to less than 1 ulp for positive normal x."""
    if x.dtype == tl.float64:
        return tl.log(x)
    else:
        bits = x.to(tl.int32, bitcast=True)
        e = (bits - 0x3F3504F3) >> 23  # x = 2^e m, sqrt(1/2) <= m < sqrt(2)
        m = (bits - e * 8388608).to(tl.float32, bitcast=True) - 1.0
        n = e.to(tl.float32)
        square = m * m
        p = m * 7.0376836292e-2 - 1.1514610310e-1
        p = p * m + 1.1676998740e-1
        p = p * m - 1.2420140846e-1
        p = p * m + 1.4249322787e-1
        p = p * m - 1.6668057665e-1
        p = p * m + 2.0000714765e-1
        p = p * m - 2.4999993993e-1
        p = p * m + 3.3333331174e-1
        y = ((m * square) * p - n * 2.12194440e-4) - 0.5 * square
        return (m + y) + n * 0.693359375


@triton.jit
def logarithm_above_one(x):
    """log(1 + x) for x >= 0: what rounding 1 + x leaves out is put right by a factor."""
    y = 1.0 + x
    rounded = y - 1.0
    return tl.where(rounded > 0.0, logarithm(y) * math.divide(x, tl.where(rounded > 0.0, rounded, 1.0)), x)


@triton.jit
def one_minus_exp(x):
    """1 - exp(-x) for x >= 0, in float64."""
    e = exponential_minus_one(at_most(x, 40.0))  # beyond, 1 - exp(-x) is 1
    return e / (e + 1.0)
