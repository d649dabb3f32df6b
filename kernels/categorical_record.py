"""What a launch of family ``categorical`` knows, in Triton: the table of its tensors, and a record of what a scale
fixes, which one program per scale computes before the programs over the elements read it.
"""

import triton
import triton.language as tl

from quantops.kernels import categorical_backward as cb
from quantops.kernels import categorical_gates as cg
from quantops.kernels import categorical_quantizer as cq
from quantops.kernels import categorical_soft as cs
from quantops.kernels import exponential as ex
from quantops.kernels import memory

# Columns of the table: one row of int64 per tensor.
FIELDS = tl.constexpr(21)
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
SPLINE = tl.constexpr(20)  # and first spline, or -1 where the rows are short

# What is done: values, then gradients.
NEAREST, BOUNDED, SAMPLE, SOFT, OF_ONE, OF_MANY, OF_SOFT = (tl.constexpr(i) for i in range(7))

# A record: numbers in the dtype of the arithmetic, the first ones a Bins; the others where these modules say.
COUNT = tl.constexpr(10)  # levels that are in; without gates all classes are one level
ONE_SIZE, LEVEL_SIZE, SOFT_SIZE = 32, 128, 544


@triton.jit
def levels_of(entry, n, A: tl.constexpr, SIGNED: tl.constexpr, MOST_BITS: tl.constexpr, HAS_GATES: tl.constexpr):
    gates = memory.pointer(tl.load(entry + GATES), 0, A)
    return cg.make_levels(gates, tl.load(entry + GATE_COUNT).to(tl.int32), n, SIGNED, MOST_BITS, HAS_GATES)


@triton.jit
def _write(to, numbers):
    for i in tl.static_range(len(numbers)):
        tl.store(to + i, numbers[i])


@triton.jit
def _write_lanes(to, numbers):
    for i in tl.static_range(len(numbers)):
        tl.store(to + cq.MAX_BITS * i, numbers[i])


@triton.jit
def prepare(
    table,
    scales,
    bits,
    records,
    splines,
    A: tl.constexpr,
    OP: tl.constexpr,
    SIGNED: tl.constexpr,
    MOST_BITS: tl.constexpr,
    HAS_GATES: tl.constexpr,
    BOUNDS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Writes a record. One program per scale."""
    pid = tl.program_id(0)
    t = memory.owner(scales, pid)
    entry = table + t.to(tl.int64) * FIELDS
    row = pid - tl.load(entry + RECORD)
    l = levels_of(entry, tl.load(bits + t), A, SIGNED, MOST_BITS, HAS_GATES)
    alpha = tl.load(memory.pointer(tl.load(entry + ALPHA), row, A))
    sigma = tl.load(memory.pointer(tl.load(entry + SIGMA), row, A))
    p = cq.make_bins(alpha, sigma, l.low, l.high, l.valid)
    to = records + pid.to(tl.int64) * SIZE
    _write(to, p)
    tl.store(to + COUNT, l.count.to(A) if HAS_GATES else 1.0)
    tl.store(to + cs.SHARP, ex.one_minus_exp(p.beta.to(tl.float64)).to(A))
    lanes = tl.arange(0, cq.MAX_BITS)
    if OP == OF_ONE:
        _write(to + cb.ONE, cb.make_one_interval(p))
    elif (OP == SOFT) | (OP == OF_SOFT):
        reach = cs.soft_reach(l, p.beta).to(A)
        tl.store(to + cs.REACH, reach)
        first = tl.load(entry + SPLINE)
        k = cs.make_spline(p, (first >= 0) & (not HAS_GATES))
        _write(to + cs.SPLINE, k)
        if not HAS_GATES and A == tl.float32:
            if k.intervals > 0.0:
                FUNCTIONS: tl.constexpr = cs.OF_MEAN if OP == SOFT else cs.OF_SLOPES
                at = splines + (first + row) * (FUNCTIONS * cs.MOST_INTERVALS * cs.ORDER)
                cs.fill_spline(at, k, to, p, reach, FUNCTIONS)
        n = tl.arange(0, cs.CLASSES)
        tl.store(to + cs.DECAY + n, ex.exponential(-p.beta * n.to(A)))
        if HAS_GATES:
            i = l.low + n
            gate = tl.full([cs.CLASSES], 1.0, A)
            gates = memory.pointer(tl.load(entry + GATES), 0, A)
            weight = tl.full([], 1.0, tl.float64)
            for s in range(1, l.count):  # classes beyond level s are at least in the next one
                weight = weight * tl.load(gates + s).to(tl.float64)
                top = cg.top_of_level(s, SIGNED)
                beyond = (i > top) | (i < (-top - 1 if SIGNED else 0))
                gate = tl.where(beyond, weight.to(A), gate)
            tl.store(to + cs.GATE_OF + n, gate)
    else:
        if BOUNDS:
            tl.store(to + cg.BOUND + lanes, cg.hard_bounds(l, cq.beta_of(alpha, sigma), SIGNED, A))
        if OP != BOUNDED:
            _write_lanes(to + cg.LEVEL + lanes, cg.make_all_levels(l, p.beta, SIGNED, HAS_GATES))


@triton.jit
def _bins(at):
    return cq.Bins(
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
    )


@triton.jit
def row_bins(entry, row, n, at, A: tl.constexpr, OP: tl.constexpr, SIGNED: tl.constexpr, MOST_BITS: tl.constexpr):
    """What the scales of rows fix; ``at``: their records."""
    if OP == NEAREST:
        l = levels_of(entry, n, A, SIGNED, MOST_BITS, False)
        alpha = tl.load(memory.pointer(tl.load(entry + ALPHA), row, A))
        sigma = tl.load(memory.pointer(tl.load(entry + SIGMA), row, A))
        return cq.make_bins(alpha, sigma, l.low, l.high, l.valid)
    else:
        return _bins(at)
