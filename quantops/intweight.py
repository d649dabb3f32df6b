"""Integer weights: what training ends with, and the file they are kept in."""

import dataclasses
import json
import os
import uuid
import zlib

import torch

from quantops import checks, foreach
from quantops.nn import quantized
from quantops.reference.uniform import GRIDS, MAX_BITS

FORMAT, VERSION = "quantops-int", 1
_DTYPES = {str(d).removeprefix("torch."): d for d in checks.FLOATS}


@dataclasses.dataclass(frozen=True, eq=False)
class IntWeight:
    """One weight as integer codes: q = m * step, the equations are in :mod:`quantops.functional`.

    codes: uint8 up to 8 bits, int32 above, in the weight's shape. scale: 0-dim or (rows,). dtype: of the trained weight
    and of :meth:`dequantize`.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    bits: int
    grid: str = GRIDS[0]
    signed: bool = True
    dtype: torch.dtype = torch.float32

    def dequantize(self):
        """The weights as the training forward had them, bit for bit."""
        return foreach.decode([self.codes], [self.scale], self.bits, grid=self.grid, signed=self.signed,
                              out_dtype=self.dtype)[0]


def code_dtype(bits):
    """The smallest dtype that holds codes of ``bits`` bits and that every device computes with."""
    return torch.uint8 if bits <= 8 else torch.int32


@torch.no_grad()
def to_int(model):
    """Integer weights of a model that :func:`quantops.quantize_` changed: {parameter name: IntWeight}.

    Names are those of the plain model's state dict ("conv1.weight"), tensors stay on their devices, and each
    ``dequantize()`` equals the training forward bit for bit (without autocast). Biases and layers that are not
    quantized are not in it.

    Raises ValueError for a model without quantized weights and for weights with NaN or inf, naming the layer.
    """
    layers = quantized(model)
    if not layers:
        raise ValueError(f"model: expected weights quantized by quantops.quantize_, {type(model).__name__} has none")
    weights = {}
    for name, owner, quantizer in layers:
        if not bool(torch.isfinite(owner.original).all()):
            raise ValueError(f"{name or 'model'}: the weight has NaN or inf values, which no code stands for")
        weights[f"{name}.weight".removeprefix(".")] = quantizer.to_int(owner.original)
    return weights


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as e:
        raise ImportError("save_int and load_int need safetensors: pip install 'quantops[io]'") from e
    return safetensors


def save_int(weights, path):
    """Writes integer weights to a safetensors file: tensors ``<name>.codes``, ``<name>.scale``, the rest as metadata.

    ``weights``: what :func:`to_int` returns, or a model for it. The file appears whole or not at all: it is written
    beside ``path`` under another name and then renamed. Needs safetensors (``pip install 'quantops[io]'``).

    Raises TypeError or ValueError for anything else, naming it, and OSError where the file cannot be written.
    """
    safetensors = _safetensors()
    if isinstance(weights, torch.nn.Module):
        weights = to_int(weights)
    if not isinstance(weights, dict) or not weights:
        raise TypeError(f"weights: expected a model or a non-empty dict of IntWeight, got {type(weights).__name__}")
    tensors, about = {}, {}
    for name, v in weights.items():
        if not isinstance(name, str) or not isinstance(v, IntWeight):
            raise TypeError(f"weights[{name!r}]: expected an IntWeight under a string, got {type(v).__name__}")
        # Copies of their own: safetensors refuses tensors that share memory.
        tensors[f"{name}.codes"] = v.codes.detach().cpu().contiguous().clone()
        tensors[f"{name}.scale"] = v.scale.detach().cpu().contiguous().clone()
        about[name] = {"bits": v.bits, "grid": v.grid, "signed": v.signed,
                       "dtype": str(v.dtype).removeprefix("torch."), "shape": list(v.codes.shape), "crc32": _crc32(v)}
        _check(name, v, about[name])
    metadata = {"format": FORMAT, "version": str(VERSION), "weights": json.dumps(about)}
    path = os.fspath(path)
    beside = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        safetensors.torch.save_file(tensors, beside, metadata)
        os.replace(beside, path)
    except safetensors.SafetensorError as e:
        raise OSError(f"{path}: {e}") from e
    finally:
        if os.path.exists(beside):
            os.unlink(beside)


def load_int(path, model=None):
    """Reads a file of :func:`save_int`: {parameter name: IntWeight}, on the CPU.

    With ``model``, a plain model that is not quantized, every weight in the file is also copied, dequantized, into the
    parameter of its name. All names and shapes are compared first; what the file does not have (biases, norms) is left
    as it is.

    Raises ValueError naming ``path`` and what is wrong for a file that is truncated, corrupt or not of this format and
    for a model that does not fit; the model is then untouched. FileNotFoundError where there is no file.
    """
    safetensors = _safetensors()
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            tensors = {key: f.get_tensor(key) for key in f.keys()}
    except Exception as e:  # safetensors raises errors of several kinds
        raise ValueError(f"{path}: not a whole safetensors file: {e}") from e
    try:
        weights = _parse(metadata, tensors)
        if model is not None:
            targets = _targets(model, weights)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    if model is not None:
        values = {name: v.dequantize() for name, v in weights.items()}
        with torch.no_grad():
            for name, value in values.items():
                targets[name].copy_(value)
    return weights


def _parse(metadata, tensors):
    if metadata.get("format") != FORMAT:
        raise ValueError(f"expected the format {FORMAT!r} of quantops.save_int, got {metadata.get('format')!r}")
    if metadata.get("version") != str(VERSION):
        raise ValueError(f"expected version {VERSION} of the format, got {metadata.get('version')!r}")
    try:
        about = json.loads(metadata.get("weights", ""))
    except json.JSONDecodeError as e:
        raise ValueError(f"metadata is not JSON: {e}") from e
    if not isinstance(about, dict) or not about:
        raise ValueError("metadata lists no weights")
    expected = {f"{name}.{part}" for name in about for part in ("codes", "scale")}
    if expected != set(tensors):
        raise ValueError(f"tensors and metadata differ in {sorted(expected ^ set(tensors))[:4]}")
    weights = {}
    for name, entry in about.items():
        try:
            v = IntWeight(tensors[f"{name}.codes"], tensors[f"{name}.scale"], entry["bits"], entry["grid"],
                          entry["signed"], _DTYPES[entry["dtype"]])
        except (KeyError, TypeError) as e:
            raise ValueError(f"{name}: bad metadata {entry!r}") from e
        _check(name, v, entry)
        if entry.get("crc32") != _crc32(v):
            raise ValueError(f"{name}: the checksum does not match, the file is damaged")
        weights[name] = v
    return weights


def _crc32(v):
    """Checksum of codes and scale, little-endian as safetensors has them."""
    value = 0
    for t in (v.codes, v.scale):
        value = zlib.crc32(t.detach().cpu().contiguous().numpy().tobytes(), value)
    return value


def _check(name, v, entry):
    """Raises ValueError where an IntWeight contradicts itself."""
    rows = v.codes.shape[0] if v.codes.dim() else 1
    acc = torch.float64 if v.dtype == torch.float64 else torch.float32
    for wrong, text in (
        (type(v.bits) is not int or not 0 <= v.bits <= MAX_BITS, f"expected bits 0..{MAX_BITS}, got {v.bits!r}"),
        (v.grid not in GRIDS, f"expected a grid of {GRIDS}, got {v.grid!r}"),
        (type(v.signed) is not bool, f"expected signed true or false, got {v.signed!r}"),
        (v.dtype not in checks.FLOATS, f"expected a dtype of {list(_DTYPES)}, got {v.dtype}"),
        (list(v.codes.shape) != entry["shape"], f"codes have shape {list(v.codes.shape)}, metadata says "
                                                f"{entry['shape']}"),
        (type(v.bits) is int and v.codes.dtype != code_dtype(v.bits), f"codes of {v.bits} bits are {v.codes.dtype}"),
        (v.scale.dtype != acc, f"expected a scale of {acc}, got {v.scale.dtype}"),
        (v.scale.shape not in ((), (1,), (rows,)), f"expected one scale or one per row ({rows}), got shape "
                                                   f"{tuple(v.scale.shape)}"),
    ):
        if wrong:
            raise ValueError(f"{name}: {text}")
    if not bool(((v.scale >= 0) & (v.scale < torch.inf)).all()):
        raise ValueError(f"{name}: expected finite scales >= 0")
    if v.codes.numel() and not 0 <= int(v.codes.min()) <= int(v.codes.max()) < 2 ** v.bits:
        raise ValueError(f"{name}: expected codes 0..{2 ** v.bits - 1}, got {int(v.codes.min())}.."
                         f"{int(v.codes.max())}")


def _targets(model, weights):
    params = dict(model.named_parameters(remove_duplicate=False))
    if quantized(model):
        raise ValueError("model: expected a plain model, got one that quantops.quantize_ changed")
    for name, v in weights.items():
        if name not in params:
            raise ValueError(f"{name}: the model has no parameter of this name")
        if params[name].shape != v.codes.shape:
            raise ValueError(f"{name}: the file has shape {tuple(v.codes.shape)}, the model "
                             f"{tuple(params[name].shape)}")
    return params
