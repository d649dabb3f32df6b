"""Tensors that a call writes to: that they fit, and that nothing else lies in their memory."""

import torch

from quantops.checks.arguments import entry, listed
from quantops.layout import dense_rows


def outputs(out, w, others, dtype):
    """``out`` as buffers that q of ``w`` may be written to, where ``others`` are read too."""
    listed("out", out)
    if len(out) != len(w):
        raise ValueError(f"out: expected one tensor per weight ({len(w)}), got {len(out)}")
    for i, (o, t) in enumerate(zip(out, w)):
        name = entry("out", i, out)
        if o.requires_grad or (torch.is_grad_enabled() and t.requires_grad):
            raise ValueError(
                f"{name}: results written in place carry no gradient: expected an out that does not "
                "require grad, and a w that does not, or torch.no_grad(); got one that requires grad"
            )
        if o.shape != t.shape or o.device != t.device:
            raise ValueError(
                f"{name}: expected shape {tuple(t.shape)} on {t.device}, got {tuple(o.shape)} on {o.device}"
            )
        if dtype is not None and o.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {o.dtype}")
        if o.stride() != t.stride() or not dense_rows(o):
            raise ValueError(f"{name}: expected a dense tensor with w's strides {t.stride()}, got {o.stride()}")
    own_memory({"out": out}, [*w, *others])
    return list(out)


def gradients(grad, w):
    """``grad`` as gradients of ``w`` that may be added to in place."""
    listed("grad", grad, (w[0].dtype,))
    if len(grad) != len(w):
        raise ValueError(f"grad: expected one tensor per weight ({len(w)}), got {len(grad)}")
    for i, (g, t) in enumerate(zip(grad, w)):
        if g.shape != t.shape or g.device != t.device or g.requires_grad:
            raise ValueError(
                f"grad[{i}]: expected a tensor of shape {tuple(t.shape)} on {t.device} that does "
                f"not require grad, got shape {tuple(g.shape)} on {g.device}, "
                f"requires_grad={g.requires_grad}"
            )


def own_memory(written, read):
    """Raises where tensors that are written, {name: list}, lie in the memory of others of them, or of ``read``, a list:
    kernels read and write in no order. While a graph is traced there are no addresses: its ops look at them when they
    run."""
    named = [(entry(name, i, v), t) for name, v in written.items() for i, t in enumerate(v)]
    for name, t in named:
        if not t.is_contiguous() and any(step == 0 and n > 1 for n, step in zip(t.shape, t.stride())):
            raise ValueError(f"{name}: expected memory of its own for each element, got strides {t.stride()}")
    if torch.compiler.is_compiling():
        return
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + _reach(t), i) for i, t in enumerate([t for _, t in named] + read) if t.numel()
    )
    last, owner = 0, -1
    for start, end, i in spans:
        if start < last and min(i, owner) < len(named):
            raise ValueError(
                f"{named[min(i, owner)][0]}: expected memory of its own, got some that another argument has too"
            )
        if end > last:
            last, owner = end, i


def _reach(t):
    """Bytes from the first to the last element of a tensor that has any."""
    if t.is_contiguous():
        return t.numel() * t.element_size()
    return (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))) * t.element_size()
