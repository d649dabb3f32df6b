"""Integers: bit-widths and counts of LSBs, as numbers or tensors, and codes. Any integer dtype, one conversion."""

import functools

import torch

from quantops.checks.arguments import kind, tensors
from quantops.reference.uniform import MAX_BITS

INTS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


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
        # Clamped first: 2^32 + 4 must not become a plausible 4.
        return value if value.dtype == torch.int32 else value.clamp(low - 1, high + 1).to(torch.int32)
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
    made = torch.tensor(values, dtype=torch.int32, pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)


def repeated(value, w):
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * len(w) if len(values) == 1 else values


def bits(value, w):
    """Bit-widths 0..16; 0 means: the whole tensor is pruned."""
    return integers("bits", value, w, 0, MAX_BITS)


@functools.lru_cache(maxsize=1024)
def _constant(value, count, dtype, device):
    return torch.full((count,), value, dtype=dtype, device=device)


def may_keep(device):
    """Whether a tensor made now may serve later calls too.

    A tensor made while tracing, under a dispatch mode (fake tensors) or for inference alone must not be kept, nor one
    on a GPU, where it may belong to a graph that is being captured, or to another stream.
    """
    return not (device.type != "cpu" or torch.compiler.is_compiling() or torch.is_inference_mode_enabled()
                or torch._C._len_torch_dispatch_stack())


def filled(value, count, dtype, device):
    return (_constant if may_keep(device) else _constant.__wrapped__)(value, count, dtype, device)


def codes(value):
    """Integer codes as a list of int32 tensors."""
    value = tensors("codes", value, INTS)
    if value[0].dtype == torch.int32:
        return value
    # Clamped first: 2^32 + 3 must not become a plausible 3.
    return [c.to(torch.int32) if c.element_size() < 4 else c.clamp(-1, 1 << 16).to(torch.int32) for c in value]
