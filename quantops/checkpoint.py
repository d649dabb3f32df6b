"""From a checkpoint to the quantized model that it is of, and from a quantized model to a state dict of the float one.

The state of every quantizer says how :func:`quantops.quantize_` made it: the method, the config, the settings of its
layer. They are JSON in ``<layer>.parametrizations.<parameter>.0._extra_state``, with a version.
"""

import glob
import json
import os
import re
from typing import Any

import torch

from quantops.config_json import config_from_dict, quantize_as
from quantops.convert import FUSE, quantize_
from quantops.methods.multibn import MultiBatchNorm
from quantops.modelfile import config_of, load_model
from quantops.nn import quantized
from quantops.owners import check_module, owners
from quantops.state import KEY, Settings, settings_in
from quantops.types import ModelT

FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_QUANTIZER = re.compile(r"(?:(.*)\.)?parametrizations\.([^.]+)\.0\." + KEY)
_FLOAT = re.compile(r"((?:.*\.)?)parametrizations\.([^.]+)\.original")


def prepare(model: ModelT, checkpoint: Any, *, fuse: str = FUSE[0], cache: bool = False) -> ModelT:
    """Makes a float model the quantized one that a checkpoint is of, in place, and returns it.

        model = AutoModelForCausalLM.from_pretrained(folder)      # or any way to make the float model
        quantops.prepare(model, folder)

    It is quantized as the model that was saved (method, config, the settings of each layer), and all of the checkpoint
    is loaded: weights, bits, batch norms, activations.

    checkpoint: a state dict; a file of one, by torch.save or safetensors; one of :func:`quantops.save_model`, whose
        float weights :func:`quantops.load_model` finds; or a folder of ``save_pretrained`` or of a
        Trainer's checkpoint. Of parameters that are tied it may hold one.
    fuse, cache: of the config; they say how and not what is computed, and are not in checkpoints.

    Raises FileNotFoundError where there is no file, ValueError for one that is damaged, says nothing of quantizers or
    does not fit the model (see :func:`quantops.quantize_`), and RuntimeError for missing and unexpected keys.
    """
    check_module(model)
    if quantized(model):
        raise ValueError("model: expected a float model, got one that quantops.quantize_ changed")
    if isinstance(checkpoint, (str, os.PathLike)) and os.path.isfile(checkpoint):
        text = config_of(checkpoint)
        if text is not None:
            return load_model(checkpoint, quantize_as(model, text, fuse=fuse, cache=cache))
    state = {_FLOAT.sub(r"\1\2", key): value for key, value in _state_of(checkpoint).items()}
    found, names = _recipes(state, fuse=fuse, cache=cache)
    kept = tuple(names)
    quantizers = {key: value for key, value in state.items() if key.startswith(kept)}
    state = _float_state(model, {key: value for key, value in state.items() if key not in quantizers})
    for key, value in quantizers.items():
        old = next(prefix for prefix in kept if key.startswith(prefix))
        state[names[old] + key.removeprefix(old)] = value
    for config, patterns in found:
        quantize_(model, config, patterns)
    own = {_FLOAT.sub(r"\1\2", key): value for key, value in model.state_dict(keep_vars=True).items()}
    held = {_memory(own[key]): key for key in own if key in state and isinstance(own[key], torch.Tensor)}
    for key in own.keys() - state.keys():  # of tied parameters a checkpoint may have one alone
        twin = held.get(_memory(own[key])) if isinstance(own[key], torch.Tensor) else None
        if twin is not None:
            state[key] = state[twin]
    model.load_state_dict(state)
    return model


