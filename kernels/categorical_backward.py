"""Gradients of the winner and of the soft sum, in Triton: csrc/categorical_backward.h under the same names.

Each function that begins with ``of_`` gives dL/dx, what an element adds to dL/dalpha and to dL/dsigma, and what all add
to gates times dL/dgates; ``at`` is the record of the scale.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from quantops.kernels import categorical_draw as cd
from quantops.kernels import categorical_gates as cg
from quantops.kernels import categorical_quantizer as cq
from quantops.kernels import categorical_soft as cs
from quantops.kernels import exponential as ex
from quantops.kernels import math

ONE = tl.constexpr(16)  # where a record has a OneInterval
HALF32, HALF64 = tl.constexpr(40.0), tl.constexpr(160.0)  # most_half of csrc/categorical_backward.h,
DECAY32, DECAY64 = tl.constexpr(-25.25), tl.constexpr(-55.0)  # and least_decay


@triton.jit
def no_gates():
    return tl.zeros([cq.MAX_BITS], tl.float64)


@triton.jit
def _with_gate(gates, t, term, mask):
    """Adds up a term of level t, counted from 0."""
    if mask is not None:
        term = tl.where(mask, term, 0.0)
    return tl.where(tl.arange(0, cq.MAX_BITS) == t, tl.sum(term).to(tl.float64), gates)


# Hard classes without gates.


@triton.jit
def winner_factors(j, rt, rq, distance, p):
    factor = j * p.beta
    return factor * rt, j + factor * (rq - j * rt), factor * (distance * rt - p.beta * rq)


class OneInterval(NamedTuple):
    """What the case without gates needs, where the winner is the nearest class, see csrc/categorical_backward.h."""

    rate: tl.tensor  # log2(e)/sigma
    half: tl.tensor  # log2(e) beta/2
    beyond: tl.tensor  # the largest w of mirrored_offset
    decay: tl.tensor  # log2(e) beta
    t: tl.tensor  # exp(-beta), not below 2^(-2 most_half)
    sharp: tl.tensor  # 1 - t
    most_q: tl.tensor  # 1 + 2 t/(1 - t)
    ratio: tl.tensor  # (1 - t)/(1 - theta)
    scale: tl.tensor  # beta times that
    spread: tl.tensor  # 2/(1 - theta)
    middle: tl.tensor  # (low + high)/2
    half_classes: tl.tensor  # (high - low + 1)/2


@triton.jit
def make_one_interval(p):
    T: tl.constexpr = p.beta.dtype
    most: tl.constexpr = ex.MOST64 if T == tl.float64 else ex.MOST32
    most_half: tl.constexpr = HALF64 if T == tl.float64 else HALF32
    most_beyond: tl.constexpr = 72.0 if T == tl.float64 else 36.0
    log2_e: tl.constexpr = 1.4426950408889634
    beta, classes = p.beta.to(tl.float64), (p.high - p.low + 1.0).to(tl.float64)
    sharp, opened, t = ex.one_minus_exp(beta), ex.one_minus_exp(beta * classes), tl.exp(-beta)
    half = (0.5 * log2_e * beta).to(T)
    return OneInterval(
        ex.at_most(log2_e * p.inv_sigma.to(tl.float64), most).to(T),
        half,
        half + most_beyond,
        (log2_e * beta).to(T),
        ex.at_least(t, 2.0 ** (-2.0 * most_half)).to(T),
        sharp.to(T),
        (1.0 + 2.0 * t / sharp).to(T),
        (sharp / opened).to(T),
        (beta * sharp / opened).to(T),
        (2.0 / opened).to(T),
        0.5 * (p.low + p.high),
        (0.5 * classes).to(T),
    )


@triton.jit
def mirrored(v, c, k):
    return ex.change_sign(v, c - k.middle)


@triton.jit
def mirrored_offset(x, c, p, k):
    """w = log2(e) z, mirrored."""
    z = cq.scaled_offset(x, c, k.rate, p)
    return ex.at_least(ex.at_most(mirrored(z, c, k), k.beyond), -k.beyond)


@triton.jit
def edge_power(w, k):
    """b of that w."""
    most_half: tl.constexpr = HALF64 if w.dtype == tl.float64 else HALF32
    return ex.power_of_two(ex.at_least(w - k.half, ex.at_most((w + k.half) - 2.0 * most_half, -most_half)))


@triton.jit
def decay_of(n, k):
    """exp(-beta n), 0 where that cannot be felt."""
    least: tl.constexpr = DECAY64 if n.dtype == tl.float64 else DECAY32
    exponent = -k.decay * n
    return tl.where(exponent < least, 0.0, ex.power_of_two(ex.at_least(exponent, 2.0 * least)))


@triton.jit
def winner_of_one(c, b, k):
    """r T and 2 r Q, mirrored and without the factor ``ratio``."""
    inv = math.divide(1.0, (1.0 + b) * (b + k.t))
    t, q = math.product_plus(-b, b, k.t) * inv, math.product_plus(-k.sharp, b * inv, k.most_q)
    side = c - k.middle
    away = ex.change_sign(side, side)
    near, far = decay_of((k.half_classes - 0.5) - away, k), k.t * decay_of((k.half_classes - 0.5) + away, k)
    outer, sums = b * near, b + far
    whole, r = 1.0 + outer, sums * inv
    far = (far * inv) * whole
    of_t = math.product_plus(t, whole, outer)
    of_q = math.product_plus(-sums, ((k.half_classes - away) * k.spread) * near, q * whole)
    return (
        math.product_plus(r, of_t, -far),
        math.product_plus(r, of_q, -(far * (((k.half_classes + away) * k.spread) * whole))),
    )


@triton.jit
def factors_of_one(c, w, rt, rq, p, k):
    """The factors that these slopes come to, at an element with its c and w."""
    return winner_factors(
        c, k.ratio * mirrored(rt, c, k), 0.5 * (k.ratio * rq), mirrored(w, c, k) * -0.69314718055994531, p
    )


@triton.jit
def one_interval_at(at):
    at = at + ONE
    return OneInterval(
        tl.load(at),
        tl.load(at + 1),
        tl.load(at + 2),
        tl.load(at + 3),
        tl.load(at + 4),
        tl.load(at + 5),
        tl.load(at + 6),
        tl.load(at + 7),
        tl.load(at + 8),
        tl.load(at + 9),
        tl.load(at + 10),
        tl.load(at + 11),
    )


@triton.jit
def of_one(x, g, at, p):
    c = cq.nearest_class(x, p)
    k = one_interval_at(at)
    w = mirrored_offset(x, c, p, k)
    rt, rq = winner_of_one(c, edge_power(w, k), k)
    _, in_alpha, in_sigma = factors_of_one(c, w, rt, rq, p, k)
    return k.scale * mirrored((g * c) * rt, c, k), g * in_alpha, g * in_sigma, no_gates()


# Classes with gates, or drawn.


class Masses(NamedTuple):
    """D and its derivatives, level by level from the lowest."""

    total: tl.tensor
    by_x: tl.tensor
    by_alpha: tl.tensor
    top: cg.Edge
    bottom: cg.Edge


@triton.jit
def first_level(k, c, z, j, p):
    zero = tl.zeros_like(z)
    top, bottom = cg.level_edges(k, c, z, p)
    mass = ((top.s * bottom.n) * k.own) * k.weight
    return _with_level(Masses(zero, zero, zero, top, bottom), mass, k, j, top, bottom)


@triton.jit
def add_level(m, k, c, z, j, p, SIGNED: tl.constexpr):
    """Adds level k for an element at (c, z) whose class is j."""
    top, bottom = cg.level_edges(k, c, z, p)
    return _with_level(m, cg.own_mass(k, top, bottom, m.top, m.bottom, SIGNED), k, j, top, bottom)


@triton.jit
def _with_level(m, mass, k, j, top, bottom):
    over, under = top.s * top.n, bottom.s * bottom.n
    return Masses(
        m.total + mass,
        m.by_x + k.step * (under - over),
        m.by_alpha + k.step * ((k.top + 0.5 - j) * over + (j + 0.5 - k.bottom) * under),
        top,
        bottom,
    )


@triton.jit
def winner_of_many(m, c, z, j, weight, sharp, p):
    """r_j, and the winner's factors for any class j, with weight G_j."""
    distance = p.beta * (j - c) - z
    inv = math.divide(1.0, m.total)
    a, b = cg.edge_at(distance + p.half), cg.edge_at(distance - p.half)
    r = ((weight * sharp) * (a.s * b.n)) * inv
    t = (a.s - b.n) - m.by_x * inv
    q = math.divide(0.5 * (math.divide(a.n, b.n) + math.divide(b.s, a.s)), sharp) - m.by_alpha * inv
    in_x, in_alpha, in_sigma = winner_factors(j, r * t, r * q, distance, p)
    return r, in_x, in_alpha, in_sigma


