"""quantize_: which layers, which errors; to_int, save_int, load_int."""

import copy
import importlib.util
import json
import os
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from quantops.convert import is_linear_or_conv, quantize_
from quantops.intweight import IntWeight, load_int, save_int, to_int
from quantops.methods.msq import MSQConfig
from quantops.nn import quantized

needs_safetensors = pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="safetensors missing")


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(),
                         nn.Linear(6 * 16, 8), nn.Linear(8, 3)).to(dtype)


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
    assert set(model.state_dict()) >= {"0.parametrizations.weight.original", "0.parametrizations.weight.0.bits",
                                       "0.parametrizations.weight.0.k"}


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


@pytest.mark.parametrize("make, config, filter_fn, text", [
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
])
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


@pytest.mark.parametrize("options, text", [
    ({"bits": 17}, "bits: expected an integer 0..16, got 17"), ({"bits": -1}, "bits: .*got -1"),
    ({"bits": 8.0}, "bits: .*got 8.0"), ({"bits": True}, "bits: .*got True"), ({"bits": 2, "k": 2}, "k < bits = 2"),
    ({"k": -1}, "k: .*got -1"), ({"grid": "even"}, "grid: expected one of 'dyadic', 'full', got 'even'"),
    ({"per_row": 1}, "per_row: "), ({"penalty": "l2"}, "penalty: expected one of 'loss', 'decoupled'"),
    ({"fuse": "all"}, "fuse: "), ({"cache": None}, "cache: "), ({"first": "fixed"}, "first: "),
    ({"last": 17}, "last: .*17"), ({"first": True}, "first: "), ({"overrides": []}, "overrides: "),
    ({"overrides": {"a": 4}}, r"overrides\['a'\]: "), ({"overrides": {"a": {"bit": 4}}}, r"overrides\['a'\]: .*'bit'"),
])
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
@pytest.mark.parametrize("grid", ["dyadic", "full"])
@pytest.mark.parametrize("per_row", [False, True])
def test_dequantize_is_the_training_forward_bit_for_bit(dtype, grid, per_row):
    for bits in (0, 1, 2, 5, 8, 9, 16):
        model = quantize_(net(dtype), MSQConfig(bits=bits, k=0, grid=grid, per_row=per_row))
        weights = to_int(model)
        assert list(weights) == ["0.weight", "3.weight", "5.weight", "6.weight"]
        for name, v in weights.items():
            q = model[int(name[0])].weight
            assert v.codes.dtype == (torch.uint8 if bits <= 8 else torch.int32) and v.dtype == dtype
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
        tensors, metadata = {k: f.get_tensor(k).clone() for k in f.keys()}, dict(f.metadata())
    about = json.loads(metadata["weights"])
    change(tensors, metadata, about)
    if metadata.get("weights") not in (None, "{"):
        metadata["weights"] = json.dumps(about)
    save_file(tensors, path, metadata or None)


@needs_safetensors
@pytest.mark.parametrize("change, text", [
    (lambda t, m, a: m.update(format="pt"), "expected the format 'quantops-int'.*got 'pt'"),
    (lambda t, m, a: m.clear(), "expected the format"),
    (lambda t, m, a: m.update(version="2"), "expected version 1 of the format, got '2'"),
    (lambda t, m, a: m.update(weights="{"), "metadata is not JSON"),
    (lambda t, m, a: a.clear(), "metadata lists no weights"),
    (lambda t, m, a: t.pop("5.weight.scale"), ".*differ in .*5.weight.scale"),
    (lambda t, m, a: t.update(extra=torch.ones(1)), ".*differ in .*extra"),
    (lambda t, m, a: a["5.weight"].pop("grid"), "5.weight: bad metadata"),
    (lambda t, m, a: a["5.weight"].update(dtype="int8"), "5.weight: bad metadata"),
    (lambda t, m, a: a["5.weight"].update(bits=17), "5.weight: expected bits 0..16, got 17"),
    (lambda t, m, a: a["5.weight"].update(bits="4"), "5.weight: expected bits 0..16, got '4'"),
    (lambda t, m, a: a["5.weight"].update(bits=3), "5.weight: expected codes 0..7, got"),
    (lambda t, m, a: a["5.weight"].update(bits=9), "5.weight: codes of 9 bits are torch.uint8"),
    (lambda t, m, a: a["5.weight"].update(grid="even"), "5.weight: expected a grid"),
    (lambda t, m, a: a["5.weight"].update(shape=[96, 8]), "5.weight: codes have shape"),
    (lambda t, m, a: t["5.weight.codes"][0, 0].bitwise_xor_(1), "5.weight: the checksum does not match"),
    (lambda t, m, a: t["5.weight.scale"][0].mul_(2), "5.weight: the checksum does not match"),
    (lambda t, m, a: t["5.weight.scale"].fill_(float("nan")), "5.weight: expected finite scales"),
    (lambda t, m, a: t.update({"5.weight.scale": torch.ones(3)}), "5.weight: expected one scale or one per row"),
    (lambda t, m, a: t.update({"5.weight.scale": torch.ones(8).double()}), "5.weight: expected a scale of"),
])
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
        ({}, TypeError, "weights: expected"), ([good], TypeError, "weights: expected"),
        ({"a": good.codes}, TypeError, r"weights\['a'\]: expected an IntWeight"), (net(), ValueError, "has none"),
        ({"a": IntWeight(good.codes, good.scale, 2)}, ValueError, "a: expected codes 0..3"),
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
