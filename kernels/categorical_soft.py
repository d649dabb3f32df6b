"""The soft sum and its gradients, in Triton: csrc/categorical_soft.h under the same names."""

from typing import NamedTuple

import triton
import triton.language as tl

from quantops.kernels import categorical_quantizer as cq
from quantops.kernels import exponential as ex
from quantops.kernels import math

# Where a record has what the sums over the classes need: 1 - exp(-beta), the reach, exp(-beta n) of n = 0..255 and G of
# class low + n; and a Spline.
SHARP, REACH = tl.constexpr(11), tl.constexpr(12)
DECAY, GATE_OF, CLASSES = tl.constexpr(16), tl.constexpr(272), tl.constexpr(256)
SPLINE = tl.constexpr(528)

MOST_INTERVALS, ORDER = tl.constexpr(48), tl.constexpr(8)  # of a spline; its coefficients
LEAST_SPLINED = 1024  # elements of a row
OF_MEAN, OF_SLOPES = tl.constexpr(1), tl.constexpr(3)  # functions that a spline is made of

# Over the classes, outward from c; y = exp(z - half) and w = exp(-z - half), pi_i = sharp u_i.


@triton.jit
def soft_reach(l, beta):
    """The farthest class from c that can be felt."""
    lanes = tl.arange(0, cq.MAX_BITS)
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
def soft_factors(by_x, by_width, c, z, mean, p):
    """Factors of dL/dq in the gradients of x, alpha and sigma."""
    in_x, in_width = p.beta * by_x, p.beta * by_width
    return in_x, c * (1.0 - in_x) + (mean - in_width), p.beta * in_width - z * in_x


@triton.jit
def gate_of(i, step, at, p, reach, HAS_GATES: tl.constexpr):
    """G of class i, which is ``step`` classes from c; 0 where it is not in or not felt."""
    there = (i >= tl.where(step <= reach, p.low, float("inf"))) & (i <= p.high)
    if HAS_GATES:
        return tl.load(at + GATE_OF + tl.where(there, i - p.low, 0.0).to(tl.int32), mask=there, other=0.0)
    else:
        return tl.where(there, 1.0, 0.0).to(i.dtype)


@triton.jit
def _decay(n, step, at, p, TABLE: tl.constexpr):
    """exp(-beta n), from the record or, while that is made, computed."""
    if TABLE:
        return tl.load(at + DECAY + n)
    else:
        return ex.exponential(-p.beta * step)


@triton.jit
def soft_sums(c, y, w, at, p, reach, steps, HAS_GATES: tl.constexpr, TABLE: tl.constexpr):
    """sum w and sum w (i - c), of weights w = G u."""
    step = tl.zeros([], c.dtype)
    u, _ = soft_center(y, w)
    weight, first = gate_of(c, step, at, p, reach, HAS_GATES) * u, tl.zeros_like(c)
    inner = _decay(0, step, at, p, TABLE)
    for n in range(1, steps + 1):
        step += 1.0
        outer = _decay(n, step, at, p, TABLE)
        pair = soft_pair(y, w, inner, outer)
        up = gate_of(c + step, step, at, p, reach, HAS_GATES) * pair.up
        down = gate_of(c - step, step, at, p, reach, HAS_GATES) * pair.down
        weight += up + down
        first += step * (up - down)
        inner = outer
    return weight, first


@triton.jit
def _beyond(i, t: tl.constexpr, SIGNED: tl.constexpr):
    """Whether class i is in a level above t, counted from 1."""
    top: tl.constexpr = (1 << (t - 1 if SIGNED else t)) - 1.0
    bottom: tl.constexpr = -top - 1.0 if SIGNED else 0.0
    return (i > top) | (i < bottom)


@triton.jit
def _add_tails(tails, i, deviation, SIGNED: tl.constexpr, LEVELS: tl.constexpr):
    """Adds the deviation of class i to the sums over the levels above 1, 2, ..."""
    new = ()
    for t in tl.static_range(1, LEVELS):
        new = new + (tails[t - 1] + tl.where(_beyond(i, t, SIGNED), deviation, 0.0),)
    return new