@triton.jit
def _outside(j, k):
    return (j < k.bottom) | (j > k.top)


@triton.jit
def of_many(
    x,
    g,
    mask,
    index,
    at,
    p,
    seed,
    count,
    SIGNED: tl.constexpr,
    LEVELS: tl.constexpr,
    DRAWN: tl.constexpr,
    GATE_GRAD: tl.constexpr,
):
    c = cq.nearest_class(x, p)
    z = cq.offset_of(x, c, p)
    if DRAWN:
        j = cd.draw(c, z, index, at, p, seed, count)
    else:
        j = cg.hard_class(x, at, p, SIGNED, LEVELS)
    before = cg.level_at(at, 0)
    m = first_level(before, c, z, j, p)
    weight = before.weight + tl.zeros_like(z)
    for t in range(1, count):
        k = cg.level_at(at, t)
        m = add_level(m, k, c, z, j, p, SIGNED)
        weight = tl.where(_outside(j, cg.level_at(at, t - 1)), k.weight, weight)
    r, in_x, in_alpha, in_sigma = winner_of_many(m, c, z, j, weight, tl.load(at + cs.SHARP), p)
    gates = no_gates()
    if GATE_GRAD:  # share * ([j is in a level above] - r of those levels), from the highest down
        share = g * (p.alpha * (j * r))
        top, bottom, tail = m.top, m.bottom, tl.zeros_like(z)
        for n in range(1, count):
            before = cg.level_at(at, count - n - 1)
            before_top, before_bottom = cg.level_edges(before, c, z, p)
            tail += cg.own_mass(cg.level_at(at, count - n), top, bottom, before_top, before_bottom, SIGNED)
            above = tl.where(_outside(j, before), 1.0, 0.0).to(z.dtype)
            gates = _with_gate(gates, count - n, share * (above - math.divide(tail, m.total)), mask)
            top, bottom = before_top, before_bottom
    return g * in_x, g * in_alpha, g * in_sigma, gates


