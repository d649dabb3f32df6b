"""quantize_: which layers, which errors; to_int, save_int, load_int."""

import copy
import dataclasses
import importlib.util
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import quantops
from quantops.convert import is_linear_or_conv, quantize_, unquantize_
from quantops.intfile import load_int, save_int
from quantops.intweight import IntWeight, to_int
from quantops.methods.cpq import CPQConfig
from quantops.methods.msq import MSQConfig
from quantops.methods.truncquant import TruncQuantConfig
from quantops.nn import quantized

needs_safetensors = pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="safetensors missing")


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.Flatten(),
        nn.Linear(6 * 16, 8),
        nn.Linear(8, 3),
    ).to(dtype)


def names(model):
    return [name for name, _, _ in quantized(model)]


def precision(model):
    return {name: (int(p.bits), int(p.k), p.prune) for name, _, p in quantized(model)}


# quantize_


def test_default_filter_takes_linear_and_conv_in_place():
    model = net()
    before = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert quantize_(model, MSQConfig()) is model
    assert names(model) == ["0", "3", "5", "6"]
    for name, owner, _ in quantized(model):
        assert owner.original is before[f"{name}.weight"]
    assert model[1].weight is before["1.weight"]  # batch norm is left alone
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    old = before["5.weight"].detach().clone()
    optimizer.step()  # an optimizer made before still trains these weights
    assert not torch.equal(old, model[5].parametrizations.weight.original)
    assert set(model.state_dict()) >= {
        "0.parametrizations.weight.original",
        "0.parametrizations.weight.0.bits",
        "0.parametrizations.weight.0.k",
    }


def test_filter_chooses_any_module_with_a_weight():
    model = nn.Sequential(nn.Embedding(7, 4), nn.ConvTranspose1d(3, 2, 2), nn.Linear(4, 4))
    quantize_(model, MSQConfig(bits=4), lambda name, m: not is_linear_or_conv(name, m) and hasattr(m, "weight"))
    assert names(model) == ["0", "1"]
    assert model[0](torch.tensor([1, 2])).shape == (2, 4)
    single = quantize_(nn.Linear(3, 3), MSQConfig(bits=2))  # the root itself
    assert names(single) == [""] and len(single.weight.unique()) <= 4
    single(torch.randn(2, 3)).sum().backward()
    assert single.parametrizations.weight.original.grad is not None


def test_first_last_and_overrides():
    model = quantize_(net(), MSQConfig(bits=6, k=2, first=8, last="skip", overrides={"3": {"bits": 5, "k": 1}}))
    assert precision(model) == {"0": (8, 0, False), "3": (5, 1, True), "5": (6, 2, True)}
    model = quantize_(net(), MSQConfig(first=8, overrides={"[05]": {"bits": 3}, "5": {"prune": False}}))
    assert precision(model) == {"0": (3, 0, False), "3": (8, 1, True), "5": (3, 0, False), "6": (8, 1, True)}


def _shared():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def _parametrized():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.utils.parametrizations.weight_norm(model[1])
    return model


def _complex():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.complex64))


@pytest.mark.parametrize(
    "make, config, filter_fn, text",
    [
        (net, {}, lambda name, m: False, "filter_fn: matches none"),
        (net, {"overrides": {"layer9.*": {"bits": 4}}}, None, r"overrides\['layer9\.\*'\]: .* none of the layers 0, 3"),
        (net, {"first": "skip", "overrides": {"0": {"bits": 4}}}, None, r"overrides\['0'\]: matches none"),
        (lambda: nn.Linear(2, 2), {"first": "skip"}, None, "first, last: skip every layer"),
        (net, {"overrides": {"5": {"bits": 17}}}, None, "5: bits: expected an integer 0..16, got 17"),
        (net, {"overrides": {"5": {"bits": 1}}}, None, "5: expected k < bits = 1"),
        (net, {}, lambda name, m: True, "model: expected a module with a parameter 'weight', got Sequential"),
        (net, {}, lambda name, m: name in ("0", "2"), "2: expected a module with a parameter 'weight', got ReLU"),
        (_shared, {}, None, "1: shares its weight with 0"),
        (_parametrized, {}, None, "1: the weight already has a parametrization"),
        (_complex, {}, None, "1: expected a floating-point weight .*complex64"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)), {}, None, "1: .*not initialized"),
        (lambda: nn.Linear(2, 2, device="meta"), {}, None, "model: .*not initialized"),
    ],
)
def test_errors_leave_the_model_untouched(make, config, filter_fn, text):
    model = make()
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=text):
        quantize_(model, MSQConfig(**config), filter_fn)
    assert keys == list(model.state_dict()) and classes == [type(m) for m in model.modules()]
    assert not model._forward_pre_hooks


