"""Damaged files of weights and of models: load_int and load_model give what was saved, bit for bit, or a ValueError
that names the file."""

import base64
import json
import random
import tempfile
from pathlib import Path

import torch
from torch import nn

from quantops import CPQConfig, MSQConfig, TruncQuantConfig, load_int, load_model, quantize_, save_int, save_model
from quantops.intweight import IntWeight

torch.set_num_threads(1)
FOLDER = tempfile.TemporaryDirectory()
PATH = Path(FOLDER.name) / "x.safetensors"
CONFIGS = [
    MSQConfig(bits=3, act_bits=4),
    MSQConfig(scale=2.8, per_row=True),
    TruncQuantConfig(bits=(8, 2)),
    CPQConfig(bits=3, act_bits=3, dropbits="learned"),
]
ODD = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**62,
    2**66,
    1.5,
    float("inf"),
    float("nan"),
    "",
    "full",
    "float64",
    [],
    [1],
    {},
    [[]],
    10**400,
]


def make(rng):
    """Some weights, and what happens to their file."""
    weights = [
        {
            "shape": [rng.randrange(0, 9) for _ in range(rng.randrange(3))],
            "bits": rng.randrange(0, 17),
            "rows": rng.random() < 0.4,
            "seed": rng.randrange(2**31),
            "double": rng.random() < 0.2,
        }
        for _ in range(rng.randrange(1, 4))
    ]
    kinds = ["bytes", "cut", "grow", "header", "header", "length", "metadata", "metadata", "swap"]
    damage = [[rng.choice(kinds), rng.randrange(2**31)] for _ in range(rng.randrange(1, 3))]
    model = {"config": rng.randrange(len(CONFIGS)), "floats": rng.random() < 0.5} if rng.random() < 0.3 else None
    return {"weights": weights, "damage": damage, "model": model}


def _weights(case):
    found = {}
    for i, w in enumerate(case["weights"]):
        generator = torch.Generator().manual_seed(w["seed"])
        codes = torch.randint(0, 2 ** w["bits"], w["shape"], generator=generator)
        rows = (w["shape"][0],) if w["rows"] and w["shape"] else ()
        scale = torch.rand(rows, generator=generator, dtype=torch.float64 if w["double"] else torch.float32)
        found[f"layer{i}.weight"] = IntWeight.from_codes(codes, scale, w["bits"], dtype=scale.dtype)
    return found


def _damaged(data, kind, rng):
    length = int.from_bytes(data[:8], "little")
    if kind == "bytes":
        data = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    if kind == "cut":
        return data[: rng.randrange(len(data))]
    if kind == "grow":
        return data + rng.randbytes(rng.randrange(1, 100))
    if kind == "swap":
        a, b = sorted(rng.randrange(len(data)) for _ in range(2))
        return data[:a] + data[b:] + data[a:b]
    if kind == "length":
        other = rng.choice([0, 1, max(length - 1, 0), min(length + 1, 2**64 - 1), len(data), 2**32, 2**63, 2**64 - 1])
        return other.to_bytes(8, "little") + data[8:]
    try:
        header = json.loads(data[8 : 8 + length])
        part = rng.choice([k for k in ("weights", "state", "config") if k in header["__metadata__"]])
        inner = json.loads(header["__metadata__"][part]) if kind == "metadata" else None
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return data  # damaged too much already
    target = header if inner is None else inner
    for _ in range(rng.randrange(1, 3)):
        target = _changed(target, rng)
    if inner is not None:
        header["__metadata__"][part] = json.dumps(target) if rng.random() < 0.9 else "[" * rng.randrange(1, 20000)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _changed(node, rng):
    """JSON with something else somewhere."""
    if isinstance(node, dict) and node and rng.random() < 0.9:
        key = rng.choice(sorted(node))
        if rng.random() < 0.15:
            return {k: v for k, v in node.items() if k != key}
        if rng.random() < 0.1:
            return {**node, rng.choice(["x", "layer0.weight", "crc32", ""]): node[key]}
        return {**node, key: _changed(node[key], rng)}
    if isinstance(node, list) and node and rng.random() < 0.8:
        i = rng.randrange(len(node))
        return rng.choice([[*node[:i], _changed(node[i], rng), *node[i + 1 :]], node[:i], node + [node[i]]])
    return rng.choice(ODD)


def _model(config, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    model = quantize_(net, CONFIGS[config])
    model(torch.randn(5, 8))
    return model.eval()


def _damage(case):
    data = PATH.read_bytes()
    for kind, seed in case["damage"]:
        data = _damaged(data, kind, random.Random(seed)) or b"\0"
    PATH.write_bytes(data)
    return data


def _check_model(case):
    saved, model = (_model(case["model"]["config"], seed) for seed in (1, 2))
    save_model(saved, PATH, floats=case["model"]["floats"])
    data, before = _damage(case), {k: v.clone() for k, v in model.state_dict().items()}
    try:
        load_model(PATH, model)
    except ValueError as error:
        assert str(PATH) in str(error), f"the error does not name the file: {error}"
        same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert same, f"a refused file has changed the model; file {base64.b64encode(data)[:4000]!r}"
        return 1
    x = torch.randn(4, 8)
    assert torch.equal(model(x), saved(x)), f"another model was loaded; file {base64.b64encode(data)[:4000]!r}"
    return 1


def check(case):
    """The file after its damage is what it was, or refused; a model that it was for is then as before."""
    if case.get("model"):
        return _check_model(case)
    weights = _weights(case)
    save_int(weights, PATH)
    data = _damage(case)
    model = nn.Module()
    for name, v in weights.items():
        layer = nn.Module()
        layer.weight = nn.Parameter(torch.full(v.shape, 7.0, dtype=v.dtype))
        model.add_module(name.partition(".")[0], layer)
    try:
        loaded = load_int(PATH, model)
    except ValueError as error:
        assert str(PATH) in str(error), f"the error does not name the file: {error}"
        assert all(bool((p == 7).all()) for p in model.parameters()), "a refused file has changed the model"
        return 1
    for name, v in weights.items():
        assert name in loaded, f"{name} is gone, and nothing was said; file {base64.b64encode(data)[:4000]!r}"
        same = (
            torch.equal(loaded[name].codes, v.codes)
            and torch.equal(loaded[name].scale, v.scale)
            and loaded[name].bits == v.bits
            and loaded[name].shape == v.shape
            and loaded[name].dtype == v.dtype
        )
        assert same, f"{name} was loaded as something else; file {base64.b64encode(data)[:4000]!r}"
    assert len(loaded) == len(weights), "there are more weights than were saved"
    return 1
