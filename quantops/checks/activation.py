"""Family ``activation``: one tensor at a time."""

import torch

from quantops.checks.arguments import FLOATS, choice, kind, names, tensors
from quantops.layout import dense_rows
from quantops.reference.activation import FRONTS, KEEPS, LEARNS
from quantops.reference.activation_front import SMOOTH
from quantops.reference.packing import data_shape
from quantops.reference.uniform import RULES, acc_dtype

BITS, RESIDUAL = KEEPS.index("bits"), KEEPS.index("residual")


def channel_values(name, value, x):
    """A positive scale, or an offset, as a contiguous tensor of the arithmetic dtype: one element, or one per channel.
    Numbers are made tensors; values in tensors are not read here."""
    dtype = acc_dtype(x.dtype)
    if not isinstance(value, torch.Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number or a tensor, got {kind(value)}")
        if not abs(value) <= torch.finfo(dtype).max:
            raise ValueError(f"{name}: expected a finite number of {dtype}, got {value}")
        value = torch.full((1,), value, dtype=dtype, device=x.device)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: expected one of {names(FLOATS)}, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected device {x.device}, where x is, got {value.device}")
    _check_count(name, value, x)
    return value.to(dtype).contiguous()


def _check_count(name, value, x):
    channels = x.shape[1] if x.dim() > 1 else 1
    if value.numel() not in (1, channels):
        raise ValueError(
            f"{name}: expected one element or one per channel ({channels}, dim 1) of x of shape "
            f"{tuple(x.shape)}, got shape {tuple(value.shape)}"
        )


def default_keep(front, learn):
    """What is kept where nobody says it."""
    return "input" if front in SMOOTH else "residual" if learn == "step" else "bits"


def choices(rule, signed, front, keep, learn, offset):
    """(rule, signed, front, keep, learn) as the ops take them."""
    found = (
        RULES.index(choice("rule", rule, RULES)),
        choice("signed", signed, (True, False)),
        FRONTS.index(choice("front", front, FRONTS)),
        KEEPS.index(choice("keep", keep, KEEPS)),
        LEARNS.index(choice("learn", learn, LEARNS)),
    )
    _fit(*found[1:], offset)
    return found


def _fit(signed, front, keep, learn, offset):
    if FRONTS[front] == "relu" and (signed or offset is not None):
        raise ValueError(
            "front: expected unsigned codes without an offset behind 'relu', got "
            + ("signed codes" if signed else "an offset")
        )
    if FRONTS[front] in SMOOTH and KEEPS[keep] != "input":
        raise ValueError(
            f"keep: expected 'input' with front={FRONTS[front]!r}, whose derivative is taken from x, got "
            f"{KEEPS[keep]!r}"
        )
    fitting = {"bits": (None, "clip"), "residual": (None, "step")}.get(KEEPS[keep], LEARNS)
    if LEARNS[learn] not in fitting:
        raise ValueError(
            f"keep: expected 'input' or {'residual' if KEEPS[keep] == 'bits' else 'bits'!r} for the "
            f"gradient of learn={LEARNS[learn]!r}, got {KEEPS[keep]!r}"
        )


def structure(arguments):
    """See quantops/checks/__init__.py."""
    backward = "grad" in arguments
    name = "grad" if backward else "x"
    (x,) = tensors(name, [arguments[name]])
    dtype, keep, offset = arguments["dtype"], arguments["keep"], arguments["offset"]
    if dtype not in FLOATS:
        raise ValueError(f"dtype: expected one of {names(FLOATS)}, got {dtype}")
    for option, allowed in (("rule", RULES), ("front", FRONTS), ("keep", KEEPS), ("learn", LEARNS)):
        if arguments[option] not in range(len(allowed)):
            raise ValueError(f"{option}: expected 0..{len(allowed) - 1}, got {arguments[option]}")
    _fit(arguments["signed"], arguments["front"], keep, arguments["learn"], offset)
    acc, scale = acc_dtype(dtype if backward else x.dtype), arguments["scale"]
    for option, t, expected in (
        ("scale", scale, acc),
        ("offset", offset, acc),
        ("bits", arguments["bits"], torch.int32),
    ):
        if t is not None and (t.dtype != expected or t.device != x.device or not t.is_contiguous()):
            raise ValueError(
                f"{option}: expected a contiguous tensor of {expected} on {x.device}, got {kind(t)}, "
                f"strides {t.stride()}, on {t.device}"
            )
    _check_count("scale", scale, x)
    if offset is not None and offset.numel() != scale.numel():
        raise ValueError(
            f"offset: expected as many elements as in scale ({scale.numel()}), got shape {tuple(offset.shape)}"
        )
    if arguments["bits"].numel() != 1:
        raise ValueError(f"bits: expected one element, got shape {tuple(arguments['bits'].shape)}")
    if backward:
        _kept(arguments, x)


def _kept(arguments, grad):
    """The part of :func:`structure` for what the forward pass has kept."""
    keep, kept, wants_q = arguments["keep"], arguments["kept"], arguments["learn"] and arguments["keep"] == BITS
    if not dense_rows(grad):
        raise ValueError(f"grad: expected a dense tensor, laid out as q was, got strides {grad.stride()}")
    for name, needed in (("x", KEEPS[keep] == "input"), ("q", wants_q)):
        t = arguments[name]
        if t is None and not needed:
            continue
        if t is None:
            raise ValueError(f"{name}: expected a tensor, got none")
        tensors(name, [t])
        if t.shape != grad.shape or t.device != grad.device:
            raise ValueError(
                f"{name}: expected shape {tuple(grad.shape)} on {grad.device}, got {tuple(t.shape)} on {t.device}"
            )
    shape = data_shape(grad.numel(), 1, "dense") if keep == BITS else (grad.numel() if keep == RESIDUAL else 0,)
    if kept.shape != shape or kept.dtype != torch.uint8 or kept.device != grad.device or not kept.is_contiguous():
        raise ValueError(
            f"kept: expected a contiguous uint8 tensor of shape {tuple(shape)} on {grad.device}, got "
            f"{kind(kept)} on {kept.device}"
        )
