"""Integer weights: what training ends with, and the file they are kept in."""

import dataclasses
import json
import math
import os
import uuid
import zlib

import torch

from quantops import checks, foreach
from quantops.nn import check_only, quantized
from quantops.packed import Packed
from quantops.reference.packing import plane_bytes
from quantops.reference.uniform import GRIDS, MAX_BITS

FORMAT, VERSION = "quantops-int", 2
_DTYPES = {str(d).removeprefix("torch."): d for d in checks.FLOATS}


@dataclasses.dataclass(frozen=True, eq=False)
class IntWeight:
    """One weight as n-bit codes in bit planes, which can be read at any lower precision: q = m * step.

    packed: the codes, a :class:`quantops.Packed` of planes. scale: 0-dim or (rows,), what the step is made of; the
    equations are in :mod:`quantops.functional`. dtype: of the trained weight and of :meth:`dequantize`. fixed: a layer
    that keeps its bits where the others of its network have fewer, as :func:`load_int` knows.

    At m < n bits the codes are c >> (n-m) and the step is that of m bits. On the full grid and with floor codes
    (TruncQuant, arXiv 2506.11431) that is the weight that was trained at m bits, ``quantops.truncate``, bit for bit. On
    the dyadic grid (MSQ, arXiv 2507.22349) it rounds down to a multiple of 2^(n-m) steps, and changes nothing where
    the bits that are cut off are zero, as its penalty makes them.
    """

    packed: Packed
    scale: torch.Tensor
    _: dataclasses.KW_ONLY
    grid: str = GRIDS[0]
    signed: bool = True
    dtype: torch.dtype = torch.float32
    fixed: bool = False

    def __post_init__(self):
        if self.packed.layout != "planes":
            raise ValueError(f"packed: expected the layout 'planes', got {self.packed.layout!r}")

    @classmethod
    def from_codes(cls, codes, scale, bits, **settings):
        """The weight of integer codes of ``bits`` bits. ValueError for codes out of range, on every device."""
        if codes.device.type != "cpu" and codes.numel():
            low, high = codes.aminmax()
            if not 0 <= int(low) <= int(high) < 2 ** bits:
                raise ValueError(f"codes: expected values in 0..2^{bits} - 1, got {int(low)}..{int(high)}")
        return cls(foreach.pack([codes], bits)[0], scale, **settings)

    @property
    def bits(self):
        """n, the bits of each code."""
        return self.packed.bits

    @property
    def shape(self):
        """The weight's shape."""
        return torch.Size(self.packed.shape)

    @property
    def codes(self):
        """The codes: uint8 up to 8 bits, int32 above, in the weight's shape."""
        codes = foreach.unpack([self.packed])[0]
        return codes.to(torch.uint8) if self.bits <= 8 else codes

    @property
    def unit(self):
        """The scale whose step is 1."""
        return 2**self.bits - 1 if self.grid == "full" else 2 ** max(self.bits - self.signed, 0)

    @property
    def levels(self):
        """m, the integers of which q = m * step: int32, in the weight's shape; all 0 for 0 bits."""
        unit = torch.full_like(self.scale, self.unit)
        return foreach.decode([self.packed], [unit], grid=self.grid, signed=self.signed,
                              out_dtype=unit.dtype)[0].to(torch.int32)

    @property
    def step(self):
        """What the levels are multiplied by: in the scale's shape and dtype; 0 for 0 bits."""
        return self.scale / self.unit if self.bits else torch.zeros_like(self.scale)

    def at(self, bits):
        """The same weight at ``bits`` <= n bits, from the same memory."""
        return dataclasses.replace(self, packed=self.packed.truncate(bits))

    def dequantize(self, bits=None):
        """The weights, at n bits as the training forward had them, bit for bit. ``bits``: fewer of them, see above."""
        return foreach.decode([self.packed], [self.scale], bits, grid=self.grid, signed=self.signed,
                              out_dtype=self.dtype)[0]


