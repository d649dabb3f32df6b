"""Draws of a class, in Triton: csrc/categorical_draw.h under the same names."""

import triton
import triton.language as tl

from quantops.kernels import categorical_gates as cg
from quantops.kernels import categorical_quantizer as cq
from quantops.kernels import exponential as ex
from quantops.kernels import math


@triton.jit
def philox(seed, index):
    """Philox4x32-10 of a 64-bit key and counter: the first two of its four words."""
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    first, second, _, _ = tl.philox(seed, low, high, zero, zero)
    return first, second


@triton.jit
def interval_mass(k, c, z, p):
    """The mass of [lo_t, hi_t] times its step: the part that it has in the mixture r."""
    top, bottom = cg.level_edges(k, c, z, p)
    return k.step * ((top.s * bottom.n) * k.whole)


@triton.jit
def unit_of(word, T: tl.constexpr):
    """[0, 1)"""
    return (word >> 8).to(tl.int32).to(T) * (1.0 / 16777216)


@triton.jit
def draw_inside(word, top, bottom, whole, c, z, p):
    """A class of [bottom, top] drawn from pi by inverting the logistic distribution; ``whole``: of that level."""
    T: tl.constexpr = z.dtype
    u, rest = unit_of(word, T) + 1.0 / 33554432, unit_of(~word, T) + 1.0 / 33554432
    near = ex.at_most(ex.at_least(c, bottom), top)
    at = cq.clamp_far(z + p.beta * (c - near), p)
    a, b = cg.edge_at(p.beta * (top + 0.5 - near) - at), cg.edge_at(p.beta * (bottom - 0.5 - near) - at)
    below, above = rest * b.s + u * a.s, rest * b.n + u * a.n
    steps = math.divide((ex.logarithm(below) - ex.logarithm(above)) + at, p.beta)
    i = near + math.rint_small(ex.at_most(ex.at_least(steps, bottom - top), top - bottom))
    # An interval that is less than a sigma wide: its ends are too near to each other for a difference of logarithms.
    ratio = math.divide((u * whole) * math.divide(a.s, b.s), rest + u * math.divide(a.n, b.n))
    narrow = math.rint_small(bottom + (math.divide(ex.logarithm_above_one(ratio), p.beta) - 0.5))
    i = tl.where(p.beta * (top - bottom + 1.0) < 1.0, narrow, i)
    return ex.at_most(ex.at_least(i, bottom), top) + 0.0


@triton.jit
def draw(c, z, index, at, p, seed, count):
    """A class drawn from r; ``index``: of the element in the list; ``at``: the record of its scale."""
    first, second = philox(seed, index)
    left = interval_mass(cg.level_at(at, 0), c, z, p)
    for t in range(1, count):
        left += interval_mass(cg.level_at(at, t), c, z, p)
    left = left * unit_of(first, z.dtype)
    last = cg.level_at(at, count - 1)
    zero = tl.zeros_like(z)
    top, bottom, whole = last.top + zero, last.bottom + zero, last.whole + zero
    for t in range(0, count - 1):  # the first interval that what is left is in
        k = cg.level_at(at, t)
        mass = interval_mass(k, c, z, p)
        here = left < mass
        top, bottom, whole = (
            tl.where(here, k.top, top),
            tl.where(here, k.bottom, bottom),
            tl.where(here, k.whole, whole),
        )
        left = tl.where(here, float("inf"), left - mass)
    return draw_inside(second, top, bottom, whole, c, z, p)
