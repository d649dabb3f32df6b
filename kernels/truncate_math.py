"""Truncation per element, in Triton: the statement of csrc/truncate_math.h under the same names."""

from typing import NamedTuple

import triton
import triton.language as tl

from quantops.kernels import math
from quantops.kernels.tanh import tanh_of


@triton.jit
def companded(w, TANH: tl.constexpr):
    """What the codes are taken of."""
    if TANH:
        return tanh_of(w)
    else:
        return w


class Base(NamedTuple):
    """The quantizer of the base width, whose codes are those of tanh(w) with scale tanh(s) under companding."""

    scale: tl.tensor  # |w| <= scale is inside, also under companding
    inv: tl.tensor  # 0.5 over the scale of the codes; 0 where that overflows
    offset: tl.tensor  # 0.5
    mul: tl.tensor  # 2^N
    top: tl.tensor  # 2^N - 1
    factor: tl.tensor  # (x/s) is x times it, see the reference
    valid: tl.tensor


@triton.jit
def make_base(s, n, TANH: tl.constexpr):
    p = math.make_quantizer(companded(s + 0.0, TANH), n, 0, math.FULL, True)
    valid = p.valid & math.valid_scale(s)
    factor = p.inv_scale
    if TANH:
        v = tanh_of(s + 0.0)
        factor = factor * (1.0 - v * v)
    return Base(s + 0.0, p.inv, tl.where(valid, p.offset, float("nan")), p.mul, p.top, factor, valid)


@triton.jit
def base_code(x, p, RULE: tl.constexpr):
    """The code of the base width, as a float; NaN where x is."""
    u = math.unit(x, p)
    if RULE == math.NEAREST:
        c = math.rint_small(p.top * u)
    elif RULE == math.FLOOR:
        c = math.floor_small(p.mul * u)
    else:
        c = math.rint_small(p.mul * u)
    return tl.where(c > p.top, p.top, c)


class Width(NamedTuple):
    """A width that is cut from codes of a base width, on the full grid."""

    mul: tl.tensor  # 2^-shift
    top: tl.tensor  # 2^m - 1
    step: tl.tensor  # q = level * step
    unit_step: tl.tensor  # the step of a scale of one


@triton.jit
def make_width(out_scale, n, base):
    """A width, base width or scale out of range makes the steps NaN, so every result is."""
    T: tl.constexpr = out_scale.dtype
    in_range = (n >= 1) & (n <= base) & (base <= math.MAX_BITS)
    n = tl.where(in_range, n, 1)
    base = tl.where(in_range, base, 1)
    valid = in_range & math.valid_scale(out_scale)
    top = math.pow2(n, T) - 1.0
    step = tl.where(valid, math.divide(out_scale + 0.0, top), float("nan"))  # -0 is 0
    unit_step = tl.where(valid, math.divide(1.0, top), float("nan"))
    return Width(math.divide(1.0, math.pow2(base - n, T)), top, step, unit_step)


@triton.jit
def odd_level(c, v):
    """2 (c >> shift) - (2^m - 1)"""
    m = math.floor_small(c * v.mul)
    return (m + m) - v.top


@triton.jit
def inside(w, p):
    return tl.abs(w) <= p.scale


@triton.jit
def grad_weight(w, x, total, p, bad, TANH: tl.constexpr):
    """dL/dw from the sum of the gradients; x is the companded weight."""
    if TANH:
        total = total * (1.0 - x * x)
    return tl.where(bad != 0, float("nan"), tl.where(inside(w, p), total, 0.0))


@triton.jit
def inner_term(w, x, p):
    """(x/s) * inside"""
    return tl.where(inside(w, p), x * p.factor, 0.0)
