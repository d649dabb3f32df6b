"""The memory layout of results: dense, dim 0 outermost, so that a row is one run of memory."""

from collections.abc import Sequence
from typing import Any

import torch

from quantops.computed import PLAIN


def dense_rows(t):
    """True where ``t`` fills its memory without gaps or overlaps and dim 0 is outermost (contiguous, channels_last).

    Such tensors are taken without a copy and their results have the same strides.
    """
    if t.is_contiguous():
        return True
    dims = [d for d in range(t.dim()) if t.shape[d] != 1]
    order = sorted(dims, key=lambda d: t.stride(d), reverse=True)
    if not order or (0 in dims and order[0] != 0):
        return False
    expected = 1
    for d in reversed(order):
        if t.stride(d) != expected:
            return False
        expected = expected * t.shape[d]
    return True


def dense(t):
    """``t`` itself where its rows are dense, else a contiguous copy."""
    return t if dense_rows(t) else t.contiguous()


def empty_like(t, dtype):
    """An uninitialised tensor of ``t``'s shape, in the layout of :func:`dense` of ``t``."""
    if dense_rows(t):
        return torch.empty_strided(t.shape, t.stride(), dtype=dtype, device=t.device)
    return torch.empty(t.shape, dtype=dtype, device=t.device)


def laid_out(results, like):
    """``results`` in the layout that the compiled kernels and the fakes give those of ``like``."""
    if type(like[0]) not in PLAIN:  # traced: a graph of values, which may not write
        return [r.clone() for r in results]
    return [empty_like(t, r.dtype).copy_(r) for r, t in zip(results, like)]


def in_memory(t):
    """The elements of a dense ``t`` in the order of its memory, as one dim."""
    return t.as_strided((t.numel(),), (1,))


def relaid(t, strides):
    """``t`` itself where it has these strides, which are dense, else a copy that has."""
    if t.stride() == strides:
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)


def in_layout_of(t, like):
    """``t`` itself where it has the strides of ``like``, which is dense, else a copy that has."""
    return t if t.stride() == like.stride() else empty_like(like, t.dtype).copy_(t)


def each_scale(scale: Any, w: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The scales of a list one by one, of which one tensor may hold those of several weights."""
    joined = len(scale) == 1 < len(w) == scale[0].numel()
    return list(scale[0].reshape(-1).unbind()) if joined else scale
