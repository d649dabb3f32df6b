"""One file for a whole quantized model: its integers, everything else that it has, and how it was quantized."""

import copy
import json

import torch

from quantops import config_json
from quantops.convert import remove_quantizers
from quantops.intfile import (
    check_bits,
    crc32,
    fill,
    metadata_of,
    opened,
    parsed,
    parts_of,
    shown,
    slice_of,
    targets_of,
    weights_of,
    write,
)
from quantops.intweight import to_int
from quantops.inverse import float_weight
from quantops.methods.multibn import MultiBatchNorm, replace
from quantops.methods.truncquant import TruncQuantWeight, network_of, set_bits
from quantops.nn import parameter_name, quantized
from quantops.owners import check_module
from quantops.recorded import check_recorded
from quantops.state import Settings
from quantops.types import ModelT, Path
from quantops.version import __version__

FORMAT, VERSION = "quantops-model", 1
STATE = "state/"  # before the name, in the state dict, of what is no integer weight


def save_model(model: torch.nn.Module, path: Path, *, floats: bool = False) -> None:
    """Writes a model that :func:`quantops.quantize_` changed to one safetensors file, from which it comes back whole.

    Tensors: those of :func:`quantops.save_int` for the quantized weights, and, named ``state/<name in the state
    dict>``, all others: biases, norms (of every width), the scales and settings of activations, bits, alpha and sigma,
    other parameters and buffers. Metadata: the configs of the ``quantize_`` calls and the layers that they chose, the
    quantizers of activations, those included that :func:`quantops.unquantize_` left, the version of quantops, and a
    checksum of every tensor.

    floats: the float weights too, at 4 bytes each (2 for bfloat16 and float16), so that training goes on from the file
        exactly where it was. Models of bfloat16, float16 and float64 with scales that are means need them, see
        :func:`load_model`.

    The file appears whole or not at all, as that of ``save_int``. Needs safetensors (``pip install 'quantops[io]'``).
    Raises ValueError as :func:`quantops.to_int` does, for a model that has changed since ``quantize_`` or of which a
    slice was given to that, naming what no call explains, for a config that is not quantops' own, and for extra state
    of other modules that is no tensor; OSError where the file cannot be written.
    """
    check_module(model)
    model = getattr(model, "_orig_mod", model)
    check_recorded(model)
    weights = to_int(model)
    text = config_json.to_json(model)
    tensors, about = parts_of(weights)
    checksums = {}
    left_out = () if floats else _float_weights(model)
    for name, t in model.state_dict().items():
        if name in left_out:
            continue
        if not isinstance(t, torch.Tensor) or t.is_meta:
            raise ValueError(f"{name}: expected a tensor with values in the state dict, got {type(t).__name__}")
        tensors[STATE + name] = t.detach().cpu().contiguous().clone()
        checksums[name] = crc32(tensors[STATE + name])
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "quantops": __version__,
        "config": text,
        "weights": json.dumps(about),
        "state": json.dumps(checksums),
    }
    write(path, tensors, metadata)


def load_model(path: Path, model: ModelT, bits: int | None = None) -> ModelT:
    """Fills a model, in place, from a file of :func:`save_model`, and returns it.

    model: either the plain network, not quantized: it becomes what :func:`quantops.plain_model` gives, with the values
        of the integers in plain Parameters, the activations' quantizers, and the norms of its width; or one that was
        quantized by the same settings, which then is what was saved, bit for bit, and can be trained on.
    bits: the width to open it at; None: all that was saved. A plain model opens at any width (see
        :func:`quantops.load_int`), but for norms or activations of each width, which the model must have been trained
        for; a quantized one, of TruncQuant alone, at one of its widths.

    A quantized model takes its float weights from the file where it has them (``floats=True``). Where it has not, they
    are some of which its quantizer makes the very integers, see quantops/inverse.py; should none be found, a ValueError
    says so. That can happen where scales are means, or multiples of them, as they are by default but with CPQConfig:
    seldom with float32 weights, more often with float64, and next to always with bfloat16 and float16, since no weights
    of so few digits have the very mean. Save such models with ``floats=True`` to load them into quantized ones, or load
    the file into a plain model, which always works.

    Raises ValueError naming ``path`` and what is wrong for a file that is truncated, corrupt or of another format, for
    a model that does not fit, and for ``bits`` that it has not; the model is then as it was. FileNotFoundError where
    there is no file.
    """
    check_module(model)
    check_bits(bits)
    given, model = model, getattr(model, "_orig_mod", model)
    with opened(path) as f:
        metadata = metadata_of(f, FORMAT, VERSION)
        text = metadata.get("config", "")
        config_json.parsed(text)
        whole = bool(quantized(model))
        weights = weights_of(f, metadata, None if whole else bits)
        state = _state_of(f, metadata)
        keys = {f"{n}.{part}" for n in weights for part in ("planes", "scale")} | {STATE + n for n in state}
        if keys != set(f.keys()):
            raise ValueError(f"tensors and metadata differ in {sorted(keys ^ set(f.keys()))[:4]}")
        if whole:
            _check_width(model, bits)
            state = _with_floats(model, weights, state)
            _check_state(model, state)
        else:
            _fill_plain(copy.deepcopy(model), weights, state, text, bits)  # what does not fit raises here
    if whole:
        model.load_state_dict(state)
        if bits is not None:
            set_bits(model, bits)
    else:
        _fill_plain(model, weights, state, text, bits)
    return given


