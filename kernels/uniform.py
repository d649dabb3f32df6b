"""Family ``uniform`` in Triton: the ops of quantops/library.py, each a single launch over a list of any tensors.

Two kernels do all the work. :func:`flat` cuts every tensor into runs of BLOCK elements, one program each, for ops that
go element by element. :func:`by_row` cuts along rows, for ops that give a number per row (or per tensor, which then is
one row). Sums are taken in two stages of fixed shape, without float atomics: a program leaves a partial, and a second,
tiny kernel adds those up in float64, in order.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from quantops.kernels import math, memory
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
from quantops.reference.uniform import GRIDS, acc_dtype, code_bits
from quantops.values import check_codes, check_values

# Columns of the table: one row of int64 per tensor.
FIELDS = tl.constexpr(12)
W = tl.constexpr(0)  # addresses: the input,
X = tl.constexpr(1)  # a second input, in w's layout,
OUT = tl.constexpr(2)  # the output, in w's layout,
SCALE = tl.constexpr(3)  # the scales,
RESULT = tl.constexpr(4)  # the numbers per row
NUMEL = tl.constexpr(5)
ROWS = tl.constexpr(6)  # scales, or numbers per row
INNER = tl.constexpr(7)  # elements per row
FIRST = tl.constexpr(8)  # the tensor's first program
ALIGNED = tl.constexpr(9)  # 1 where all addresses that matter are multiples of 16
PIECES = tl.constexpr(10)  # programs per row; 0 where a program takes many rows (by_row only)
PARTIAL = tl.constexpr(11)  # the tensor's first partial (by_row), or program of the second stage

# What is done per element.
QUANTIZE, LSB, ENCODE, DECODE, BACKWARD, ADD_LSB_GRAD = (tl.constexpr(i) for i in range(6))
ABSMAX, ABSMEAN, SCALE_GRAD, CARRIERS = (tl.constexpr(i) for i in range(6, 10))

SUB = tl.constexpr(1024)  # elements at a time off the main path, where registers are dear
SHRINK = tl.constexpr(2.0**-64)  # of sums of |w| that may be past the largest number
TILE_ROWS = tl.constexpr(16)  # of short rows that share a program


@triton.jit
def _element(w, x, r, p, OP: tl.constexpr, RULE: tl.constexpr, SIGNED: tl.constexpr, HAS_X: tl.constexpr,
             HAS_R: tl.constexpr):
    """The output of an op without sums at one element; w is the code (DECODE), x the gradient."""
    if OP == LSB:
        u = math.round_clamp_unit(w, p)
        return math.to_int(math.lsb_residual(u, math.round_clamp_code(u, p), p), p.valid)
    elif OP == ENCODE:
        return math.stored_code(math.code(w, p, RULE), p)
    elif OP == DECODE:
        ok = p.valid & (w >= 0.0) & (w < p.count)
        return tl.where(ok, math.level(math.code_of_stored(w, p), p) * p.step, float("nan"))
    elif OP == ADD_LSB_GRAD:
        return math.add_penalty_slope(w, x, r, p, SIGNED)
    else:  # BACKWARD
        total = tl.zeros_like(w)
        if HAS_X:
            total = x
        if HAS_R:
            return math.grad_weight(w, total, r, p, SIGNED)
        else:
            return tl.where(math.inside(w, p, SIGNED), total, p.outside)


@triton.jit
def _block(w_ptr, x_ptr, out_ptr, i, mask, r, p, A: tl.constexpr, OUT_T: tl.constexpr, OP: tl.constexpr,
           RULE: tl.constexpr, SIGNED: tl.constexpr, HAS_X: tl.constexpr, HAS_R: tl.constexpr, HAS_OUT: tl.constexpr,
           STATS: tl.constexpr):
    """Reads, computes and writes the elements at ``i``; gives |B| and (q - w)^2, for STATS."""
    w = memory.load(w_ptr, i, mask, A)
    b, error = w, w
    if OP == QUANTIZE:
        u = math.round_clamp_unit(w, p)
        c = math.round_clamp_code(u, p)
        v = math.level(c, p) * p.step
        if STATS:
            b = tl.abs(math.lsb_residual(u, c, p))
            error = (v - w) * (v - w)
            if mask is not None:
                b = tl.where(mask, b, 0.0)
                error = tl.where(mask, error, 0.0)
    else:
        x = w
        if HAS_X:
            x = memory.load(x_ptr, i, mask, A)
        v = _element(w, x, r, p, OP, RULE, SIGNED, HAS_X, HAS_R)
    if HAS_OUT:
        tl.store(out_ptr + i, math.narrow(v, OUT_T), mask=mask)
    return b, error


@triton.jit
def flat(table, chunks, bits, k, r, penalty, nonzero, sq_error, A: tl.constexpr, W_T: tl.constexpr,
         X_T: tl.constexpr, OUT_T: tl.constexpr, OP: tl.constexpr, RULE: tl.constexpr, GRID: tl.constexpr,
         SIGNED: tl.constexpr, HAS_X: tl.constexpr, HAS_R: tl.constexpr, HAS_OUT: tl.constexpr, STATS: tl.constexpr,
         WIDEST: tl.constexpr, BLOCK: tl.constexpr):
    """One program per run of BLOCK elements of one tensor."""
    pid = tl.program_id(0)
    t = memory.owner(chunks, pid)
    entry = table + t.to(tl.int64) * FIELDS
    numel, inner = tl.load(entry + NUMEL), tl.load(entry + INNER)
    start = (pid - tl.load(entry + FIRST)) * BLOCK
    w_at, x_at, out_at = tl.load(entry + W), tl.load(entry + X), tl.load(entry + OUT)
    row, left = memory.first_row(start, numel, inner)
    s_ptr = memory.pointer(tl.load(entry + SCALE), row, A)
    n = tl.load(bits + t)
    kk = n * 0
    if k is not None:
        kk = tl.load(k + t)
    rr = tl.zeros([], A)
    if HAS_R:
        rr = tl.load(r + t)
    whole = (tl.load(entry + ALIGNED) != 0) & (numel - start >= BLOCK)

    weighed = tl.zeros([], tl.float64)
    count = tl.zeros([], tl.int32)
    squares = tl.zeros([], A)
    if whole & (left >= BLOCK):  # the main path: one scale, nothing masked, 128 bits at a time
        i = tl.arange(0, BLOCK)
        p = math.make_quantizer(tl.load(s_ptr), n, kk, GRID, SIGNED)
        # Promised per type: 128 bits of the widest, as many elements of others, so that all accesses share a layout.
        # The promise sticks to the sum it is made on: this path has sums of its own, and none comes out of a call.
        w_vec = tl.multiple_of(w_at.to(tl.pointer_type(W_T)) + start, 16 * W_T.primitive_bitwidth // WIDEST)
        x_vec = tl.multiple_of(x_at.to(tl.pointer_type(X_T)) + start, 16 * X_T.primitive_bitwidth // WIDEST)
        out_vec = tl.multiple_of(out_at.to(tl.pointer_type(OUT_T)) + start, 16 * OUT_T.primitive_bitwidth // WIDEST)
        b, error = _block(w_vec, x_vec, out_vec, i, None, rr, p, A, OUT_T, OP, RULE, SIGNED, HAS_X, HAS_R, HAS_OUT,
                          STATS)
        if STATS:
            weighed = tl.sum(b.to(tl.int32)).to(tl.float64) * p.code_step  # at most 4096 * 2^16: exact
            count = tl.sum((b != 0.0).to(tl.int32))
            squares = tl.sum(error)
    else:  # a tail, an odd address, or several rows: a scale per element
        weighed_v = tl.zeros([SUB], tl.float64)
        count_v = tl.zeros([SUB], tl.int32)
        squares_v = tl.zeros([SUB], A)
        w_ptr, x_ptr = memory.pointer(w_at, start, W_T), memory.pointer(x_at, start, X_T)
        out_ptr = memory.pointer(out_at, start, OUT_T)
        for j in range(0, tl.minimum(numel - start, BLOCK).to(tl.int32), SUB):
            i = j + tl.arange(0, SUB)
            mask = i < numel - start
            s = tl.load(s_ptr + memory.rows_from(i, inner, left, BLOCK), mask=mask, other=1.0)
            p = math.make_quantizer(s, n, kk, GRID, SIGNED)
            b, error = _block(w_ptr, x_ptr, out_ptr, i, mask, rr, p, A, OUT_T, OP, RULE, SIGNED, HAS_X, HAS_R, HAS_OUT,
                              STATS)
            if STATS:
                weighed_v += b.to(tl.float64) * p.code_step
                count_v += (b != 0.0).to(tl.int32)
                squares_v += error
        if STATS:
            weighed = tl.sum(weighed_v)
            count = tl.sum(count_v)
            squares = tl.sum(squares_v)
    if STATS:
        tl.store(penalty + pid, weighed)
        tl.store(nonzero + pid, count)
        tl.store(sq_error + pid, squares)


@triton.jit
def finish_stats(table, bits, k, part_penalty, part_nonzero, part_sq_error, penalty, nonzero, sq_error,
                 A: tl.constexpr, GRID: tl.constexpr, BLOCK: tl.constexpr):
    """Second stage of the sums: one program per tensor."""
    t = tl.program_id(0)
    entry = table + t.to(tl.int64) * FIELDS
    rows, first, programs = tl.load(entry + ROWS), tl.load(entry + FIRST), tl.load(entry + PIECES)
    s_ptr = memory.pointer(tl.load(entry + SCALE), 0, A)
    lanes = tl.arange(0, BLOCK)
    bad = tl.zeros([BLOCK], tl.int32)
    for j in range(0, rows, BLOCK):
        s = tl.load(s_ptr + j + lanes, mask=j + lanes < rows, other=1.0)
        bad |= tl.where(math.valid_scale(s), 0, 1)
    valid = math.valid_bits(tl.load(bits + t), tl.load(k + t), GRID) & (tl.max(bad) == 0)
    weighed = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.int64)
    squares = tl.zeros([BLOCK], tl.float64)
    for j in range(0, programs, BLOCK):
        mask = j + lanes < programs
        weighed += tl.load(part_penalty + first + j + lanes, mask=mask, other=0.0)
        count += tl.load(part_nonzero + first + j + lanes, mask=mask, other=0).to(tl.int64)
        squares += tl.load(part_sq_error + first + j + lanes, mask=mask, other=0.0).to(tl.float64)
    tl.store(penalty + t, tl.where(valid, tl.sum(weighed), float("nan")).to(A))
    tl.store(nonzero + t, tl.where(valid, tl.sum(count), -1))
    tl.store(sq_error + t, tl.where(valid, tl.sum(squares), float("nan")).to(A))


@triton.jit
def _zeros(shape: tl.constexpr, A: tl.constexpr, OP: tl.constexpr):
    """Where a reduction starts. A maximum is taken over the bits of |w|: NaN is above infinity there."""
    if OP == ABSMAX:
        return tl.zeros(shape, tl.int64 if A == tl.float64 else tl.int32)
    else:
        return tl.zeros(shape, A)


@triton.jit
def _bits_of(v, A: tl.constexpr):
    if A == tl.float64:
        return v.to(tl.int64, bitcast=True)
    else:
        return v.to(tl.int32, bitcast=True)


@triton.jit
def _add(a, b, OP: tl.constexpr):
    if OP == ABSMAX:
        return tl.maximum(a, b)
    else:
        return a + b


@triton.jit
def _total(v, axis: tl.constexpr, OP: tl.constexpr):
    if OP == ABSMAX:
        return tl.max(v, axis)
    else:
        return tl.sum(v, axis)


@triton.jit
def _partial(total, shrunk, A: tl.constexpr, OP: tl.constexpr):
    """What a piece leaves. Of |w|, whose sums are not negative, -shrunk where the total is past the largest number."""
    if OP == ABSMAX:
        return total.to(A, bitcast=True)
    elif OP == ABSMEAN:
        return tl.where(total == float("inf"), -shrunk, total)
    else:
        return total


@triton.jit
def _number(total, shrunk, inner, A: tl.constexpr, OP: tl.constexpr):
    """The number of a row from its total, and for a mean from SHRINK of it, where that is past the largest number."""
    if OP == ABSMAX:
        return total.to(A, bitcast=True)
    elif OP == ABSMEAN:
        n = inner.to(tl.float64)
        return tl.where(total == float("inf"), shrunk.to(tl.float64) / n / SHRINK, total.to(tl.float64) / n).to(A)
    else:
        return total.to(A)


@triton.jit
def _row_block(w_ptr, x_ptr, out_ptr, i, mask, r, p, A: tl.constexpr, OUT_T: tl.constexpr, OP: tl.constexpr,
               SIGNED: tl.constexpr, HAS_X: tl.constexpr, HAS_R: tl.constexpr):
    """What the elements at ``i`` add to their row; SCALE_GRAD also writes dL/dw."""
    w = memory.load(w_ptr, i, mask, A)
    if OP == ABSMAX:
        v = _bits_of(tl.abs(w), A)
    elif OP == ABSMEAN:
        v = tl.abs(w)
    elif OP == CARRIERS:  # how many weights are of the scale's size; p is the scale
        v = (tl.abs(w) >= p).to(A)
        if mask is not None:
            v = tl.where(mask, v, 0.0)
    else:
        g = tl.zeros_like(w)
        if HAS_X:
            g = memory.load(x_ptr, i, mask, A)
        grad_w = _element(w, g, r, p, BACKWARD, math.ROUND_CLAMP, SIGNED, HAS_X, HAS_R)
        tl.store(out_ptr + i, math.narrow(grad_w, OUT_T), mask=mask)
        v = g * math.scale_grad_term(w, p, SIGNED)
        if mask is not None:
            v = tl.where(mask, v, 0.0)
    return v


@triton.jit
def _row_quantizer(s_ptr, i, mask, n, k, GRID: tl.constexpr, SIGNED: tl.constexpr, OP: tl.constexpr):
    if OP == SCALE_GRAD or OP == CARRIERS:  # noqa: SIM109  compiled, not run
        if mask is None:
            s = tl.load(s_ptr + i)
        else:
            s = tl.load(s_ptr + i, mask=mask, other=1.0)
        if OP == CARRIERS:
            return s
        else:
            return math.make_quantizer(s, n, k, GRID, SIGNED)
    else:
        return n


@triton.jit
def by_row(table, chunks, bits, k, r, partials, A: tl.constexpr, W_T: tl.constexpr, X_T: tl.constexpr,
           OUT_T: tl.constexpr, OP: tl.constexpr, GRID: tl.constexpr, SIGNED: tl.constexpr, HAS_X: tl.constexpr,
           HAS_R: tl.constexpr, WIDEST: tl.constexpr, BLOCK: tl.constexpr):
    """One program per piece of a long row, or per TILE_ROWS short rows."""
    pid = tl.program_id(0)
    t = memory.owner(chunks, pid)
    entry = table + t.to(tl.int64) * FIELDS
    rows, inner, pieces = tl.load(entry + ROWS), tl.load(entry + INNER), tl.load(entry + PIECES)
    local = pid - tl.load(entry + FIRST)
    result = tl.load(entry + RESULT).to(tl.pointer_type(A))
    s_ptr = memory.pointer(tl.load(entry + SCALE), 0, A)
    w_at, x_at, out_at = tl.load(entry + W), tl.load(entry + X), tl.load(entry + OUT)
    n = pid * 0
    kk = pid * 0
    rr = tl.zeros([], A)
    if OP == SCALE_GRAD:
        n = tl.load(bits + t)
        kk = tl.load(k + t)
        if HAS_R:
            rr = tl.load(r + t)

    AT_ONCE: tl.constexpr = SUB // 2 if A == tl.float64 else SUB  # off the main path
    WIDTH: tl.constexpr = AT_ONCE // TILE_ROWS
    if pieces == 0:
        lines = local * TILE_ROWS + tl.arange(0, TILE_ROWS)
        here = lines[:, None] < rows
        w_all = memory.pointer(w_at, 0, W_T)
        x_all = memory.pointer(x_at, 0, X_T)
        out_all = memory.pointer(out_at, 0, OUT_T)
        q = _row_quantizer(s_ptr, lines[:, None], here, n, kk, GRID, SIGNED, OP)
        tile, shrunk = _zeros([TILE_ROWS, WIDTH], A, OP), tl.zeros([TILE_ROWS, WIDTH], A)
        for j in range(0, inner.to(tl.int32), WIDTH):
            column = j + tl.arange(0, WIDTH)[None, :]
            v = _row_block(w_all, x_all, out_all, lines[:, None] * inner + column, here & (column < inner), rr, q, A,
                           OUT_T, OP, SIGNED, HAS_X, HAS_R)
            tile = _add(tile, v, OP)
            if OP == ABSMEAN:
                shrunk += v * SHRINK
        number = _number(_total(tile, 1, OP), tl.sum(shrunk, 1), inner, A, OP)
        tl.store(result + lines, number, mask=lines < rows)
    else:
        row = local // pieces
        start = (local - row * pieces) * BLOCK
        at = row * inner + start
        p = _row_quantizer(s_ptr, row, None, n, kk, GRID, SIGNED, OP)
        if (tl.load(entry + ALIGNED) != 0) & (inner - start >= BLOCK):  # promises as in flat
            w_vec = tl.multiple_of(w_at.to(tl.pointer_type(W_T)) + at, 16 * W_T.primitive_bitwidth // WIDEST)
            x_vec = tl.multiple_of(x_at.to(tl.pointer_type(X_T)) + at, 16 * X_T.primitive_bitwidth // WIDEST)
            out_vec = tl.multiple_of(out_at.to(tl.pointer_type(OUT_T)) + at, 16 * OUT_T.primitive_bitwidth // WIDEST)
            v = _row_block(w_vec, x_vec, out_vec, tl.arange(0, BLOCK), None, rr, p, A, OUT_T, OP, SIGNED, HAS_X, HAS_R)
            total, small = _total(v, 0, OP), tl.zeros([], A)
            if OP == ABSMEAN:
                small = tl.sum(v * SHRINK, 0)
        else:
            sums, shrunk = _zeros([AT_ONCE], A, OP), tl.zeros([AT_ONCE], A)
            w_ptr, x_ptr = memory.pointer(w_at, at, W_T), memory.pointer(x_at, at, X_T)
            out_ptr = memory.pointer(out_at, at, OUT_T)
            for j in range(0, tl.minimum(inner - start, BLOCK).to(tl.int32), AT_ONCE):
                i = j + tl.arange(0, AT_ONCE)
                v = _row_block(w_ptr, x_ptr, out_ptr, i, i < inner - start, rr, p, A, OUT_T, OP, SIGNED, HAS_X, HAS_R)
                sums = _add(sums, v, OP)
                if OP == ABSMEAN:
                    shrunk += v * SHRINK
            total, small = _total(sums, 0, OP), tl.sum(shrunk, 0)
        if pieces == 1:
            tl.store(result + row, _number(total, small, inner, A, OP))
        else:
            tl.store(partials + tl.load(entry + PARTIAL) + local, _partial(total, small, A, OP))


@triton.jit
def finish_rows(table, chunks, partials, A: tl.constexpr, OP: tl.constexpr, BLOCK: tl.constexpr):
    """Second stage of the numbers per row: one program per row that is in several pieces."""
    pid = tl.program_id(0)
    t = memory.owner(chunks, pid)
    entry = table + t.to(tl.int64) * FIELDS
    pieces = tl.load(entry + PIECES)
    row = pid - tl.load(entry + NUMEL)  # by_row has no use for NUMEL: it holds the first program of this stage
    first = partials + tl.load(entry + PARTIAL) + row * pieces
    lanes = tl.arange(0, BLOCK)
    if OP == ABSMAX:
        sums = _zeros([BLOCK], A, OP)
    else:
        sums = tl.zeros([BLOCK], tl.float64)
    shrunk = tl.zeros([BLOCK], tl.float64)
    for j in range(0, pieces, BLOCK):
        v = tl.load(first + j + lanes, mask=j + lanes < pieces, other=0.0)
        if OP == ABSMAX:
            sums = tl.maximum(sums, _bits_of(v, A))
        elif OP == ABSMEAN:
            v = v.to(tl.float64)
            sums += tl.where(v < 0, float("inf"), v)
            shrunk += tl.where(v < 0, -v, v * SHRINK)
        else:
            sums += v.to(tl.float64)
    result = tl.load(entry + RESULT).to(tl.pointer_type(A))
    tl.store(result + row, _number(_total(sums, 0, OP), tl.sum(shrunk, 0), tl.load(entry + INNER), A, OP))


# Host side.


def _flat(op, w, scale, bits, k=None, *, acc, x=None, out=None, r=None, rule=0, grid=0, signed=True, stats=None):
    """Launches :func:`flat`; ``stats`` = (penalty, nonzero, sq_error) to fill, if any."""
    count, device = len(w), w[0].device
    block = block_of(acc, w, *[x] * (x is not None), values=2 if stats else 1)
    bits, k = ints(bits), None if k is None else ints(k)
    table = np.zeros((count, FIELDS.value), np.int64)
    for column, tensors in ((W, w), (X, x), (OUT, out), (SCALE, scale)):
        table[:, column.value] = addresses(tensors, count)
    table[:, NUMEL.value] = numel = np.array([t.numel() for t in w], np.int64)
    table[:, ROWS.value] = rows = np.array([s.numel() for s in scale], np.int64)
    table[:, INNER.value] = numel // np.maximum(rows, 1)
    table[:, PIECES.value] = programs = -(-numel // block)
    table[:, FIRST.value] = starts(programs)
    table[:, ALIGNED.value] = all_aligned(*(table[:, c.value] for c in (W, X, OUT)))
    total = int(programs.sum())
    with on_device_of(w):
        rows_of = on_device(table, device)
        partials = [None] * 3
        if stats:
            partials = [torch.empty(total, dtype=d, device=device) for d in (torch.float64, torch.int32, acc)]
        launch(flat, total, rows_of, owners(programs, device), bits, k, r, *partials,
               A=TYPES[acc], W_T=TYPES[w[0].dtype], X_T=TYPES[(x or w)[0].dtype], OUT_T=TYPES[(out or w)[0].dtype],
               OP=op.value, RULE=rule, GRID=grid, SIGNED=signed, HAS_X=x is not None, HAS_R=r is not None,
               HAS_OUT=out is not None, STATS=stats is not None, WIDEST=widest(w, x, out), BLOCK=block)
        if stats:
            launch(finish_stats, count, rows_of, bits, k, *partials, *stats, A=TYPES[acc], GRID=grid,
                   BLOCK=1024)


def _by_row(op, w, result, rows, *, acc, scale=None, bits=None, k=None, x=None, out=None, r=None, grid=0,
            signed=True):
    """Launches :func:`by_row`: ``rows`` numbers for each tensor, at the addresses ``result``."""
    count, device, block = len(w), w[0].device, block_of(acc, w, *[x] * (x is not None))
    table = np.zeros((count, FIELDS.value), np.int64)
    for column, tensors in ((W, w), (X, x), (OUT, out), (SCALE, scale)):
        table[:, column.value] = addresses(tensors, count)
    numel, rows = np.array([t.numel() for t in w], np.int64), np.array(rows, np.int64)
    inner = numel // np.maximum(rows, 1)
    short = inner <= SHORT_ROW
    pieces = np.where(short, 0, -(-inner // block))
    programs = np.where(short, -(-rows // TILE_ROWS.value), rows * pieces) * (inner > 0)
    second = rows * (pieces > 1)
    narrowest = min(t[0].element_size() for t in (w, x, out) if t)
    whole_rows = (rows == 1) | (inner * narrowest % 16 == 0)
    table[:, RESULT.value], table[:, ROWS.value], table[:, INNER.value] = result, rows, inner
    table[:, FIRST.value], table[:, PIECES.value] = starts(programs), pieces
    table[:, ALIGNED.value] = all_aligned(*(table[:, c.value] for c in (W, X, OUT))) & whole_rows
    table[:, PARTIAL.value] = starts(programs * (pieces > 1))
    table[:, NUMEL.value] = starts(second)
    with on_device_of(w):
        rows_of = on_device(table, device)
        partials = torch.empty(int((programs * (pieces > 1)).sum()), dtype=acc, device=device)
        launch(by_row, int(programs.sum()), rows_of, owners(programs, device), bits, k, r, partials,
               A=TYPES[acc], W_T=TYPES[w[0].dtype], X_T=TYPES[(x or w)[0].dtype], OUT_T=TYPES[(out or w)[0].dtype],
               OP=op.value, GRID=grid, SIGNED=signed, HAS_X=x is not None, HAS_R=r is not None,
               WIDEST=widest(w, x, out), BLOCK=block)
        if second.any():
            launch(finish_rows, int(second.sum()), rows_of, owners(second, device), partials, A=TYPES[acc],
                   OP=op.value, BLOCK=4096)


def _reduce(op, w, per_row):
    w, acc = [dense(t) for t in w], acc_dtype(w[0].dtype)
    rows = [t.shape[0] if per_row else 1 for t in w]
    out = torch.zeros(sum(rows), dtype=acc, device=w[0].device)  # empty rows have no program: they stay 0
    _by_row(op, w, out.data_ptr() + out.element_size() * starts(rows), rows, acc=acc)
    return out


def reduce_rows(op, w, result, scale):
    """A number per scale into ``result``, in the shape of the scales."""
    _by_row(op, w, [t.data_ptr() for t in result], [s.numel() for s in scale], acc=scale[0].dtype, scale=scale)


def absmax(w, per_row):
    return _reduce(ABSMAX, w, per_row)


def absmean(w, per_row):
    return _reduce(ABSMEAN, w, per_row)


def _elementwise(op, w, dtype, scale, bits, k=None, **options):
    """Runs an op without sums into new tensors."""
    w = [dense(t) for t in w]
    out = [empty_like(t, dtype) for t in w]
    options.setdefault("acc", acc_dtype(w[0].dtype))
    _flat(op, w, scale, bits, k, out=out, **options)
    return out


def round_clamp(w, scale, bits, grid, signed, covered, dtype):
    check_values(scale, bits, grid=grid)
    return _elementwise(QUANTIZE, w, dtype, scale, bits, grid=grid, signed=signed)


def _write_back(q, out):
    for to, value in zip(q, out):
        if to is not value:
            to.copy_(value)


def _targets(q, w):
    """Buffers in w's layout for results that go to ``q``: q itself where it has that layout."""
    return [o if o.stride() == t.stride() else empty_like(t, o.dtype) for o, t in zip(q, w)]


