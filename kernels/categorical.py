"""Family ``categorical`` in Triton: the ops of quantops/library.py, each a single launch over a list of any tensors.

:func:`by_row` does all the work, along rows, since scales and sums belong to rows (or to the tensor, which then is one
row). Hard classes without gates need nothing else. For the others, :func:`prepare` first computes what every scale
fixes, once: one program per scale, which writes a record that the programs over the elements read. Sums are taken in
two stages of fixed shape, without float atomics: a program leaves partials, which a tiny kernel adds up in float64, in
order.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from quantops.kernels import categorical_math as cm
from quantops.kernels import math, memory
from quantops.kernels import soft_edges as se
from quantops.kernels.launch import (
    SHORT_ROW,
    TYPES,
    addresses,
    all_aligned,
    block_of,
    in_layouts_of,
    ints,
    launch,
    on_device_of,
    owners,
    starts,
    widest,
)
from quantops.kernels.table import on_device
from quantops.layout import dense, empty_like
from quantops.reference.categorical import GRADS, MAX_BITS, MAX_SOFT_BITS, MODES
from quantops.reference.uniform import acc_dtype
from quantops.values import check_categorical

# Columns of the table: one row of int64 per tensor.
FIELDS = tl.constexpr(20)
X = tl.constexpr(0)  # addresses: x,
G = tl.constexpr(1)  # dL/dq, in x's layout,
OUT = tl.constexpr(2)  # q or dL/dx, in x's layout,
ALPHA = tl.constexpr(3)  # the scales,
SIGMA = tl.constexpr(4)
GATES = tl.constexpr(5)
IN_ALPHA = tl.constexpr(6)  # and the gradients of these three
IN_SIGMA = tl.constexpr(7)
IN_GATES = tl.constexpr(8)
GATE_COUNT = tl.constexpr(9)
PLACE = tl.constexpr(10)  # of element 0 in the list
ROWS = tl.constexpr(11)  # scales
INNER = tl.constexpr(12)  # elements per row
FIRST = tl.constexpr(13)  # the tensor's first program
PROGRAMS = tl.constexpr(14)
ALIGNED = tl.constexpr(15)  # 1 where all addresses that matter are multiples of 16
PIECES = tl.constexpr(16)  # programs per row; 0 where a program takes many rows
PARTIAL = tl.constexpr(17)  # the tensor's first partial
SECOND = tl.constexpr(18)  # the tensor's first program of the second stage
RECORD = tl.constexpr(19)  # the tensor's first record

# What is done: values, then gradients.
NEAREST, BOUNDED, SAMPLE, SOFT, OF_ONE, OF_MANY, OF_SOFT = (tl.constexpr(i) for i in range(7))

# A record: numbers in the dtype of the arithmetic, the first ones a Bins.
COUNT = tl.constexpr(10)  # levels that are in; without gates all classes are one level
SHARP = tl.constexpr(11)  # 1 - exp(-beta)
REACH = tl.constexpr(12)  # of the soft sum
ONE = tl.constexpr(16)  # a OneInterval,
ONE_SIZE = tl.constexpr(32)  # which is the end of such a record; or
BOUND = tl.constexpr(16)  # T_0..T_15,
LEVEL = tl.constexpr(32)  # a Level, each of its numbers for 16 levels
LEVEL_SIZE = tl.constexpr(128)
DECAY = tl.constexpr(16)  # or exp(-beta n), n = 0..255,
GATE_OF = tl.constexpr(272)  # and G of class low + n
EDGES = tl.constexpr(528)  # and a SoftEdges,
OUTER = tl.constexpr(540)  # of which the last numbers are two EdgeFactors,
EDGE = tl.constexpr(560)  # and an InnerEdge, each of its numbers for 16 edges
SOFT_SIZE = tl.constexpr(656)
SOFT_CLASSES = tl.constexpr(256)

TILE_ROWS = tl.constexpr(16)  # of short rows that share a program
MOST_SUB = tl.constexpr(512)  # elements at a time off the main path, where registers are dear


@triton.jit
def _levels(entry, n, A: tl.constexpr, SIGNED: tl.constexpr, MOST_BITS: tl.constexpr, HAS_GATES: tl.constexpr):
    gates = memory.pointer(tl.load(entry + GATES), 0, A)
    return cm.make_levels(gates, tl.load(entry + GATE_COUNT).to(tl.int32), n, SIGNED, MOST_BITS, HAS_GATES)


@triton.jit
def _write(to, numbers):
    for i in tl.static_range(len(numbers)):
        tl.store(to + i, numbers[i])


@triton.jit
def _write_lanes(to, numbers):
    for i in tl.static_range(len(numbers)):
        tl.store(to + cm.MAX_BITS * i, numbers[i])


@triton.jit
def prepare(table, scales, bits, records, A: tl.constexpr, OP: tl.constexpr, SIGNED: tl.constexpr,
            MOST_BITS: tl.constexpr, HAS_GATES: tl.constexpr, BOUNDS: tl.constexpr, SIZE: tl.constexpr):
    """Writes a record. One program per scale."""
    pid = tl.program_id(0)
    t = memory.owner(scales, pid)
    entry = table + t.to(tl.int64) * FIELDS
    row = pid - tl.load(entry + RECORD)
    l = _levels(entry, tl.load(bits + t), A, SIGNED, MOST_BITS, HAS_GATES)
    alpha = tl.load(memory.pointer(tl.load(entry + ALPHA), row, A))
    sigma = tl.load(memory.pointer(tl.load(entry + SIGMA), row, A))
    p = cm.make_bins(alpha, sigma, l.low, l.high, l.valid)
    to = records + pid.to(tl.int64) * SIZE
    _write(to, p)
    tl.store(to + COUNT, l.count.to(A) if HAS_GATES else 1.0)
    tl.store(to + SHARP, cm.one_minus_exp(p.beta.to(tl.float64)).to(A))
    lanes = tl.arange(0, cm.MAX_BITS)
    if OP == OF_ONE:
        _write(to + ONE, cm.make_one_interval(p))
    elif (OP == SOFT) | (OP == OF_SOFT):
        if HAS_GATES:
            _write(to + EDGES, (0.0, 0.0))
        else:
            beta, half, k = se.make_soft_edges(alpha, sigma, p)
            _write(to + EDGES, k[:12])
            _write(to + OUTER, k.below)
            _write(to + OUTER + 3, k.above)
            edges = se.inner_edge(se.edge_number(lanes, half), half, beta, A)
            _write_lanes(to + EDGE + lanes, (edges.e.factor, edges.e.least, edges.e.most, edges.part, edges.slope,
                                             edges.at))
        n = tl.arange(0, SOFT_CLASSES)
        tl.store(to + DECAY + n, cm.exponential(-p.beta * n.to(A)))
        if HAS_GATES:
            i = l.low + n
            gate = tl.full([SOFT_CLASSES], 1.0, A)
            gates = memory.pointer(tl.load(entry + GATES), 0, A)
            weight = tl.full([], 1.0, tl.float64)
            for s in range(1, l.count):  # classes beyond level s are at least in the next one
                weight = weight * tl.load(gates + s).to(tl.float64)
                top = cm.top_of_level(s, SIGNED)
                beyond = (i > top) | (i < (-top - 1 if SIGNED else 0))
                gate = tl.where(beyond, weight.to(A), gate)
            tl.store(to + GATE_OF + n, gate)
        tl.store(to + REACH, cm.soft_reach(l, p.beta).to(A))
    else:
        if BOUNDS:
            tl.store(to + BOUND + lanes, cm.hard_bounds(l, cm.beta_of(alpha, sigma), SIGNED, A))
        if OP != BOUNDED:
            _write_lanes(to + LEVEL + lanes, cm.make_all_levels(l, p.beta, SIGNED, HAS_GATES))


@triton.jit
def _bins(at):
    return cm.Bins(tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5),
                   tl.load(at + 6), tl.load(at + 7), tl.load(at + 8), tl.load(at + 9))


@triton.jit
def _one_interval(at):
    at = at + ONE
    return cm.OneInterval(tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4),
                          tl.load(at + 5), tl.load(at + 6), tl.load(at + 7), tl.load(at + 8), tl.load(at + 9),
                          tl.load(at + 10))


@triton.jit
def _level(at, t):
    """Level t, counted from 0."""
    at = at + LEVEL + t
    return cm.Level(tl.load(at), tl.load(at + 16), tl.load(at + 32), tl.load(at + 48), tl.load(at + 64),
                    tl.load(at + 80))


@triton.jit
def _soft_edges(at):
    at = at + EDGES
    outer = at + (OUTER - EDGES)
    return se.SoftEdges(tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4),
                        tl.load(at + 5), tl.load(at + 6), tl.load(at + 7), tl.load(at + 8), tl.load(at + 9),
                        tl.load(at + 10), tl.load(at + 11),
                        se.EdgeFactor(tl.load(outer), tl.load(outer + 1), tl.load(outer + 2)),
                        se.EdgeFactor(tl.load(outer + 3), tl.load(outer + 4), tl.load(outer + 5)))


@triton.jit
def _edge(at, i):
    """Edge number i, lower pairs first."""
    at = at + EDGE + i
    return se.InnerEdge(se.EdgeFactor(tl.load(at), tl.load(at + 16), tl.load(at + 32)), tl.load(at + 48),
                        tl.load(at + 64), tl.load(at + 80))


@triton.jit
def _hard_class(x, at, p, SIGNED: tl.constexpr, LEVELS: tl.constexpr):
    m = cm.mirror(x, p)
    c = m.c
    for t in tl.static_range(1, LEVELS):
        c = cm.bounded(m.value, c, tl.load(at + BOUND + t), (1 << (t - 1 if SIGNED else t)) - 1.0)
    return cm.unmirrored(c, m.below)


@triton.jit
def _draw(c, z, index, at, p, seed, count):
    first, second = cm.philox(seed, index)
    left = cm.interval_mass(_level(at, 0), c, z, p)
    for t in range(1, count):
        left += cm.interval_mass(_level(at, t), c, z, p)
    left = left * cm.unit_of(first, z.dtype)
    last = _level(at, count - 1)
    top, bottom = last.top + tl.zeros_like(z), last.bottom + tl.zeros_like(z)
    for t in range(0, count - 1):  # the first interval that what is left is in
        k = _level(at, t)
        mass = cm.interval_mass(k, c, z, p)
        here = left < mass
        top, bottom = tl.where(here, k.top, top), tl.where(here, k.bottom, bottom)
        left = tl.where(here, float("inf"), left - mass)
    return cm.draw_inside(second, top, bottom, c, z, p)


@triton.jit
def _gate(i, step, at, p, reach, HAS_GATES: tl.constexpr):
    """G of class i, which is ``step`` classes from c; 0 where it is not in or not felt."""
    there = (i >= tl.where(step <= reach, p.low, float("inf"))) & (i <= p.high)
    if HAS_GATES:
        return tl.load(at + GATE_OF + tl.where(there, i - p.low, 0.0).to(tl.int32), mask=there, other=0.0)
    else:
        return tl.where(there, 1.0, 0.0).to(i.dtype)


@triton.jit
def _soft_sums(c, y, w, at, p, reach, steps, HAS_GATES: tl.constexpr):
    """sum w and sum w (i - c), of weights w = G u."""
    step = tl.zeros([], c.dtype)
    u, _ = cm.soft_center(y, w)
    weight, first = _gate(c, step, at, p, reach, HAS_GATES) * u, tl.zeros_like(c)
    inner = tl.load(at + DECAY)
    for n in range(1, steps + 1):
        step += 1.0
        outer = tl.load(at + DECAY + n)
        pair = cm.soft_pair(y, w, inner, outer)
        up = _gate(c + step, step, at, p, reach, HAS_GATES) * pair.up
        down = _gate(c - step, step, at, p, reach, HAS_GATES) * pair.down
        weight += up + down
        first += step * (up - down)
        inner = outer
    return weight, first


@triton.jit
def _edge_sums(x, at, p, lower, upper, SLOPES: tl.constexpr):
    """(SoftEdges, v, OuterEdges, mean and the sums of the slopes); ``lower``, ``upper``: pairs."""
    k = _soft_edges(at)
    offset = se.offset_from_middle(x, k)
    power, v = se.middle_power(offset, k), offset * p.inv_alpha
    zero = tl.zeros_like(x)
    sums = (zero, zero, zero, zero)
    for n in range(0, lower):
        sums = se.add_edge_pair(sums, power, v, _edge(at, 2 * n), _edge(at, 2 * n + 1), True, SLOPES)
    for n in range(lower, lower + upper):
        sums = se.add_edge_pair(sums, power, v, _edge(at, 2 * n), _edge(at, 2 * n + 1), False, SLOPES)
    outer = se.outer_edges(power, k)
    return k, v, outer, se.edge_mean(sums[1], sums[0], outer, k), sums[2], sums[3]


@triton.jit
def _value(x, index, at, p, seed, turns, OP: tl.constexpr, SIGNED: tl.constexpr, LEVELS: tl.constexpr,
           HAS_GATES: tl.constexpr):
    """q of an element; ``index``: its place in the list; ``turns``: levels, or those of _soft_turns."""
    if OP == NEAREST:
        return p.alpha * cm.nearest_class(x, p)
    elif OP == BOUNDED:
        return p.alpha * _hard_class(x, at, p, SIGNED, LEVELS)
    else:
        c = cm.nearest_class(x, p)
        z = cm.offset_of(x, c, p)
        if OP == SAMPLE:
            return p.alpha * _draw(c, z, index, at, p, seed, turns)
        else:
            steps, lower, upper = turns
            mean = tl.zeros_like(x)
            if steps >= 0:
                y, w = cm.exponential(z - p.half), cm.exponential(-z - p.half)
                weight, first = _soft_sums(c, y, w, at, p, tl.load(at + REACH), steps, HAS_GATES)
                mean = c + math.divide(first, weight)
            if not HAS_GATES:
                if lower > 0:
                    _, _, _, by_edges, _, _ = _edge_sums(x, at, p, lower, upper, False)
                    mean = tl.where(tl.load(at + EDGES) > 0.0, tl.where(x == x, by_edges, x), mean)
            return p.alpha * mean


# Gradients: (dL/dx, what an element adds to dL/dalpha, to dL/dsigma, and what all add to gates times dL/dgates).


@triton.jit
def _no_gates():
    return tl.zeros([cm.MAX_BITS], tl.float64)


@triton.jit
def _with_gate(gates, t, term, mask):
    """Adds up a term of level t, counted from 0."""
    if mask is not None:
        term = tl.where(mask, term, 0.0)
    return tl.where(tl.arange(0, cm.MAX_BITS) == t, tl.sum(term).to(tl.float64), gates)


@triton.jit
def _of_one(x, g, at, p):
    c = cm.nearest_class(x, p)
    k = _one_interval(at)
    w = cm.mirrored_offset(x, c, p, k)
    rt, rq = cm.winner_of_one(c, cm.edge_power(w, k), k)
    _, in_alpha, in_sigma = cm.factors_of_one(c, w, rt, rq, p, k)
    return k.scale * cm.mirrored((g * c) * rt, c, k), g * in_alpha, g * in_sigma, _no_gates()


@triton.jit
def _outside(j, k):
    return (j < k.bottom) | (j > k.top)


@triton.jit
def _of_many(x, g, mask, index, at, p, seed, count, SIGNED: tl.constexpr, LEVELS: tl.constexpr, DRAWN: tl.constexpr,
             GATE_GRAD: tl.constexpr):
    c = cm.nearest_class(x, p)
    z = cm.offset_of(x, c, p)
    if DRAWN:
        j = _draw(c, z, index, at, p, seed, count)
    else:
        j = _hard_class(x, at, p, SIGNED, LEVELS)
    before = _level(at, 0)
    m = cm.first_level(before, c, z, j, p)
    weight = before.weight + tl.zeros_like(z)
    for t in range(1, count):
        k = _level(at, t)
        m = cm.add_level(m, k, c, z, j, p, SIGNED)
        weight = tl.where(_outside(j, _level(at, t - 1)), k.weight, weight)
    r, in_x, in_alpha, in_sigma = cm.winner_of_many(m, c, z, j, weight, tl.load(at + SHARP), p)
    gates = _no_gates()
    if GATE_GRAD:  # share * ([j is in a level above] - r of those levels), from the highest down
        share = g * (p.alpha * (j * r))
        top, bottom, tail = m.top, m.bottom, tl.zeros_like(z)
        for n in range(1, count):
            before = _level(at, count - n - 1)
            before_top, before_bottom = cm.level_edges(before, c, z, p)
            tail += cm.own_mass(_level(at, count - n), top, bottom, before_top, before_bottom, SIGNED)
            above = tl.where(_outside(j, before), 1.0, 0.0).to(z.dtype)
            gates = _with_gate(gates, count - n, share * (above - math.divide(tail, m.total)), mask)
            top, bottom = before_top, before_bottom
    return g * in_x, g * in_alpha, g * in_sigma, gates


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
def _of_edges(x, g, at, p, lower, upper):
    k, v, outer, mean, by_x, by_width = _edge_sums(x, at, p, lower, upper, True)
    in_x, in_alpha, in_sigma = se.edge_factors(v, mean, tl.where(v == v, by_x, v), by_width, outer, k, p)
    return g * in_x, g * in_alpha, g * in_sigma


@triton.jit
def _of_soft(x, g, mask, at, p, turns, SIGNED: tl.constexpr, LEVELS: tl.constexpr, HAS_GATES: tl.constexpr,
             GATE_GRAD: tl.constexpr):
    steps, lower, upper = turns
    if HAS_GATES:
        return _of_classes(x, g, mask, at, p, steps, SIGNED, LEVELS, HAS_GATES, GATE_GRAD)
    else:
        out, in_alpha, in_sigma = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
        if steps >= 0:
            out, in_alpha, in_sigma, _ = _of_classes(x, g, mask, at, p, steps, SIGNED, LEVELS, False, False)
        if lower > 0:
            by_edges = tl.load(at + EDGES) > 0.0
            e_out, e_alpha, e_sigma = _of_edges(x, g, at, p, lower, upper)
            out, in_alpha = tl.where(by_edges, e_out, out), tl.where(by_edges, e_alpha, in_alpha)
            in_sigma = tl.where(by_edges, e_sigma, in_sigma)
        return out, in_alpha, in_sigma, _no_gates()


@triton.jit
def _of_classes(x, g, mask, at, p, steps, SIGNED: tl.constexpr, LEVELS: tl.constexpr, HAS_GATES: tl.constexpr,
             GATE_GRAD: tl.constexpr):
    A: tl.constexpr = x.dtype
    c = cm.nearest_class(x, p)
    z = cm.offset_of(x, c, p)
    y, w = cm.exponential(z - p.half), cm.exponential(-z - p.half)
    reach, sharp = tl.load(at + REACH), tl.load(at + SHARP)
    weight, first = _soft_sums(c, y, w, at, p, reach, steps, HAS_GATES)
    inv = math.divide(1.0, weight)
    mean = first * inv
    # The second pass, with deviations d = w (i - c - mean): sum d T and sum d V, which are covariances under r.
    step = tl.zeros([], A)
    u, slope = cm.soft_center(y, w)
    deviation = -(_gate(c, step, at, p, reach, HAS_GATES) * u) * mean
    by_x, by_width = deviation * slope, deviation * (0.5 * sharp * u)
    tails = ()
    if GATE_GRAD:
        for t in tl.static_range(1, LEVELS):
            tails = tails + (tl.zeros_like(x),)
        tails = _add_tails(tails, c, deviation, SIGNED, LEVELS)
    inner = tl.load(at + DECAY)
    for n in range(1, steps + 1):
        step += 1.0
        outer = tl.load(at + DECAY + n)
        pair = cm.soft_pair(y, w, inner, outer)
        up = (_gate(c + step, step, at, p, reach, HAS_GATES) * pair.up) * (step - mean)
        down = (_gate(c - step, step, at, p, reach, HAS_GATES) * pair.down) * (-step - mean)
        by_x += up * pair.up_slope - down * pair.down_slope
        by_width += (up * (0.5 * sharp * pair.up + step * pair.up_slope)
                     + down * (0.5 * sharp * pair.down + step * pair.down_slope))
        if GATE_GRAD:
            tails = _add_tails(_add_tails(tails, c + step, up, SIGNED, LEVELS), c - step, down, SIGNED, LEVELS)
        inner = outer
    gates = _no_gates()
    if GATE_GRAD:
        for t in tl.static_range(1, LEVELS):
            gates = _with_gate(gates, t, (g * p.alpha) * (tails[t - 1] * inv), mask)
    in_x, in_alpha, in_sigma = cm.soft_factors(by_x, by_width, c, z, mean, inv, p)
    return g * in_x, g * in_alpha, g * in_sigma, gates


@triton.jit
def _block(x_ptr, g_ptr, out_ptr, i, mask, place, at, p, seed, turns, A: tl.constexpr, OUT_T: tl.constexpr,
           OP: tl.constexpr, SIGNED: tl.constexpr, LEVELS: tl.constexpr, HAS_GATES: tl.constexpr, DRAWN: tl.constexpr,
           GATE_GRAD: tl.constexpr):
    """Reads, computes and writes the elements at ``i``; gives what they add to dL/dalpha, dL/dsigma and dL/dgates."""
    x = memory.load(x_ptr, i, mask, A)
    index = i
    if (OP == SAMPLE) | DRAWN:
        index = place + i
    if OP < OF_ONE:
        out = _value(x, index, at, p, seed, turns, OP, SIGNED, LEVELS, HAS_GATES)
        in_alpha, in_sigma, gates = x, x, _no_gates()
    else:
        g = memory.load(g_ptr, i, mask, A)
        if OP == OF_ONE:
            out, in_alpha, in_sigma, gates = _of_one(x, g, at, p)
        elif OP == OF_MANY:
            out, in_alpha, in_sigma, gates = _of_many(x, g, mask, index, at, p, seed, turns, SIGNED, LEVELS, DRAWN,
                                                      GATE_GRAD)
        else:
            out, in_alpha, in_sigma, gates = _of_soft(x, g, mask, at, p, turns, SIGNED, LEVELS, HAS_GATES, GATE_GRAD)
        if mask is not None:
            in_alpha, in_sigma = tl.where(mask, in_alpha, 0.0), tl.where(mask, in_sigma, 0.0)
    tl.store(out_ptr + i, math.narrow(out, OUT_T), mask=mask)
    return in_alpha, in_sigma, gates


@triton.jit
def _row_bins(entry, row, n, at, A: tl.constexpr, OP: tl.constexpr, SIGNED: tl.constexpr, MOST_BITS: tl.constexpr):
    """What the scales of rows fix; ``at``: their records."""
    if OP == NEAREST:
        l = _levels(entry, n, A, SIGNED, MOST_BITS, False)
        alpha = tl.load(memory.pointer(tl.load(entry + ALPHA), row, A))
        sigma = tl.load(memory.pointer(tl.load(entry + SIGMA), row, A))
        return cm.make_bins(alpha, sigma, l.low, l.high, l.valid)
    else:
        return _bins(at)


@triton.jit
def _soft_turns(at, MANY: tl.constexpr):
    """Steps of the soft sums over the classes, -1 where there are none, and pairs of edges, lower and upper ones, of
    those over the edges. MANY: of all rows at ``at``."""
    lower, upper = tl.load(at + EDGES), tl.load(at + EDGES + 1)
    steps = tl.where(lower > 0.0, -1.0, tl.load(at + REACH))
    if MANY:
        lower, upper, steps = tl.max(lower), tl.max(upper), tl.max(steps)
    return steps.to(tl.int32), lower.to(tl.int32), upper.to(tl.int32)


@triton.jit
def by_row(table, chunks, bits, seed, records, in_alphas, in_sigmas, in_gates, A: tl.constexpr, X_T: tl.constexpr,
           G_T: tl.constexpr, OUT_T: tl.constexpr, OP: tl.constexpr, SIGNED: tl.constexpr, MOST_BITS: tl.constexpr,
           LEVELS: tl.constexpr, HAS_GATES: tl.constexpr, DRAWN: tl.constexpr, SCALE_GRAD: tl.constexpr,
           GATE_GRAD: tl.constexpr, SIZE: tl.constexpr, WIDEST: tl.constexpr, BLOCK: tl.constexpr):
    """One program per piece of a long row, or per TILE_ROWS short rows."""
    pid = tl.program_id(0)
    t = memory.owner(chunks, pid)
    entry = table + t.to(tl.int64) * FIELDS
    rows, inner, pieces = tl.load(entry + ROWS), tl.load(entry + INNER), tl.load(entry + PIECES)
    local = pid - tl.load(entry + FIRST)
    x_at, g_at, out_at = tl.load(entry + X), tl.load(entry + G), tl.load(entry + OUT)
    place = tl.load(entry + PLACE)
    n = tl.load(bits + t)
    record = memory.pointer(tl.load(entry + ALPHA), 0, A)  # not read where there is none
    count = n
    if OP != NEAREST:
        record = records + tl.load(entry + RECORD) * SIZE
        count = tl.load(record + COUNT).to(tl.int32)
    key = place
    if (OP == SAMPLE) | DRAWN:
        key = tl.load(seed)
    MOST: tl.constexpr = MOST_SUB // 2 if OP == OF_SOFT else MOST_SUB
    SUB: tl.constexpr = BLOCK if BLOCK < MOST else MOST
    COLUMNS: tl.constexpr = SUB // TILE_ROWS
    short = pieces == 0
    row = local * TILE_ROWS
    if pieces > 0:
        row = local // pieces
    start = (local - row * pieces) * BLOCK * (pieces > 0).to(tl.int64)
    begin = row * inner + start
    if (tl.load(entry + ALIGNED) != 0) & (inner - start >= BLOCK) & (pieces > 0):
        at = record + row * SIZE
        p = _row_bins(entry, row, n, at, A, OP, SIGNED, MOST_BITS)
        turns = count
        if (OP == SOFT) | (OP == OF_SOFT):
            turns = _soft_turns(at, False)
        # The main path: one scale, nothing masked, 128 bits at a time; promises as in flat of family uniform.
        x_vec = tl.multiple_of(x_at.to(tl.pointer_type(X_T)) + begin, 16 * X_T.primitive_bitwidth // WIDEST)
        g_vec = tl.multiple_of(g_at.to(tl.pointer_type(G_T)) + begin, 16 * G_T.primitive_bitwidth // WIDEST)
        out_vec = tl.multiple_of(out_at.to(tl.pointer_type(OUT_T)) + begin, 16 * OUT_T.primitive_bitwidth // WIDEST)
        alpha, sigma, gates = _block(
            x_vec, g_vec, out_vec, tl.arange(0, BLOCK), None, place + begin, at, p, key, turns, A, OUT_T, OP, SIGNED,
            LEVELS, HAS_GATES, DRAWN, GATE_GRAD)
        if SCALE_GRAD:
            _write_sums(entry, row, local, pieces, tl.sum(alpha), tl.sum(sigma), in_alphas, in_sigmas, A)
    else:  # a tile: TILE_ROWS short rows; or one line after the other of a tail, or of a piece at an odd address
        line, column = tl.arange(0, TILE_ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
        rows_on = line * short.to(tl.int64)
        row_of = tl.minimum(row + rows_on, rows - 1)  # rows past the end have a scale, too
        at_rows = record + row_of * SIZE
        p_rows = _row_bins(entry, row_of, n, at_rows, A, OP, SIGNED, MOST_BITS)
        turns = count
        if (OP == SOFT) | (OP == OF_SOFT):
            turns = _soft_turns(at_rows, True)
        x_ptr, g_ptr = memory.pointer(x_at, begin, X_T), memory.pointer(g_at, begin, G_T)
        out_ptr = memory.pointer(out_at, begin, OUT_T)
        width = tl.minimum(inner - start, BLOCK)
        size, apart, further = width, inner * 0 + COLUMNS, inner * 0 + SUB
        if short:
            size, apart, further = (rows - row) * inner, inner, inner * 0 + COLUMNS
        alpha_tile = tl.zeros([TILE_ROWS, COLUMNS], A)
        sigma_tile = tl.zeros([TILE_ROWS, COLUMNS], A)
        gates = _no_gates()
        for tile in range(0, ((width + further - 1) // further).to(tl.int32)):
            j = tile * further
            i = j + line * apart + column
            in_alpha, in_sigma, in_gate = _block(
                x_ptr, g_ptr, out_ptr, i, (i < size) & (j + column < width), place + begin, at_rows, p_rows, key, turns,
                A, OUT_T, OP, SIGNED, LEVELS, HAS_GATES, DRAWN, GATE_GRAD)
            if SCALE_GRAD:
                alpha_tile += in_alpha
                sigma_tile += in_sigma
            gates += in_gate
        if SCALE_GRAD:
            alphas, sigmas = tl.sum(alpha_tile, 1), tl.sum(sigma_tile, 1)
            if short:
                lines = row + tl.arange(0, TILE_ROWS)
                _write_scales(entry, lines, alphas.to(tl.float64), sigmas.to(tl.float64), lines < rows, A)
            else:
                _write_sums(entry, row, local, pieces, tl.sum(alphas), tl.sum(sigmas), in_alphas, in_sigmas, A)
    if GATE_GRAD:
        tl.store(in_gates + pid.to(tl.int64) * cm.MAX_BITS + tl.arange(0, cm.MAX_BITS), gates)


@triton.jit
def _write_sums(entry, row, local, pieces, alpha, sigma, in_alphas, in_sigmas, A: tl.constexpr):
    """Of a piece of a row, or of all of it."""
    if pieces == 1:
        _write_scales(entry, row, alpha.to(tl.float64), sigma.to(tl.float64), None, A)
    else:
        tl.store(in_alphas + tl.load(entry + PARTIAL) + local, alpha.to(tl.float64))
        tl.store(in_sigmas + tl.load(entry + PARTIAL) + local, sigma.to(tl.float64))


@triton.jit
def _write_scales(entry, row, alpha, sigma, mask, A: tl.constexpr):
    tl.store(memory.pointer(tl.load(entry + IN_ALPHA), row, A), alpha.to(A), mask=mask)
    tl.store(memory.pointer(tl.load(entry + IN_SIGMA), row, A), sigma.to(A), mask=mask)


@triton.jit
def finish_scales(table, chunks, in_alphas, in_sigmas, A: tl.constexpr, BLOCK: tl.constexpr):
    """Second stage of dL/dalpha and dL/dsigma: one program per row that is in several pieces."""
    pid = tl.program_id(0)
    entry = table + memory.owner(chunks, pid).to(tl.int64) * FIELDS
    pieces = tl.load(entry + PIECES)
    row = pid - tl.load(entry + SECOND)
    first = tl.load(entry + PARTIAL) + row * pieces
    lanes = tl.arange(0, BLOCK)
    alpha = tl.zeros([BLOCK], tl.float64)
    sigma = tl.zeros([BLOCK], tl.float64)
    for j in range(0, pieces, BLOCK):
        mask = j + lanes < pieces
        alpha += tl.load(in_alphas + first + j + lanes, mask=mask, other=0.0)
        sigma += tl.load(in_sigmas + first + j + lanes, mask=mask, other=0.0)
    _write_scales(entry, row, tl.sum(alpha), tl.sum(sigma), None, A)


@triton.jit
def finish_gates(table, bits, in_gates, A: tl.constexpr, SIGNED: tl.constexpr, MOST_BITS: tl.constexpr,
                 BLOCK: tl.constexpr):
    """Second stage of dL/dgates: one program per tensor."""
    t = tl.program_id(0)
    entry = table + t.to(tl.int64) * FIELDS
    l = _levels(entry, tl.load(bits + t), A, SIGNED, MOST_BITS, True)
    programs = tl.load(entry + PROGRAMS)
    level = tl.arange(0, cm.MAX_BITS)
    lanes = tl.arange(0, BLOCK)[:, None]
    first = in_gates + tl.load(entry + FIRST) * cm.MAX_BITS
    sums = tl.zeros([BLOCK, cm.MAX_BITS], tl.float64)
    for j in range(0, programs, BLOCK):
        sums += tl.load(first + (j + lanes) * cm.MAX_BITS + level[None, :], mask=j + lanes < programs, other=0.0)
    gate_count = tl.load(entry + GATE_COUNT)
    gates = memory.pointer(tl.load(entry + GATES), 0, A)
    there = (level > 0) & (level < l.count)
    gate = tl.load(gates + level, mask=there & (level < gate_count), other=1.0)
    value = tl.where(there, tl.sum(sums, 0) / gate.to(tl.float64), 0.0)
    value = tl.where(l.valid, value, float("nan")).to(A)
    tl.store(memory.pointer(tl.load(entry + IN_GATES), 0, A) + level, value, mask=level < gate_count)


# Host side.


def _sizes(op, gates):
    """(numbers in a record, levels that kernels are unrolled for)"""
    most = max([g.numel() for g in gates], default=1)
    levels = next(n for n in (1, 2, 4, 8, MAX_BITS) if n >= min(most, MAX_BITS))
    if op in (SOFT, OF_SOFT):
        return SOFT_SIZE.value, levels
    return (ONE_SIZE if op == OF_ONE else LEVEL_SIZE).value, levels


# Values that the arithmetic of an element holds at once, as far as the registers suffice.
_VALUES = {NEAREST.value: 1, BOUNDED.value: 4, SAMPLE.value: 16, SOFT.value: 16, OF_ONE.value: 8, OF_MANY.value: 16,
           OF_SOFT.value: 16}


def _run(op, x, alpha, sigma, bits, gates, seed, signed, soft, out, grad=None, drawn=False, in_scales=None,
         in_gates=None):
    """Launches :func:`by_row` and what comes before and after; ``in_scales``: lists of dL/dalpha and dL/dsigma."""
    count, device, acc = len(x), x[0].device, acc_dtype(x[0].dtype)
    values = 16 if op == OF_ONE and x[0].dtype == acc else _VALUES[op.value]  # more elements are spilled on sm_90
    block = block_of(acc, x, values=values)
    size, levels = _sizes(op, gates)
    table = np.zeros((count, FIELDS.value), np.int64)
    for column, tensors in ((X, x), (G, grad), (OUT, out), (ALPHA, alpha), (SIGMA, sigma), (GATES, gates or None),
                            (IN_ALPHA, in_scales and in_scales[0]), (IN_SIGMA, in_scales and in_scales[1]),
                            (IN_GATES, in_gates)):
        table[:, column.value] = addresses(tensors, count)
    numel, rows = (np.array([t.numel() for t in v], np.int64) for v in (x, alpha))
    inner = numel // np.maximum(rows, 1)
    pieces = np.where(inner <= SHORT_ROW, 0, -(-inner // block))
    programs = np.where(pieces == 0, -(-rows // TILE_ROWS.value), rows * pieces) * (inner > 0)
    second = rows * (pieces > 1)
    narrowest = min(t[0].element_size() for t in (x, grad, out) if t)
    table[:, GATE_COUNT.value] = [g.numel() for g in gates] or 0
    table[:, PLACE.value], table[:, ROWS.value], table[:, INNER.value] = starts(numel), rows, inner
    table[:, FIRST.value], table[:, PROGRAMS.value], table[:, PIECES.value] = starts(programs), programs, pieces
    table[:, ALIGNED.value] = all_aligned(*(table[:, c.value] for c in (X, G, OUT))) & (
        (rows == 1) | (inner * narrowest % 16 == 0))
    table[:, PARTIAL.value], table[:, SECOND.value] = starts(programs * (pieces > 1)), starts(second)
    table[:, RECORD.value] = starts(rows)
    shared = dict(A=TYPES[acc], SIGNED=signed, MOST_BITS=MAX_SOFT_BITS if soft else MAX_BITS)
    bits = ints(bits)
    with on_device_of(x):
        table, chunks = on_device(table, device), owners(programs, device)
        records = in_alphas = in_sigmas = gate_sums = None
        if op != NEAREST:
            records = torch.empty(int(rows.sum()) * size, dtype=acc, device=device)
            launch(prepare, int(rows.sum()), table, owners(rows, device), bits, records, OP=op.value,
                   HAS_GATES=bool(gates), BOUNDS=bool(gates) and not drawn and op in (BOUNDED, OF_MANY), SIZE=size,
                   **shared)
        if in_scales:
            in_alphas, in_sigmas = torch.empty((2, int((programs * (pieces > 1)).sum())), dtype=torch.float64,
                                               device=device)
        if in_gates:
            gate_sums = torch.empty(int(programs.sum()) * MAX_BITS, dtype=torch.float64, device=device)
        launch(by_row, int(programs.sum()), table, chunks, bits, seed, records, in_alphas, in_sigmas, gate_sums,
               X_T=TYPES[x[0].dtype], G_T=TYPES[(grad or x)[0].dtype], OUT_T=TYPES[out[0].dtype], OP=op.value,
               LEVELS=levels, HAS_GATES=bool(gates), DRAWN=drawn, SCALE_GRAD=bool(in_scales), GATE_GRAD=bool(in_gates),
               SIZE=size, WIDEST=widest(x, grad, out), BLOCK=block, **shared)
        if in_scales and second.any():
            launch(finish_scales, int(second.sum()), table, owners(second, device), in_alphas, in_sigmas, A=TYPES[acc],
                   BLOCK=1024)
        if in_gates:
            launch(finish_gates, count, table, bits, gate_sums, BLOCK=64, **shared)


def categorical(x, alpha, sigma, bits, gates, seed, mode, grad_of, signed, dtype):
    check_categorical(alpha, sigma, bits, gates, seed, mode, grad_of)
    x = [dense(t) for t in x]
    q = [empty_like(t, dtype) for t in x]
    soft = "soft" in (MODES[mode], GRADS[grad_of])
    op = {"hard": BOUNDED if gates else NEAREST, "soft": SOFT, "sample": SAMPLE}[MODES[mode]]
    _run(op, x, alpha, sigma, bits, gates, seed if op == SAMPLE else None, signed, soft, q)
    return q


def categorical_backward(grad, x, alpha, sigma, bits, gates, seed, mode, grad_of, signed, scale_grad, gate_grad):
    check_categorical(alpha, sigma, bits, gates, seed, mode, grad_of)
    x = [dense(t) for t in x]
    grad_x = [empty_like(t, t.dtype) for t in x]
    grad_alpha, grad_sigma = ([torch.empty_like(v) if t.numel() else torch.zeros_like(v) for v, t in zip(values, x)]
                              if scale_grad else [] for values in (alpha, sigma))
    # More gates than there can be bits are out of range; the kernel writes the first ones only.
    grad_gates = [torch.full_like(v, torch.nan) if v.numel() > MAX_BITS else torch.empty_like(v)
                  for v in gates if gate_grad]
    soft, drawn = "soft" in (MODES[mode], GRADS[grad_of]), MODES[mode] == "sample"
    op = OF_SOFT if soft else OF_MANY if gates or drawn else OF_ONE
    drawn = drawn and not soft
    _run(op, x, alpha, sigma, bits, gates, seed if drawn else None, signed, soft, grad_x, in_layouts_of(x, grad), drawn,
         (grad_alpha, grad_sigma) if scale_grad else None, grad_gates or None)
    return grad_x, grad_alpha, grad_sigma, grad_gates