def test_twice_and_compiled_and_wrong_config_are_errors():
    model = quantize_(net(), MSQConfig())
    with pytest.raises(ValueError, match="0: the weight already has a parametrization"):
        quantize_(model, MSQConfig())
    with pytest.raises(TypeError, match="config: expected MSQConfig.*got dict"):
        quantize_(net(), {"bits": 8})
    with pytest.raises(ValueError, match="quantize_ first, then torch.compile"):
        quantize_(torch.compile(net()), MSQConfig())


@pytest.mark.parametrize(
    "options, text",
    [
        ({"bits": 17}, "bits: expected an integer 0..16, got 17"),
        ({"bits": -1}, "bits: .*got -1"),
        ({"bits": 8.0}, "bits: .*got 8.0"),
        ({"bits": True}, "bits: .*got True"),
        ({"bits": 2, "k": 2}, "k < bits = 2"),
        ({"k": -1}, "k: .*got -1"),
        ({"grid": "even"}, "grid: expected one of 'dyadic', 'full', 'sign', got 'even'"),
        ({"scale": "max"}, "scale: expected 'absmax' or a positive number .*'max'"),
        ({"scale": 0}, "scale: .*got 0"),
        ({"scale": True}, "scale: .*True"),
        ({"per_row": 1}, "per_row: "),
        ({"penalty": "l2"}, "penalty: expected one of 'loss', 'decoupled'"),
        ({"fuse": "all"}, "fuse: "),
        ({"cache": None}, "cache: "),
        ({"first": "fixed"}, "first: "),
        ({"last": 17}, "last: .*17"),
        ({"first": True}, "first: "),
        ({"overrides": []}, "overrides: "),
        ({"overrides": {"a": 4}}, r"overrides\['a'\]: "),
        ({"overrides": {"a": {"bit": 4}}}, r"overrides\['a'\]: .*'bit'"),
    ],
)
def test_config_errors_name_the_field(options, text):
    with pytest.raises(ValueError, match=text):
        MSQConfig(**options)


def test_removing_the_parametrization_gives_either_weight_back():
    model = quantize_(net(), MSQConfig(bits=3))
    float_weight, q = model[0].parametrizations.weight.original.detach().clone(), model[0].weight.detach().clone()
    parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)
    assert torch.equal(model[0].weight, float_weight)
    other = quantize_(net(), MSQConfig(bits=3))
    parametrize.remove_parametrizations(other[0], "weight", leave_parametrized=True)
    assert torch.equal(other[0].weight, q) and not torch.equal(q, float_weight)
    other(torch.randn(2, 1, 8, 8))


@pytest.mark.parametrize("fuse", ["model", "layer"])
@pytest.mark.parametrize("config", [MSQConfig, TruncQuantConfig, CPQConfig])
def test_unquantize_gives_the_float_network_back(config, fuse):
    plain, x = net().eval(), torch.randn(2, 1, 8, 8)
    options = {"batch_norm": False} if config is TruncQuantConfig else {}
    model = net().eval()
    before = list(model.named_parameters())
    quantize_(model, config(fuse=fuse, cache=config is MSQConfig, **options))
    other, quantizers = copy.deepcopy(model), [p for _, _, p in quantized(model)]
    q = other(x)
    assert not torch.equal(model(x), plain(x))
    assert unquantize_(model) is model and not quantized(model)
    after = list(model.named_parameters())
    assert [name for name, _ in before] == [name for name, _ in after]
    assert all(a is b for (_, a), (_, b) in zip(before, after))
    assert torch.equal(model(x), plain(x)) and list(model.state_dict()) == list(plain.state_dict())
    assert all(p.group is None and p.slot.result is None for p in quantizers)
    assert not any(m._forward_pre_hooks or m._forward_hooks or m._forward_hooks_always_called for m in model.modules())
    assert torch.equal(other(x), q) and len(quantized(other)) == 4  # the copy shared torch's classes with it