def round_clamp_out(w, scale, bits, grid, signed, q):
    check_values(scale, bits, grid=grid)
    w = [dense(t) for t in w]
    out = _targets(q, w)
    _flat(QUANTIZE, w, scale, bits, acc=acc_dtype(w[0].dtype), out=out, grid=grid, signed=signed)
    _write_back(q, out)


def _sums(w, acc):
    return [torch.empty(len(w), dtype=d, device=w[0].device) for d in (acc, torch.int64, acc)]


def _msq(w, scale, bits, k, grid, out):
    """Quantizes into ``out`` (None: nowhere), gives the sums."""
    check_values(scale, bits, k, grid)
    acc = acc_dtype(w[0].dtype)
    stats = _sums(w, acc)
    _flat(QUANTIZE, w, scale, bits, k, acc=acc, out=out, grid=grid, stats=stats)
    return stats


def msq(w, scale, bits, k, grid, covered, dtype):
    w = [dense(t) for t in w]
    q = [empty_like(t, dtype) for t in w]
    return q, *_msq(w, scale, bits, k, grid, q)


def msq_out(w, scale, bits, k, grid, q, penalty, nonzero, sq_error):
    w = [dense(t) for t in w]
    out = _targets(q, w)
    sums = _msq(w, scale, bits, k, grid, out)
    _write_back([*q, penalty, nonzero, sq_error], [*out, *sums])


