"""What all exports start from: the evaluated network in plain torch, and its weights as integers."""

import importlib

import torch

from quantops.intweight import to_int
from quantops.methods.truncquant import plain_model


def need(module, extra="export"):
    """The module of an optional library; ImportError naming the extra where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"this export needs {error.name}: pip install 'quantops[{extra}]'") from error


@torch.no_grad()
def trained(model, bits=None):
    """(plain model without gradients, {parameter name: IntWeight}), at ``bits`` where the model has several widths.

    ValueError for a model in training mode, and as :func:`quantops.plain_model` and :func:`quantops.to_int`.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError("model: expected a model in evaluation mode, got one in training mode: call model.eval()")
    plain = plain_model(model, bits).requires_grad_(False)
    weights = {}
    for name, w in to_int(model).items():
        w = w if bits is None or w.fixed else w.at(bits)
        weights.update(dict.fromkeys((name, *w.shared), w))
    return plain, weights


def signed_bits(w):
    """The least bits of a two's complement integer that holds every level."""
    lowest, highest = w.level_range
    return 1 + max((-lowest - 1).bit_length() if lowest < 0 else 0, highest.bit_length())


def check_fits(target, name, w, most):
    """ValueError where the levels take more than ``most`` bits, saying which grid can."""
    if signed_bits(w) > most:
        raise ValueError(
            f"{name}: {target} has integers of at most {most} bits, which hold the dyadic grid of {most} "
            f"bits and other grids of {most - 1}; got the {w.grid} grid of {w.bits} bits"
        )
