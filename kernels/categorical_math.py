"""The categorical quantizer per element, in Triton: the statement of csrc/categorical_math.h under the same names.

In float32, exp and log are made of additions and multiplications, so that they have the same bits as on every other
backend; in float64 they are the device's own. What is fixed by gates and scales is computed in float64.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from quantops.kernels import math
from quantops.kernels import truncate_math as tm

MAX_BITS, MAX_SOFT_BITS = tl.constexpr(16), tl.constexpr(8)
LEAST_GATE = tl.constexpr(2.0**-64)  # a cumulative gate below counts as 0
MOST32, MOST64 = tl.constexpr(3.4028234663852886e38), tl.constexpr(1.7976931348623157e308)
HALF32, HALF64 = tl.constexpr(40.0), tl.constexpr(160.0)  # most_half of csrc/categorical_math.h,
DECAY32, DECAY64 = tl.constexpr(-25.25), tl.constexpr(-55.0)  # and least_decay


@triton.jit
def at_most(v, top):
    return tl.where(v > top, top, v)


@triton.jit
def at_least(v, low):
    return tl.where(v < low, low, v)


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
def scaled_power(r, shifted):
    """2^r 2^n to less than 1.3 ulp for |r| <= 1/2; the integer n is in the lowest bits of ``shifted``. NaN as above."""
    square = r * r
    low = 0.24022652 + 0.0555031039 * r
    high = 0.00961769279 + 0.00134066434 * r
    p = low + square * (high + square * 0.000155946778)
    y = (p * square + 0.693147242 * r) + 1.0
    bits = y.to(tl.uint32, bitcast=True) + (shifted.to(tl.uint32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(x):
    """2^x for -125 <= x <= 127."""
    if x.dtype == tl.float64:
        return tl.exp2(x)
    else:
        shifted = x + 12582912.0  # its lowest bits are the integer nearest to x
        return scaled_power(x - (shifted - 12582912.0), shifted)


@triton.jit
def power_of_two_parts(high, low):
    """2^(high + low), where low is what high lacks."""
    if high.dtype == tl.float64:
        return tl.exp2(high + low)
    else:
        shifted = (high + low) + 12582912.0
        return scaled_power((high - (shifted - 12582912.0)) + low, shifted)


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
def one_minus_exp(x):
    """1 - exp(-x) for x >= 0, in float64."""
    e = tm.exponential_minus_one(at_most(x, 40.0))  # beyond, 1 - exp(-x) is 1
    return e / (e + 1.0)


@triton.jit
def philox(seed, index):
    """Philox4x32-10 of a 64-bit key and counter: the first two of its four words."""
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    first, second, _, _ = tl.philox(seed, low, high, zero, zero)
    return first, second


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
    lanes = tl.arange(0, MAX_BITS)
    valid = (n >= 0) & (n <= MOST_BITS)
    gate = tl.full([MAX_BITS], 1.0, tl.float64)
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
    return at_most(at_least(alpha.to(tl.float64) / sigma.to(tl.float64), 1.0 / 16777216), 16777216.0)


@triton.jit
def head_of(v):
    if v.dtype == tl.float64:
        return ((v.to(tl.int64, bitcast=True) >> 16) << 16).to(tl.float64, bitcast=True)
    else:
        return ((v.to(tl.int32, bitcast=True) >> 16) << 16).to(tl.float32, bitcast=True)


@triton.jit
def make_bins(alpha, sigma, low, high, valid):
    T: tl.constexpr = alpha.dtype
    most: tl.constexpr = MOST64 if T == tl.float64 else MOST32
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
    return Bins(shown, math.divide(1.0, shown), head, alpha - head, at_most(beta64 / alpha.to(tl.float64), most).to(T),
                beta, half, far, low.to(T), high.to(T))


@triton.jit
def rint_class(v):
    """rint, half to even, for |v| < 2^22, never -0."""
    return math.rint_small(v) + 0.0


@triton.jit
def nearest_class(x, p):
    """c = clamp(rint(x / alpha), low, high); NaN where x is."""
    return rint_class(at_most(at_least(x * p.inv_alpha, p.low), p.high))


@triton.jit
def clamp_far(z, p):
    return at_most(at_least(z, -p.far), p.far)


@triton.jit
def offset_of(x, c, p):
    """z = (x - alpha c)/sigma"""
    return clamp_far(((x - c * p.alpha_head) - c * p.alpha_tail) * p.inv_sigma, p)


# The hard class with gates: bounds T_t on the mirrored value, see csrc/categorical_math.h.


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
    lanes = tl.arange(0, MAX_BITS)  # of level s = lane + 1
    s, u = lanes[:, None] + 1, lanes[None, :] + 1
    top_s, top_u = top_of_level(s, SIGNED), top_of_level(u, SIGNED)
    first = top_of_level(tl.maximum(u - 1, 1), SIGNED) + 1
    there = (s < u) & (u <= l.count)
    ratio = tl.where(there, l.gate[:, None], 1.0) / tl.where(there, l.gate[None, :], 1.0)
    wins = round_up(crossing(ratio, beta, top_s.to(tl.float64), first.to(tl.float64), top_u.to(tl.float64)), T)
    level = tl.arange(0, MAX_BITS) + 1
    bound = tl.full([MAX_BITS], -float("inf"), T)  # of level - 1
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
    most: tl.constexpr = MOST64 if T == tl.float64 else MOST32
    v = at_least(x * p.inv_alpha, tl.where(p.low < 0.0, -most, 0.0))
    size = tl.where(v < 0.0, -v, v)
    below = tl.where(v < 0.0, 1.0, 0.0).to(T)
    return Mirrored(at_most(size - below, most), math.rint_small(at_most(size, p.high + below)) - below, below)


@triton.jit
def bounded(value, c, bound, top):
    """Applies T_t: the class is at most ``top`` below it."""
    return tl.where(value < bound, at_most(c, top), c)


@triton.jit
def unmirrored(c, below):
    return c * (1.0 - 2.0 * below) - below


# The winner's backward: factors of dL/dq in the gradients of x, alpha and sigma.


@triton.jit
def winner_factors(j, rt, rq, distance, p):
    factor = j * p.beta
    return factor * rt, j + factor * (rq - j * rt), factor * (distance * rt - p.beta * rq)


class OneInterval(NamedTuple):
    """What the case without gates needs, where the winner is the nearest class, see csrc/categorical_math.h."""

    rate: tl.tensor  # log2(e)/sigma
    half: tl.tensor  # log2(e) beta/2
    beyond: tl.tensor  # the largest w of mirrored_offset
    decay: tl.tensor  # log2(e) beta
    t: tl.tensor  # exp(-beta), not below 2^(-2 most_half)
    twice: tl.tensor  # 2 t/(1 - t)
    ratio: tl.tensor  # (1 - t)/(1 - theta)
    scale: tl.tensor  # beta times that
    spread: tl.tensor  # 2/(1 - theta)
    middle: tl.tensor  # (low + high)/2
    half_classes: tl.tensor  # (high - low + 1)/2


@triton.jit
def make_one_interval(p):
    T: tl.constexpr = p.beta.dtype
    most: tl.constexpr = MOST64 if T == tl.float64 else MOST32
    most_half: tl.constexpr = HALF64 if T == tl.float64 else HALF32
    most_beyond: tl.constexpr = 72.0 if T == tl.float64 else 36.0
    log2_e: tl.constexpr = 1.4426950408889634
    beta, classes = p.beta.to(tl.float64), (p.high - p.low + 1.0).to(tl.float64)
    sharp, opened, t = one_minus_exp(beta), one_minus_exp(beta * classes), tl.exp(-beta)
    half = (0.5 * log2_e * beta).to(T)
    return OneInterval(at_most(log2_e * p.inv_sigma.to(tl.float64), most).to(T), half, half + most_beyond,
                       (log2_e * beta).to(T), at_least(t, 2.0 ** (-2.0 * most_half)).to(T),
                       (2.0 * t / sharp).to(T), (sharp / opened).to(T), (beta * sharp / opened).to(T),
                       (2.0 / opened).to(T), 0.5 * (p.low + p.high), (0.5 * classes).to(T))


@triton.jit
def change_sign(v, by):
    """v, negated where ``by`` is below 0, which is not 0 or NaN."""
    return tl.where(by < 0.0, -v, v)


@triton.jit
def mirrored(v, c, k):
    return change_sign(v, c - k.middle)


@triton.jit
def mirrored_offset(x, c, p, k):
    """w = log2(e) z, mirrored."""
    z = ((x - c * p.alpha_head) - c * p.alpha_tail) * k.rate
    return at_least(at_most(mirrored(z, c, k), k.beyond), -k.beyond)


@triton.jit
def edge_power(w, k):
    """b of that w."""
    most_half: tl.constexpr = HALF64 if w.dtype == tl.float64 else HALF32
    return power_of_two(at_least(w - k.half, at_most((w + k.half) - 2.0 * most_half, -most_half)))


@triton.jit
def decay_of(n, k):
    """exp(-beta n), 0 where that cannot be felt."""
    least: tl.constexpr = DECAY64 if n.dtype == tl.float64 else DECAY32
    exponent = -k.decay * n
    return tl.where(exponent < least, 0.0, power_of_two(at_least(exponent, 2.0 * least)))


@triton.jit
def winner_of_one(c, b, k):
    """r T and 2 r Q, mirrored and without the factor ``ratio``."""
    over, under = 1.0 + b, b + k.t
    inv = math.divide(1.0, over * under)
    n1, n2 = (b * inv) * under, k.t * (over * inv)
    t, q = n2 - n1, (n1 + n2) + k.twice
    side = c - k.middle
    away = change_sign(side, side)
    near, far = decay_of((k.half_classes - 0.5) - away, k), k.t * decay_of((k.half_classes - 0.5) + away, k)
    outer = b * near
    whole, spread, sums = 1.0 + outer, (k.half_classes - away) * k.spread, b + far
    r, far = sums * inv, (far * inv) * whole
    return (r * (t * whole + outer) - far,
            r * (q * whole - spread * (near * sums)) - far * (((k.half_classes + away) * k.spread) * whole))


@triton.jit
def factors_of_one(c, w, rt, rq, p, k):
    """The factors that these slopes come to, at an element with its c and w."""
    return winner_factors(c, k.ratio * mirrored(rt, c, k), 0.5 * (k.ratio * rq),
                          mirrored(w, c, k) * -0.69314718055994531, p)


class Edge(NamedTuple):
    """S at an edge and at minus that edge."""

    s: tl.tensor
    n: tl.tensor


@triton.jit
def edge_at(a):
    e = exponential(tl.where(a < 0.0, a, -a))
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
    t = tl.arange(0, MAX_BITS) + 1
    if HAS_GATES:
        top = tl.minimum(top_of_level(t, SIGNED), l.high)
        bottom = tl.zeros_like(top)
        if SIGNED:
            bottom = tl.maximum(-top - 1, l.low)
        weight = l.gate.to(T)
        following = tl.sum(tl.where(t[None, :] == t[:, None] + 1, l.gate[None, :], 0.0), 1).to(T)
        step = weight - tl.where(t < l.count, following, 0.0)
        whole = one_minus_exp(width * (top - bottom + 1).to(tl.float64))
        before = top_of_level(tl.maximum(t - 1, 1), SIGNED)
        own = tl.where(t == 1, whole, one_minus_exp(width * (tl.maximum(top - before, 1)).to(tl.float64)))
    else:
        top, bottom = l.high + t * 0, l.low + t * 0
        weight = tl.full([MAX_BITS], 1.0, T)
        step = weight
        whole = one_minus_exp(width * (top - bottom + 1).to(tl.float64))
        own = whole
    return Level(top.to(T), bottom.to(T), weight, step, own.to(T), whole.to(T))


class Masses(NamedTuple):
    """D and its derivatives, level by level from the lowest."""

    total: tl.tensor
    by_x: tl.tensor
    by_alpha: tl.tensor
    top: Edge
    bottom: Edge


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
def first_level(k, c, z, j, p):
    zero = tl.zeros_like(z)
    top, bottom = level_edges(k, c, z, p)
    mass = ((top.s * bottom.n) * k.own) * k.weight
    return _with_level(Masses(zero, zero, zero, top, bottom), mass, k, j, top, bottom)


@triton.jit
def add_level(m, k, c, z, j, p, SIGNED: tl.constexpr):
    """Adds level k for an element at (c, z) whose class is j."""
    top, bottom = level_edges(k, c, z, p)
    return _with_level(m, own_mass(k, top, bottom, m.top, m.bottom, SIGNED), k, j, top, bottom)


@triton.jit
def _with_level(m, mass, k, j, top, bottom):
    over, under = top.s * top.n, bottom.s * bottom.n
    return Masses(m.total + mass, m.by_x + k.step * (under - over),
                  m.by_alpha + k.step * ((k.top + 0.5 - j) * over + (j + 0.5 - k.bottom) * under), top, bottom)


@triton.jit
def winner_of_many(m, c, z, j, weight, sharp, p):
    """r_j, and the winner's factors for any class j, with weight G_j."""
    distance = p.beta * (j - c) - z
    inv = math.divide(1.0, m.total)
    a, b = edge_at(distance + p.half), edge_at(distance - p.half)
    r = ((weight * sharp) * (a.s * b.n)) * inv
    t = (a.s - b.n) - m.by_x * inv
    q = math.divide(0.5 * (math.divide(a.n, b.n) + math.divide(b.s, a.s)), sharp) - m.by_alpha * inv
    in_x, in_alpha, in_sigma = winner_factors(j, r * t, r * q, distance, p)
    return r, in_x, in_alpha, in_sigma


