"""The file that integer weights are kept in: safetensors, with planes that are read one by one."""

import contextlib
import json
import math
import os
import zlib
from collections.abc import Mapping
from typing import Any

import torch

from quantops import checks
from quantops.calibration import activation_scales
from quantops.files import write_whole
from quantops.intweight import MOST, IntWeight, check, rows_shape, to_int
from quantops.layers import ROWS
from quantops.nn import quantized
from quantops.packed import Packed
from quantops.reference.activation import FRONTS
from quantops.reference.packing import plane_bytes
from quantops.reference.uniform import MAX_BITS, RULES, code_bits
from quantops.types import Path

FORMAT, VERSION = "quantops-int", 2
_DTYPES = {str(d).removeprefix("torch."): d for d in checks.FLOATS}
_SCALES = {"F32": torch.float32, "F64": torch.float64}
_ACT_TENSORS = ("scale", "offset")
_ACT_SETTINGS = ("bits", "rule", "signed", "front")
_ENTRY = {"bits", "grid", "signed", "shape", "fixed", "dtype", "crc32"}
_MORE = {"rows", "shared"}  # where they are not the usual ones


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as e:
        raise ImportError("files of weights need safetensors: pip install 'quantops[io]'") from e
    return safetensors


def save_int(weights: torch.nn.Module | Mapping[str, IntWeight], path: Path) -> None:
    """Writes integer weights to a safetensors file: n/8 bytes per weight of n bits, the scales and a header.

    Tensors: ``<name>.planes``, uint8 of shape (n, ceil(numel / 8)), the bit planes of :class:`quantops.Packed` without
    their padding, most significant first, on the sign grid behind that of the signs; and ``<name>.scale``. The rest is
    metadata, with a checksum of each plane. Of a model, what :func:`quantops.activation_scales` says of its quantized
    activations (at the width that is selected) goes with them: ``<name>.act_scale`` and ``<name>.act_offset``, which
    :func:`quantops.load_activation_scales` reads.

    ``weights``: what :func:`to_int` returns, or a model for it. The file appears whole or not at all, flushed to the
    disk, with the mode of a file that it replaces, or that of the umask; a symbolic link's target is what is replaced.
    Needs safetensors (``pip install 'quantops[io]'``).

    Raises TypeError or ValueError for anything else, naming it, and OSError where the file cannot be written.
    """
    _safetensors()
    scales = {}
    if isinstance(weights, torch.nn.Module):
        model: Any = getattr(weights, "_orig_mod", weights)
        weights, scales = to_int(model), activation_scales(model)
    if not isinstance(weights, dict) or not weights:
        raise TypeError(f"weights: expected a model or a non-empty dict of IntWeight, got {type(weights).__name__}")
    tensors, about = parts_of(weights)
    metadata = {"format": FORMAT, "version": str(VERSION), "weights": json.dumps(about)}
    if scales:
        metadata["activations"] = json.dumps({name: _keep_scales(tensors, name, v) for name, v in scales.items()})
    write(path, tensors, metadata)


def load_int(path: Path, model: torch.nn.Module | None = None, bits: int | None = None) -> dict[str, IntWeight]:
    """Reads a file of :func:`save_int`: {parameter name: IntWeight}, on the CPU.

    ``bits``: an integer m; weights stored with more are opened at m bits, but for those that are ``fixed``, and of
    their planes only the first m are read and checked. With ``model``, a plain model that is not quantized, every
    weight in the file is also copied, dequantized, into the parameter of its name. All names and shapes are compared
    first; what the file does not have (biases, norms) is left as it is.

    Raises ValueError naming ``path`` and what is wrong for a file that is truncated, corrupt or not of this format, for
    more ``bits`` than any weight in it has, and for a model that does not fit, or has no memory (on the meta device);
    the model is then untouched. FileNotFoundError where there is no file.
    """
    check_bits(bits)
    with opened(path) as f:
        metadata = metadata_of(f, FORMAT, VERSION)
        weights, scales = weights_of(f, metadata, bits), _scales_of(f, metadata)
        keys = {f"{name}.{part}" for name in weights for part in ("planes", "scale")}
        keys |= {f"{name}.act_{part}" for name, v in scales.items() for part in _ACT_TENSORS if v[part] is not None}
        keys ^= set(f.keys())
        if keys:
            raise ValueError(f"tensors and metadata differ in {sorted(keys)[:4]}")
        if model is not None:
            if quantized(model):
                raise ValueError("model: expected a plain model, got one that quantops.quantize_ changed")
            targets = targets_of(model, weights)
    if model is not None:
        fill(targets, {name: v.dequantize() for name, v in weights.items()})
    return weights


