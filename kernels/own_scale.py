"""Family ``own_scale`` in Triton: gradients of scales that are functions of their weights, over lists of any tensors.

The weights that share the gradient of a maximum are counted first, by the reduction of family ``uniform``.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from quantops.default.own_scale import own_scale  # noqa: F401  absmax and absmean, which have kernels of their own
from quantops.kernels import math, memory
from quantops.kernels.launch import TYPES, addresses, all_aligned, block_of, launch, on_device_of, owners, starts
from quantops.kernels.table import on_device
from quantops.kernels.uniform import CARRIERS, reduce_rows
from quantops.layout import dense, empty_like
from quantops.reference.uniform import acc_dtype

# Columns of the table: one row of int64 per tensor.
FIELDS = tl.constexpr(8)
W = tl.constexpr(0)
OUT = tl.constexpr(1)
SCALE = tl.constexpr(2)
EACH = tl.constexpr(3)  # dL/ds over the number of weights that carry it
NUMEL = tl.constexpr(4)
INNER = tl.constexpr(5)
FIRST = tl.constexpr(6)
ALIGNED = tl.constexpr(7)

SUB = tl.constexpr(1024)


@triton.jit
def _element(w, least, each, MEAN: tl.constexpr):
    """sign(w) * each where the weight carries gradient: one of the maximum's size, or any."""
    signed = tl.where(w > 0.0, each, tl.where(w < 0.0, -each, 0.0))
    if MEAN:
        return signed
    else:
        return tl.where(tl.abs(w) >= least, signed, 0.0)


@triton.jit
def own_scale_elements(table, chunks, A: tl.constexpr, W_T: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """One program per run of BLOCK elements of one tensor."""
    pid = tl.program_id(0)
    entry = table + memory.owner(chunks, pid).to(tl.int64) * FIELDS
    numel, inner = tl.load(entry + NUMEL), tl.load(entry + INNER)
    start = (pid - tl.load(entry + FIRST)) * BLOCK
    w_at, out_at = tl.load(entry + W), tl.load(entry + OUT)
    row, left = memory.first_row(start, numel, inner)
    s_ptr = memory.pointer(tl.load(entry + SCALE), row, A)
    each_ptr = memory.pointer(tl.load(entry + EACH), row, A)
    if (tl.load(entry + ALIGNED) != 0) & (numel - start >= BLOCK) & (left >= BLOCK):
        i = tl.arange(0, BLOCK)
        w_vec = tl.multiple_of(w_at.to(tl.pointer_type(W_T)) + start, 16)
        out_vec = tl.multiple_of(out_at.to(tl.pointer_type(W_T)) + start, 16)
        v = _element(memory.load(w_vec, i, None, A), tl.load(s_ptr), tl.load(each_ptr), MEAN)
        tl.store(out_vec + i, math.narrow(v, W_T))
    else:  # a tail, an odd address, or several rows: a scale per element
        w_ptr, out_ptr = memory.pointer(w_at, start, W_T), memory.pointer(out_at, start, W_T)
        for j in range(0, tl.minimum(numel - start, BLOCK).to(tl.int32), SUB):
            i = j + tl.arange(0, SUB)
            mask = i < numel - start
            rows = memory.rows_from(i, inner, left, BLOCK)
            least = tl.load(s_ptr + rows, mask=mask, other=0.0)
            each = tl.load(each_ptr + rows, mask=mask, other=0.0)
            v = _element(memory.load(w_ptr, i, mask, A), least, each, MEAN)
            tl.store(out_ptr + i, math.narrow(v, W_T), mask=mask)


def own_scale_backward(w, scale, grad_scale, mean):
    w, acc = [dense(t) for t in w], acc_dtype(w[0].dtype)
    if mean:
        each = [g / max(t.numel() // max(g.numel(), 1), 1) for t, g in zip(w, grad_scale)]
    else:
        counts = [torch.zeros_like(s) for s in scale]  # empty rows have no program
        reduce_rows(CARRIERS, w, counts, scale)
        each = [g / n for g, n in zip(grad_scale, counts)]
    out, block = [empty_like(t, t.dtype) for t in w], block_of(acc, w)
    numel = np.array([t.numel() for t in w], np.int64)
    table = np.zeros((len(w), FIELDS.value), np.int64)
    for column, tensors in ((W, w), (OUT, out), (SCALE, scale), (EACH, each)):
        table[:, column.value] = addresses(tensors, len(w))
    table[:, NUMEL.value] = numel
    table[:, INNER.value] = numel // np.maximum([s.numel() for s in scale], 1)
    programs = -(-numel // block)
    table[:, FIRST.value] = starts(programs)
    table[:, ALIGNED.value] = all_aligned(table[:, W.value], table[:, OUT.value])
    with on_device_of(w):
        device = w[0].device
        launch(own_scale_elements, int(programs.sum()), on_device(table, device), owners(programs, device),
               A=TYPES[acc], W_T=TYPES[w[0].dtype], MEAN=mean, BLOCK=block)
    return out
