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

from quantops.kernels import categorical_backward as cb
from quantops.kernels import categorical_draw as cd
from quantops.kernels import categorical_gates as cg
from quantops.kernels import categorical_quantizer as cq
from quantops.kernels import categorical_soft as cs
from quantops.kernels import math, memory
from quantops.kernels.categorical_record import (
    ALIGNED,
    ALPHA,
    BOUNDED,
    COUNT,
    FIELDS,
    FIRST,
    GATE_COUNT,
    GATES,
    IN_ALPHA,
    IN_GATES,
    IN_SIGMA,
    INNER,
    LEVEL_SIZE,
    NEAREST,
    OF_MANY,
    OF_ONE,
    OF_SOFT,
    ONE_SIZE,
    OUT,
    PARTIAL,
    PIECES,
    PLACE,
    PROGRAMS,
    RECORD,
    ROWS,
    SAMPLE,
    SECOND,
    SIGMA,
    SOFT,
    SOFT_SIZE,
    SPLINE,
    G,
    X,
    levels_of,
    prepare,
    row_bins,
)
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

TILE_ROWS = tl.constexpr(16)  # of short rows that share a program
MOST_SUB = tl.constexpr(512)  # elements at a time off the main path, where registers are dear


@triton.jit
def _value(
    x,
    index,
    at,
    table,
    splined,
    p,
    seed,
    turns,
    OP: tl.constexpr,
    SIGNED: tl.constexpr,
    LEVELS: tl.constexpr,
    HAS_GATES: tl.constexpr,
):
    """q of an element; ``index``: its place in the list; ``turns``: levels, or steps of a soft sum over the classes,
    where it is not ``splined``, with the coefficients at ``table``."""
    if OP == NEAREST:
        return p.alpha * cq.nearest_class(x, p)
    elif OP == BOUNDED:
        return p.alpha * cg.hard_class(x, at, p, SIGNED, LEVELS)
    elif OP == SAMPLE:
        c = cq.nearest_class(x, p)
        return p.alpha * cd.draw(c, cq.offset_of(x, c, p), index, at, p, seed, turns)
    elif HAS_GATES or x.dtype == tl.float64:
        return p.alpha * cs.soft_value(x, at, p, turns, HAS_GATES)
    else:
        mean = tl.zeros_like(x)
        if splined:
            mean = cs.mean_by_spline(x, table, p, cs.spline_at(at))
        else:
            mean = cs.soft_value(x, at, p, turns, False)
        return p.alpha * mean


@triton.jit
def _gradients(
    x,
    g,
    mask,
    index,
    at,
    table,
    splined,
    p,
    seed,
    turns,
    OP: tl.constexpr,
    SIGNED: tl.constexpr,
    LEVELS: tl.constexpr,
    HAS_GATES: tl.constexpr,
    DRAWN: tl.constexpr,
    GATE_GRAD: tl.constexpr,
):
    if OP == OF_ONE:
        return cb.of_one(x, g, at, p)
    elif OP == OF_MANY:
        return cb.of_many(x, g, mask, index, at, p, seed, turns, SIGNED, LEVELS, DRAWN, GATE_GRAD)
    elif HAS_GATES or x.dtype == tl.float64:
        return cb.of_classes(x, g, mask, at, p, turns, SIGNED, LEVELS, HAS_GATES, GATE_GRAD)
    else:
        out, in_alpha, in_sigma, gates = x, x, x, cb.no_gates()
        if splined:
            out, in_alpha, in_sigma, gates = cb.of_spline(x, g, at, table, p)
        else:
            out, in_alpha, in_sigma, gates = cb.of_classes(x, g, mask, at, p, turns, SIGNED, LEVELS, False, False)
        return out, in_alpha, in_sigma, gates