# The soft sum.


@triton.jit
def of_classes(
    x,
    g,
    mask,
    at,
    p,
    steps,
    SIGNED: tl.constexpr,
    LEVELS: tl.constexpr,
    HAS_GATES: tl.constexpr,
    GATE_GRAD: tl.constexpr,
):
    """``steps``: the farthest class that is felt in any row."""
    c = cq.nearest_class(x, p)
    z = cq.offset_of(x, c, p)
    y, w = ex.exponential(z - p.half), ex.exponential(-z - p.half)
    reach, sharp = tl.load(at + cs.REACH), tl.load(at + cs.SHARP)
    weight, first = cs.soft_sums(c, y, w, at, p, reach, steps, HAS_GATES, True)
    inv = math.divide(1.0, weight)
    mean = first * inv
    by_x, by_width, tails = cs.soft_slopes(
        c, y, w, inv, mean, sharp, at, p, reach, steps, SIGNED, LEVELS, HAS_GATES, GATE_GRAD, True
    )
    gates = no_gates()
    if GATE_GRAD:
        for t in tl.static_range(1, LEVELS):
            gates = _with_gate(gates, t, (g * p.alpha) * (tails[t - 1] * inv), mask)
    in_x, in_alpha, in_sigma = cs.soft_factors(by_x, by_width, c, z, mean, p)
    return g * in_x, g * in_alpha, g * in_sigma, gates


@triton.jit
def of_spline(x, g, at, table, p):
    """``table``: the coefficients."""
    out, in_alpha, in_sigma = cs.slopes_by_spline(x, g, table, p, cs.spline_at(at))
    return out, in_alpha, in_sigma, no_gates()
