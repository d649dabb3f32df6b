"""What gates do, in Triton: csrc/categorical_gates.h under the same names. What they fix is computed in float64."""

from typing import NamedTuple

import triton
import triton.language as tl

from quantops.kernels import categorical_quantizer as cq
from quantops.kernels import exponential as ex
from quantops.kernels import math

# Where a record has what gates fix (see kernels/categorical.py): T_0..T_15, then a Level, each of its numbers for 16.
BOUND, LEVEL = tl.constexpr(16), tl.constexpr(32)
LEAST_GATE = tl.constexpr(2.0**-64)  # a cumulative gate below counts as 0


@triton.jit
def top_of_level(t, SIGNED: tl.constexpr):
    if SIGNED:
        return (1 << (t - 1)) - 1
    else:
        return (1 << t) - 1


class Levels(NamedTuple):
    """The levels of one tensor that are in, of n bits, and their classes."""

    gate: tl.tensor  # G_1..G_16 in float64, as lanes; 0 below the least gate
    count: tl.tensor
    low: tl.tensor
    high: tl.tensor
    valid: tl.tensor


@triton.jit
def make_levels(gates, gate_count, n, SIGNED: tl.constexpr, MOST_BITS: tl.constexpr, HAS_GATES: tl.constexpr):
    lanes = tl.arange(0, cq.MAX_BITS)
    valid = (n >= 0) & (n <= MOST_BITS)
    gate = tl.full([cq.MAX_BITS], 1.0, tl.float64)
    if HAS_GATES:
        valid = valid & (gate_count == n)
        count = tl.where(valid, n, 0)
        given = tl.load(gates + lanes, mask=lanes < count, other=1.0)
        valid = valid & (tl.min(((given >= 0.0) & (given <= 1.0)).to(tl.int32), 0) != 0)
        for i in range(1, count):  # in this order, on every backend
            gate = tl.where(lanes >= i, gate * tl.load(gates + i).to(tl.float64), gate)
        gate = tl.where(gate < LEAST_GATE, 0.0, gate)
    n = tl.where(valid, n, 0)
    count = tl.maximum(tl.sum(((gate > 0.0) & (lanes < n)).to(tl.int32), 0), 1)
    high = tl.where(n > 0, top_of_level(count, SIGNED), 0)
    low = high * 0
    if SIGNED:
        low = tl.where(n > 0, -high - 1, 0)
    return Levels(gate, count, low, high, valid)


# The hard class: bounds T_t on the mirrored value.


@triton.jit
def crossing(ratio, beta, top, first, last):
    """Where, going up, the classes first..last, 1/ratio as likely by their gate, begin to win against class ``top``."""
    h = 0.5 * beta
    inverse = 1.0 / ratio
    x = tl.log(2.0 * ratio - 1.0) + (h + tl.log(0.5 + 0.5 * tl.exp(-2.0 * h)))
    reach = tl.where(x > 30.0, x + 0.69314718055994531, tl.log(tl.exp(x) + tl.sqrt(tl.exp(2.0 * x) - 1.0)))
    i = math.rint_small(top + reach / beta)
    i = tl.where(i > first, tl.where(i > last, last, i), first)
    best = tl.full(i.shape, float("inf"), tl.float64)
    for _ in tl.static_range(2):
        delta = 0.5 * beta * (i - top)
        e = tl.exp(-2.0 * delta)
        a = inverse - e  # a y^2 - 2 b y = c
        b = 0.5 * (1.0 - inverse) * (tl.exp(h - delta) + tl.exp(-h - delta))
        c = 1.0 - e * inverse
        at = 0.5 * (i + top) + tl.log((b + tl.sqrt(b * b + a * c)) / a) / beta
        best = tl.where((a > 0.0) & (at < best), at, best)
        i = tl.where(i > first, i - 1.0, i)
    return tl.where((ratio == 1.0) & (first == top + 1.0), top + 0.5, best)


@triton.jit
def round_up(v, T: tl.constexpr):
    """The least number of type T that is not below v."""
    r = v.to(T)
    if T == tl.float32:
        return tl.where(r.to(tl.float64) < v, (r.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True), r)
    else:
        return r


@triton.jit
def hard_bounds(l, beta, SIGNED: tl.constexpr, T: tl.constexpr):
    """T_0..T_15 as lanes, T_0 and those that are not there minus infinity.

    Levels enter from the lowest; a new one cuts off what is above its first win.
    """
    lanes = tl.arange(0, cq.MAX_BITS)  # of level s = lane + 1
    s, u = lanes[:, None] + 1, lanes[None, :] + 1
    top_s, top_u = top_of_level(s, SIGNED), top_of_level(u, SIGNED)
    first = top_of_level(tl.maximum(u - 1, 1), SIGNED) + 1
    there = (s < u) & (u <= l.count)
    ratio = tl.where(there, l.gate[:, None], 1.0) / tl.where(there, l.gate[None, :], 1.0)
    wins = round_up(crossing(ratio, beta, top_s.to(tl.float64), first.to(tl.float64), top_u.to(tl.float64)), T)
    level = tl.arange(0, cq.MAX_BITS) + 1
    bound = tl.full([cq.MAX_BITS], -float("inf"), T)  # of level - 1
    for new in range(2, l.count + 1):
        at = tl.sum(tl.where(u == new, wins, 0.0), 1)
        ok = (level < new) & ((level == 1) | (at > bound))
        best = tl.max(tl.where(ok, level, 0), 0)  # the level that the new one first wins against
        value = tl.sum(tl.where(level == best, at, 0.0), 0)
        bound = tl.where((level > best) & (level <= new), value, bound)
    return bound