@triton.jit
def soft_slopes(
    c,
    y,
    w,
    inv,
    mean,
    sharp,
    at,
    p,
    reach,
    steps,
    SIGNED: tl.constexpr,
    LEVELS: tl.constexpr,
    HAS_GATES: tl.constexpr,
    GATE_GRAD: tl.constexpr,
    TABLE: tl.constexpr,
):
    """The second pass, with deviations d = w (i - c - mean): sum d T and sum d V, which are covariances under r; with
    GATE_GRAD the sums of d over the levels above 1, 2, ... as well."""
    step = tl.zeros([], c.dtype)
    u, slope = soft_center(y, w)
    deviation = -(gate_of(c, step, at, p, reach, HAS_GATES) * u) * mean
    by_x, by_width = deviation * slope, deviation * (0.5 * sharp * u)
    tails = ()
    if GATE_GRAD:
        for _ in tl.static_range(1, LEVELS):
            tails = tails + (tl.zeros_like(c),)
        tails = _add_tails(tails, c, deviation, SIGNED, LEVELS)
    inner = _decay(0, step, at, p, TABLE)
    for n in range(1, steps + 1):
        step += 1.0
        outer = _decay(n, step, at, p, TABLE)
        pair = soft_pair(y, w, inner, outer)
        up = (gate_of(c + step, step, at, p, reach, HAS_GATES) * pair.up) * (step - mean)
        down = (gate_of(c - step, step, at, p, reach, HAS_GATES) * pair.down) * (-step - mean)
        by_x += up * pair.up_slope - down * pair.down_slope
        by_width += up * (0.5 * sharp * pair.up + step * pair.up_slope) + down * (
            0.5 * sharp * pair.down + step * pair.down_slope
        )
        if GATE_GRAD:
            tails = _add_tails(_add_tails(tails, c + step, up, SIGNED, LEVELS), c - step, down, SIGNED, LEVELS)
        inner = outer
    return by_x * inv, by_width * inv, tails


@triton.jit
def soft_value(x, at, p, steps, HAS_GATES: tl.constexpr):
    """The mean of the classes; ``steps``: the farthest class that is felt."""
    c = cq.nearest_class(x, p)
    z = cq.offset_of(x, c, p)
    y, w = ex.exponential(z - p.half), ex.exponential(-z - p.half)
    weight, first = soft_sums(c, y, w, at, p, tl.load(at + REACH), steps, HAS_GATES, True)
    return c + math.divide(first, weight)


# By a spline.


class Spline(NamedTuple):
    intervals: tl.tensor  # of all classes together; 0 where the sum is taken over the classes
    per_class: tl.tensor
    cells: tl.tensor  # classes with intervals of their own
    rate: tl.tensor  # y rate + shift: the place of y = z, mirrored, among the intervals of its class
    shift: tl.tensor
    first: tl.tensor  # classes from the middle to the first of these cells
    most: tl.tensor  # of y: nothing changes beyond
    middle: tl.tensor


