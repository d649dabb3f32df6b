"""Which parameters of a model are quantized and which stay in float."""

import warnings
from typing import NamedTuple

from torch.nn.parameter import is_lazy

from quantops.layers import adapters
from quantops.nn import quantized
from quantops.state import Settings

LEAST = 0.9  # part of the matrices that quantize_ says nothing about
NAMED = 6


class LeftFloat(NamedTuple):
    """A parameter that stays in float, in a :class:`quantops.report.BitReport`."""

    name: str
    shape: tuple
    numel: int
    why: str
    matrix: bool  # whether it is matrix-shaped: a weight that could be quantized


def left_in_float(model):
    """[LeftFloat] of a quantized model. Parameters of quantizers, such as steps that learn, are not in it."""
    owners = {id(owner): owner for _, owner, _ in quantized(model)}
    found, seen = [], {id(owner.original) for owner in owners.values()}
    of_adapters = adapters(model)
    for path, module in model.named_modules():
        if id(module) in owners or (isinstance(module, Settings) and not module.is_layer):
            continue
        for name, p in module.named_parameters(recurse=False):
            if id(p) not in seen and not is_lazy(p):
                seen.add(id(p))
                matrix = p.dim() > 1 and not isinstance(module, Settings) and module not in of_adapters
                kind = type(module).__name__
                why = f"{kind} was not chosen" if matrix else f"no matrix, of {kind}"
                why = "of an adapter" if module in of_adapters else why
                found.append(LeftFloat(f"{path}.{name}".removeprefix("."), tuple(p.shape), p.numel(), why, matrix))
    return found


def warn_of_the_rest(model):
    """A warning where less than 90 % of the weights in matrices are quantized, that names the largest of the others."""
    left = sorted((v for v in left_in_float(model) if v.matrix), key=lambda v: -v.numel)
    taken, rest = sum(owner.original.numel() for _, owner, _ in quantized(model)), sum(v.numel for v in left)
    if taken < LEAST * (taken + rest):
        names = ", ".join(f"{v.name} ({v.why})" for v in left[:NAMED])
        more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
        warnings.warn(
            f"quantize_: {taken / (taken + rest):.1%} of the weights in matrices are quantized, in float "
            f"stay {names}{more}; filter_fn chooses layers and parameters, quantops.bit_report(model) tells all",
            stacklevel=3,
        )
