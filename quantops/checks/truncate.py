"""Family ``truncate``: many widths, out scales, companding."""

import functools

import torch

from quantops.checks.arguments import choice, entry, kind, one_for_each, tensors
from quantops.checks.integral import integers, may_keep, repeated
from quantops.checks.scaling import ready_scales
from quantops.checks.scaling import scale as one_scale
from quantops.reference.truncate import COMPANDINGS
from quantops.reference.uniform import MAX_BITS, RULES, acc_dtype


def widths(bits_value, base_value, w):
    """Widths to truncate to, as an int32 tensor (widths, weights); the base widths; whether one width was asked for.

    An int or a tensor with an entry per weight is one width. A list or tuple of these, or a tensor (widths, weights),
    is several.
    """
    one, device = not isinstance(bits_value, (list, tuple)), w[0].device
    each = (bits_value,) if one else tuple(bits_value)
    if type(base_value) is int and all(type(n) is int for n in each) and may_keep(device):
        return *_constant_widths(each, base_value, len(w), device), one
    base = integers("base_bits", base_value, w, 1, MAX_BITS)
    if isinstance(bits_value, torch.Tensor) and bits_value.dim() > 1:
        if bits_value.dim() != 2 or bits_value.shape[1] != len(w) or not 1 <= bits_value.shape[0] <= MAX_BITS:
            raise ValueError(
                f"bits: expected shape (widths, weights) = (1..{MAX_BITS}, {len(w)}), got {tuple(bits_value.shape)}"
            )
        flat = integers("bits", bits_value.reshape(-1), w * bits_value.shape[0], 1, MAX_BITS)
        return flat.reshape(bits_value.shape), base, False
    if not 1 <= len(each) <= MAX_BITS:
        raise ValueError(f"bits: expected 1..{MAX_BITS} widths, got {len(each)}")
    most = MAX_BITS if isinstance(base_value, torch.Tensor) else min(repeated(base_value, w))
    numbers = [n for n in each if not isinstance(n, torch.Tensor)]
    for j, n in enumerate(numbers):
        if isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)):
            raise TypeError(f"bits: expected an integer or an integer tensor, or a sequence of these, got {kind(n)}")
        if not 1 <= n <= most:
            raise ValueError(f"bits: expected widths in 1..base_bits = {most}, got {n}")
        if n in numbers[:j]:
            raise ValueError(f"bits: expected distinct widths, got {n} twice")
    # On a GPU numbers become tensors by fills alone, which a CUDA graph may capture.
    return torch.stack([integers("bits", n, w, 1, MAX_BITS).reshape(-1) for n in each]), base, one


@functools.lru_cache(maxsize=1024)
def _constant_widths(bits_value, base_value, count, device):
    like = [torch.empty(0, device=device)] * count
    return widths(bits_value, [base_value], like)[:2]  # a list is not looked up here again


def out_scales(value, scale, w):
    """``scale`` and out_scale, or None, with as many elements each: where one has one per row, so has the other."""
    if value is None:
        return scale, None
    one_for_each("out_scale", value, w, "entry per weight")
    dtype, device = acc_dtype(w[0].dtype), w[0].device
    value = [one_scale(entry("out_scale", i, w), o, t, dtype, device) for i, (o, t) in enumerate(zip(value, w))]

    def spread(s, o):
        return s.reshape(()).expand(o.shape).contiguous() if s.numel() == 1 != o.numel() else s

    return [spread(s, o) for s, o in zip(scale, value)], [spread(o, s) for s, o in zip(scale, value)]


def tanh(companding):
    """True for companding with tanh, False for none."""
    return COMPANDINGS.index(choice("companding", companding, COMPANDINGS)) == 1


def structure(arguments):
    """See quantops/checks/__init__.py."""
    w = tensors("w", arguments["w"])
    scale, out_scale, bits, base, grads = (
        arguments.get(name) for name in ("scale", "out_scale", "bits", "base_bits", "grads")
    )
    ready_scales("scale", scale, w, acc_dtype(w[0].dtype))
    if not 0 <= arguments["rule"] < len(RULES):
        raise ValueError(f"rule: expected 0..{len(RULES) - 1}, got {arguments['rule']}")
    if out_scale:
        ready_scales("out_scale", out_scale, w, acc_dtype(w[0].dtype))
    if out_scale and [s.numel() for s in out_scale] != [s.numel() for s in scale]:
        raise ValueError("out_scale: expected as many elements as in scale")
    if bits.dim() != 2 or bits.shape[1] != len(w) or not 1 <= bits.shape[0] <= MAX_BITS:
        raise ValueError(f"bits: expected shape (1..{MAX_BITS} widths, {len(w)}), got {tuple(bits.shape)}")
    for name, t, count in (("bits", bits, bits.shape[0]), ("base_bits", base, 1)):
        if integers(name, t, w * count, 1, MAX_BITS) is not t:
            raise ValueError(f"{name}: expected int32, got {t.dtype}")
    if grads is None:
        return
    if len(tensors("grads", grads)) != bits.numel() or grads[0].device != w[0].device:
        raise ValueError(
            f"grads: expected {bits.numel()} tensors on {w[0].device}, one per width and weight, got "
            f"{len(grads)} on {grads[0].device}"
        )
    for i, g in enumerate(grads):
        if g.numel() and g.shape != w[i % len(w)].shape:
            raise ValueError(f"grads[{i}]: expected shape {tuple(w[i % len(w)].shape)}, got {tuple(g.shape)}")