@torch.no_grad()
def to_int(model):
    """Integer weights of a model that :func:`quantops.quantize_` changed: {parameter name: IntWeight}.

    Names are those of the plain model's state dict ("conv1.weight"), tensors stay on their devices, and each
    ``dequantize()`` equals the training forward bit for bit (without autocast), with CPQ the evaluated one. Biases and
    layers that are not quantized are not in it.

    Raises ValueError for a model without quantized weights, for weights with NaN or inf and for those that have other
    parametrizations too, naming the layer.
    """
    layers = quantized(getattr(model, "_orig_mod", model))
    if not layers:
        raise ValueError(f"model: expected weights quantized by quantops.quantize_, {type(model).__name__} has none")
    weights = {}
    for name, owner, quantizer in layers:
        check_only(name, owner)
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
    """Writes integer weights to a safetensors file: n/8 bytes per weight of n bits, the scales and a header.

    Tensors: ``<name>.planes``, uint8 of shape (n, ceil(numel / 8)), the bit planes of :class:`quantops.Packed` without
    their padding, most significant first; and ``<name>.scale``. The rest is metadata, with a checksum of each plane.

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
        _check(name, v)
        # Copies of their own: safetensors refuses tensors that share memory.
        planes = v.packed.data[:, :_file_bytes(v.shape)].detach().cpu().contiguous().clone()
        scale = v.scale.detach().cpu().contiguous().clone()
        tensors[f"{name}.planes"], tensors[f"{name}.scale"] = planes, scale
        entry = {"bits": v.bits, "grid": v.grid, "signed": v.signed, "shape": list(v.shape),
                 "fixed": v.fixed, "dtype": str(v.dtype).removeprefix("torch.")}
        about[name] = {**entry, "crc32": [_crc32(scale, entry), *(_crc32(t) for t in planes)]}
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


def load_int(path, model=None, bits=None):
    """Reads a file of :func:`save_int`: {parameter name: IntWeight}, on the CPU.

    ``bits``: an integer m; weights stored with more are opened at m bits, but for those that are ``fixed``, and of
    their planes only the first m are read and checked. With ``model``, a plain model that is not quantized, every
    weight in the file is also copied, dequantized, into the parameter of its name. All names and shapes are compared
    first; what the file does not have (biases, norms) is left as it is.

    Raises ValueError naming ``path`` and what is wrong for a file that is truncated, corrupt or not of this format, for
    more ``bits`` than any weight in it has, and for a model that does not fit; the model is then untouched.
    FileNotFoundError where there is no file.
    """
    safetensors = _safetensors()
    path = os.fspath(path)
    if bits is not None and (type(bits) is not int or not 0 <= bits <= MAX_BITS):
        raise ValueError(f"bits: expected an integer 0..{MAX_BITS} or None, got {bits!r}")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        file = safetensors.safe_open(path, framework="pt")
    except Exception as e:  # safetensors raises errors of several kinds
        raise ValueError(f"{path}: not a whole safetensors file: {e}") from e
    try:
        with file as f:
            weights = _read(f, bits)
        if model is not None:
            targets = _targets(model, weights)
    except (ValueError, safetensors.SafetensorError) as e:
        raise ValueError(f"{path}: {e}") from e
    if model is not None:
        values = {name: v.dequantize() for name, v in weights.items()}
        with torch.no_grad():
            for name, value in values.items():
                targets[name].copy_(value)
    return weights


def _read(f, bits):
    """The weights of an open file."""
    about, keys = _about(f.metadata() or {}), set(f.keys())
    expected = {f"{name}.{part}" for name in about for part in ("planes", "scale")}
    if expected != keys:
        raise ValueError(f"tensors and metadata differ in {sorted(expected ^ keys)[:4]}")
    weights = {}
    for name, entry in about.items():
        try:
            sums = [int(v) for v in entry.pop("crc32")]
            stored, shape, dtype = entry["bits"], torch.Size(entry["shape"]), _DTYPES[entry["dtype"]]
            settings = {"grid": entry["grid"], "signed": entry["signed"], "dtype": dtype,
                        "fixed": entry["fixed"]}
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{name}: bad metadata {entry!r}") from e
        if type(stored) is not int or not 0 <= stored <= MAX_BITS:
            raise ValueError(f"{name}: expected bits 0..{MAX_BITS}, got {stored!r}")
        planes, used = f.get_slice(f"{name}.planes"), _file_bytes(shape)
        if planes.get_shape() != [stored, used] or planes.get_dtype() != "U8" or len(sums) != 1 + stored:
            raise ValueError(f"{name}: expected planes of shape {[stored, used]} for {stored} bits and shape "
                             f"{list(shape)}, got {planes.get_dtype()} of shape {planes.get_shape()}")
        m = stored if bits is None or settings["fixed"] else min(bits, stored)
        data, scale = torch.zeros(m, plane_bytes(math.prod(shape)), dtype=torch.uint8), f.get_tensor(f"{name}.scale")
        data[:, :used] = planes[:m]
        weights[name] = IntWeight(Packed(data, shape, m), scale.clone(), **settings)
        _check(name, weights[name])
        found = _crc32(scale, entry), *(_crc32(t) for t in data[:, :used])
        for j, (a, b) in enumerate(zip(found, sums)):
            if a != b:
                part = f"plane {j - 1}" if j else "scale and metadata"
                raise ValueError(f"{name}: the checksum of {part} does not match, the file is damaged")
    most = max(entry["bits"] for entry in about.values())
    if bits is not None and bits > most:
        raise ValueError(f"bits: expected at most {most}, the most that a weight of the file has, got {bits}")
    return weights


def _about(metadata):
    """What the metadata say of each weight: {name: dict}."""
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
    return about


def _file_bytes(shape):
    """Bytes of a plane in the file: without the padding that it has in memory."""
    return -(-math.prod(shape) // 8)


def _crc32(t, entry=None):
    """Checksum of a contiguous CPU tensor, little-endian as safetensors has it, and of metadata, if any."""
    return zlib.crc32(t.numpy(), zlib.crc32(json.dumps(entry, sort_keys=True).encode()) if entry else 0)


def _check(name, v):
    """Raises ValueError where an IntWeight contradicts itself."""
    rows = v.shape[0] if v.shape else 1
    acc = torch.float64 if v.dtype == torch.float64 else torch.float32
    for wrong, text in (
        (v.grid not in GRIDS, f"expected a grid of {GRIDS}, got {v.grid!r}"),
        (type(v.fixed) is not bool, f"expected fixed true or false, got {v.fixed!r}"),
        (type(v.signed) is not bool, f"expected signed true or false, got {v.signed!r}"),
        (v.dtype not in checks.FLOATS, f"expected a dtype of {list(_DTYPES)}, got {v.dtype}"),
        (v.scale.dtype != acc, f"expected a scale of {acc}, got {v.scale.dtype}"),
        (v.scale.shape not in ((), (1,), (rows,)), f"expected one scale or one per row ({rows}), got shape "
                                                   f"{tuple(v.scale.shape)}"),
    ):
        if wrong:
            raise ValueError(f"{name}: {text}")
    if not bool(((v.scale >= 0) & (v.scale < torch.inf)).all()):
        raise ValueError(f"{name}: expected finite scales >= 0")
    try:
        checks.packed_data([v.packed.data], [v.shape], [v.bits], v.packed.layout)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{name}: {e}") from e


def _targets(model, weights):
    params = dict(model.named_parameters(remove_duplicate=False))
    if quantized(model):
        raise ValueError("model: expected a plain model, got one that quantops.quantize_ changed")
    for name, v in weights.items():
        if name not in params:
            raise ValueError(f"{name}: the model has no parameter of this name")
        tied = [n for n, p in params.items() if p is params[name] and n not in weights]
        if tied:
            raise ValueError(f"{name}: the model has one parameter for it and {', '.join(tied)}, which the file does "
                             "not have and was not quantized; expected a model with a parameter for each")
        if params[name].shape != v.shape:
            raise ValueError(f"{name}: the file has shape {tuple(v.shape)}, the model {tuple(params[name].shape)}")
    return params
