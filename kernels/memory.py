"""How kernels find elements: pointers from the addresses in a table, and the rows that a run of elements lies in."""

import triton
import triton.language as tl

from quantops.kernels import math

RUN = tl.constexpr(64)  # programs that share an entry in the table of owners


@triton.jit
def pointer(address, start, T: tl.constexpr):
    return address.to(tl.pointer_type(T)) + start


@triton.jit
def owner(chunks, pid):
    """The tensor that program ``pid`` works on, of :func:`quantops.kernels.launch.owners`."""
    t = tl.load(chunks + pid // RUN)
    ends = chunks + (tl.num_programs(0) + RUN - 1) // RUN
    while tl.load(ends + t) <= pid:
        t += 1
    return t


@triton.jit
def load(ptr, i, mask, T: tl.constexpr):
    """Elements in the dtype of the arithmetic."""
    if mask is None:
        return math.widen(tl.load(ptr + i), T)
    else:
        return math.widen(tl.load(ptr + i, mask=mask, other=0), T)


@triton.jit
def first_row(start, numel, inner):
    """(the row of element ``start`` of a tensor with rows of ``inner``, how many from there on belong to that row)"""
    row = start * 0
    if inner < numel:
        row = start // inner
    return row, inner - (start - row * inner)


@triton.jit
def rows_from(i, inner, left, BLOCK: tl.constexpr):
    """Rows of elements 0 <= i < BLOCK, counted from that of element 0, which has ``left`` more from there on."""
    run = tl.minimum(inner, BLOCK).to(tl.int32)
    lead = run - tl.minimum(left, run).to(tl.int32)
    return (i + lead).to(tl.uint32) // run.to(tl.uint32)
