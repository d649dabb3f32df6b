"""quantize_ and unquantize_: which layers, which errors."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import quantops
from networks import layered
from quantops.convert import quantize_, unquantize_
from quantops.intweight import to_int
from quantops.layers import is_linear_or_conv
from quantops.methods.cpq import CPQConfig
from quantops.methods.msq import MSQConfig
from quantops.methods.truncquant import TruncQuantConfig
from quantops.nn import quantized


def names(model):
    return [name for name, _, _ in quantized(model)]


def precision(model):
    return {name: (int(p.bits), int(p.k), p.prune) for name, _, p in quantized(model)}


# quantize_


def test_default_filter_takes_linear_and_conv_in_place():
    model = layered()
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
    model = quantize_(layered(), MSQConfig(bits=6, k=2, first=8, last="skip", overrides={"3": {"bits": 5, "k": 1}}))
    assert precision(model) == {"0": (8, 0, False), "3": (5, 1, True), "5": (6, 2, True)}
    model = quantize_(layered(), MSQConfig(first=8, overrides={"[05]": {"bits": 3}, "5": {"prune": False}}))
    assert precision(model) == {"0": (3, 0, False), "3": (8, 1, True), "5": (3, 0, False), "6": (8, 1, True)}


def test_the_first_and_the_last_layer_are_whole_ones():
    make = lambda: nn.Sequential(nn.LSTM(4, 4), nn.Linear(4, 4), nn.LSTM(4, 3))  # noqa: E731
    assert names(quantize_(make(), TruncQuantConfig.paper(bits=(4, 2)))) == ["1"]
    found = precision(quantize_(make(), MSQConfig(bits=4, first=8, last=6)))
    assert [bits for bits, _, _ in found.values()] == [8, 8, 4, 6, 6]
    with pytest.raises(ValueError, match="first, last: skip every layer"):
        quantize_(nn.LSTM(4, 4), MSQConfig(first="skip"))


def test_the_last_layer_may_share_the_weight_of_the_first():
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    for options, bits in (({"last": 8}, 8), ({"first": 6}, 6), ({"first": 6, "last": 8}, 8)):
        found = precision(quantize_(copy.deepcopy(model), MSQConfig(bits=4, **options), ["*weight"]))
        assert {name: bits for name, (bits, _, _) in found.items()} == {"0": bits, "1": 4}
    assert names(quantize_(model, MSQConfig(last="skip"), ["*weight"])) == ["1"]


def _parametrized():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.utils.parametrizations.weight_norm(model[1])
    return model


def _complex():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.complex64))


def _tied_to(**options):
    model = nn.Sequential(nn.Embedding(4, 4, **options), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    "make, config, filter_fn, text",
    [
        (layered, {}, lambda name, m: False, "filter_fn: matches none"),
        (
            layered,
            {"overrides": {"layer9.*": {"bits": 4}}},
            None,
            r"overrides\['layer9\.\*'\]: .* none of the layers 0, 3",
        ),
        (layered, {"first": "skip", "overrides": {"0": {"bits": 4}}}, None, r"overrides\['0'\]: matches none"),
        (lambda: nn.Linear(2, 2), {"first": "skip"}, None, "first, last: skip every layer"),
        (layered, {"overrides": {"5": {"bits": 17}}}, None, "5: bits: expected an integer 0..16, got 17"),
        (layered, {"overrides": {"5": {"bits": 1}}}, None, "5: expected k < bits = 1"),
        (layered, {}, lambda name, m: True, "model: expected a module with a parameter 'weight', got Sequential"),
        (layered, {}, lambda name, m: name in ("0", "2"), "2: expected a module with a parameter 'weight', got ReLU"),
        (_parametrized, {}, None, "1: the weight already has a parametrization"),
        (_complex, {}, None, "1: expected a floating-point weight .*complex64"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)), {}, None, "1: .*not initialized"),
        (lambda: nn.Linear(2, 2, device="meta"), {}, None, "model: .*not initialized"),
        (lambda: nn.Embedding(2, 2, max_norm=1.0), {}, ["weight"], r"model: max_norm: expected None, got 1\.0"),
        (lambda: nn.EmbeddingBag(2, 2, sparse=True), {}, ["weight"], "model: sparse: expected False, got True"),
        (lambda: _tied_to(max_norm=2), {}, None, "0: max_norm: expected None, got 2"),
        (lambda: torch.jit.script(nn.Linear(2, 2)), {}, ["weight"], "model: expected a layer in Python, got a Script"),
        (lambda: _tied_to(sparse=True), {}, None, "0: sparse: expected False, got True"),
    ],
)
def test_errors_leave_the_model_untouched(make, config, filter_fn, text):
    model = make()
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=text):
        quantize_(model, MSQConfig(**config), filter_fn)
    assert keys == list(model.state_dict()) and classes == [type(m) for m in model.modules()]
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("filter_fn", [None, ["0.weight"]])
def test_scripted_parts_stay_as_they_are(filter_fn):
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU())))
    with pytest.warns(UserWarning, match=r"50\.0% of the weights .* in float stay 1\.0\.weight"):
        quantize_(model, MSQConfig(bits=3), filter_fn)
    x = torch.randn(2, 4)
    assert list(to_int(model)) == ["0.weight"] and torch.equal(quantops.plain_model(model)(x), model(x))


def test_twice_and_compiled_and_wrong_config_are_errors():
    model = quantize_(layered(), MSQConfig())
    with pytest.raises(ValueError, match="0: the weight already has a parametrization"):
        quantize_(model, MSQConfig())
    with pytest.raises(TypeError, match="config: expected MSQConfig.*got dict"):
        quantize_(layered(), {"bits": 8})
    with pytest.raises(ValueError, match="quantize_ first, then torch.compile"):
        quantize_(torch.compile(layered()), MSQConfig())


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
    model = quantize_(layered(), MSQConfig(bits=3))
    float_weight, q = model[0].parametrizations.weight.original.detach().clone(), model[0].weight.detach().clone()
    parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)
    assert torch.equal(model[0].weight, float_weight)
    other = quantize_(layered(), MSQConfig(bits=3))
    parametrize.remove_parametrizations(other[0], "weight", leave_parametrized=True)
    assert torch.equal(other[0].weight, q) and not torch.equal(q, float_weight)
    other(torch.randn(2, 1, 8, 8))


@pytest.mark.parametrize("fuse", ["model", "layer"])
@pytest.mark.parametrize("config", [MSQConfig, TruncQuantConfig, CPQConfig])
def test_unquantize_gives_the_float_network_back(config, fuse):
    plain, x = layered().eval(), torch.randn(2, 1, 8, 8)
    options = {"batch_norm": False} if config is TruncQuantConfig else {}
    model = layered().eval()
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
    model = quantize_(layered(), MSQConfig(overrides={"0": {"bits": 4}, "5": {"bits": 2}}))
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
    model = quantize_(layered(), MSQConfig())
    controller = quantops.MSQController(model, 8.0, threshold=1.0, strength=1e-3, hessian=False)
    assert controller.step() is not None
    unquantize_(model)
    with pytest.raises(ValueError, match="model: 0 is not quantized any more"):
        controller.step()


def test_unquantize_refuses_what_it_would_leave_half_done():
    with pytest.raises(ValueError, match="model: expected a model with quantizers, found none"):
        unquantize_(layered())
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got int"):
        unquantize_(3)
    model = nn.Sequential(layered())
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
    widths = quantize_(layered(), TruncQuantConfig())
    with pytest.raises(ValueError, match="1: a batch norm for each width cannot stay"):
        unquantize_(widths)
    assert len(quantized(widths)) == 4
    parts = nn.Sequential(layered(), nn.Flatten())
    quantize_(parts[0], MSQConfig())  # a part that was quantized alone may go alone, or with the whole
    assert not quantized(unquantize_(parts))


def test_assigning_a_weight_sets_the_float_weight():
    model = quantize_(layered(), MSQConfig(bits=3))
    original, value = model[6].parametrizations.weight.original, torch.randn(3, 8)
    model(torch.randn(2, 1, 8, 8))
    model[6].weight = value
    assert model[6].parametrizations.weight.original is original and torch.equal(original, value)
    assert torch.equal(model[6].weight, to_int(model)["6.weight"].dequantize())


def test_a_pickled_model_goes_on_as_one_of_its_own():
    model = quantize_(layered(), MSQConfig(bits=3, cache=True))
    x = torch.randn(2, 1, 8, 8)
    model.eval()(x)
    other = pickle.loads(pickle.dumps(model))
    group = quantized(other)[0][2].group
    assert [p.slot.result for _, p in group.layers] == [None] * 4 and group.layers[0][1].group is group
    assert torch.equal(other(x), model(x)) and [name for name, _ in other.named_parameters()] == [
        name for name, _ in model.named_parameters()
    ]
    before = model(x)
    other(x).sum().backward()
    torch.optim.SGD(other.parameters(), 0.1).step()
    assert torch.equal(model(x), before) and not torch.equal(other(x), before)
    assert not quantized(unquantize_(other)) and len(quantized(model)) == 4


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


class Mixed(nn.Module):
    """Parameters of one shape, and a module behind them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(4, 4)) for _ in range(3))
        self.last = nn.Linear(4, 4, bias=False)


@pytest.mark.parametrize("chosen", [["a"], ["c"], ["b", "c"], ["a", "c"], ["a", "b", "c", "last.weight"]], ids=str)
def test_parameters_at_either_end_of_a_layer_keep_their_order(chosen):
    model = Mixed()
    before = list(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "quantize_: .*are quantized")
        quantize_(model, MSQConfig(), chosen)
    names = [n for n, _ in model.named_modules()]
    assert len(set(names)) == len(names)
    for m in (model, copy.deepcopy(model)):
        assert [n.split(".")[-2 if "parametrizations" in n else 0] for n, _ in m.named_parameters()][:3] == [*"abc"]
    assert all(p is old for p, old in zip(model.parameters(), before, strict=True))


def test_an_order_that_changes_without_a_word_of_torch_is_a_warning():
    model = Mixed()
    with pytest.warns(UserWarning, match="the order of parameters has changed, from c on"):
        quantize_(model, MSQConfig(), ["b"])
    assert [n for n, _ in model.named_parameters()][:2] == ["a", "c"]


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