# Draws.


@triton.jit
def interval_mass(k, c, z, p):
    """The mass of [lo_t, hi_t] times its step: the part that it has in the mixture r."""
    top, bottom = level_edges(k, c, z, p)
    return k.step * ((top.s * bottom.n) * k.whole)


@triton.jit
def unit_of(word, T: tl.constexpr):
    """[0, 1)"""
    return (word >> 8).to(tl.int32).to(T) * (1.0 / 16777216)


@triton.jit
def draw_inside(word, top, bottom, c, z, p):
    """A class of [bottom, top] drawn from pi by inverting the logistic distribution."""
    T: tl.constexpr = z.dtype
    u, rest = unit_of(word, T) + 1.0 / 33554432, unit_of(~word, T) + 1.0 / 33554432
    near = at_most(at_least(c, bottom), top)
    at = clamp_far(z + p.beta * (c - near), p)
    a, b = edge_at(p.beta * (top + 0.5 - near) - at), edge_at(p.beta * (bottom - 0.5 - near) - at)
    below, above = rest * b.s + u * a.s, rest * b.n + u * a.n
    steps = math.divide((logarithm(below) - logarithm(above)) + at, p.beta)
    i = near + math.rint_small(at_most(at_least(steps, bottom - top), top - bottom))
    return at_most(at_least(i, bottom), top) + 0.0


