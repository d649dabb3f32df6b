"""Tensors that a call writes to: that they fit, and that nothing else lies in their memory."""

import torch

from quantops.checks.arguments import entry, tensors
from quantops.layout import dense_rows


def outputs(out, w, dtype):
    """``out`` as buffers that q may be written to."""
    tensors("out", out)
    if len(out) != len(w):
        raise ValueError(f"out: expected one tensor per weight ({len(w)}), got {len(out)}")
    for i, (o, t) in enumerate(zip(out, w)):
        name = entry("out", i, out)
        if o.requires_grad or (torch.is_grad_enabled() and t.requires_grad):
            raise ValueError(f"{name}: results written in place carry no gradient: expected an out that does not "
                             "require grad, and a w that does not, or torch.no_grad(); got one that requires grad")
        if o.shape != t.shape or o.device != t.device:
            raise ValueError(f"{name}: expected shape {tuple(t.shape)} on {t.device}, got {tuple(o.shape)} on "
                             f"{o.device}")
        if dtype is not None and o.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {o.dtype}")
        if o.stride() != t.stride() or not dense_rows(o):
            raise ValueError(f"{name}: expected a dense tensor with w's strides {t.stride()}, got {o.stride()}")
    if not torch.compiler.is_compiling():
        _no_overlap(out, w)
    return list(out)


def gradients(grad, w):
    """``grad`` as gradients of ``w`` that may be added to in place."""
    tensors("grad", grad, (w[0].dtype,))
    for i, (g, t) in enumerate(zip(grad, w)):
        if g.shape != t.shape or g.device != t.device or g.requires_grad or len(grad) != len(w):
            raise ValueError(f"grad[{i}]: expected a tensor of shape {tuple(t.shape)} on {t.device} that does not "
                             f"require grad, one for each of {len(w)} weights, got shape {tuple(g.shape)} on "
                             f"{g.device}, requires_grad={g.requires_grad}, {len(grad)} in all")


def _no_overlap(out, w):
    """No memory of ``out`` may be that of a weight or of another out: the launch reads and writes in no order."""
    spans = sorted((t.data_ptr(), t.data_ptr() + _reach(t), i) for i, t in enumerate([*out, *w]) if t.numel())
    last, owner = 0, -1
    for start, end, i in spans:
        if start < last and min(i, owner) < len(out):
            raise ValueError(f"{entry('out', min(i, owner), out)}: expected memory of its own, got some that a weight "
                             "or another out has too")
        if end > last:
            last, owner = end, i


def _reach(t):
    """Bytes from the first to the last element of a tensor that has any."""
    if t.is_contiguous():
        return t.numel() * t.element_size()
    return (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))) * t.element_size()