def test_another_method_goes_on_at_the_bits_that_one_has_found():
    model = quantize_(net(), MSQConfig(overrides={"0": {"bits": 4}, "5": {"bits": 2}}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bits = {row.name: row.bits for row in quantops.bit_report(model).rows}
    quantize_(
        unquantize_(model),
        TruncQuantConfig(
            bits=(8,),
            rule="nearest",
            scale=1.87,
            batch_norm=False,
            overrides={name: {"bits": n} for name, n in bits.items()},
        ),
    )
    assert {row.name: row.bits for row in quantops.bit_report(model).rows} == bits == {"0": 4, "3": 8, "5": 2, "6": 8}
    assert model[5].weight.unique().numel() <= 4
    before = model[5].parametrizations.weight.original.detach().clone()
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[5].parametrizations.weight.original, before)


def test_a_bare_layer_has_the_name_of_its_report():
    layer = quantize_(nn.Linear(4, 3), MSQConfig(overrides={"model": {"bits": 3}}))
    assert [(row.name, row.bits) for row in quantops.bit_report(layer).rows] == [("model", 3)]
    assert list(unquantize_(layer)._parameters) == ["weight", "bias"]


def test_a_controller_does_not_decide_about_what_is_gone():
    model = quantize_(net(), MSQConfig())
    controller = quantops.MSQController(model, 8.0, threshold=1.0, strength=1e-3, hessian=False)
    assert controller.step() is not None
    unquantize_(model)
    with pytest.raises(ValueError, match="model: 0 is not quantized any more"):
        controller.step()


def test_unquantize_refuses_what_it_would_leave_half_done():
    with pytest.raises(ValueError, match="model: expected a model with quantizers, found none"):
        unquantize_(net())
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got int"):
        unquantize_(3)
    model = nn.Sequential(net())
    quantize_(model, MSQConfig())
    with pytest.raises(ValueError, match="model: 0 is quantized with the whole that quantize_ was called with"):
        unquantize_(model[0])
    assert len(quantized(model)) == 4 and model._forward_pre_hooks
    with pytest.raises(ValueError, match="model: 0 is quantized with the whole"):
        unquantize_(copy.deepcopy(model)[0])
    with pytest.raises(ValueError, match="expected the model itself, got what torch.compile or DDP made of it"):
        unquantize_(torch.compile(model))
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)  # as in DDP, without a process group
    wrapped.module = model
    with pytest.raises(ValueError, match="expected the model itself, got what torch.compile or DDP made of it"):
        unquantize_(wrapped)
    owner = model[0][0].parametrizations.weight
    plain, owner.original.__class__ = owner.original, type("DTensor", (nn.Parameter,), {})
    with pytest.raises(ValueError, match="0.0: expected a plain weight, got a DTensor"):
        unquantize_(model)
    plain.__class__ = nn.Parameter
    parametrize.register_parametrization(model[0][5], "weight", nn.Identity())
    with pytest.raises(ValueError, match="0.5: expected a weight with no other parametrization.*MSQWeight, Identity"):
        unquantize_(model)
    assert len(quantized(model)) == 4 and model._forward_pre_hooks
    widths = quantize_(net(), TruncQuantConfig())
    with pytest.raises(ValueError, match="1: a batch norm for each width cannot stay"):
        unquantize_(widths)
    assert len(quantized(widths)) == 4
    parts = nn.Sequential(net(), nn.Flatten())
    quantize_(parts[0], MSQConfig())  # a part that was quantized alone may go alone, or with the whole
    assert not quantized(unquantize_(parts))


def test_assigning_a_weight_sets_the_float_weight():
    model = quantize_(net(), MSQConfig(bits=3))
    original, value = model[6].parametrizations.weight.original, torch.randn(3, 8)
    model(torch.randn(2, 1, 8, 8))
    model[6].weight = value
    assert model[6].parametrizations.weight.original is original and torch.equal(original, value)
    assert torch.equal(model[6].weight, to_int(model)["6.weight"].dequantize())


def test_pickling_is_refused_by_torch_but_the_group_pickles():
    model = quantize_(net(), MSQConfig(cache=True))
    model(torch.randn(2, 1, 8, 8))
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(model)
    group = pickle.loads(pickle.dumps(quantized(model)[0][2].group))
    assert [p.slot.result for _, p in group.layers] == [None] * 4 and group.layers[0][1].group is group