class Mirrored(NamedTuple):
    """The mirrored value and class of x, class c >= 0 being itself and c < 0 being -1 - c; below = 1 for those."""

    value: tl.tensor
    c: tl.tensor
    below: tl.tensor


@triton.jit
def mirror(x, p):
    T: tl.constexpr = x.dtype
    most: tl.constexpr = ex.MOST64 if T == tl.float64 else ex.MOST32
    v = ex.at_least(x * p.inv_alpha, tl.where(p.low < 0.0, -most, 0.0))
    size = tl.where(v < 0.0, -v, v)
    below = tl.where(v < 0.0, 1.0, 0.0).to(T)
    return Mirrored(ex.at_most(size - below, most), math.rint_small(ex.at_most(size, p.high + below)) - below, below)


@triton.jit
def bounded(value, c, bound, top):
    """Applies T_t: the class is at most ``top`` below it."""
    return tl.where(value < bound, ex.at_most(c, top), c)


@triton.jit
def unmirrored(c, below):
    return c * (1.0 - 2.0 * below) - below


@triton.jit
def hard_class(x, at, p, SIGNED: tl.constexpr, LEVELS: tl.constexpr):
    """The class of x with the gates of the record ``at``."""
    m = mirror(x, p)
    c = m.c
    for t in tl.static_range(1, LEVELS):
        c = bounded(m.value, c, tl.load(at + BOUND + t), (1 << (t - 1 if SIGNED else t)) - 1.0)
    return unmirrored(c, m.below)


# Masses of the levels.


class Edge(NamedTuple):
    """S at an edge and at minus that edge."""

    s: tl.tensor
    n: tl.tensor


@triton.jit
def edge_at(a):
    e = ex.exponential(tl.where(a < 0.0, a, -a))
    inv = math.divide(1.0, 1.0 + e)
    other = e * inv
    return Edge(tl.where(a < 0.0, other, inv), tl.where(a < 0.0, inv, other))


class Level(NamedTuple):
    """Constants of level t. Its own classes are those above the level before it and, signed, those below."""

    top: tl.tensor
    bottom: tl.tensor
    weight: tl.tensor  # G_t
    step: tl.tensor  # G_t - G_(t+1)
    own: tl.tensor  # 1 - exp(-beta n) of the n classes of its own on one side,
    whole: tl.tensor  # of all from bottom to top


@triton.jit
def make_all_levels(l, beta, SIGNED: tl.constexpr, HAS_GATES: tl.constexpr):
    """The levels as lanes; one that has all classes where there are no gates."""
    T: tl.constexpr = beta.dtype
    width = beta.to(tl.float64)
    t = tl.arange(0, cq.MAX_BITS) + 1
    if HAS_GATES:
        top = tl.minimum(top_of_level(t, SIGNED), l.high)
        bottom = tl.zeros_like(top)
        if SIGNED:
            bottom = tl.maximum(-top - 1, l.low)
        weight = l.gate.to(T)
        following = tl.sum(tl.where(t[None, :] == t[:, None] + 1, l.gate[None, :], 0.0), 1).to(T)
        step = weight - tl.where(t < l.count, following, 0.0)
        whole = ex.one_minus_exp(width * (top - bottom + 1).to(tl.float64))
        before = top_of_level(tl.maximum(t - 1, 1), SIGNED)
        own = tl.where(t == 1, whole, ex.one_minus_exp(width * (tl.maximum(top - before, 1)).to(tl.float64)))
    else:
        top, bottom = l.high + t * 0, l.low + t * 0
        weight = tl.full([cq.MAX_BITS], 1.0, T)
        step = weight
        whole = ex.one_minus_exp(width * (top - bottom + 1).to(tl.float64))
        own = whole
    return Level(top.to(T), bottom.to(T), weight, step, own.to(T), whole.to(T))


@triton.jit
def level_edges(k, c, z, p):
    """Of the upper edge of a level's top class and of the lower one of its bottom class."""
    return edge_at(p.beta * (k.top + 0.5 - c) - z), edge_at(p.beta * (k.bottom - 0.5 - c) - z)


@triton.jit
def own_mass(k, top, bottom, before_top, before_bottom, SIGNED: tl.constexpr):
    """The mass of the level's own classes times G_t."""
    mass = (top.s * before_top.n) * k.own
    if SIGNED:
        mass = mass + (before_bottom.s * bottom.n) * k.own
    return mass * k.weight


@triton.jit
def level_at(at, t):
    """Level t, counted from 0, of the record ``at``."""
    at = at + LEVEL + t
    return Level(tl.load(at), tl.load(at + 16), tl.load(at + 32), tl.load(at + 48), tl.load(at + 64), tl.load(at + 80))
