"""State dicts say with which settings their numbers were made; constants are there after every move and load."""

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from quantops import (
    CategoricalActivation,
    CPQConfig,
    MSQConfig,
    TruncQuantConfig,
    UniformActivation,
    calibrate,
    finish_dropbits,
    quantize_,
    set_bits,
    unquantize_,
)
from quantops.calibration import activations
from quantops.classes import QuantizedList
from quantops.nn import quantized
from quantops.state import Settings

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIGS = [
    MSQConfig(bits=3),
    MSQConfig(bits=3, scale="absmax", per_row=True, grid="full"),
    TruncQuantConfig(bits=(8, 4)),
    TruncQuantConfig(bits=(8, 2)),
    TruncQuantConfig(scale="absmax", companding="tanh", out_scale="absmean"),
    CPQConfig(act_bits=4),
    CPQConfig(act_bits=3),
    CPQConfig(bits=3, dropbits="learned"),
    CPQConfig(per_row=True),
    MSQConfig(bits=3, act_bits=4, act_scale="tracked"),
    TruncQuantConfig(bits=(8, 2), act_bits="weights"),
    MSQConfig(act_bits=4, act="input", act_scale="clip"),
]
ACTIVATIONS = {"CategoricalActivation", "UniformActivation"}


def make(config):
    torch.manual_seed(0)
    return quantize_(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), config)


def batch():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def started(config):
    model = make(config)
    for n in reversed(config.bits) if isinstance(config, TruncQuantConfig) else [None]:
        if n is not None:
            set_bits(model, n)
        model(batch())
    return model.eval()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_model_gets_all_values_from_its_state_dict(config):
    """From memory that held anything, too."""
    model = started(config)
    state = model.state_dict()
    for make_empty in (lambda m: m.to_empty(device="cpu"), lambda m: m.to("meta").to_empty(device="cpu")):
        other = make_empty(make(config)).eval()
        with torch.no_grad():
            for t in (*other.parameters(), *(t for n, t in other.named_buffers() if n in state)):
                t.fill_(77)
        other.load_state_dict(state)
        assert torch.equal(other(batch()), model(batch())) and repr(other) == repr(model)
    lean = make(config).to("meta").eval()
    lean.load_state_dict(state, assign=True)
    assert torch.equal(lean(batch()), model(batch()))


def test_every_constant_is_made_again():
    """Of every module of quantops: what is not in a state dict has its value after to_empty."""
    seen = set()
    for config in CONFIGS:
        model = make(config)
        for module in model.modules():
            lost = set(dict(module.named_buffers(recurse=False))) - set(module.state_dict())
            if type(module) is QuantizedList:
                assert not lost
            elif type(module).__module__.startswith("quantops"):
                assert isinstance(module, Settings) and lost == {*module.constants, "seal"}
                seen.add(type(module).__name__)
        values = {n: t.clone() for n, t in model.named_buffers() if n not in model.state_dict() and "seal" not in n}
        for n, t in model.named_buffers():
            if n in values:
                t.fill_(77)
        model.to_empty(device="cpu")
        assert all(torch.equal(t, values[n]) for n, t in model.named_buffers() if n in values)
    assert seen == {"MSQWeight", "TruncQuantWeight", "CPQWeight", "MultiBatchNorm", *ACTIVATIONS}


@pytest.mark.parametrize(
    "model, state, text",
    [
        (
            0,
            1,
            "0: expected a state of the settings that the model has, grid='dyadic', scale=2.8, per_row=False, got "
            "one of grid='full', scale='absmax', per_row=True",
        ),
        (2, 3, r"widths=\[8, 4\], got one of widths=\[8, 2\]"),
        (5, 6, "2: .* bits=4, got one of bits=3"),
        (0, 2, "method='msq'.*method='truncquant'"),
        (7, 5, "dropbits='learned'.*dropbits=None"),
        (8, 5, "per_row=True.*per_row=False"),
    ],
)
def test_other_settings_are_refused_by_both_names(model, state, text):
    model, state = (make(CONFIGS[i]) for i in (model, state))
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=text):
            model.load_state_dict(state.state_dict(), strict)