@triton.jit
def _block(
    x_ptr,
    g_ptr,
    out_ptr,
    i,
    mask,
    place,
    at,
    table,
    splined,
    p,
    seed,
    turns,
    A: tl.constexpr,
    OUT_T: tl.constexpr,
    OP: tl.constexpr,
    SIGNED: tl.constexpr,
    LEVELS: tl.constexpr,
    HAS_GATES: tl.constexpr,
    DRAWN: tl.constexpr,
    GATE_GRAD: tl.constexpr,
):
    """Reads, computes and writes the elements at ``i``; gives what they add to dL/dalpha, dL/dsigma and dL/dgates."""
    x = memory.load(x_ptr, i, mask, A)
    index = i
    if (OP == SAMPLE) | DRAWN:
        index = place + i
    if OP < OF_ONE:
        out = _value(x, index, at, table, splined, p, seed, turns, OP, SIGNED, LEVELS, HAS_GATES)
        in_alpha, in_sigma, gates = x, x, cb.no_gates()
    else:
        g = memory.load(g_ptr, i, mask, A)
        out, in_alpha, in_sigma, gates = _gradients(
            x, g, mask, index, at, table, splined, p, seed, turns, OP, SIGNED, LEVELS, HAS_GATES, DRAWN, GATE_GRAD
        )
        if mask is not None:
            in_alpha, in_sigma = tl.where(mask, in_alpha, 0.0), tl.where(mask, in_sigma, 0.0)
    tl.store(out_ptr + i, math.narrow(out, OUT_T), mask=mask)
    return in_alpha, in_sigma, gates