@triton.jit
def make_spline(p, long):
    """``long``: whether the row has enough elements; numbers in the dtype of the arithmetic."""
    T: tl.constexpr = p.beta.dtype
    half = ((p.high - p.low + 1.0).to(tl.int32) // 2).to(T)
    fits = long & (half > 0.0) & (p.alpha == p.alpha) & (p.beta > 0.25) & (p.beta < 32.0)
    beta = tl.where(fits, p.beta, 1.0)
    per_class = 1.0 + math.floor_small(beta * (1.0 / 1.2))
    cells = tl.minimum(2.0 + math.floor_small(math.divide(20.0, beta)), half)
    rate = math.divide(per_class, beta) * (1.0 - 1.0 / 4096)  # the intervals cover a bin with its rounding
    shift = 0.5 * per_class - 0.5
    beyond = 1.0 + math.floor_small(17.0 * rate)
    intervals = cells * per_class + beyond
    return Spline(
        tl.where(fits & (intervals <= MOST_INTERVALS), intervals, 0.0),
        per_class,
        cells,
        rate,
        shift,
        (half - cells) + 0.5,
        math.divide(shift + beyond, rate),
        0.5 * (p.low + p.high),
    )


@triton.jit
def spline_at(at):
    at = at + SPLINE
    return Spline(
        tl.load(at),
        tl.load(at + 1),
        tl.load(at + 2),
        tl.load(at + 3),
        tl.load(at + 4),
        tl.load(at + 5),
        tl.load(at + 6),
        tl.load(at + 7),
    )


@triton.jit
def _write_coefficients(to, values, there):
    """``values``: of a function, at 8 nodes of each interval."""
    a0, a1, a2, a3, a4, a5, a6, a7 = (
        _chebyshev(values, 0),
        _chebyshev(values, 1),
        _chebyshev(values, 2),
        _chebyshev(values, 3),
        _chebyshev(values, 4),
        _chebyshev(values, 5),
        _chebyshev(values, 6),
        _chebyshev(values, 7),
    )
    a0 = 0.5 * a0
    tl.store(to, (a0 - a2) + (a4 - a6), mask=there)
    tl.store(to + 1, 2.0 * ((a1 - 3.0 * a3) + (5.0 * a5 - 7.0 * a7)), mask=there)
    tl.store(to + 2, 4.0 * (2.0 * a2 - (8.0 * a4 - 18.0 * a6)), mask=there)
    tl.store(to + 3, 8.0 * (4.0 * a3 - (20.0 * a5 - 56.0 * a7)), mask=there)
    tl.store(to + 4, 16.0 * (8.0 * a4 - 48.0 * a6), mask=there)
    tl.store(to + 5, 32.0 * (16.0 * a5 - 112.0 * a7), mask=there)
    tl.store(to + 6, 64.0 * (32.0 * a6), mask=there)
    tl.store(to + 7, 128.0 * (64.0 * a7), mask=there)


@triton.jit
def _cosine(k):
    """cos(pi k/16)"""
    m = k & 31
    m = tl.where(m > 16, 32 - m, m)
    n = tl.where(m > 8, 16 - m, m)
    v = tl.where(n == 0, 1.0, tl.where(n == 1, 0.98078528040323, tl.where(n == 2, 0.92387953251129, 0.0)))
    v = tl.where(n == 3, 0.83146961230255, tl.where(n == 4, 0.70710678118655, v))
    v = tl.where(n == 5, 0.55557023301960, tl.where(n == 6, 0.38268343236509, v))
    v = tl.where(n == 7, 0.19509032201613, v)
    return tl.where(m > 8, -v, v)


@triton.jit
def _chebyshev(values, K: tl.constexpr):
    """The coefficient of a Chebyshev polynomial; of the first, twice that."""
    turns = K * (2 * tl.arange(0, ORDER)[None, :] + 1)
    return 0.25 * tl.sum(values * _cosine(turns).to(values.dtype), 1)


@triton.jit
def fill_spline(to, k, at, p, reach, FUNCTIONS: tl.constexpr):
    """Writes the coefficients: of an interval those of the mean, or of x, alpha and sigma, from t^0 on."""
    T: tl.constexpr = p.beta.dtype
    interval = tl.arange(0, 64)
    cell = tl.minimum(math.floor_small(math.divide(interval.to(T), k.per_class)), k.cells - 1.0)
    node = 0.5 * _cosine(2 * tl.arange(0, ORDER)[None, :] + 1).to(T)
    z = math.divide(((interval.to(T) - cell * k.per_class)[:, None] + node) - k.shift, k.rate)
    c = (p.high - ((k.cells - 1.0) - cell))[:, None] + tl.zeros_like(z)
    y, w = ex.exponential(z - p.half), ex.exponential(-z - p.half)
    steps = reach.to(tl.int32)
    weight, first = soft_sums(c, y, w, at, p, reach, steps, False, False)
    inv = math.divide(1.0, weight)
    mean = first * inv
    there = interval < k.intervals.to(tl.int32)
    to = to + interval * (FUNCTIONS * ORDER)
    if FUNCTIONS == OF_MEAN:
        _write_coefficients(to, mean, there)
    else:
        sharp = ex.one_minus_exp(p.beta.to(tl.float64)).to(T)
        by_x, by_width, _ = soft_slopes(c, y, w, inv, mean, sharp, at, p, reach, steps, False, 1, False, False, False)
        in_x, in_alpha, in_sigma = soft_factors(by_x, by_width, c * 0.0, z, mean, p)
        _write_coefficients(to, in_x, there)
        _write_coefficients(to + ORDER, in_alpha, there)
        _write_coefficients(to + 2 * ORDER, in_sigma, there)


@triton.jit
def spline_place(side, z, k):
    """(t, the interval, which is one of those there are whatever x); ``side``: of c from the middle of the grid."""
    y = ex.at_most(ex.change_sign(z, side), k.most)
    j = math.rint_small(math.product_plus(y, k.rate, k.shift))
    cell = ex.at_least(tl.abs(side) - k.first, 0.0)
    interval = math.product_plus(cell, k.per_class, j)
    interval = tl.where((interval >= 0.0) & (interval < k.intervals), interval, 0.0).to(tl.int32)
    return math.product_plus(y, k.rate, k.shift - j), interval


@triton.jit
def spline_value(row, t):
    """The polynomial with the coefficients at ``row``."""
    v = math.product_plus(tl.load(row + 7), t, tl.load(row + 6))
    v = math.product_plus(v, t, tl.load(row + 5))
    v = math.product_plus(v, t, tl.load(row + 4))
    v = math.product_plus(v, t, tl.load(row + 3))
    v = math.product_plus(v, t, tl.load(row + 2))
    v = math.product_plus(v, t, tl.load(row + 1))
    return math.product_plus(v, t, tl.load(row))


@triton.jit
def mean_by_spline(x, table, p, k):
    c = cq.nearest_class(x, p)
    side = c - k.middle
    t, interval = spline_place(side, cq.scaled_offset(x, c, p.inv_sigma, p), k)
    return c + ex.change_sign(spline_value(table + interval * ORDER, t), side)


@triton.jit
def slopes_by_spline(x, g, table, p, k):
    """dL/dx, and what an element adds to dL/dalpha and dL/dsigma."""
    c = cq.nearest_class(x, p)
    side = c - k.middle
    t, interval = spline_place(side, cq.scaled_offset(x, c, p.inv_sigma, p), k)
    row = table + interval * (3 * ORDER)
    out, mirrored = g * spline_value(row, t), ex.change_sign(g, side)
    in_alpha = math.product_plus(mirrored, spline_value(row + ORDER, t), (g - out) * c)
    return out, in_alpha, mirrored * spline_value(row + 2 * ORDER, t)