def load_activation_scales(path: Path) -> dict[str, dict[str, Any]]:
    """What :func:`quantops.activation_scales` said of the model that :func:`save_int` wrote: {name: dict}, on the CPU;
    {} where its activations are float. Errors as of :func:`load_int`."""
    with opened(path) as f:
        return _scales_of(f, metadata_of(f, FORMAT, VERSION))


def _keep_scales(tensors, name, about):
    """Puts the scale and the offset of an activation into ``tensors``; what the metadata say of it."""
    _check_scales(name, about)
    entry = {key: about[key] for key in _ACT_SETTINGS}
    sums = []
    for part in _ACT_TENSORS:
        if about[part] is not None:
            t = tensors[f"{name}.act_{part}"] = about[part].detach().cpu().contiguous().clone()
            sums.append(crc32(t, entry))
    return {**entry, "crc32": sums}


def _check_scales(name, about):
    """ValueError for scales and offsets that no quantizer of activations has."""
    scale, offset = about["scale"], about["offset"]
    sane = scale.dtype in _SCALES.values() and scale.dim() == 1 and scale.numel() and bool((scale > 0).all())
    if not sane or not bool(scale.isfinite().all()):
        raise ValueError(f"{name}: expected one finite scale > 0, or one per channel, got {shown(scale)}")
    if offset is not None and (
        (offset.dtype, offset.shape) != (scale.dtype, scale.shape) or not bool(offset.isfinite().all())
    ):
        raise ValueError(f"{name}: expected a finite offset for each scale, got {shown(offset)}")


def _scales_of(f, metadata):
    """{name: what activation_scales says} of an open file; ValueError where it is not whole and sane."""
    found = {}
    for name, entry in (parsed(metadata, "activations") if "activations" in metadata else {}).items():
        if not isinstance(entry, dict) or entry.keys() != {*_ACT_SETTINGS, "crc32"} or not _integers(entry["crc32"]):
            raise ValueError(f"{name}: bad metadata {shown(entry)}")
        about = {key: value for key, value in entry.items() if key != "crc32"}
        if (
            type(about["bits"]) is not int
            or not 0 <= about["bits"] <= MAX_BITS
            or about["rule"] not in RULES
            or type(about["signed"]) is not bool
            or about["front"] not in FRONTS
        ):
            raise ValueError(f"{name}: expected bits, rule, sign and front of an activation, got {shown(about)}")
        parts = {p: f.get_tensor(f"{name}.act_{p}") for p in _ACT_TENSORS if f"{name}.act_{p}" in f.keys()}  # noqa: SIM118
        if "scale" not in parts or [crc32(t, about) for t in parts.values()] != entry["crc32"]:
            raise ValueError(f"{name}: the checksum of its scale does not match, the file is damaged")
        found[name] = {**about, **{p: parts[p].clone() if p in parts else None for p in _ACT_TENSORS}}
        _check_scales(name, found[name])
    return found


def show(path, others=None):
    """What a file of :func:`save_int` or :func:`quantops.save_model` holds, as text, read from its header alone: a line
    per weight, and what ``others``, {format: function of the open file}, tell of files of other formats."""
    with opened(path) as f:
        kind = (f.metadata() or {}).get("format")
        told = others[kind](f) if others and kind in others else None
        about = parsed(f.metadata() if told else metadata_of(f, FORMAT, VERSION), "weights")
        rows, total, numel = [], 0, 0
        for name, entry in about.items():
            bits, shape, _ = _sizes(name, entry)
            scales = math.prod(slice_of(f, f"{name}.scale").get_shape())
            held = bits * _file_bytes(shape) + scales * (8 if entry["dtype"] == "float64" else 4)
            total, numel = total + held, numel + math.prod(shape)
            rows.append(
                (
                    name,
                    "x".join(map(str, shape)) or "one",
                    f"{bits} bits" + " fixed" * (entry["fixed"] is True),
                    entry["grid"] + " unsigned" * (entry["signed"] is False),
                    entry["dtype"],
                    f"{scales} scale" + "s" * (scales != 1),
                    f"{held:,} bytes",
                )
            )
        scales = {} if told else _scales_of(f, f.metadata())
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]
    average = 8 * total / numel if numel else 0.0
    held = f"{len(rows)} weights, {numel:,} elements, {total:,} bytes: {average:.2f} bits each with the scales"
    for name, v in scales.items():
        sign, count = "signed" if v["signed"] else "unsigned", v["scale"].numel()
        kind = f"{v['rule']} {sign}" + (f" of {v['front']}" if v["front"] else "")
        lines.append(f"{name}  activation  {v['bits']} bits  {kind}  {count} scale{'s' * (count != 1)}")
    return "\n".join([*lines, *([held, *told] if told else [f"{held}; format {FORMAT} {VERSION}"])])