def lsb(w, scale, bits, k, grid):
    check_values(scale, bits, k, grid)
    return _elementwise(LSB, w, torch.int32, scale, bits, k, grid=grid)


def lsb_stats(w, scale, bits, k, grid, covered):
    return tuple(_msq([dense(t) for t in w], scale, bits, k, grid, None))


def uniform_backward(grad, grad_penalty, w, scale, bits, k, grid, signed, scale_grad):
    check_values(scale, bits, k, grid)
    w, acc = [dense(t) for t in w], acc_dtype(w[0].dtype)
    grad = in_layouts_of(w, grad) if grad else None
    r = None if grad_penalty is None else grad_penalty.to(acc).contiguous()
    grad_w = [empty_like(t, t.dtype) for t in w]
    options = dict(acc=acc, x=grad, out=grad_w, r=r, grid=grid, signed=signed)
    if not scale_grad:
        _flat(BACKWARD, w, scale, bits, k, **options)
        return grad_w, []
    grad_scale = [torch.empty_like(s) if t.numel() else torch.zeros_like(s) for s, t in zip(scale, w)]
    _by_row(SCALE_GRAD, w, [s.data_ptr() for s in grad_scale], [s.numel() for s in scale], scale=scale,
            bits=ints(bits), k=ints(k), **options)
    return grad_w, grad_scale


def add_lsb_grad_(grad, w, scale, bits, k, grid, strength):
    check_values(scale, bits, k, grid)
    w, acc = [dense(t) for t in w], acc_dtype(w[0].dtype)
    same = in_layouts_of(w, grad)
    _flat(ADD_LSB_GRAD, w, scale, bits, k, acc=acc, x=same, out=same, r=strength.to(acc), grid=grid)
    _write_back(grad, same)


def encode(w, scale, bits, rule, grid, signed):
    check_values(scale, bits, grid=grid)
    return _elementwise(ENCODE, w, torch.int32, scale, bits, rule=rule, grid=grid, signed=signed)


def decode(codes, scale, bits, grid, signed, dtype):
    check_values(scale, bits, grid=grid)
    check_codes(codes, code_bits(bits.reshape(-1), GRIDS[grid]))
    return _elementwise(DECODE, codes, dtype, scale, bits, acc=acc_dtype(scale[0].dtype), grid=grid, signed=signed)