@triton.jit
def by_row(
    table,
    chunks,
    bits,
    seed,
    records,
    splines,
    in_alphas,
    in_sigmas,
    in_gates,
    A: tl.constexpr,
    X_T: tl.constexpr,
    G_T: tl.constexpr,
    OUT_T: tl.constexpr,
    OP: tl.constexpr,
    SIGNED: tl.constexpr,
    MOST_BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    HAS_GATES: tl.constexpr,
    DRAWN: tl.constexpr,
    SCALE_GRAD: tl.constexpr,
    GATE_GRAD: tl.constexpr,
    SIZE: tl.constexpr,
    WIDEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
    spline, splined = record, False
    if (OP == SOFT) | (OP == OF_SOFT):
        if not HAS_GATES and A == tl.float32:
            first = tl.load(entry + SPLINE)
            FUNCTIONS: tl.constexpr = cs.OF_MEAN if OP == SOFT else cs.OF_SLOPES
            spline = splines + (first + row) * (FUNCTIONS * cs.MOST_INTERVALS * cs.ORDER)
            splined = (first >= 0) & (tl.load(record + row * SIZE + cs.SPLINE) > 0.0)
    if (tl.load(entry + ALIGNED) != 0) & (inner - start >= BLOCK) & (pieces > 0):
        at = record + row * SIZE
        p = row_bins(entry, row, n, at, A, OP, SIGNED, MOST_BITS)
        turns = count
        if (OP == SOFT) | (OP == OF_SOFT):
            turns = tl.load(at + cs.REACH).to(tl.int32)
        # The main path: one scale, nothing masked, 128 bits at a time; promises as in flat of family uniform.
        x_vec = tl.multiple_of(x_at.to(tl.pointer_type(X_T)) + begin, 16 * X_T.primitive_bitwidth // WIDEST)
        g_vec = tl.multiple_of(g_at.to(tl.pointer_type(G_T)) + begin, 16 * G_T.primitive_bitwidth // WIDEST)
        out_vec = tl.multiple_of(out_at.to(tl.pointer_type(OUT_T)) + begin, 16 * OUT_T.primitive_bitwidth // WIDEST)
        alpha, sigma, gates = _block(
            x_vec,
            g_vec,
            out_vec,
            tl.arange(0, BLOCK),
            None,
            place + begin,
            at,
            spline,
            splined,
            p,
            key,
            turns,
            A,
            OUT_T,
            OP,
            SIGNED,
            LEVELS,
            HAS_GATES,
            DRAWN,
            GATE_GRAD,
        )
        if SCALE_GRAD:
            _write_sums(entry, row, local, pieces, tl.sum(alpha), tl.sum(sigma), in_alphas, in_sigmas, A)
    else:  # a tile: TILE_ROWS short rows; or one line after the other of a tail, or of a piece at an odd address
        line, column = tl.arange(0, TILE_ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
        rows_on = line * short.to(tl.int64)
        row_of = tl.minimum(row + rows_on, rows - 1)  # rows past the end have a scale, too
        at_rows = record + row_of * SIZE
        p_rows = row_bins(entry, row_of, n, at_rows, A, OP, SIGNED, MOST_BITS)
        turns = count
        if (OP == SOFT) | (OP == OF_SOFT):
            turns = tl.max(tl.load(at_rows + cs.REACH)).to(tl.int32)
        x_ptr, g_ptr = memory.pointer(x_at, begin, X_T), memory.pointer(g_at, begin, G_T)
        out_ptr = memory.pointer(out_at, begin, OUT_T)
        width = tl.minimum(inner - start, BLOCK)
        size, apart, further = width, inner * 0 + COLUMNS, inner * 0 + SUB
        if short:
            size, apart, further = (rows - row) * inner, inner, inner * 0 + COLUMNS
        alpha_tile = tl.zeros([TILE_ROWS, COLUMNS], A)
        sigma_tile = tl.zeros([TILE_ROWS, COLUMNS], A)
        gates = cb.no_gates()
        for tile in range(0, ((width + further - 1) // further).to(tl.int32)):
            j = tile * further
            i = j + line * apart + column
            in_alpha, in_sigma, in_gate = _block(
                x_ptr,
                g_ptr,
                out_ptr,
                i,
                (i < size) & (j + column < width),
                place + begin,
                at_rows,
                spline,
                splined,
                p_rows,
                key,
                turns,
                A,
                OUT_T,
                OP,
                SIGNED,
                LEVELS,
                HAS_GATES,
                DRAWN,
                GATE_GRAD,
            )
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
        tl.store(in_gates + pid.to(tl.int64) * cq.MAX_BITS + tl.arange(0, cq.MAX_BITS), gates)


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
def finish_gates(
    table, bits, in_gates, A: tl.constexpr, SIGNED: tl.constexpr, MOST_BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Second stage of dL/dgates: one program per tensor."""
    t = tl.program_id(0)
    entry = table + t.to(tl.int64) * FIELDS
    l = levels_of(entry, tl.load(bits + t), A, SIGNED, MOST_BITS, True)
    programs = tl.load(entry + PROGRAMS)
    level = tl.arange(0, cq.MAX_BITS)
    lanes = tl.arange(0, BLOCK)[:, None]
    first = in_gates + tl.load(entry + FIRST) * cq.MAX_BITS
    sums = tl.zeros([BLOCK, cq.MAX_BITS], tl.float64)
    for j in range(0, programs, BLOCK):
        sums += tl.load(first + (j + lanes) * cq.MAX_BITS + level[None, :], mask=j + lanes < programs, other=0.0)
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
        return SOFT_SIZE, levels
    return (ONE_SIZE if op == OF_ONE else LEVEL_SIZE), levels


# Values that the arithmetic of an element holds at once, as far as the registers suffice.
_VALUES = {
    NEAREST.value: 1,
    BOUNDED.value: 4,
    SAMPLE.value: 16,
    SOFT.value: 16,
    OF_ONE.value: 8,
    OF_MANY.value: 16,
    OF_SOFT.value: 16,
}


def _run(
    op, x, alpha, sigma, bits, gates, seed, signed, soft, out, grad=None, drawn=False, in_scales=None, in_gates=None
):
    """Launches :func:`by_row` and what comes before and after; ``in_scales``: lists of dL/dalpha and dL/dsigma."""
    count, device, acc = len(x), x[0].device, acc_dtype(x[0].dtype)
    values = 16 if op == OF_ONE and x[0].dtype == acc else _VALUES[op.value]  # more elements are spilled on sm_90
    block = block_of(acc, x, values=values)
    size, levels = _sizes(op, gates)
    table = np.zeros((count, FIELDS.value), np.int64)
    for column, tensors in (
        (X, x),
        (G, grad),
        (OUT, out),
        (ALPHA, alpha),
        (SIGMA, sigma),
        (GATES, gates or None),
        (IN_ALPHA, in_scales and in_scales[0]),
        (IN_SIGMA, in_scales and in_scales[1]),
        (IN_GATES, in_gates),
    ):
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
        (rows == 1) | (inner * narrowest % 16 == 0)
    )
    table[:, PARTIAL.value], table[:, SECOND.value] = starts(programs * (pieces > 1)), starts(second)
    table[:, RECORD.value] = starts(rows)
    splined = rows * (op in (SOFT, OF_SOFT) and not gates and acc == torch.float32 and inner >= cs.LEAST_SPLINED)
    table[:, SPLINE.value] = np.where(splined, starts(splined), -1)
    shared = dict(A=TYPES[acc], SIGNED=signed, MOST_BITS=MAX_SOFT_BITS if soft else MAX_BITS)
    bits = ints(bits)
    with on_device_of(x):
        table, chunks = on_device(table, device), owners(programs, device)
        records = splines = in_alphas = in_sigmas = gate_sums = None
        if op != NEAREST:
            records = torch.empty(int(rows.sum()) * size, dtype=acc, device=device)
            functions = (cs.OF_MEAN if op == SOFT else cs.OF_SLOPES).value
            splines = torch.empty(
                int(splined.sum()) * functions * cs.MOST_INTERVALS.value * cs.ORDER.value, dtype=acc, device=device
            )
            launch(
                prepare,
                int(rows.sum()),
                table,
                owners(rows, device),
                bits,
                records,
                splines,
                OP=op.value,
                HAS_GATES=bool(gates),
                BOUNDS=bool(gates) and not drawn and op in (BOUNDED, OF_MANY),
                SIZE=size,
                **shared,
            )
        if in_scales:
            in_alphas, in_sigmas = torch.empty(
                (2, int((programs * (pieces > 1)).sum())), dtype=torch.float64, device=device
            )
        if in_gates:
            gate_sums = torch.empty(int(programs.sum()) * MAX_BITS, dtype=torch.float64, device=device)
        launch(
            by_row,
            int(programs.sum()),
            table,
            chunks,
            bits,
            seed,
            records,
            splines,
            in_alphas,
            in_sigmas,
            gate_sums,
            X_T=TYPES[x[0].dtype],
            G_T=TYPES[(grad or x)[0].dtype],
            OUT_T=TYPES[out[0].dtype],
            OP=op.value,
            LEVELS=levels,
            HAS_GATES=bool(gates),
            DRAWN=drawn,
            SCALE_GRAD=bool(in_scales),
            GATE_GRAD=bool(in_gates),
            SIZE=size,
            WIDEST=widest(x, grad, out),
            BLOCK=block,
            **shared,
        )
        if in_scales and second.any():
            launch(
                finish_scales,
                int(second.sum()),
                table,
                owners(second, device),
                in_alphas,
                in_sigmas,
                A=TYPES[acc],
                BLOCK=1024,
            )
        if in_gates:
            launch(finish_gates, count, table, bits, gate_sums, BLOCK=64, **shared)


def categorical(x, alpha, sigma, bits, gates, seed, mode, grad_of, signed, dtype):
    check_categorical(alpha, sigma, bits, gates, seed, mode, grad_of)
    gates = gates or []
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
    grad_alpha, grad_sigma = (
        [torch.empty_like(v) if t.numel() else torch.zeros_like(v) for v, t in zip(values, x)] if scale_grad else []
        for values in (alpha, sigma)
    )
    # More gates than there can be bits are out of range; the kernel writes the first ones only.
    grad_gates = [
        torch.full_like(v, torch.nan) if v.numel() > MAX_BITS else torch.empty_like(v) for v in gates if gate_grad
    ]
    soft, drawn = "soft" in (MODES[mode], GRADS[grad_of]), MODES[mode] == "sample"
    op = OF_SOFT if soft else OF_MANY if gates or drawn else OF_ONE
    drawn = drawn and not soft
    _run(
        op,
        x,
        alpha,
        sigma,
        bits,
        gates,
        seed if drawn else None,
        signed,
        soft,
        grad_x,
        in_layouts_of(x, grad),
        drawn,
        (grad_alpha, grad_sigma) if scale_grad else None,
        grad_gates or None,
    )
    return grad_x, grad_alpha, grad_sigma, grad_gates
