"""Where the quantized weights of a model are."""

from math import inf

import torch
from torch.nn.utils.parametrize import ParametrizationList


def check_module(model):
    """TypeError for what is not a module."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def owners(model):
    """[(layer path, parameter, ParametrizationList)] of all quantized weights, once each, as named_modules has them.

    Steps of training ask for them, which named_modules would take milliseconds for.
    """
    check_module(model)
    found = []
    _find_owners(model, "", set(), found)
    return found


def _find_owners(layer, path, seen, found):
    children = layer._modules
    if "parametrizations" in children and children["parametrizations"] not in seen:
        lists, own = children["parametrizations"], []
        seen.add(lists)
        for name, owner in lists._modules.items():
            if isinstance(owner, ParametrizationList) and hasattr(owner._modules["0"], "source") and owner not in seen:
                seen.add(owner)
                own.append((path, name, owner))
        found += sorted(own, key=lambda entry: getattr(entry[2]._modules["0"], "place", inf)) if len(own) > 1 else own
    for name, child in children.items():
        if child is not None and child not in seen:
            seen.add(child)
            if child._modules:
                _find_owners(child, f"{path}.{name}" if path else name, seen, found)