def parts_of(weights):
    """(tensors, {name: what the metadata say of it}) of {name: IntWeight}."""
    tensors, about = {}, {}
    for name, v in weights.items():
        if not isinstance(name, str) or not isinstance(v, IntWeight):
            raise TypeError(f"weights[{name!r}]: expected an IntWeight under a string, got {type(v).__name__}")
        check(name, v)
        # Copies of their own: safetensors refuses tensors that share memory.
        planes = v.packed.data[:, : _file_bytes(v.shape)].detach().cpu().contiguous().clone()
        scale = v.scale.detach().cpu().contiguous().clone()
        tensors[f"{name}.planes"], tensors[f"{name}.scale"] = planes, scale
        entry = {
            "bits": v.bits,
            "grid": v.grid,
            "signed": v.signed,
            "shape": list(v.shape),
            "fixed": v.fixed,
            "dtype": str(v.dtype).removeprefix("torch."),
        }
        if v.rows != ROWS:
            entry["rows"] = list(v.rows)
        if v.shared:
            entry["shared"] = list(v.shared)
        about[name] = {**entry, "crc32": [crc32(scale, entry), *(crc32(t) for t in planes)]}
    return tensors, about


def write(path, tensors, metadata):
    """Writes a safetensors file, whole or not at all."""
    data = _safetensors().torch.save(tensors, metadata)
    write_whole(path, lambda file: file.write(data))


@contextlib.contextmanager
def opened(path):
    """An open safetensors file. What is wrong with it, or a ValueError raised inside, is a ValueError that names it."""
    safetensors, path = _safetensors(), os.fspath(path)
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path}: expected a file, got a folder")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        file = safetensors.safe_open(path, framework="pt")
    except Exception as e:  # safetensors raises errors of several kinds
        raise ValueError(f"{path}: not a whole safetensors file: {e}") from e
    try:
        with torch.device("cpu"), file as f:  # whatever the default device is, which safetensors goes by
            yield f
    except (ValueError, safetensors.SafetensorError) as e:
        raise ValueError(f"{path}: {e}") from e


def check_bits(bits):
    """ValueError for what no file can be opened at."""
    if bits is not None and (type(bits) is not int or not 0 <= bits <= MAX_BITS):
        raise ValueError(f"bits: expected an integer 0..{MAX_BITS} or None, got {bits!r}")


def metadata_of(f, kind, version):
    """The metadata of an open file of format ``kind``; ValueError for another."""
    metadata = f.metadata() or {}
    if metadata.get("format") != kind:
        raise ValueError(f"expected the format {kind!r} of quantops, got {metadata.get('format')!r}")
    if metadata.get("version") != str(version):
        raise ValueError(f"expected version {version} of the format, got {metadata.get('version')!r}")
    return metadata


def parsed(metadata, key):
    """The non-empty dict under ``key``, from JSON."""
    try:
        found = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"metadata is not JSON: {e}") from None
    if not isinstance(found, dict) or not found:
        raise ValueError(f"metadata lists no {key}")
    return found


def weights_of(f, metadata, bits):
    """{name: IntWeight} of an open file, at no more than ``bits`` bits where they are not fixed."""
    about = parsed(metadata, "weights")
    weights = {name: _weight(f, name, entry, bits) for name, entry in about.items()}
    most = max(entry["bits"] for entry in about.values())
    if bits is not None and bits > most:
        raise ValueError(f"bits: expected at most {most}, the most that a weight of the file has, got {bits}")
    return weights


def _weight(f, name, entry, bits):
    stored, shape, sums = _sizes(name, entry)
    settings = {
        "grid": entry["grid"],
        "signed": entry["signed"],
        "dtype": _DTYPES[entry["dtype"]],
        "fixed": entry["fixed"],
        "shared": tuple(entry.get("shared", ())),
    }
    rows_in_front = tuple(entry.get("rows", ROWS))
    if rows_in_front != ROWS:
        settings.update(rows=rows_in_front, whole=shape)
    planes, used, rows = slice_of(f, f"{name}.planes"), _file_bytes(shape), code_bits(stored, settings["grid"])
    if planes.get_shape() != [rows, used] or planes.get_dtype() != "U8" or len(sums) != 1 + rows:
        raise ValueError(
            f"{name}: expected planes of shape {[rows, used]} for {stored} bits and shape "
            f"{list(shape)}, got {planes.get_dtype()} of shape {planes.get_shape()}"
        )
    kind = slice_of(f, f"{name}.scale").get_dtype()
    if kind not in _SCALES:
        raise ValueError(f"{name}: expected a scale of float32 or float64, got {kind}")
    m = stored if bits is None or settings["fixed"] is True else min(bits, stored)
    m = code_bits(m, settings["grid"])
    data, scale = torch.zeros(m, plane_bytes(math.prod(shape)), dtype=torch.uint8), f.get_tensor(f"{name}.scale")
    data[:, :used] = planes[:m]
    laid = torch.Size(rows_shape(shape, rows_in_front))
    weight = IntWeight(Packed(data, laid, m), scale.clone(), **settings)
    check(name, weight)
    told = {key: value for key, value in entry.items() if key != "crc32"}
    found = crc32(scale, told), *(crc32(t) for t in data[:, :used])
    for j, (a, b) in enumerate(zip(found, sums)):
        if a != b:
            part = f"plane {j - 1}" if j else "scale and metadata"
            raise ValueError(f"{name}: the checksum of {part} does not match, the file is damaged")
    return weight


