"""Family ``activation`` in Triton: the ops of quantops/library.py on one tensor; csrc/activation_math.h in Triton.

Elements stand in rows of eight, whose bits are a byte. With one scale dL/dx and the sums are one kernel, and another
adds up the partial sums, in float64 and in order; with a scale per channel a second kernel goes through each channel
for its sums, and elements compute from the scale of their own.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from quantops.kernels import math
from quantops.kernels.activation_front import RELU, front_and_slope
from quantops.kernels.launch import TYPES, block_of, ints, launch, on_device_of
from quantops.layout import dense, empty_like, in_layout_of
from quantops.reference.activation import KEEPS
from quantops.reference.uniform import acc_dtype
from quantops.values import check_activation

INPUT, BITS, RESIDUAL = (tl.constexpr(KEEPS.index(name)) for name in ("input", "bits", "residual"))
CLIP, STEP = tl.constexpr(1), tl.constexpr(2)  # the order of LEARNS in the reference
RESIDUALS, MIDDLE, ABOVE = tl.constexpr(126.0), tl.constexpr(128.0), tl.constexpr(255.0)
LEAST_SCALE, MOST_SCALE = tl.constexpr(2.0**-100), tl.constexpr(2.0**100)
ROW = tl.constexpr(8)  # elements


class Grid(NamedTuple):
    """All that scales, offsets and bits fix. Out of range, ``step`` and ``valid_zero`` are NaN."""

    offset: tl.tensor
    mul: tl.tensor
    shift: tl.tensor
    times: tl.tensor
    top: tl.tensor
    a: tl.tensor
    b: tl.tensor
    step: tl.tensor
    low: tl.tensor
    high: tl.tensor
    per_code: tl.tensor
    first: tl.tensor
    last: tl.tensor
    unit_step: tl.tensor
    valid_zero: tl.tensor


@triton.jit
def make_grid(s, offset, bits, RULE: tl.constexpr, SIGNED: tl.constexpr):
    T: tl.constexpr = s.dtype
    in_range = (bits >= 0) & (bits <= math.MAX_BITS)
    valid = in_range & (s >= LEAST_SCALE) & (s <= MOST_SCALE) & (offset - offset == 0.0)
    n = tl.where(in_range, bits, 0)
    codes = math.pow2(n, T)
    top, none = codes - 1.0, n == 0
    one = codes * 0.0 + 1.0
    if RULE == math.NEAREST:
        power, times = one, tl.where(none, one, top)
    else:
        power, times = codes, one
    if SIGNED:
        mul, shift, low = math.divide(0.5, s) * power, 0.5 * power, 0.0 - s
    else:
        mul, shift, low = math.divide(1.0, s) * power, 0.0 * power, 0.0 * s
    a = one
    if RULE == math.ROUND_CLAMP:
        b = tl.where(none, 0.0, -0.5 * codes) if SIGNED else 0.0 * codes
        unit_step = tl.where(none, 0.0, math.divide(2.0 if SIGNED else 1.0, codes))
        step = tl.where(none, 0.0, s * unit_step)
    else:
        if SIGNED:
            a = one * 2.0
        b = tl.where(none, 0.0, 0.0 - top) if SIGNED else 0.0 * codes
        unit_step = tl.where(none, 0.0, math.divide(1.0, top))
        step = tl.where(none, 0.0, math.divide(s, top))
    per_code = tl.where(none, 0.0, math.divide(1.0, a * step))
    nan = float("nan")
    return Grid(offset, mul, shift, times, top, a, b, tl.where(valid, step, nan), low, s, per_code, b, a * top + b,
                unit_step, tl.where(valid, 0.0 * s, nan))


@triton.jit
def level(v, p, RULE: tl.constexpr):
    """m of v = x - offset."""
    y = v * p.mul + p.shift
    if RULE == math.NEAREST:
        y = y * p.times
    y = tl.where(y < -1048576.0, -1048576.0, y)
    y = tl.where(y > 1048576.0, 1048576.0, y)
    c = math.rint_small(y)
    if RULE == math.FLOOR:
        c = tl.where(c > y, c - 1.0, c)
    c = tl.where(c < 0.0, 0.0, c)
    c = tl.where(c > p.top, p.top, c)
    return math.product_plus(p.a, c, p.b)  # exact: a is 1 or 2


@triton.jit
def inside_of(v, p, FRONT: tl.constexpr):
    if FRONT == RELU:
        return (v > 0.0) & (v <= p.high)
    else:
        return (v >= p.low) & (v <= p.high)


@triton.jit
def residual_of(value, v, p):
    """rho from m * step."""
    rho = (value - v) * p.per_code
    rho = tl.where(rho < -1.0, -1.0, rho)
    return tl.where(rho > 1.0, 1.0, rho)


@triton.jit
def residual_number(value, v, p, FRONT: tl.constexpr):
    number = math.rint_small(residual_of(value, v, p) * RESIDUALS) + MIDDLE
    return tl.where(inside_of(v, p, FRONT), number, tl.where(v > p.high, ABOVE, 0.0))


@triton.jit
def grid_at(i, scale, offset, bits, count, run, RULE: tl.constexpr, SIGNED: tl.constexpr, OFFSET: tl.constexpr,
            CHANNELS: tl.constexpr):
    """The grids of elements i of memory, or the one that all have."""
    n = tl.load(bits)
    if CHANNELS:
        channel = (i // run) % count
        s = tl.load(scale + channel)
        b = tl.load(offset + channel) if OFFSET else 0.0 * s
    else:
        s = tl.load(scale)
        b = tl.load(offset) if OFFSET else 0.0 * s
    return make_grid(s, tl.where(s == s, b, 0.0), n, RULE, SIGNED)


@triton.jit(do_not_specialize=["numel", "count", "run"])
def quantize(x, q, kept, scale, offset, bits, numel, count, run, Q_T: tl.constexpr, A: tl.constexpr,
             RULE: tl.constexpr, SIGNED: tl.constexpr, FRONT: tl.constexpr, OFFSET: tl.constexpr,
             CHANNELS: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    """One program per BLOCK elements."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    column = tl.arange(0, ROW)[None, :]
    row = tl.arange(0, BLOCK // ROW)
    i = row[:, None] * ROW + column
    p = grid_at(start + i, scale, offset, bits, count, run, RULE, SIGNED, OFFSET, CHANNELS)
    left = numel - start
    x += start
    q += start
    if left >= BLOCK:
        _quantize(tl.load(x + i), q, kept, start, i, row, column, left, p, Q_T, A, RULE, FRONT, KEEP, True)
    else:
        _quantize(tl.load(x + i, mask=i < left, other=0), q, kept, start, i, row, column, left, p, Q_T, A, RULE, FRONT,
                  KEEP, False)


@triton.jit
def _quantize(x, q, kept, start, i, row, column, left, p, Q_T: tl.constexpr, A: tl.constexpr, RULE: tl.constexpr,
              FRONT: tl.constexpr, KEEP: tl.constexpr, WHOLE: tl.constexpr):
    h, _ = front_and_slope(math.widen(x, A), FRONT)
    v = h - p.offset
    value = level(v, p, RULE) * p.step
    result = math.narrow(value + p.offset, Q_T)
    if WHOLE:
        tl.store(q + i, result)
    else:
        tl.store(q + i, result, mask=i < left)
    if KEEP == BITS:
        bit = inside_of(v, p, FRONT)
        if not WHOLE:
            bit = bit & (i < left)
        word = tl.sum(bit.to(tl.int32) << column, axis=1).to(tl.uint8)
        if WHOLE:
            tl.store(kept + start // 8 + row, word)
        else:
            tl.store(kept + start // 8 + row, word, mask=row * ROW < left)
    if KEEP == RESIDUAL:
        number = residual_number(value, v, p, FRONT)
        number = tl.where(number == number, number, 0.0).to(tl.int32).to(tl.uint8)
        if WHOLE:
            tl.store(kept + start + i, number)
        else:
            tl.store(kept + start + i, number, mask=i < left)


@triton.jit
def known(other, number, p, RULE: tl.constexpr, FRONT: tl.constexpr, KEEP: tl.constexpr, LEARN: tl.constexpr):
    """(inside, above, rho, of numbers times RESIDUALS) from h, from q and a bit, or from a number."""
    if KEEP == INPUT:
        v = other - p.offset
        inside, above, rho = inside_of(v, p, FRONT), v > p.high, 0.0 * v
        if LEARN == STEP:
            rho = residual_of(level(v, p, RULE) * p.step, v, p)
    elif KEEP == BITS:
        inside, above, rho = number > 0, number > 0, 0.0
        if LEARN == CLIP:
            above = other > 0.5 * (p.first + p.last) * p.step + p.offset
    else:
        inside, above = (number > 0) & (number < 255), number == 255
        rho = number.to(p.step.dtype) - MIDDLE
    return inside, above, rho


@triton.jit
def sums_of(g, inside, above, rho, LEARN: tl.constexpr):
    """(g * rho inside, g above, g below) of elements."""
    outside = tl.where(inside, 0.0, g)
    up, down = tl.where(above, outside, 0.0), tl.where(above, 0.0, outside)
    if LEARN == STEP:
        return tl.where(inside, g * rho, 0.0), up, down
    else:
        return 0.0 * up, up, down


@triton.jit
def read_kept(kept, start, i, row, column, left, KEEP: tl.constexpr, WHOLE: tl.constexpr):
    number = i
    if KEEP == BITS:
        if WHOLE:
            word = tl.load(kept + start // 8 + row)
        else:
            word = tl.load(kept + start // 8 + row, mask=row * ROW < left, other=0)
        number = (word.to(tl.int32)[:, None] >> column) & 1
    if KEEP == RESIDUAL:
        if WHOLE:
            number = tl.load(kept + start + i).to(tl.int32)
        else:
            number = tl.load(kept + start + i, mask=i < left, other=0).to(tl.int32)
    return number


@triton.jit
def _gradient(g, other, number, out, partials, i, left, p, OUT_T: tl.constexpr, A: tl.constexpr, RULE: tl.constexpr,
              FRONT: tl.constexpr, KEEP: tl.constexpr, LEARN: tl.constexpr, SUMS: tl.constexpr, WHOLE: tl.constexpr):
    g = math.widen(g, A)
    h, slope = front_and_slope(math.widen(other, A), FRONT)
    inside, above, rho = known(h, number, p, RULE, FRONT, KEEP, LEARN)
    result = math.narrow(tl.where(inside, g, 0.0) * slope + p.valid_zero, OUT_T)
    if WHOLE:
        tl.store(out + i, result)
    else:
        tl.store(out + i, result, mask=i < left)
        g = tl.where(i < left, g, 0.0)
    if SUMS:
        within, up, down = sums_of(g, inside, above, rho, LEARN)
        at = partials + 3 * tl.program_id(0)
        tl.store(at, tl.sum(within.to(tl.float64)))
        tl.store(at + 1, tl.sum(up.to(tl.float64)))
        tl.store(at + 2, tl.sum(down.to(tl.float64)))


@triton.jit(do_not_specialize=["numel", "count", "run"])
def gradient(g, other, kept, out, partials, scale, offset, bits, numel, count, run, OUT_T: tl.constexpr,
             A: tl.constexpr, RULE: tl.constexpr, SIGNED: tl.constexpr, FRONT: tl.constexpr, OFFSET: tl.constexpr,
             CHANNELS: tl.constexpr, KEEP: tl.constexpr, LEARN: tl.constexpr, READS: tl.constexpr, SUMS: tl.constexpr,
             BLOCK: tl.constexpr):
    """dL/dx, and with one scale (SUMS) the partial sums of each program, of BLOCK elements."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    column = tl.arange(0, ROW)[None, :]
    row = tl.arange(0, BLOCK // ROW)
    i = row[:, None] * ROW + column
    p = grid_at(start + i, scale, offset, bits, count, run, RULE, SIGNED, OFFSET, CHANNELS)
    left = numel - start
    g += start
    other += start
    if left >= BLOCK:
        v = tl.load(g + i)
        t = tl.load(other + i) if READS else v
        number = read_kept(kept, start, i, row, column, left, KEEP, True)
        _gradient(v, t, number, out + start, partials, i, left, p, OUT_T, A, RULE, FRONT, KEEP, LEARN, SUMS, True)
    else:
        v = tl.load(g + i, mask=i < left, other=0)
        t = tl.load(other + i, mask=i < left, other=0) if READS else v
        number = read_kept(kept, start, i, row, column, left, KEEP, False)
        _gradient(v, t, number, out + start, partials, i, left, p, OUT_T, A, RULE, FRONT, KEEP, LEARN, SUMS, False)


@triton.jit(do_not_specialize=["each", "count", "run", "parts"])
def channel_sums(g, other, kept, partials, scale, offset, bits, each, count, run, parts, A: tl.constexpr,
                 RULE: tl.constexpr, SIGNED: tl.constexpr, FRONT: tl.constexpr, OFFSET: tl.constexpr,
                 KEEP: tl.constexpr, LEARN: tl.constexpr, READS: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of BLOCK elements of one channel, which has ``each`` of them, in ``parts``."""
    channel, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    j = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = j < each
    i = (j // run * count + channel) * run + j % run
    n = tl.load(bits)
    s = tl.load(scale + channel)
    p = make_grid(s, tl.load(offset + channel) if OFFSET else 0.0 * s, n, RULE, SIGNED)
    v = math.widen(tl.load(g + i, mask=mask, other=0), A)
    t = math.widen(tl.load(other + i, mask=mask, other=0), A) if READS else v
    number = tl.zeros([BLOCK], tl.int32)
    if KEEP == BITS:
        number = (tl.load(kept + i // 8, mask=mask, other=0).to(tl.int32) >> (i % 8).to(tl.int32)) & 1
    if KEEP == RESIDUAL:
        number = tl.load(kept + i, mask=mask, other=0).to(tl.int32)
    h, _ = front_and_slope(t, FRONT)
    inside, above, rho = known(h, number, p, RULE, FRONT, KEEP, LEARN)
    within, up, down = sums_of(tl.where(mask, v, 0.0), inside, above, rho, LEARN)
    at = partials + 3 * tl.program_id(0)
    tl.store(at, tl.sum(within.to(tl.float64)))
    tl.store(at + 1, tl.sum(up.to(tl.float64)))
    tl.store(at + 2, tl.sum(down.to(tl.float64)))


@triton.jit(do_not_specialize=["parts", "each"])
def finish(partials, of_scale, of_offset, scale, offset, bits, parts, each, A: tl.constexpr, RULE: tl.constexpr,
           SIGNED: tl.constexpr, OFFSET: tl.constexpr, KEEP: tl.constexpr, LEARN: tl.constexpr, BLOCK: tl.constexpr):
    """dL/ds and dL/db of one channel: one program."""
    channel, lanes = tl.program_id(0), tl.arange(0, BLOCK)
    within, up, down = (tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64))
    at = partials + channel.to(tl.int64) * parts * 3
    for first in range(0, parts, BLOCK):
        mask = first + lanes < parts
        within += tl.load(at + 3 * (first + lanes), mask=mask, other=0.0)
        up += tl.load(at + 3 * (first + lanes) + 1, mask=mask, other=0.0)
        down += tl.load(at + 3 * (first + lanes) + 2, mask=mask, other=0.0)
    s = tl.load(scale + channel)
    p = make_grid(s, tl.load(offset + channel) if OFFSET else 0.0 * s, tl.load(bits), RULE, SIGNED)
    above, below = tl.sum(up), tl.sum(down)
    total = p.last.to(tl.float64) * above + p.first.to(tl.float64) * below
    both = above + below
    if LEARN == STEP:
        last = tl.where(p.last < 1.0, 1.0, p.last).to(tl.float64)
        norm = 1.0 / tl.sqrt(last * tl.maximum(each, 1).to(tl.float64))
        inner = tl.sum(within)
        if KEEP == RESIDUAL:
            inner = inner / RESIDUALS
        total = (total + p.a.to(tl.float64) * inner) * norm
        both = both * norm
    tl.store(of_scale + channel, (p.unit_step.to(tl.float64) * total).to(A) + p.valid_zero)
    tl.store(of_offset + channel, both.to(A) + p.valid_zero)


# Host side.


def _channels(scale, x):
    """(count, elements in a row): element i of the memory of a dense x belongs to channel (i // run) % count."""
    return (scale.numel(), x.stride(1)) if scale.numel() > 1 else (1, max(x.numel(), 1))


def _settings(scale, offset, rule, signed, front):
    return {"A": TYPES[scale.dtype], "RULE": rule, "SIGNED": signed, "FRONT": front, "OFFSET": offset is not None}


def activation(x, scale, offset, bits, rule, signed, front, keep, learn, dtype):
    check_activation(scale, offset, bits)
    x = dense(x)
    q, n = empty_like(x, dtype), x.numel()
    kept = x.new_empty((0, triton.cdiv(n, 8), n)[keep], dtype=torch.uint8)
    block, (count, run) = block_of(scale.dtype, [x], values=4), _channels(scale, x)
    with on_device_of([x]):
        launch(quantize, triton.cdiv(n, block), x, q, kept, scale, scale if offset is None else offset, ints(bits), n,
               count, run, Q_T=TYPES[dtype], CHANNELS=count > 1, KEEP=keep, BLOCK=block,
               **_settings(scale, offset, rule, signed, front))
    return q, kept


def activation_backward(grad, x, q, kept, scale, offset, bits, rule, signed, front, keep, learn, dtype):
    check_activation(scale, offset, bits)
    other = x if KEEPS[keep] == "input" else q if learn and KEEPS[keep] == "bits" else None
    other = None if other is None else in_layout_of(other, grad)
    out, sums = empty_like(grad, dtype), [torch.empty_like(scale) for _ in range(2 if learn else 0)]
    n, bits, settings = grad.numel(), ints(bits), _settings(scale, offset, rule, signed, front)
    settings["A"] = TYPES[acc_dtype(dtype)]
    block, (count, run) = block_of(scale.dtype, [grad], values=8), _channels(scale, grad)
    fused, programs = learn > 0 and count == 1, triton.cdiv(n, block)
    each = n // count
    parts = programs if count == 1 else triton.cdiv(each, block)
    values = scale, scale if offset is None else offset, bits
    reads, second = other is not None, grad if other is None else other
    with on_device_of([grad]):
        partials = torch.empty(3 * parts * count if learn else 0, dtype=torch.float64, device=grad.device)
        launch(gradient, programs, grad, second, kept, out, partials, *values, n, count, run, OUT_T=TYPES[dtype],
               CHANNELS=count > 1, KEEP=keep, LEARN=learn, READS=reads, SUMS=fused, BLOCK=block, **settings)
        if learn and not fused:
            launch(channel_sums, count * parts, grad, second, kept, partials, *values, each, count, run, parts,
                   KEEP=keep, LEARN=learn, READS=reads, BLOCK=block, **settings)
        if learn:
            names = ("A", "RULE", "SIGNED", "OFFSET")
            launch(finish, count, partials, *sums, *values, parts, each, KEEP=keep, LEARN=learn, BLOCK=256,
                   **{name: settings[name] for name in names})
    return out, sums