# Integer weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", ["dyadic", "full", "sign"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("scale", ["absmax", 1.5])
def test_dequantize_is_the_training_forward_bit_for_bit(dtype, grid, per_row, scale):
    for bits in (0, 1, 2, 5, 7, 8, 9, 15 if grid == "sign" else 16):
        model = quantize_(net(dtype), MSQConfig(bits=bits, k=0, grid=grid, per_row=per_row, scale=scale))
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
        to_int(net())
    model = quantize_(net(), MSQConfig())
    with torch.no_grad():
        model[5].parametrizations.weight.original[0, 0] = float("nan")
    with pytest.raises(ValueError, match="5: the weight has NaN"):
        to_int(model)


@pytest.fixture
def saved(tmp_path):
    """(path, quantized model): mixed bits, a scale per row."""
    model = quantize_(net(), MSQConfig(bits=4, per_row=True, first=9, overrides={"3": {"bits": 0, "k": 0}}))
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
    plain = net()
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
    other = net()
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
    plain = net()
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
        (net(), ValueError, "has none"),
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
        save_int(quantize_(net(), MSQConfig()), tmp_path / "x")


@pytest.mark.parametrize("fuse", ["model", "layer"])
def test_errors_of_the_ops_name_the_layer(fuse):
    model = quantize_(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), MSQConfig(bits=4, fuse=fuse))
    with torch.no_grad():
        model[2].parametrizations.weight.original[1, 1] = torch.nan
    with pytest.raises(ValueError, match=r"^2: scale: expected finite values >= 0, got .*nan"):
        model(torch.ones(1, 4))


# The order of parameters, by which optimizers know their states


@pytest.mark.parametrize("config", [MSQConfig(), TruncQuantConfig(batch_norm=False), CPQConfig()])
def test_parameters_keep_their_order(config):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.LayerNorm(4), nn.Linear(4, 3, bias=False), nn.Linear(3, 3))
    before = list(model.parameters())
    quantize_(model, config, lambda name, m: isinstance(m, (nn.Conv2d, nn.LayerNorm, nn.Linear)))
    for m in (model, copy.deepcopy(model)):
        names = [n for n, _ in m.named_parameters() if ".log_" not in n]
        assert names == [
            f"{i}.{n}" for i in range(4) for n in ("parametrizations.weight.original", "bias") if (i, n) != (2, "bias")
        ]
        modules = [n for n, _ in m.named_modules()]
        assert len(set(modules)) == len(modules) and {"", "0", "3.parametrizations.weight.0"} <= set(modules)
    assert all(
        a is b for a, b in zip((p for n, p in model.named_parameters() if ".log_" not in n), before, strict=True)
    )
    assert all(a is b for a, b in zip(unquantize_(model).parameters(), before, strict=True))


def test_states_of_an_optimizer_made_before_go_to_their_parameters():
    def norm():
        return nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))

    model = norm()
    optimizer = torch.optim.Adam(model.parameters())
    (model(torch.randn(3, 4)) * torch.randn(3, 4)).sum().backward()
    optimizer.step()
    quantize_(model, MSQConfig(), lambda name, m: isinstance(m, (nn.LayerNorm, nn.Linear)))
    after = torch.optim.Adam(model.parameters())
    after.load_state_dict(optimizer.state_dict())
    for p in model.parameters():
        assert torch.equal(after.state[p]["exp_avg"], optimizer.state[p]["exp_avg"])


@pytest.mark.parametrize(
    "wrap, text",
    [
        (nn.utils.parametrizations.weight_norm, r"\(_WeightNorm\).*remove_parametrizations"),
        (nn.utils.parametrizations.spectral_norm, r"\(_SpectralNorm\).*remove_parametrizations"),
        (nn.utils.weight_norm, "computed from weight_g .*remove_weight_norm"),
        (nn.utils.spectral_norm, "computed from weight_orig .*remove_spectral_norm"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), r"computed from weight_orig .*prune.remove"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_is_computed_says_how_it_becomes_plain(wrap, text):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    wrap(model[1])
    with pytest.raises(ValueError, match=f"^1: .*{text}"):
        quantize_(model, MSQConfig())
    assert not quantized(model)
