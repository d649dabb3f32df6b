"""Quantizers of activations as JSON, and back into a model: unquantize_ leaves them, and their call is gone with it.

{"name": "act", "class": "UniformActivation", "settings": {"bits": 4, "scale": "step", "front": "relu", ...}}
"""

import torch

from quantops.activation import (
    INPUT,
    OUTPUT,
    UniformActivation,
    front_of,
    leave_fused_evaluation,
    quantize_inputs,
    quantize_outputs,
)
from quantops.calibration import activations
from quantops.categorical_activation import CategoricalActivation
from quantops.methods.multibn import replace

CLASSES = {c.__name__: c for c in (UniformActivation, CategoricalActivation)}


def described(model):
    """[{"name": in the model, "class": name, "settings": what the class takes}] of all of a model."""
    return [
        {"name": name, "class": kind, "settings": _settings(m)}
        for name, m in activations(model)
        if CLASSES.get(kind := type(m).__name__) is type(m)
    ]


def _settings(m):
    if isinstance(m, CategoricalActivation):
        return {"bits": m.highest.bit_length(), "grad": m.grad, "sigma": m.ratio}
    several = len(m.widths) > 1
    return {
        "bits": None if several else m.widths[0],
        "widths": list(m.widths) if several else None,
        "shared": not m.per_width,
        "channels": m.start.shape[1],
        "offset": m.offset is not None,
        **{name: getattr(m, name) for name in ("rule", "scale", "signed", "front", "keep", "percentile", "momentum")},
    }


def put_back(model, found):
    """Puts those of ``found``, a list as of :func:`described`, into a model that has none of their name: in front of a
    layer, behind one, or in the place of what each has in front. ValueError for what does not fit."""
    for entry in found:
        if not isinstance(entry, dict) or entry.keys() != {"name", "class", "settings"}:
            raise ValueError("config: expected activations of name, class and settings")
        name, kind = entry["name"], entry["class"]
        if not isinstance(name, str) or not isinstance(kind, str) or kind not in CLASSES:
            raise ValueError(
                f"config: expected the name of an activation and one of {', '.join(CLASSES)}, got {name!r}, {kind!r}"
            )
        if not isinstance(entry["settings"], dict):
            raise ValueError(f"config: {name}: expected a dict of settings, got {entry['settings']!r}")
        modules = dict(model.named_modules(remove_duplicate=False))
        if not isinstance(modules.get(name), tuple(CLASSES.values())):
            _put(model, modules, name, CLASSES[kind], entry["settings"])
    leave_fused_evaluation(model)


def _put(model, modules, name, kind, settings):
    def make(like, *_):
        try:
            return kind(**settings, device=like.device, dtype=like.dtype)
        except (RuntimeError, TypeError, ValueError) as error:  # of a damaged file: names that it has not, any values
            raise ValueError(f"config: {name}: {error}") from None

    path, _, last = name.rpartition(".")
    if last in (INPUT, OUTPUT) and path in modules:
        with torch.no_grad():
            if last == INPUT:
                quantize_inputs([(modules[path], True)], make)
            else:
                quantize_outputs([(path, modules[path])], make, next(model.parameters()))
        return
    front = "relu" if kind is CategoricalActivation else settings.get("front")
    old = modules.get(name)
    if old is None or front is None or front_of(old) != front:
        raise ValueError(
            f"model: {name}: expected a quantizer of activations or what one stands for, {front}, got "
            f"{'nothing' if old is None else type(old).__name__}"
        )
    replace(model, {old: make(next(model.parameters()))}.get)