def _sizes(name, entry):
    """(bits, shape, checksums) of what the metadata say of a weight; ValueError where they say anything else."""
    if (
        not isinstance(entry, dict)
        or entry.keys() - _MORE != _ENTRY
        or not isinstance(entry["grid"], str)
        or not isinstance(entry["dtype"], str)
        or entry["dtype"] not in _DTYPES
        or not _integers(entry["shape"])
        or not _integers(entry["crc32"])
    ):
        raise ValueError(f"{name}: bad metadata {shown(entry)}")
    bits, shape = entry["bits"], entry["shape"]
    if type(bits) is not int or not 0 <= bits <= MAX_BITS:
        raise ValueError(f"{name}: expected bits 0..{MAX_BITS}, got {shown(bits)}")
    if len(shape) > 64 or not all(0 <= n <= MOST for n in (*shape, math.prod(shape))):
        raise ValueError(f"{name}: expected a shape of at most 64 dims and 2^40 elements, got {shown(shape)}")
    rows, shared = entry.get("rows", [0]), entry.get("shared", [])
    dims = _integers(rows) and rows and all(0 <= d < max(len(shape), 1) for d in rows)
    if not dims or len(set(rows)) < len(rows):
        raise ValueError(f"{name}: expected rows, distinct dims of {len(shape)}, got {shown(rows)}")
    if not isinstance(shared, list) or not all(isinstance(other, str) for other in shared):
        raise ValueError(f"{name}: expected shared, names of parameters, got {shown(shared)}")
    return bits, torch.Size(shape), entry["crc32"]


def _integers(value):
    return isinstance(value, list) and all(type(i) is int for i in value)


def slice_of(f, key):
    """The tensor of an open file under ``key``, to read parts of."""
    if key not in f.keys():  # noqa: SIM118  not a dict
        raise ValueError(f"tensors and metadata differ in {[key]}")
    return f.get_slice(key)


def shown(value):
    """Something of a file, in an error: it may be long."""
    try:
        text = repr(value)
    except RecursionError:
        text = "something nested too deep"
    return text if len(text) <= 300 else text[:300] + "..."


def _file_bytes(shape):
    """Bytes of a plane in the file: without the padding that it has in memory."""
    return -(-math.prod(shape) // 8)


def crc32(t, entry=None):
    """Checksum of a contiguous CPU tensor, little-endian as safetensors has it, and of metadata, if any."""
    start = zlib.crc32(json.dumps(entry, sort_keys=True).encode()) if entry else 0
    numbers = t.reshape(-1).as_strided((t.numel(),), (1,))  # of one number, any stride counts as contiguous
    return zlib.crc32(numbers.view(torch.uint8).numpy(), start)


def targets_of(model, weights):
    """The parameters of ``model`` for {name: IntWeight}; ValueError where it has none that fit."""
    params = dict(model.named_parameters(remove_duplicate=False))
    for name, v in weights.items():
        if name not in params:
            raise ValueError(f"{name}: the model has no parameter of this name")
        p = params[name]
        tied = [n for n, other in params.items() if other is p and n not in (*weights, *v.shared)]
        if tied:
            raise ValueError(
                f"{name}: the model has one parameter for it and {', '.join(tied)}, which the file does "
                "not have and was not quantized; expected a model with a parameter for each"
            )
        if p.is_meta or isinstance(p, torch.nn.parameter.UninitializedParameter):
            raise ValueError(
                f"{name}: expected a parameter with memory, got one that is not initialized or on the "
                "meta device: model.to_empty(device=...) gives it some"
            )
        for other in (name, *v.shared):
            p = params.get(other, p)  # a model may lack those that shared the weight, or have one for all of them
            if p.shape != v.shape:
                raise ValueError(f"{other}: the file has shape {tuple(v.shape)}, the model {tuple(p.shape)}")
            if not p.is_floating_point():
                raise ValueError(f"{other}: expected a floating-point parameter, got {p.dtype}")
    return {name: [params[n] for n in (name, *v.shared) if n in params] for name, v in weights.items()}


@torch.no_grad()
def fill(targets, values):
    """Copies each value into the tensors of its name."""
    for name, value in values.items():
        for target in targets[name]:
            target.copy_(value)
