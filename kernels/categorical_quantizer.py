"""The categorical quantizer per element, in Triton: csrc/categorical_quantizer.h under the same names.

What is fixed by scales is computed in float64.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from quantops.kernels import exponential as ex
from quantops.kernels import math

MAX_BITS, MAX_SOFT_BITS = tl.constexpr(16), tl.constexpr(8)


class Bins(NamedTuple):
    """All that alpha and sigma fix. Where they are out of range, alpha is NaN, and so is every result."""

    alpha: tl.tensor
    inv_alpha: tl.tensor
    alpha_head: tl.tensor  # alpha in two parts, so that x - alpha c is rounded once
    alpha_tail: tl.tensor
    inv_sigma: tl.tensor
    beta: tl.tensor
    half: tl.tensor  # beta/2
    far: tl.tensor  # the largest |z|: nothing changes beyond
    low: tl.tensor
    high: tl.tensor


@triton.jit
def beta_of(alpha, sigma):
    return ex.at_most(ex.at_least(alpha.to(tl.float64) / sigma.to(tl.float64), 1.0 / 16777216), 16777216.0)


@triton.jit
def head_of(v):
    if v.dtype == tl.float64:
        return ((v.to(tl.int64, bitcast=True) >> 16) << 16).to(tl.float64, bitcast=True)
    else:
        return ((v.to(tl.int32, bitcast=True) >> 16) << 16).to(tl.float32, bitcast=True)


@triton.jit
def make_bins(alpha, sigma, low, high, valid):
    T: tl.constexpr = alpha.dtype
    most: tl.constexpr = ex.MOST64 if T == tl.float64 else ex.MOST32
    valid = valid & (alpha > 0.0) & (alpha <= most) & (math.divide(1.0, alpha) <= most)
    valid = valid & (sigma > 0.0) & (sigma <= most)
    alpha, sigma = tl.where(valid, alpha, 1.0), tl.where(valid, sigma, 1.0)
    beta64 = beta_of(alpha, sigma)
    beta = beta64.to(T)
    half = 0.5 * beta
    if T == tl.float64:
        far = half + 50.0
    else:
        far = half + 25.0
    shown = tl.where(valid, alpha, float("nan"))
    head = head_of(alpha)
    inv_sigma = ex.at_most(beta64 / alpha.to(tl.float64), most).to(T)
    return Bins(shown, math.divide(1.0, shown), head, alpha - head, inv_sigma, beta, half, far, low.to(T), high.to(T))


@triton.jit
def rint_class(v):
    """rint, half to even, for |v| < 2^22, never -0."""
    return math.rint_small(v) + 0.0


@triton.jit
def nearest_class(x, p):
    """c = clamp(rint(x / alpha), low, high); NaN where x is."""
    return rint_class(ex.at_most(ex.at_least(x * p.inv_alpha, p.low), p.high))


@triton.jit
def clamp_far(z, p):
    return ex.at_most(ex.at_least(z, -p.far), p.far)


@triton.jit
def offset_of(x, c, p):
    """z = (x - alpha c)/sigma"""
    return clamp_far(((x - c * p.alpha_head) - c * p.alpha_tail) * p.inv_sigma, p)


@triton.jit
def scaled_offset(x, c, rate, p):
    """(x - alpha c) rate, for gradients."""
    return math.product_plus(-c, p.alpha, x) * rate
