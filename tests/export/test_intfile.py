"""to_int, save_int and load_int: the integers of a model, and their file."""

import copy
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import quantops
from networks import layered
from quantops.convert import quantize_
from quantops.intfile import load_int, save_int
from quantops.intweight import IntWeight, to_int
from quantops.methods.msq import MSQConfig

needs_safetensors = pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="safetensors missing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", ["dyadic", "full", "sign"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("scale", ["absmax", 1.5])
def test_dequantize_is_the_training_forward_bit_for_bit(dtype, grid, per_row, scale):
    for bits in (0, 1, 2, 5, 7, 8, 9, 15 if grid == "sign" else 16):
        model = quantize_(layered(dtype), MSQConfig(bits=bits, k=0, grid=grid, per_row=per_row, scale=scale))
        weights = to_int(model)
        assert list(weights) == ["0.weight", "3.weight", "5.weight", "6.weight"]
        for name, v in weights.items():
            q = model[int(name[0])].weight
            stored = bits + (grid == "sign" and bits > 0)
            assert v.codes.dtype == (torch.uint8 if stored <= 8 else torch.int32) and v.dtype == dtype
            assert (v.bits, v.packed.bits) == (bits, stored)
            assert v.scale.shape == ((q.shape[0],) if per_row else ())
            assert torch.equal(v.dequantize(), q) and v.dequantize().dtype == q.dtype


def test_to_int_errors():
    with pytest.raises(ValueError, match="Sequential has none"):
        to_int(layered())
    model = quantize_(layered(), MSQConfig())
    with torch.no_grad():
        model[5].parametrizations.weight.original[0, 0] = float("nan")
    with pytest.raises(ValueError, match="5: the weight has NaN"):
        to_int(model)


@pytest.fixture
def saved(tmp_path):
    """(path, quantized model): mixed bits, a scale per row."""
    model = quantize_(layered(), MSQConfig(bits=4, per_row=True, first=9, overrides={"3": {"bits": 0, "k": 0}}))
    path = tmp_path / "weights.safetensors"
    save_int(model, path)
    return path, model


@needs_safetensors
def test_file_round_trip(saved):
    path, model = saved
    assert os.listdir(path.parent) == [path.name]  # no temporary file is left
    weights, expected = load_int(path), to_int(model)
    assert list(weights) == list(expected)
    for name, v in weights.items():
        e = expected[name]
        assert torch.equal(v.codes, e.codes) and torch.equal(v.scale, e.scale) and v.codes.dtype == e.codes.dtype
        assert (v.bits, v.grid, v.signed, v.dtype) == (e.bits, e.grid, e.signed, e.dtype)
    assert [v.bits for v in weights.values()] == [9, 0, 4, 4]


@needs_safetensors
def test_a_file_costs_its_bits_and_a_header(tmp_path):
    torch.manual_seed(0)
    for bits in (0, 1, 3, 8, 11, 16):
        shapes = [(64, 300), (3, 5), (7, 11, 3, 3), (1000,), (1, 0)]
        weights = {
            f"layer{i}.weight": IntWeight.from_codes(torch.randint(0, 2**bits, s), torch.rand(s[0]), bits)
            for i, s in enumerate(shapes)
        }
        path = tmp_path / "w.safetensors"
        save_int(weights, path)
        scales = sum(4 * v.scale.numel() for v in weights.values())
        header = int.from_bytes(path.read_bytes()[:8], "little") + 8
        planes = sum(bits * -(-v.shape.numel() // 8) for v in weights.values())
        assert path.stat().st_size == header + scales + planes
        assert header <= len(weights) * (400 + 12 * bits) + 200
        for name, v in load_int(path).items():
            assert torch.equal(v.codes, weights[name].codes) and v.shape == weights[name].shape


@needs_safetensors
@pytest.mark.parametrize("rule, grid", [("round_clamp", "dyadic"), ("floor", "full"), ("round_clamp", "sign")])
def test_a_file_opens_at_any_lower_precision(tmp_path, rule, grid):
    w, path = torch.randn(24, 50), tmp_path / "w.safetensors"
    scale = quantops.absmax(w)
    codes = {name: quantops.encode(w, scale, n, rule=rule, grid=grid) for name, n in (("a", 8), ("b", 3), ("c", 0))}
    weights = {name: IntWeight.from_codes(c, scale, n, grid=grid) for (name, c), n in zip(codes.items(), (8, 3, 0))}
    save_int(weights, path)
    for m in range(9):
        opened = load_int(path, bits=m)
        for name, v in opened.items():
            n = weights[name].bits
            least = min(m, n)
            cut = codes[name] >> (n - least) if least else torch.zeros_like(codes[name])
            want = quantops.reference.decode(cut, scale, least, grid=grid)
            assert v.bits == least and torch.equal(v.codes.int(), cut)
            for q in (v.dequantize(), weights[name].at(least).dequantize(), weights[name].dequantize(least)):
                assert torch.equal(q, want)
    if rule == "floor":  # the codes of a narrower weight are those of the wider one, cut
        narrow = IntWeight.from_codes(quantops.encode(w, scale, 5, rule="floor"), scale, 5, grid=grid)
        assert torch.equal(load_int(path, bits=5)["a"].dequantize(), narrow.dequantize())
    for m, text in (
        (9, "bits: expected at most 8, .* got 9"),
        (17, "bits: expected an integer 0..16"),
        (-1, "bits: "),
        (2.0, "bits: expected an integer"),
        (True, "bits: expected an integer"),
    ):
        with pytest.raises(ValueError, match=text):
            load_int(path, bits=m)
    plain = nn.ParameterDict({"a": torch.ones(24, 50)})
    path2 = tmp_path / "a.safetensors"
    save_int({"a": weights["a"]}, path2)
    load_int(path2, plain, bits=2)
    assert torch.equal(plain["a"], weights["a"].dequantize(2))


CUT = """
import os, sys, torch, safetensors, quantops as Q
path, m = sys.argv[1], int(sys.argv[2])
opened = safetensors.safe_open

def cut(*args, **kwargs):
    f = opened(*args, **kwargs)  # the file is mapped: from now on, whoever reads behind its end is killed
    header = int.from_bytes(open(path, "rb").read(8), "little")
    os.truncate(path, 8 + header + 4 + 2 * 65536)  # the scale and two planes
    return f

safetensors.safe_open = cut
print(Q.load_int(path, bits=m)["w"].codes.sum().item())
"""


@needs_safetensors
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reading behind the end of a mapped file")
def test_opening_at_two_bits_reads_two_planes(tmp_path):
    path = tmp_path / "w.safetensors"
    codes = torch.randint(0, 16, (8 * 65536,))
    for m in (2, 4):
        save_int({"w": IntWeight.from_codes(codes, torch.ones(()), 4)}, path)
        run = subprocess.run(
            [sys.executable, "-c", CUT, path, str(m)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        if m == 2:
            assert run.stdout.split() == [str((codes >> 2).sum().item())], run.stderr
        else:
            assert run.returncode and not run.stdout


@needs_safetensors
def test_damage_in_planes_that_are_not_read_is_not_seen(tmp_path):
    path, codes = tmp_path / "w.safetensors", torch.randint(0, 256, (40, 30))
    save_int({"w": IntWeight.from_codes(codes, torch.ones(()), 8)}, path)
    _rewrite(path, lambda t, m, a: t["w.planes"][5:].bitwise_not_())
    for m in range(1, 6):
        assert torch.equal(load_int(path, bits=m)["w"].codes, (codes >> (8 - m)).to(torch.uint8))
    for m in (6, 7, None):
        with pytest.raises(ValueError, match="w: the checksum of plane 5 does not match"):
            load_int(path, bits=m)


def test_int_weight_errors():
    good = IntWeight.from_codes(torch.tensor([0, 3]), torch.ones(()), 2)
    with pytest.raises(ValueError, match=r"codes: .*2\^2"):
        IntWeight.from_codes(torch.tensor([0, 4]), torch.ones(()), 2)
    with pytest.raises(ValueError, match="packed: expected the layout 'planes', got 'dense'"):
        IntWeight(quantops.pack(good.codes, 2, layout="dense"), good.scale)
    for call in (lambda: good.at(3), lambda: good.dequantize(3)):
        with pytest.raises(ValueError, match="bits: expected 0..2, the bits that are stored, got 3"):
            call()


@needs_safetensors
def test_load_into_a_plain_model(saved):
    path, model = saved
    torch.manual_seed(5)
    plain = layered()
    for p in plain.parameters():
        nn.init.normal_(p)
    bias = plain[5].bias.detach().clone()
    load_int(path, plain)
    for name, v in to_int(model).items():
        assert torch.equal(plain.get_parameter(name), v.dequantize())
    assert torch.equal(plain[5].bias, bias)


@needs_safetensors
def test_load_into_a_model_that_does_not_fit_touches_nothing(saved):
    path, model = saved
    other = layered()
    other[6] = nn.Linear(8, 4)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"weights.safetensors: 6.weight: .* shape \(3, 8\), the model \(4, 8\)"):
        load_int(path, other)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    with pytest.raises(ValueError, match="3.weight: the model has no parameter"):
        load_int(path, nn.Sequential(nn.Conv2d(1, 4, 3)))
    with pytest.raises(ValueError, match="expected a plain model"):
        load_int(path, model)


@needs_safetensors
def test_every_truncation_is_an_error_that_names_the_file(saved):
    path, _ = saved
    whole = path.read_bytes()
    plain = layered()
    before = copy.deepcopy(plain.state_dict())
    for size in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="weights.safetensors: "):
            load_int(path, plain)
        assert path.read_bytes() == whole[:size]
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items())


def _rewrite(path, change):
    """Applies ``change`` to (tensors, metadata) of a file."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as f:
        tensors, metadata = {k: f.get_tensor(k).clone() for k in f.keys()}, dict(f.metadata())  # noqa: SIM118
    about = json.loads(metadata["weights"])
    change(tensors, metadata, about)
    if metadata.get("weights") not in (None, "{"):
        metadata["weights"] = json.dumps(about)
    save_file(tensors, path, metadata or None)


@needs_safetensors
@pytest.mark.parametrize(
    "change, text",
    [
        (lambda t, m, a: m.update(format="pt"), "expected the format 'quantops-int'.*got 'pt'"),
        (lambda t, m, a: m.clear(), "expected the format"),
        (lambda t, m, a: m.update(version="1"), "expected version 2 of the format, got '1'"),
        (lambda t, m, a: m.update(weights="{"), "metadata is not JSON"),
        (lambda t, m, a: a.clear(), "metadata lists no weights"),
        (lambda t, m, a: t.pop("5.weight.scale"), ".*differ in .*5.weight.scale"),
        (lambda t, m, a: t.update(extra=torch.ones(1)), ".*differ in .*extra"),
        (lambda t, m, a: a["5.weight"].pop("grid"), "5.weight: bad metadata"),
        (lambda t, m, a: a["5.weight"].update(dtype="int8"), "5.weight: bad metadata"),
        (lambda t, m, a: a["5.weight"].update(bits=17), "5.weight: expected bits 0..16, got 17"),
        (lambda t, m, a: a["5.weight"].update(bits="4"), "5.weight: expected bits 0..16, got '4'"),
        (
            lambda t, m, a: a["5.weight"].update(bits=3),
            r"5.weight: expected planes of shape \[3, 96\].*got U8 .*\[4, 96\]",
        ),
        (lambda t, m, a: a["5.weight"].update(crc32=[1]), "5.weight: expected planes"),
        (lambda t, m, a: a["5.weight"].update(crc32=["x"]), "5.weight: bad metadata"),
        (lambda t, m, a: a.update({"5.weight": []}), "5.weight: bad metadata"),
        (lambda t, m, a: a["5.weight"].update(shape=[8, 95]), "5.weight: expected planes of shape"),
        (lambda t, m, a: a["5.weight"].update(shape=[10**30]), "5.weight: expected a shape of at most"),
        (lambda t, m, a: a["5.weight"].update(shape=[-8, -96]), "5.weight: "),
        (lambda t, m, a: t.update({"5.weight.planes": torch.ones(4, 96)}), "5.weight: expected planes .*got F32"),
        (
            lambda t, m, a: a["5.weight"].update(grid="full"),
            "5.weight: the checksum of scale and metadata does not match",
        ),
        (lambda t, m, a: a["5.weight"].update(grid="even"), "5.weight: expected a grid"),
        (lambda t, m, a: a["5.weight"].update(shape=[96, 8]), "5.weight: expected one scale or one per row"),
        (
            lambda t, m, a: t["5.weight.planes"][3, 17].bitwise_xor_(1),
            "5.weight: the checksum of plane 3 does not match",
        ),
        (lambda t, m, a: t["5.weight.scale"][0].mul_(2), "5.weight: the checksum of scale and metadata does not match"),
        (lambda t, m, a: t["5.weight.scale"].fill_(float("nan")), "5.weight: expected finite scales"),
        (lambda t, m, a: t.update({"5.weight.scale": torch.ones(3)}), "5.weight: expected one scale or one per row"),
        (lambda t, m, a: t.update({"5.weight.scale": torch.ones(8).double()}), "5.weight: expected a scale of"),
    ],
)
def test_corrupt_and_foreign_files_are_errors(saved, change, text):
    path, _ = saved
    _rewrite(path, change)
    with pytest.raises(ValueError, match="weights.safetensors: " + text):
        load_int(path)


@needs_safetensors
def test_save_errors_leave_the_old_file(saved, monkeypatch):
    path, model = saved
    whole = path.read_bytes()
    good = to_int(model)["5.weight"]
    for weights, error, text in (
        ({}, TypeError, "weights: expected"),
        ([good], TypeError, "weights: expected"),
        ({"a": good.codes}, TypeError, r"weights\['a'\]: expected an IntWeight"),
        (layered(), ValueError, "has none"),
        ({"a": dataclasses.replace(good, scale=-good.scale)}, ValueError, "a: expected finite scales"),
        ({"a": dataclasses.replace(good, packed=dataclasses.replace(good.packed, bits=2))}, ValueError, "a: data: "),
    ):
        with pytest.raises(error, match=text):
            save_int(weights, path)
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_int(model, path)
    assert path.read_bytes() == whole and os.listdir(path.parent) == [path.name]
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_int(path.parent / "other")


def test_missing_safetensors_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"quantops\[io\]"):
        load_int(tmp_path / "x")
    with pytest.raises(ImportError, match=r"quantops\[io\]"):
        save_int(quantize_(layered(), MSQConfig()), tmp_path / "x")
