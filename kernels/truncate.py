"""Family ``truncate`` in Triton: the ops of quantops/library.py, each a single launch over a list of any tensors.

As in family ``uniform``: :func:`cut` and :func:`add_up` go over every tensor in runs of BLOCK elements,
:func:`add_up_rows` along rows, for the gradients of scales, whose sums are taken in two stages of fixed shape. A
program reads its weights once, and loops over the widths, whose number is no constant of the kernels.
"""

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from quantops.kernels import math, memory
from quantops.kernels import truncate_math as tm
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
from quantops.reference.uniform import acc_dtype
from quantops.values import check_truncation

# Columns of the table: one row of int64 per tensor.
W = tl.constexpr(0)  # addresses: the weight,
OUT = tl.constexpr(1)  # dL/dw,
SCALE = tl.constexpr(2)  # the scales
OUT_SCALE = tl.constexpr(3)  # of the codes and of q,
RESULT = tl.constexpr(4)  # dL/ds
OUT_RESULT = tl.constexpr(5)  # and dL/d out_scale; 0 where that is not wanted
NUMEL = tl.constexpr(6)
ROWS = tl.constexpr(7)  # scales
INNER = tl.constexpr(8)  # elements per row
FIRST = tl.constexpr(9)  # the tensor's first program
ALIGNED = tl.constexpr(10)  # 1 where all addresses that matter are multiples of 16
PIECES = tl.constexpr(11)  # programs per row; 0 where a program takes many rows (add_up_rows only)
PARTIAL = tl.constexpr(12)  # the tensor's first partial
SECOND = tl.constexpr(13)  # the tensor's first program of the second stage
USED = tl.constexpr(14)  # 1 where a gradient is there
DATA = tl.constexpr(15)  # addresses, one per width: q, or its gradient, 0 where there is none

SUB = tl.constexpr(512)  # elements at a time off the main path, where registers are dear
TILE_ROWS, COLUMNS = tl.constexpr(16), tl.constexpr(32)  # of short rows that share a program


@triton.jit
def _entry(table, t, widths):
    return table + t.to(tl.int64) * (DATA + widths)


class Run(NamedTuple):
    """A program's run of elements of one tensor."""

    entry: tl.tensor  # the tensor's row of the table
    bits: tl.tensor  # the tensor's first width
    base: tl.tensor  # base bits
    numel: tl.tensor
    inner: tl.tensor
    start: tl.tensor  # the first element
    left: tl.tensor  # elements from there on that belong to its row,
    s_ptr: tl.tensor  # whose scales these are
    o_ptr: tl.tensor


