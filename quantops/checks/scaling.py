"""Scales: one positive number per weight, or one per row."""

import torch

from quantops.checks.arguments import FLOATS, alike, entry, kind, names, one_for_each, ops_check
from quantops.reference.uniform import acc_dtype


def scales(value, w, dtype=None, name="scale"):
    """One contiguous scale tensor per weight, of the arithmetic dtype: one element, or one per row."""
    dtype, device = dtype or acc_dtype(w[0].dtype), w[0].device
    one_for_each(name, value, w, "entry per weight")
    if alike(value, (dtype,)) and all(map(torch.Tensor.is_contiguous, value)) and ops_check(w[0]):
        return list(value)  # the op checks the rest
    return [scale(entry(name, i, w), s, t, dtype, device) for i, (s, t) in enumerate(zip(value, w))]


def scale(name, s, t, dtype, device):
    if not isinstance(s, torch.Tensor):
        if isinstance(s, bool) or not isinstance(s, (int, float)):
            raise TypeError(f"{name}: expected a number or a tensor, got {kind(s)}")
        if not 0 <= s <= torch.finfo(dtype).max:
            raise ValueError(f"{name}: expected a finite value >= 0 of {dtype}, got {s}")
        return torch.full((), s, dtype=dtype, device=device)
    if s.dtype not in FLOATS:
        raise TypeError(f"{name}: expected one of {names(FLOATS)}, got {s.dtype}")
    if s.device != device:
        raise ValueError(f"{name}: expected device {device}, where the weights are, got {s.device}")
    rows = t.shape[0] if len(t.shape) else 1
    if s.numel() != 1 and (s.numel() != rows or s.shape[0] != rows):
        raise ValueError(
            f"{name}: expected one element or one per row ({rows}) of a weight of shape "
            f"{tuple(t.shape)}, got shape {tuple(s.shape)}"
        )
    if s.dtype != dtype:
        s = s.to(dtype)
    return s if s.is_contiguous() else s.contiguous()


def ready_scales(name, given, w, dtype):
    """Raises where ``given`` are not scales that :func:`scales` would take as they are."""
    one_for_each(name, given, w, "entry per weight")
    for i, (value, t) in enumerate(zip(given, w)):
        fit = scale(entry(name, i, w), value, t, dtype, t.device)
        if value is not fit:
            raise ValueError(
                f"{name}: expected contiguous {fit.dtype} tensors, got {value.dtype}, strides {value.stride()}"
            )