def _float_state(model, state):
    """What ``state`` has of the float model; in the names, and with the experts put together, that models of
    transformers have in memory."""
    if not hasattr(model, "tie_weights") or not hasattr(model, "from_pretrained"):
        return state
    if state.keys() <= model.state_dict().keys():
        return state
    dtype = next(model.parameters()).dtype
    loaded, info = type(model).from_pretrained(
        None, config=model.config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    if wrong:
        raise RuntimeError(f"checkpoint: missing or unexpected keys for {type(model).__name__}: {sorted(wrong)[:8]}")
    return loaded.state_dict()


def float_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the float network: ``layer.weight`` is the float weight, and of quantizers there is nothing. A
    plain model loads it. The other way, ``load_state_dict`` of a quantized model takes it with ``strict=False``, and
    keeps its bits.

    Raises ValueError for a model with a batch norm per width, which no float network has.
    """
    check_module(model)
    for name, module in model.named_modules():
        if isinstance(module, MultiBatchNorm):
            raise ValueError(f"{name}: a float network has no batch norm for each width; see quantops.plain_model")
    own = [f"{path}.parametrizations.{name}.0.".removeprefix(".") for path, name, _ in owners(model)]
    own += [f"{name}." for name, module in model.named_modules() if isinstance(module, Settings)]
    state = model.state_dict()
    return {_FLOAT.sub(r"\1\2", key): value for key, value in state.items() if not key.startswith(tuple(own))}


def _memory(t):
    return t.data_ptr(), t.shape, t.dtype, t.stride(), t.numel() or id(t)


def _state_of(checkpoint):
    if isinstance(checkpoint, dict):
        return checkpoint
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise TypeError(f"checkpoint: expected a state dict or a path, got {type(checkpoint).__name__}")
    path = os.fspath(checkpoint)
    if os.path.isdir(path):
        found = [os.path.join(path, name) for name in FILES if os.path.isfile(os.path.join(path, name))]
        if not found:
            raise FileNotFoundError(f"{path}: none of {', '.join(FILES)}")
        path = found[0]
    if not path.endswith(".index.json"):
        return _read(path)
    try:
        with open(path) as file:
            parts = sorted(set(json.load(file)["weight_map"].values()))
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path}: expected JSON with a weight_map, a file for each name: {e}") from e
    state = {}
    for part in parts:
        state.update(_read(os.path.join(os.path.dirname(path), part)))
    return state


def _read(path):
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (ImportError, OSError):
        raise
    except Exception as e:  # torch and safetensors raise errors of many kinds
        raise ValueError(f"{path}: not a whole checkpoint: {e}") from e
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a state dict, got {type(state).__name__}")
    return state


def _recipes(state, **how):
    """([(config, patterns of names)] of the quantizers of a state dict, {prefix of their keys there: the one that they
    have in the model}). transformers renames layers when it saves: what a quantizer says of itself then counts."""
    found, prefixes = {}, {}
    for key, value in state.items():
        match = _QUANTIZER.fullmatch(key)
        if match:
            settings = settings_in(value)
            if not isinstance(settings, dict) or "recipe" not in settings:
                raise ValueError(
                    f"{key}: expected what a quantizer of this version was made from, got {settings!r}; quantize the "
                    "model as it was then, and call its load_state_dict"
                )
            recipe = settings["recipe"]
            name = ".".join(part for part in match.groups() if part)
            if not f".{name}".endswith(f".{recipe['name']}"):
                name = recipe["name"]
            path, _, parameter = name.rpartition(".")
            prefixes[key.removesuffix(KEY)] = f"{path}.parametrizations.{parameter}.0.".removeprefix(".")
            kind = json.dumps(recipe["config"], sort_keys=True)
            layers = found.setdefault(kind, (recipe["config"], {}))[1]
            layers[name] = recipe["settings"]
            layers.update({name.removesuffix(recipe["name"]) + other: {} for other in recipe.get("shared", ())})
    if not found:
        raise ValueError("checkpoint: expected a state of a model that quantops.quantize_ changed, found no quantizer")
    made = []
    for fields, layers in found.values():
        names = [glob.escape(name) for name in layers]
        overrides = {glob.escape(name): settings for name, settings in layers.items() if settings}
        made.append((config_from_dict({**fields, "overrides": overrides, **how}), names))
    return made, prefixes
