"""Family ``categorical_activation``: one tensor at a time."""

import torch

from quantops.checks.arguments import FLOATS, kind, names, tensors
from quantops.layout import dense_rows
from quantops.reference.categorical import GRADS
from quantops.reference.categorical_activation import QUARTER_BITS
from quantops.reference.packing import data_shape
from quantops.reference.uniform import acc_dtype


def structure(arguments):
    """See quantops/checks/__init__.py."""
    backward = "q" in arguments
    (x,) = tensors("q" if backward else "x", [arguments["q" if backward else "x"]])
    dtype, quarters = arguments["dtype"], arguments.get("quarters")
    if dtype not in FLOATS:
        raise ValueError(f"dtype: expected one of {names(FLOATS)}, got {dtype}")
    if arguments["grad_of"] not in range(len(GRADS)):
        raise ValueError(f"grad_of: expected 0 or 1, got {arguments['grad_of']}")
    acc = acc_dtype(dtype if backward else x.dtype)
    for name, expected in (("alpha", acc), ("sigma", acc), ("bits", torch.int32)):
        t = arguments[name]
        if t.dtype != expected or t.numel() != 1 or t.device != x.device:
            raise ValueError(f"{name}: expected one element of {expected} on {x.device}, got {kind(t)} on {t.device}")
    if not backward:
        return
    (grad,) = tensors("grad", [arguments["grad"]])
    if grad.shape != x.shape or grad.device != x.device:
        raise ValueError(
            f"grad: expected shape {tuple(x.shape)} on {x.device}, got {tuple(grad.shape)} on {grad.device}"
        )
    if not dense_rows(x):
        raise ValueError(f"q: expected a dense tensor, as the forward pass gives it, got strides {x.stride()}")
    expected = data_shape(x.numel(), QUARTER_BITS, "dense")
    if (
        quarters.shape != expected
        or quarters.dtype != torch.uint8
        or quarters.device != x.device
        or not quarters.is_contiguous()
    ):
        raise ValueError(
            f"quarters: expected a contiguous uint8 tensor of shape {expected} on {x.device}, got "
            f"{kind(quarters)} on {quarters.device}"
        )