@pytest.mark.parametrize(
    "config, other, text",
    [
        (TruncQuantConfig(), {"slope": "ste"}, "trained with slope='ste', the model has slope='exact'"),
        (MSQConfig(), {"scale_grad": True}, "trained with scale_grad=True, the model has scale_grad=False"),
        (MSQConfig(), {"penalty": "decoupled"}, "trained with penalty='decoupled', the model has penalty='loss'"),
        (CPQConfig(), {"grad": "winner"}, "trained with grad='winner'"),
    ],
    ids=str,
)
def test_settings_of_training_alone_are_told(config, other, text):
    """The values are the same."""
    trained, model = started(dataclasses.replace(config, **other)), make(config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(config).load_state_dict(started(config).state_dict())
    with pytest.warns(UserWarning, match=text):
        model.load_state_dict(trained.state_dict())
    assert torch.equal(model(batch()), trained(batch()))


@pytest.mark.parametrize(
    "config, key, value, text",
    [
        (CONFIGS[0], "0.parametrizations.weight.0.bits", 3.7, "0: bits: expected one of 0, 1, .*, 16, got 3.7"),
        (CONFIGS[0], "3.parametrizations.weight.0.bits", 40, "3: bits: expected .* got 40"),
        (CONFIGS[0], "0.parametrizations.weight.0.k", float("nan"), "0: k: expected .* got nan"),
        (CONFIGS[7], "0.parametrizations.weight.0.bits", -1, "0: bits: expected .* got -1"),
        (CONFIGS[2], "0.parametrizations.weight.0.bits", 5, "0: bits: expected one of 8, 4, got 5"),
        (CONFIGS[2], "1.index", 2, "1: index: expected one of 0, 1, got 2"),
    ],
)
def test_numbers_that_are_none_of_the_settings_are_refused(config, key, value, text):
    model = make(config)
    with pytest.raises(RuntimeError, match=text):
        model.load_state_dict({**model.state_dict(), key: torch.tensor(value)})


@pytest.mark.parametrize("value", [3, [3], "3", None])
def test_numbers_that_are_no_tensors_are_refused_as_torch_does(value):
    model = make(CONFIGS[0])
    with pytest.raises(RuntimeError, match='"0.parametrizations.weight.0.bits", expected torch.Tensor'):
        model.load_state_dict({**model.state_dict(), "0.parametrizations.weight.0.bits": value})


def test_a_state_of_another_version_is_refused():
    model = make(CONFIGS[0])
    key = "0.parametrizations.weight.0._extra_state"
    later = bytes(model.state_dict()[key].tolist()).replace(b'"version": 1', b'"version": 2')
    with pytest.raises(RuntimeError, match="0: expected version 1 of the state of a module of quantops, got 2"):
        model.load_state_dict({**model.state_dict(), key: torch.tensor(list(later), dtype=torch.uint8)})


def test_settings_without_values_are_refused():
    model = make(CONFIGS[0])
    key = "0.parametrizations.weight.0._extra_state"
    with pytest.raises(RuntimeError, match="0: expected the settings of a module of quantops"):
        model.load_state_dict({**model.state_dict(), key: model.state_dict()[key].to("meta")})


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_states_do_not_depend_on_the_default_device(config):
    model, other = started(config), make(config).eval()
    with torch.device("meta"):
        state = model.state_dict()
        other.load_state_dict(state)
    assert torch.equal(other(batch()), model(batch()))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_on_the_meta_device_a_model_has_shapes(config):
    """Whether its activations have started or not; it gets its values from a state dict all the same."""
    for model in (make(config), started(config).train()):
        state = copy.deepcopy(model.state_dict())
        empty = copy.deepcopy(model).to("meta")
        y = empty(batch().to("meta"))
        y.sum().backward()
        assert y.is_meta and y.shape == (5, 3)
        empty.load_state_dict(state, assign=True)
        torch.manual_seed(2)  # where gates are drawn
        y = empty(batch())
        torch.manual_seed(2)
        assert torch.equal(y, model(batch()))


@pytest.mark.parametrize("make_one", [UniformActivation, CategoricalActivation])
def test_values_of_activations_do_not_start_from_shapes(make_one):
    model, x = make_one(3), batch()
    for part, come in ((model, x.to("meta")), (make_one(3, device="meta"), x)):
        with pytest.raises(ValueError, match=f"expected device {come.device}, where x is"):
            part(come)
    expected = make_one(3)(x)
    assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="x: expected values to take a scale from, got a tensor on the meta device"):
        calibrate(nn.Sequential(UniformActivation(3)), [x.to("meta")])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_states_of_earlier_versions_load_with_a_warning(config):
    model, other = started(config), make(config)
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("_extra_state")}
    with pytest.warns(UserWarning, match="the state dict does not say which settings"):
        other.load_state_dict(state)
    assert torch.equal(other.eval()(batch()), model(batch()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(model.state_dict())


def test_a_state_is_a_file_that_loads_weights_only(tmp_path):
    model = started(CONFIGS[1])
    torch.save(model.state_dict(), tmp_path / "state.pt")
    make(CONFIGS[1]).load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    damaged = {**model.state_dict(), "0.parametrizations.weight.0._extra_state": torch.zeros(3, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match="0: expected the settings of a module of quantops"):
        model.load_state_dict(damaged)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("config", [c for c in CONFIGS if not isinstance(c, TruncQuantConfig)], ids=str)
def test_the_state_of_a_float_network_sets_the_float_weights(config, strict):
    if config.act_bits and strict:
        config = dataclasses.replace(config, act_bits=None)  # whose state a float network does not have
    model, plain = make(config), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    keys = list(model.state_dict())
    found = model.load_state_dict(plain.state_dict(), strict)
    missing = [k for k in found.missing_keys if "2." not in k and "input_quantizer" not in k]
    assert not found.unexpected_keys and not missing
    assert list(model.state_dict()) == keys
    for i in (0, 3):
        assert torch.equal(model[i].parametrizations.weight.original, plain[i].weight)
    expected = quantize_(plain, config)  # quantized as if it had been float then: alpha starts from these weights
    assert torch.equal(model.eval()[0].weight, expected.eval()[0].weight)
    unquantize_(model)
    assert not model[0]._load_state_dict_pre_hooks


def test_a_float_weight_of_another_shape_is_torchs_error():
    model, plain = make(MSQConfig()), nn.Sequential(nn.Linear(7, 8))
    with pytest.raises(RuntimeError, match="size mismatch for 0.parametrizations.weight.original"):
        model.load_state_dict(plain.state_dict(), strict=False)


# Averages of models


def averages():
    """{how: (copy, model) -> None}, that average buffers too."""

    def by_hand(average, model):
        own = average.state_dict()
        for k, v in model.state_dict().items():
            own[k].copy_(0.9 * own[k] + 0.1 * v)

    def of_torch(make):
        def update(average, model):
            whole = AveragedModel(model, use_buffers=True, **make())
            whole.module = average
            whole.n_averaged += 1
            whole.update_parameters(model)

        return update

    return {
        "by hand": by_hand,
        "equal": of_torch(dict),
        "decaying": of_torch(lambda: {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}),
    }


@pytest.mark.parametrize("config", [MSQConfig(bits=6, act_bits=6), TruncQuantConfig(bits=(6, 4, 2))], ids=str)
def test_an_average_of_state_dicts_is_told(config):
    """Of 6 and 2 bits, which would be 4."""
    model, states = started(config), []
    for n in (6, 2):
        if isinstance(config, TruncQuantConfig):
            set_bits(model, n)
        else:
            for _, _, p in quantized(model):
                p.set_precision(n, 1)
            model[2].set_bits(n)
        states.append(copy.deepcopy(model.state_dict()))
    whole = [k for k in states[0] if k.endswith("_extra_state")]
    mean = {k: ((a.double() + states[1][k].double()) / 2).to(a.dtype) for k, a in states[0].items()}
    mean |= {k: states[0][k] for k in whole}
    with pytest.warns(UserWarning, match=r"^(0|1|2|3): the state dict has (bits = 4|index = 1).* was made with others"):
        make(config).load_state_dict(mean)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for state in states:
            make(config).load_state_dict(state)
    assert all(states[0][k].shape == states[1][k].shape for k in whole)


def precision(model):
    return [t.tolist() for n, t in model.named_buffers() if n.endswith((".bits", ".k", "index", ".base", "signed"))]


@pytest.mark.parametrize("how", averages())
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_an_average_has_the_bits_of_the_model_or_is_an_error(config, how):
    model = started(config)
    average = copy.deepcopy(model)
    for _, _, p in quantized(model):
        if isinstance(config, MSQConfig):
            p.set_precision(int(p.bits) - 1, 1)
    if isinstance(config, TruncQuantConfig):
        set_bits(model, config.bits[-1])
    for _, m in activations(model):
        if isinstance(config, MSQConfig):
            m.set_bits(int(m.bits) - 1)
    try:
        averages()[how](average, model)
        average(batch())
    except (RuntimeError, ValueError) as e:  # torch's own of bool tensors, or ours
        assert "use_buffers=False" in str(e) or "two bool tensors" in str(e)
    else:
        assert precision(average) == precision(model)
    kept = AveragedModel(model)
    kept.update_parameters(model)
    assert torch.equal(kept(batch()), model(batch()))


@pytest.mark.parametrize(
    "config", [MSQConfig(bits=6), TruncQuantConfig(bits=(6, 4)), CPQConfig(dropbits="learned")], ids=str
)
def test_an_average_of_models_of_the_same_bits_has_them_too(config):
    model = make(config)
    average = AveragedModel(model, use_buffers=True)
    for _ in range(7):
        average.update_parameters(model)
    assert torch.equal(average.eval()(batch()), model.eval()(batch())) and precision(average) == precision(model)


def test_states_of_earlier_versions_have_other_seals_and_booleans():
    model = make(CPQConfig(dropbits="learned"))
    finish_dropbits(model)
    old, state = copy.deepcopy(model), model.state_dict()
    for _, _, p in quantized(old):
        p.seal.fill_(p.hashed)  # as whole models were pickled
    for key in [key for key in state if key.endswith("finished")]:
        state[key] = state[key].bool()
    loaded = [make(CPQConfig(dropbits="learned")) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded[0].load_state_dict(state)
        loaded[1].load_state_dict(state, assign=True)
        for other in (old, *loaded):
            assert torch.equal(other.eval()(batch()), model.eval()(batch()))
            for (_, _, p), (_, _, own) in zip(quantized(other), quantized(model)):
                assert p.finished and p.hashed == own.hashed


@pytest.mark.parametrize("config, value", [(CONFIGS[0], 2), (CONFIGS[3], 5), (CONFIGS[7], 2)])
def test_numbers_that_others_wrote_are_an_error(config, value):
    model = started(config)
    model[0].parametrizations.weight[0].bits.fill_(value)
    with pytest.raises(ValueError, match=f"bits = {value}.*use_buffers=False"):
        model(batch())


def test_the_index_of_a_batch_norm_that_others_wrote_is_an_error():
    model = started(CONFIGS[2])
    model[1].index.fill_(1)
    with pytest.raises(ValueError, match="index = 1"):
        model(batch())


@pytest.mark.parametrize("name, value", [("bits", 3), ("index", 1), ("is_signed", 1)])
def test_numbers_of_an_activation_that_others_wrote_are_an_error(name, value):
    model = started(CONFIGS[10])
    getattr(model[2], name).fill_(value)
    with pytest.raises(ValueError, match=f"{name} = {value}.*use_buffers=False"):
        model(batch())
    with pytest.raises(ValueError, match=f"{name} = {value}.*use_buffers=False"):
        set_bits(model, 8)


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.act_bits], ids=str)
def test_an_average_made_before_the_first_batch_begins_with_the_model(config):
    model = make(config)
    average = AveragedModel(model).eval()
    model(batch())
    average.update_parameters(model)
    assert torch.equal(average(batch()), model.eval()(batch()))


def test_states_of_activations_whose_numbers_had_a_dimension_load():
    model = started(CONFIGS[10])
    state = {k: v.reshape(1) if k in ("2.bits", "2.index", "2.is_signed") else v for k, v in model.state_dict().items()}
    other = make(CONFIGS[10]).eval()
    other.load_state_dict(state)
    assert torch.equal(other(batch()), model(batch()))
    with pytest.raises(RuntimeError, match="2: bits: expected one of 8, 2, got 4"):
        other.load_state_dict({**state, "2.bits": torch.tensor(4)})


@pytest.mark.parametrize("config", [MSQConfig(), TruncQuantConfig(), CPQConfig(act_bits=4)], ids=str)
def test_inference_mode_evaluates_models_and_makes_none(config):
    model = started(config)
    with torch.inference_mode():
        assert torch.equal(model(batch()), model(batch()))
        with pytest.raises(RuntimeError, match="within torch.inference_mode"):
            make(config)(batch())
        copied = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="inference mode|torch.inference_mode"):  # torch's own, of weights
        copied(batch())
