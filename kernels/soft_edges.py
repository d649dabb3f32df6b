"""The soft sum of few classes over the edges between them, per element, in Triton: csrc/soft_edges.h, which has the
equations. An edge is a record of its own here, in the place of two to a pair.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from quantops.kernels import categorical_math as cm
from quantops.kernels import math

MOST_EDGE32, MOST_EDGE64 = tl.constexpr(8e18), tl.constexpr(1e150)  # of e
LEAST_EDGE32, LEAST_EDGE64 = tl.constexpr(1e-30), tl.constexpr(1e-200)


class EdgeFactor(NamedTuple):
    """What e of an edge comes from."""

    factor: tl.tensor  # e in the middle of the grid
    least: tl.tensor  # of e over the factor: beyond, e is not felt, or out of range
    most: tl.tensor


class InnerEdge(NamedTuple):
    """An edge i inside the grid."""

    e: EdgeFactor
    part: tl.tensor  # of P(above i) where i > 0, else of P(below i): what is fixed, but for W and Y
    slope: tl.tensor
    at: tl.tensor  # i - h(n) + h(m)


class SoftEdges(NamedTuple):
    lower: tl.tensor  # pairs of edges i <= 0; 0 where the sum is not taken over the edges
    upper: tl.tensor  # and of the others
    half_classes: tl.tensor  # H
    inv_open: tl.tensor  # 1/(1 - t^N)
    above_middle: tl.tensor  # the class above the middle of the grid
    middle: tl.tensor  # which is half a class less
    at_head: tl.tensor  # alpha middle, in two parts
    at_tail: tl.tensor
    rate: tl.tensor  # -log2(e)/sigma, and in two parts
    rate_head: tl.tensor
    rate_tail: tl.tensor
    farthest: tl.tensor  # nothing changes where x is further from the middle
    below: EdgeFactor  # edge -H
    above: EdgeFactor  # edge H


@triton.jit
def has_soft_edges(alpha, beta, p):
    """``beta``: in float64."""
    T: tl.constexpr = alpha.dtype
    most: tl.constexpr = cm.MOST64 if T == tl.float64 else cm.MOST32
    sharpest: tl.constexpr = 250.0 if T == tl.float64 else 7.0
    widest: tl.constexpr = 1300.0 if T == tl.float64 else 122.0
    beyond: tl.constexpr = 50.0 if T == tl.float64 else 25.0
    classes, unit = (p.high - p.low + 1.0).to(tl.float64), alpha.to(tl.float64)
    return ((p.alpha == p.alpha) & (classes >= 2.0) & (classes <= 16.0) & (beta >= 1.0 / 16) & (beta <= sharpest)
            & (beta * (classes + 1.0) <= widest) & (1.4426950408889634 * (beta / unit) <= most)
            & (unit * (classes + beyond / beta) <= most))


@triton.jit
def edge_factor(i, beta, T: tl.constexpr):
    """Of edge i, in float64."""
    most: tl.constexpr = cm.MOST64 if T == tl.float64 else cm.MOST32
    most_edge: tl.constexpr = MOST_EDGE64 if T == tl.float64 else MOST_EDGE32
    least_edge: tl.constexpr = LEAST_EDGE64 if T == tl.float64 else LEAST_EDGE32
    factor = tl.exp(beta * i)
    zero = tl.zeros_like(factor)
    return EdgeFactor(factor.to(T), ((zero + least_edge) / factor).to(T),
                      cm.at_most((zero + most_edge) / factor, most).to(T))


@triton.jit
def make_soft_edges(alpha, sigma, p):
    """In the dtype of alpha, as the rest of a record; ``alpha``, ``sigma``: anything where they are out of range."""
    T: tl.constexpr = alpha.dtype
    beyond: tl.constexpr = 50.0 if T == tl.float64 else 25.0
    good = p.alpha == p.alpha
    alpha, sigma = tl.where(good, alpha, 1.0), tl.where(good, sigma, 1.0)
    beta = cm.beta_of(alpha, sigma)
    there = has_soft_edges(alpha, beta, p)
    beta = tl.where(there, beta, 1.0)
    half = tl.where(there, (p.high - p.low + 1.0).to(tl.int32) // 2, 1)
    wide = half.to(tl.float64)
    unit, middle = alpha.to(tl.float64), p.low.to(tl.float64) + wide - 0.5
    at, rate = middle * unit, -1.4426950408889634 * (beta / unit)
    rate_head = cm.head_of(rate.to(T))
    lower, upper = tl.where(there, (half + 1) // 2, 0), tl.where(there, half // 2, 0)
    return beta, half, SoftEdges(
        lower.to(T), upper.to(T), half.to(T), (1.0 / cm.one_minus_exp(beta * (2.0 * wide))).to(T), (middle + 0.5).to(T),
        middle.to(T), at.to(T), (at - at.to(T).to(tl.float64)).to(T), rate.to(T), rate_head,
        (rate - rate_head.to(tl.float64)).to(T), (unit * (wide + beyond / beta)).to(T), edge_factor(-wide, beta, T),
        edge_factor(wide, beta, T))


@triton.jit
def inner_edge(i, half, beta, T: tl.constexpr):
    """Edge i, of a grid of two times ``half`` classes; all numbers 0 where it has none such. Of integers or lanes."""
    there = (i > -half) & (i < half)
    at = tl.where(there, i, 0)
    n, m, i = (half - at).to(tl.float64), (half + at).to(tl.float64), at.to(tl.float64)
    of_n, of_m = cm.one_minus_exp(beta * n), cm.one_minus_exp(beta * m)
    opened = cm.one_minus_exp(beta * (n + m))
    e = edge_factor(i, beta, T)
    e = EdgeFactor(tl.where(there, e.factor, 0.0), tl.where(there, e.least, 0.0), tl.where(there, e.most, 0.0))
    part, slope = tl.where(i > 0.0, of_n, of_m) / opened, of_n * of_m / opened
    at = i - n * (1.0 - of_n) / of_n + m * (1.0 - of_m) / of_m
    return InnerEdge(e, tl.where(there, part, 0.0).to(T), tl.where(there, slope, 0.0).to(T),
                     tl.where(there, at, 0.0).to(T))


@triton.jit
def edge_number(place, half):
    """The edge at a place, lower pairs first; one that is not there where a pair has one only."""
    lower = 2 * ((half + 1) // 2)
    i = tl.where(place < lower, 1 - half + place, 1 + place - lower)
    return tl.where((place < lower) & (i > 0), half, i)


@triton.jit
def offset_from_middle(x, k):
    """x from the middle of the grid, where something changes."""
    return cm.at_most(cm.at_least((x - k.at_head) - k.at_tail, -k.farthest), k.farthest)


@triton.jit
def middle_power(x, k):
    """e in the middle of the grid, from that."""
    head = cm.head_of(x)
    return cm.power_of_two_parts(head * k.rate_head, head * k.rate_tail + (x - head) * k.rate)


@triton.jit
def edge_of(power, f):
    """e of an edge."""
    return cm.at_most(cm.at_least(power, f.least), f.most) * f.factor


class EdgeShares(NamedTuple):
    """1/(1 + e) and e/(1 + e) of two edges."""

    above0: tl.tensor
    above1: tl.tensor
    below0: tl.tensor
    below1: tl.tensor


@triton.jit
def edge_shares(power, first, second):
    e0, e1 = edge_of(power, first.e), edge_of(power, second.e)
    d0, d1 = 1.0 + e0, 1.0 + e1
    inv = math.divide(1.0, d0 * d1)
    above0, above1 = inv * d1, inv * d0
    return EdgeShares(above0, above1, e0 * above0, e1 * above1)


@triton.jit
def edge_slopes(s, first, second, v):
    """What a pair adds to the sums of slope u, and of that times v - at."""
    s0, s1 = first.slope * (s.above0 * s.below0), second.slope * (s.above1 * s.below1)
    return s0 + s1, s0 * (v - first.at) + s1 * (v - second.at)


class OuterEdges(NamedTuple):
    """W, Y, 1 + W and 1 + Y."""

    below: tl.tensor
    above: tl.tensor
    of_above: tl.tensor
    of_below: tl.tensor


@triton.jit
def outer_edges(power, k):
    below, above = edge_of(power, k.below), math.divide(1.0, edge_of(power, k.above))
    return OuterEdges(below, above, 1.0 + below, 1.0 + above)


@triton.jit
def edge_mean(upper, lower, o, k):
    return (o.of_above * upper - o.of_below * lower) + k.above_middle


@triton.jit
def add_edge_pair(sums, power, v, first, second, LOWER: tl.constexpr, SLOPES: tl.constexpr):
    """Adds a pair to the sums of P(below i), P(above i), and of the slopes."""
    lower, upper, by_x, by_width = sums
    shares = edge_shares(power, first, second)
    if LOWER:
        lower += first.part * shares.below0 + second.part * shares.below1
    else:
        upper += first.part * shares.above0 + second.part * shares.above1
    if SLOPES:
        in_x, in_width = edge_slopes(shares, first, second, v)
        by_x += in_x
        by_width += in_width
    return lower, upper, by_x, by_width


@triton.jit
def edge_factors(v, mean, by_x, by_width, o, k, p):
    """``by_x``: NaN where x is."""
    ends = (k.half_classes - v) * (o.above * o.of_above) - (k.half_classes + v) * (o.below * o.of_below)
    in_x = p.beta * by_x
    in_width = p.beta * ((ends * by_x + (o.of_above * o.of_below) * by_width) * k.inv_open)
    return in_x, (mean - (v + k.middle) * in_x) + in_width, -(p.beta * in_width)