def describe(f):
    """What an open file holds besides its integer weights, as lines of text."""
    metadata = metadata_of(f, FORMAT, VERSION)
    sizes = {name: slice_of(f, STATE + name) for name in parsed(metadata, "state")}
    lines = []
    for name, t in sizes.items():
        if not name.endswith("_extra_state"):
            lines.append(f"{name}  {'x'.join(map(str, t.get_shape())) or 'one'}  {t.get_dtype()}")
    for module, config, chosen in config_json.parsed(metadata.get("config", "")):
        lines.append(f"{module or 'model'}, {len(chosen)} layers chosen: {config}")
    return [*lines, f"format {FORMAT} {VERSION}, written by quantops {metadata.get('quantops')}"]


def config_of(path):
    """The JSON text of how the model in a file of :func:`save_model` was quantized; None for files of other kinds."""
    try:
        with opened(path) as f:
            metadata = f.metadata() or {}
    except (ImportError, ValueError):
        return None
    return metadata.get("config", "") if metadata.get("format") == FORMAT else None


def _float_weights(model):
    """{name in the state dict: name of the integer weight} of the float weights of a quantized model."""
    known = {id(owner.original): parameter_name(name, p) for name, owner, p in quantized(model)}
    state = model.state_dict(keep_vars=True)  # the very tensors, whatever the model calls them
    return {key: known[id(t)] for key, t in state.items() if id(t) in known}


def _state_of(f, metadata):
    """{name: tensor} of what is no integer weight, whose checksums are right."""
    state = {}
    for name, told in parsed(metadata, "state").items():
        slice_of(f, STATE + name)
        state[name] = f.get_tensor(STATE + name).clone()
        if type(told) is not int or crc32(state[name]) != told:
            raise ValueError(f"{name}: the checksum does not match {shown(told)}, the file is damaged")
    return state


def _check_width(model, bits):
    if bits is None:
        return
    if not any(isinstance(p, TruncQuantWeight) for _, _, p in quantized(model)):
        raise ValueError(
            f"bits: expected None, since the weights of a quantized model are not truncated to widths "
            f"(TruncQuantConfig), got {bits}; a plain model opens at any"
        )
    network_of(model).place(bits)


def _check_state(model, state):
    """ValueError where ``model.load_state_dict(state)`` would fail."""
    own = model.state_dict()
    if differ := sorted(own.keys() ^ state.keys()):
        raise ValueError(f"model: the file and the model differ in {', '.join(differ[:4])}")
    for name, t in state.items():
        if isinstance(own[name], torch.Tensor) and own[name].shape != t.shape and not name.endswith("_extra_state"):
            raise ValueError(f"{name}: the file has shape {tuple(t.shape)}, the model {tuple(own[name].shape)}")
        if isinstance(own[name], torch.Tensor) and own[name].is_meta:
            raise ValueError(f"{name}: expected a tensor with memory, got one on the meta device")
    for name, m in model.named_modules():
        if isinstance(m, Settings):
            wrong = m.refusal(state, f"{name}." if name else "")
            if wrong:
                raise ValueError(f"{name}: {wrong}")


def _with_floats(model, weights, state):
    """``state`` with a float weight for each quantized one."""
    missing = {key: name for key, name in _float_weights(model).items() if key not in state}
    of_each = {parameter_name(name, p): (owner, p) for name, owner, p in quantized(model)}
    if differ := sorted(of_each.keys() ^ weights.keys()):
        raise ValueError(f"model: the file and the model differ in {', '.join(differ[:4])}")
    for name, (owner, _) in of_each.items():
        if owner.original.is_meta:
            raise ValueError(f"{name}: expected a weight with memory, got one on the meta device")
    made = {name: _float_weight(name, *of_each[name], weights[name], state, model) for name in set(missing.values())}
    return state | {key: made[name] for key, name in missing.items()}


def _float_weight(name, owner, quantizer, v, state, model):
    """A float weight of which a quantizer, in the state that it has in ``state``, makes the integers ``v``."""
    if owner.original.shape != v.shape:
        raise ValueError(f"{name}: the file has shape {tuple(v.shape)}, the model {tuple(owner.original.shape)}")
    prefix = next(f"{path}." for path, module in model.named_modules() if module is quantizer)
    own = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
    if wrong := quantizer.refusal(own, ""):
        raise ValueError(f"{name}: {wrong}")
    trial = copy.deepcopy(quantizer, {id(quantizer.group): None})
    trial.load_state_dict(own)
    w = float_weight(trial, v, owner.original.device)
    if w is None:
        raise ValueError(
            f"{name}: no float weights are known of which its quantizer makes these integers; expected a plain model, "
            "or a file of save_model(floats=True)"
        )
    return w


def _fill_plain(model, weights, state, text, bits):
    """Makes a plain model what quantops.plain_model gives of the one that was saved."""
    fill(targets_of(model, weights), {name: v.dequantize() for name, v in weights.items()})
    known = set(model.modules())
    config_json.quantize_as(model, text)
    full = model.state_dict()
    state = state | {key: full[key] for key in _float_weights(model)}
    _check_state(model, state)
    model.load_state_dict(state)
    if any(isinstance(p, TruncQuantWeight) for _, _, p in quantized(model)):
        net = network_of(model)
        place = net.place(bits) if bits is None or net.norms or net.acts else 0
        net.select(place)
        remove_quantizers(model, leave_quantized=False)
        replace(model, lambda m: m.plain(place) if isinstance(m, MultiBatchNorm) else None)
    else:
        remove_quantizers(model, leave_quantized=False)
    for m in set(model.modules()) - known:
        m.training = model.training
