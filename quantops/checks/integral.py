"""Integers: bit-widths and counts of LSBs, as numbers or tensors, and codes. Any integer dtype, one conversion."""

import functools

import torch

from quantops.checks.arguments import kind, listed
from quantops.reference.uniform import GRIDS, most_bits

INTS = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64)


def as_int32(t):
    """An integer tensor as the ops take it. What int32 does not hold becomes its end: 2^32 + 4 is no plausible 4."""
    if t.dtype == torch.int32:
        return t
    if t.element_size() < 4:
        return t.to(torch.int32)
    ends = torch.iinfo(torch.int32)
    # uint64 beyond int64 turns negative, which is out of range too.
    return t.to(torch.int64).clamp(ends.min, ends.max).to(torch.int32)


def integers(name, value, w, low, high):
    """``bits`` or ``k`` as an int32 tensor with one entry per weight, on the weights' device."""
    count, device = len(w), w[0].device
    if isinstance(value, torch.Tensor):
        if value.dtype not in INTS:
            raise TypeError(f"{name}: expected an integer or an integer tensor, got {kind(value)}")
        if value.numel() != count:
            raise ValueError(f"{name}: expected one entry per weight ({count}), got shape {tuple(value.shape)}")
        if value.device != device:
            raise ValueError(f"{name}: expected device {device}, where the weights are, got {value.device}")
        return as_int32(value)
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(values) not in (1, count):
        raise ValueError(f"{name}: expected one entry per weight ({count}), got {len(values)}")
    for v in values:
        if isinstance(v, bool) or not isinstance(v, (int, torch.SymInt)):
            raise TypeError(f"{name}: expected an integer or an integer tensor, got {kind(v)}")
        if not low <= v <= high:
            raise ValueError(f"{name}: expected {low}..{high}, got {v}")
    if len(values) == 1:
        return filled(values[0], count, torch.int32, device)
    return on_device(values, torch.int32, device)


def capturing(device):
    """Whether what is called now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on_device(values, dtype, device):
    """Numbers as a tensor on ``device``.

    A copy from the host would be a node of a CUDA graph that reads its temporary again at every replay, when other
    numbers lie there. So while one is captured, a kernel fills in each run of equal numbers instead.
    """
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=device)
    if not capturing(device):
        return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    made, first = torch.empty(len(values), dtype=dtype, device=device), 0
    for i in range(1, len(values) + 1):
        if i == len(values) or values[i] != values[first]:
            made[first:i].fill_(values[first])
            first = i
    return made


def repeated(value, w):
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * len(w) if len(values) == 1 else values


def bits(value, w, grid=0):
    """Bit-widths from 0, which means that the whole tensor is pruned, to the most on the grid of this index."""
    return integers("bits", value, w, 0, most_bits(GRIDS[grid]))


@functools.lru_cache(maxsize=1024)
def _constant(value, count, dtype, device):
    return torch.full((count,), value, dtype=dtype, device=device)


def may_keep(device):
    """Whether a tensor made now may serve later calls too.

    A tensor made while tracing, under a dispatch mode (fake tensors) or for inference alone must not be kept, nor one
    on a GPU, where it may belong to a graph that is being captured, or to another stream.
    """
    return not (
        device.type != "cpu"
        or torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or torch._C._len_torch_dispatch_stack()
    )


def filled(value, count, dtype, device):
    return (_constant if may_keep(device) else _constant.__wrapped__)(value, count, dtype, device)


def codes(value):
    """Integer codes as a list of int32 tensors."""
    return [as_int32(c) for c in listed("codes", value, INTS)]