# The soft sum over the classes, outward from c; y = exp(z - half) and w = exp(-z - half), pi_i = sharp u_i.


@triton.jit
def soft_reach(l, beta):
    """The farthest class from c that can be felt."""
    lanes = tl.arange(0, MAX_BITS)
    last = tl.sum(tl.where(lanes == l.count - 1, l.gate, 0.0), 0)
    if beta.dtype == tl.float64:
        felt = 44.0 - tl.log(last)
    else:
        felt = 21.0 - tl.log(last)
    n = tl.ceil(felt / beta.to(tl.float64) + 0.5)
    return tl.minimum(n, (l.high - l.low).to(tl.float64)).to(tl.int32)


@triton.jit
def soft_center(y, w):
    """Of the class at c itself: u, and T with its sign."""
    u = math.divide(1.0, (1.0 + y) * (1.0 + w))
    return u, (w - y) * u


class Pair(NamedTuple):
    """Two classes' u and |T|."""

    up: tl.tensor
    down: tl.tensor
    up_slope: tl.tensor
    down_slope: tl.tensor


@triton.jit
def soft_pair(y, w, inner, outer):
    """n classes up and down: inner, outer = exp(-beta (n - 1)), exp(-beta n)."""
    y0, y1, w0, w1 = y * inner, y * outer, w * inner, w * outer
    of_up, of_down = (1.0 + y0) * (1.0 + y1), (1.0 + w0) * (1.0 + w1)
    inv = math.divide(1.0, of_up * of_down)
    up, down = inv * of_down, inv * of_up
    return Pair(y0 * up, w0 * down, (1.0 - y0 * y1) * up, (1.0 - w0 * w1) * down)


@triton.jit
def soft_factors(by_x, by_width, c, z, mean, inv_weight, p):
    in_x, in_width = p.beta * (by_x * inv_weight), p.beta * (by_width * inv_weight)
    return in_x, c * (1.0 - in_x) + (mean - in_width), p.beta * in_width - z * in_x