@triton.jit
def _run(table, chunks, bits, base_bits, widths, A: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    t = memory.owner(chunks, pid)
    entry = _entry(table, t, widths)
    numel, inner = tl.load(entry + NUMEL), tl.load(entry + INNER)
    start = (pid - tl.load(entry + FIRST)) * BLOCK
    row, left = memory.first_row(start, numel, inner)
    s_ptr, o_ptr = memory.pointer(tl.load(entry + SCALE), row, A), memory.pointer(tl.load(entry + OUT_SCALE), row, A)
    return Run(entry, bits + t, tl.load(base_bits + t), numel, inner, start, left, s_ptr, o_ptr)


@triton.jit
def _scales_at(r, i, mask, BLOCK: tl.constexpr):
    """Both scales of elements ``i`` of a run."""
    rows = memory.rows_from(i, r.inner, r.left, BLOCK)
    return tl.load(r.s_ptr + rows, mask=mask, other=1.0), tl.load(r.o_ptr + rows, mask=mask, other=1.0)


@triton.jit
def _cut_block(entry, bits, base, weights, widths, start, w, i, mask, s, o, A: tl.constexpr, OUT_T: tl.constexpr,
               RULE: tl.constexpr, TANH: tl.constexpr, WIDEST: tl.constexpr, VEC: tl.constexpr):
    """Cuts the weights ``w`` at ``i`` to all widths."""
    c = tm.base_code(tm.companded(w, TANH), tm.make_base(s, base, TANH), RULE)
    for j in range(0, widths):
        v = tm.make_width(o, tl.load(bits + j * weights), base)
        q = tl.load(entry + DATA + j).to(tl.pointer_type(OUT_T)) + start
        if VEC:
            q = tl.multiple_of(q, 16 * OUT_T.primitive_bitwidth // WIDEST)
        tl.store(q + i, math.narrow(tm.odd_level(c, v) * v.step, OUT_T), mask=mask)


@triton.jit
def cut(table, chunks, bits, base_bits, weights, widths, A: tl.constexpr, W_T: tl.constexpr, OUT_T: tl.constexpr,
        RULE: tl.constexpr, TANH: tl.constexpr, WIDEST: tl.constexpr, BLOCK: tl.constexpr):
    """One program per run of BLOCK elements of one tensor."""
    r = _run(table, chunks, bits, base_bits, widths, A, BLOCK)
    w_at = tl.load(r.entry + W)
    if (tl.load(r.entry + ALIGNED) != 0) & (r.numel - r.start >= BLOCK) & (r.left >= BLOCK):
        i = tl.arange(0, BLOCK)  # the main path: one scale, nothing masked, 128 bits at a time; promises as in flat
        w_vec = tl.multiple_of(w_at.to(tl.pointer_type(W_T)) + r.start, 16 * W_T.primitive_bitwidth // WIDEST)
        w = memory.load(w_vec, i, None, A)
        _cut_block(r.entry, r.bits, r.base, weights, widths, r.start, w, i, None, tl.load(r.s_ptr), tl.load(r.o_ptr), A,
                   OUT_T, RULE, TANH, WIDEST, True)
    else:  # a tail, an odd address, or several rows: a scale per element
        w_ptr = memory.pointer(w_at, r.start, W_T)
        for k in range(0, tl.minimum(r.numel - r.start, BLOCK).to(tl.int32), SUB):
            i = k + tl.arange(0, SUB)
            mask = i < r.numel - r.start
            s, o = _scales_at(r, i, mask, BLOCK)
            _cut_block(r.entry, r.bits, r.base, weights, widths, r.start, memory.load(w_ptr, i, mask, A), i, mask, s, o,
                       A, OUT_T, RULE, TANH, WIDEST, False)


@triton.jit
def _sum_block(entry, bits, base, weights, widths, start, i, mask, o, c, valid, A: tl.constexpr, X_T: tl.constexpr,
               COVERED: tl.constexpr, SCALES: tl.constexpr, WIDEST: tl.constexpr, VEC: tl.constexpr):
    """The sum of the gradients at ``i``; that of g * q / out_scale; not 0 where a width with a gradient is invalid."""
    # -0 + g is g, also where that is -0.
    total = tl.where(tl.load(entry + USED) != 0, tl.full(i.shape, -0.0, A), tl.full(i.shape, 0.0, A))
    level = tl.full(i.shape, 0.0, A)
    bad = tl.where(valid, 0, 0)  # in the shape of the scales
    for j in range(0, widths):
        at = tl.load(entry + DATA + j)
        if at != 0:
            g_ptr = at.to(tl.pointer_type(X_T)) + start
            if VEC:
                g_ptr = tl.multiple_of(g_ptr, 16 * X_T.primitive_bitwidth // WIDEST)
            g = memory.load(g_ptr, i, mask, A)
            total = total + g
            if not COVERED:
                v = tm.make_width(o, tl.load(bits + j * weights), base)
                bad = bad | tl.where(valid & (v.step == v.step), 0, 1)
                if SCALES:
                    level = level + g * (tm.odd_level(c, v) * v.unit_step)
    return total, level, bad


@triton.jit
def _grad_block(entry, bits, base, weights, widths, start, i, mask, s, o, A: tl.constexpr, W_T: tl.constexpr,
                X_T: tl.constexpr, RULE: tl.constexpr, TANH: tl.constexpr, COVERED: tl.constexpr, SCALES: tl.constexpr,
                WIDEST: tl.constexpr, VEC: tl.constexpr):
    """Writes dL/dw at ``i``; gives what the elements add to the sums (g * q / out_scale, g * (x/s) * inside)."""
    w_ptr = tl.load(entry + W).to(tl.pointer_type(W_T)) + start
    out = tl.load(entry + OUT).to(tl.pointer_type(W_T)) + start
    if VEC:  # promises as in flat
        w_ptr = tl.multiple_of(w_ptr, 16 * W_T.primitive_bitwidth // WIDEST)
        out = tl.multiple_of(out, 16 * W_T.primitive_bitwidth // WIDEST)
    if COVERED:
        total, level, bad = _sum_block(entry, bits, base, weights, widths, start, i, mask, o, o, base == base, A, X_T,
                                       True, False, WIDEST, VEC)
        tl.store(out + i, math.narrow(total, W_T), mask=mask)
        return total, level
    else:
        w = memory.load(w_ptr, i, mask, A)
        x = tm.companded(w, TANH)
        p = tm.make_base(s, base, TANH)
        c = x
        if SCALES:
            c = tm.base_code(x, p, RULE)
        total, level, bad = _sum_block(entry, bits, base, weights, widths, start, i, mask, o, c, p.valid, A, X_T, False,
                                       SCALES, WIDEST, VEC)
        tl.store(out + i, math.narrow(tm.grad_weight(w, x, total, p, bad, TANH), W_T), mask=mask)
        inner = total * tm.inner_term(w, x, p)
        level, inner = tl.where(bad != 0, float("nan"), level), tl.where(bad != 0, float("nan"), inner)
        if mask is not None:
            level, inner = tl.where(mask, level, 0.0), tl.where(mask, inner, 0.0)
        return level, inner


@triton.jit
def add_up(table, chunks, bits, base_bits, weights, widths, A: tl.constexpr, W_T: tl.constexpr, X_T: tl.constexpr,
           TANH: tl.constexpr, COVERED: tl.constexpr, WIDEST: tl.constexpr, BLOCK: tl.constexpr):
    """dL/dw, one program per run of BLOCK elements of one tensor."""
    r = _run(table, chunks, bits, base_bits, widths, A, BLOCK)
    whole = (tl.load(r.entry + ALIGNED) != 0) & (r.numel - r.start >= BLOCK)
    if whole & (COVERED | (r.left >= BLOCK)):
        _grad_block(r.entry, r.bits, r.base, weights, widths, r.start, tl.arange(0, BLOCK), None, tl.load(r.s_ptr),
                    tl.load(r.o_ptr), A, W_T, X_T, 0, TANH, COVERED, False, WIDEST, True)
    else:  # as in cut
        for k in range(0, tl.minimum(r.numel - r.start, BLOCK).to(tl.int32), SUB):
            i = k + tl.arange(0, SUB)
            mask = i < r.numel - r.start
            s, o = _scales_at(r, i, mask, BLOCK)
            _grad_block(r.entry, r.bits, r.base, weights, widths, r.start, i, mask, s, o, A, W_T, X_T, 0, TANH, COVERED,
                        False, WIDEST, False)


@triton.jit
def _write_scales(entry, row, level, inner, mask, A: tl.constexpr):
    """dL/ds and dL/d out_scale of rows from their sums in float64."""
    result, out_result = memory.pointer(tl.load(entry + RESULT), 0, A), tl.load(entry + OUT_RESULT)
    if out_result == 0:
        tl.store(result + row, (level - inner).to(A), mask=mask)
    else:
        tl.store(result + row, (0.0 - inner).to(A), mask=mask)
        tl.store(out_result.to(tl.pointer_type(A)) + row, level.to(A), mask=mask)


@triton.jit
def add_up_rows(table, chunks, bits, base_bits, weights, widths, levels, inners, A: tl.constexpr, W_T: tl.constexpr,
                X_T: tl.constexpr, RULE: tl.constexpr, TANH: tl.constexpr, WIDEST: tl.constexpr, BLOCK: tl.constexpr):
    """dL/dw and the gradients of scales, one program per piece of a long row, or per TILE_ROWS short rows."""
    pid = tl.program_id(0)
    t = memory.owner(chunks, pid)
    entry = _entry(table, t, widths)
    rows, inner, pieces = tl.load(entry + ROWS), tl.load(entry + INNER), tl.load(entry + PIECES)
    local = pid - tl.load(entry + FIRST)
    s_ptr, o_ptr = memory.pointer(tl.load(entry + SCALE), 0, A), memory.pointer(tl.load(entry + OUT_SCALE), 0, A)
    base = tl.load(base_bits + t)
    if pieces == 0:
        lines = local * TILE_ROWS + tl.arange(0, TILE_ROWS)
        here = lines[:, None] < rows
        s_tile = tl.load(s_ptr + lines[:, None], mask=here, other=1.0)
        o_tile = tl.load(o_ptr + lines[:, None], mask=here, other=1.0)
        level_tile = tl.zeros([TILE_ROWS, COLUMNS], A)
        inner_tile = tl.zeros([TILE_ROWS, COLUMNS], A)
        for k in range(0, inner.to(tl.int32), COLUMNS):
            column = k + tl.arange(0, COLUMNS)[None, :]
            a, b = _grad_block(entry, bits + t, base, weights, widths, inner * 0, lines[:, None] * inner + column,
                               here & (column < inner), s_tile, o_tile, A, W_T, X_T, RULE, TANH, False, True, WIDEST,
                               False)
            level_tile += a
            inner_tile += b
        _write_scales(entry, lines, tl.sum(level_tile, 1).to(tl.float64), tl.sum(inner_tile, 1).to(tl.float64),
                      lines < rows, A)
    else:
        row = local // pieces
        piece = (local - row * pieces) * BLOCK
        at = row * inner + piece
        s, o = tl.load(s_ptr + row), tl.load(o_ptr + row)
        if (tl.load(entry + ALIGNED) != 0) & (inner - piece >= BLOCK):
            lanes = tl.arange(0, BLOCK)
            levels_v, inners_v = _grad_block(entry, bits + t, base, weights, widths, at, lanes, None, s, o, A, W_T, X_T,
                                             RULE, TANH, False, True, WIDEST, True)
            level, inner_sum = tl.sum(levels_v).to(tl.float64), tl.sum(inners_v).to(tl.float64)
        else:
            level_sums = tl.zeros([SUB], A)
            inner_sums = tl.zeros([SUB], A)
            for k in range(0, tl.minimum(inner - piece, BLOCK).to(tl.int32), SUB):
                i = k + tl.arange(0, SUB)
                a, b = _grad_block(entry, bits + t, base, weights, widths, at, i, i < inner - piece, s, o, A, W_T, X_T,
                                   RULE, TANH, False, True, WIDEST, False)
                level_sums += a
                inner_sums += b
            level, inner_sum = tl.sum(level_sums).to(tl.float64), tl.sum(inner_sums).to(tl.float64)
        if pieces == 1:
            _write_scales(entry, row, level, inner_sum, None, A)
        else:
            tl.store(levels + tl.load(entry + PARTIAL) + local, level)
            tl.store(inners + tl.load(entry + PARTIAL) + local, inner_sum)


@triton.jit
def finish_scales(table, chunks, widths, levels, inners, A: tl.constexpr, BLOCK: tl.constexpr):
    """Second stage of the gradients of scales: one program per row that is in several pieces."""
    pid = tl.program_id(0)
    entry = _entry(table, memory.owner(chunks, pid), widths)
    pieces = tl.load(entry + PIECES)
    row = pid - tl.load(entry + SECOND)
    first = tl.load(entry + PARTIAL) + row * pieces
    lanes = tl.arange(0, BLOCK)
    level = tl.zeros([BLOCK], tl.float64)
    inner = tl.zeros([BLOCK], tl.float64)
    for k in range(0, pieces, BLOCK):
        mask = k + lanes < pieces
        level += tl.load(levels + first + k + lanes, mask=mask, other=0.0)
        inner += tl.load(inners + first + k + lanes, mask=mask, other=0.0)
    _write_scales(entry, row, tl.sum(level), tl.sum(inner), None, A)


# Host side.


def _table(w, scale, out_scale, data, widths, out=None):
    """The columns that all launches have; ``data``: addresses of tensors, width by width."""
    count = len(w)
    table = np.zeros((count, DATA.value + widths), np.int64)
    for column, tensors in ((W, w), (OUT, out), (SCALE, scale), (OUT_SCALE, out_scale or scale)):
        table[:, column.value] = addresses(tensors, count)
    table[:, NUMEL.value] = numel = np.array([t.numel() for t in w], np.int64)
    table[:, ROWS.value] = rows = np.array([s.numel() for s in scale], np.int64)
    table[:, INNER.value] = numel // np.maximum(rows, 1)
    table[:, DATA.value:] = np.array(data, np.int64).reshape(widths, count).T
    table[:, USED.value] = table[:, DATA.value:].any(1)
    table[:, ALIGNED.value] = all_aligned(table[:, W.value], table[:, OUT.value], *table[:, DATA.value:].T)
    return table


def _by_run(table, block):
    """Programs of every tensor, one per run of ``block`` elements; fills in the first of each."""
    programs = -(-table[:, NUMEL.value] // block)
    table[:, FIRST.value] = starts(programs)
    return programs


def truncate(w, scale, out_scale, bits, base_bits, rule, tanh, covered, exact, dtype):
    check_truncation(scale, out_scale, bits, base_bits)
    w, acc, device = [dense(t) for t in w], acc_dtype(w[0].dtype), w[0].device
    widths, block = bits.shape[0], block_of(acc, w)
    q = [empty_like(t, dtype) for _ in range(widths) for t in w]
    table = _table(w, scale, out_scale, [t.data_ptr() for t in q], widths)
    programs = _by_run(table, block)
    with on_device_of(w):
        launch(cut, int(programs.sum()), on_device(table, device), owners(programs, device), ints(bits),
               ints(base_bits), len(w), widths, A=TYPES[acc], W_T=TYPES[w[0].dtype], OUT_T=TYPES[dtype], RULE=rule,
               TANH=tanh, WIDEST=widest(w, q), BLOCK=block)
    return q


def truncate_backward(grads, w, scale, out_scale, bits, base_bits, rule, tanh, covered, scale_grad):
    check_truncation(scale, out_scale, bits, base_bits)
    w, acc, device = [dense(t) for t in w], acc_dtype(w[0].dtype), w[0].device
    widths, block = bits.shape[0], block_of(acc, w, grads, values=8 if scale_grad else 1)
    used = [g.numel() > 0 for g in grads]
    grads = in_layouts_of([t if u else g for g, u, t in zip(grads, used, w * widths)], grads)
    grad_w = [empty_like(t, t.dtype) for t in w]
    data = [g.data_ptr() if u else 0 for g, u in zip(grads, used)]
    table = _table(w, scale, out_scale, data, widths, grad_w)
    types = dict(A=TYPES[acc], W_T=TYPES[w[0].dtype], X_T=TYPES[grads[0].dtype], TANH=tanh, WIDEST=widest(w, grads),
                 BLOCK=block)
    bits, base_bits = ints(bits), ints(base_bits)
    if not scale_grad:
        programs = _by_run(table, block)
        with on_device_of(w):
            launch(add_up, int(programs.sum()), on_device(table, device), owners(programs, device), bits, base_bits,
                   len(w), widths, COVERED=covered and not tanh, **types)
        return grad_w, [], []
    grad_scale, grad_out_scale = ([torch.empty_like(s) if t.numel() else torch.zeros_like(s) for s, t in zip(v, w)]
                                  for v in (scale, out_scale))
    table[:, RESULT.value] = addresses(grad_scale, len(w))
    table[:, OUT_RESULT.value] = addresses(grad_out_scale or None, len(w))
    rows, inner = table[:, ROWS.value], table[:, INNER.value]
    pieces = np.where(inner <= SHORT_ROW, 0, -(-inner // block))
    programs = np.where(pieces == 0, -(-rows // TILE_ROWS.value), rows * pieces) * (inner > 0)
    second = rows * (pieces > 1)
    narrowest = min(w[0].element_size(), grads[0].element_size())
    table[:, FIRST.value], table[:, PIECES.value] = starts(programs), pieces
    table[:, ALIGNED.value] &= (rows == 1) | (inner * narrowest % 16 == 0)
    table[:, PARTIAL.value], table[:, SECOND.value] = starts(programs * (pieces > 1)), starts(second)
    with on_device_of(w):
        table = on_device(table, device)
        partials = torch.empty((2, int((programs * (pieces > 1)).sum())), dtype=torch.float64, device=device)
        launch(add_up_rows, int(programs.sum()), table, owners(programs, device), bits, base_bits, len(w), widths,
               *partials, RULE=rule, **types)
        if second.any():
            launch(finish_scales, int(second.sum()), table, owners(second, device), widths, *partials,
                   A=types["A"], BLOCK=1024)
    return grad_w, grad_scale, grad_out_scale
