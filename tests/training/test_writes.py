"""Writes to layer.weight set the float weight, or raise; other reparametrizations say how they compose."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import quantops as Q
from quantops.nn import quantized


def layer(config=None, shape=(6, 4)):
    torch.manual_seed(0)
    return Q.quantize_(nn.Linear(*shape), config or Q.MSQConfig(bits=3))


def original(model):
    return model.parametrizations.weight.original


INITS = {
    "normal": lambda w: nn.init.normal_(w, std=0.3),
    "uniform": nn.init.uniform_,
    "constant": lambda w: nn.init.constant_(w, 0.7),
    "kaiming": nn.init.kaiming_uniform_,
    "xavier": nn.init.xavier_normal_,
    "truncated": lambda w: nn.init.trunc_normal_(w, std=0.1),
    "orthogonal": nn.init.orthogonal_,
    "sparse": lambda w: nn.init.sparse_(w, 0.5),
    "copy": lambda w: w.data.copy_(torch.full_like(w, 0.25)),
    "data": lambda w: w.data.mul_(2.0).clamp_(-0.3, 0.3),
    "data set": lambda w: setattr(w, "data", torch.full(w.shape, 0.125)),
    "item": lambda w: w.data.__setitem__((slice(None), 1), 5.0),
    "row": lambda w: w.data[2].fill_(3.0),
    "operator": lambda w: w.data.__iadd__(1.0),
}


@pytest.mark.parametrize("fuse", ["model", "layer"])
@pytest.mark.parametrize("after_forward", [False, True])
@pytest.mark.parametrize("kind", INITS)
def test_in_place_writes_are_those_of_a_plain_layer(kind, after_forward, fuse):
    plain, model = nn.Linear(6, 4), layer(Q.MSQConfig(bits=3, fuse=fuse))
    plain.load_state_dict(Q.float_state_dict(model))
    if after_forward:
        model(torch.randn(2, 6))
    w = original(model)
    for m in (plain, model):
        torch.manual_seed(5)
        INITS[kind](m.weight)
    assert original(model) is w and torch.equal(w, plain.weight) and w.requires_grad
    assert torch.equal(model.weight, Q.to_int(model)["weight"].dequantize())


def test_writes_under_no_grad():
    model = layer()
    with torch.no_grad():
        model.weight[0] = 1.0
        model.weight.mul_(2)
        model.weight += 1
    assert torch.equal(original(model)[0], torch.full((6,), 3.0))
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):  # as of a plain layer
        model.weight.mul_(2)
    model.weight.requires_grad_(False)
    assert not original(model).requires_grad and not model.weight.requires_grad


@pytest.mark.parametrize(
    "write", [lambda w: w.resize_(3), lambda w: w.set_(torch.zeros(3)), lambda w: w.t_(), lambda w: w.squeeze_()]
)
def test_what_changes_the_shape_raises(write):
    model = layer()
    with pytest.raises(RuntimeError, match="model: .* of a quantized weight: expected it of the float weight"):
        write(model.weight)
    with pytest.raises(
        RuntimeError, match=r"model: data: expected a tensor of shape \(4, 6\), got \(8, 6\); to resize"
    ):
        model.weight.data = torch.zeros(8, 6)
    with pytest.raises(ValueError, match=r"model: expected a weight of shape \(4, 6\), got \(8, 6\)"):
        model.weight = torch.zeros(8, 6)
    with pytest.raises(ValueError, match=r"model: expected a weight of shape \(4, 6\), got \(8, 6\)"):
        model.weight = nn.Parameter(torch.zeros(8, 6))
    assert original(model).shape == (4, 6)


def test_assignments():
    model, value = layer(), torch.randn(4, 6)
    w = original(model)
    model.weight = nn.Parameter(value)
    assert original(model) is w and torch.equal(w, value) and w.data_ptr() != value.data_ptr()
    before = w.detach().clone()
    model.weight = model.weight  # not q
    assert torch.equal(original(model), before)
    model.weight = original(model)
    assert torch.equal(original(model), before)


def test_a_read_weight_is_a_tensor_as_any():
    model = layer()
    q = model.weight
    assert isinstance(q, torch.Tensor) and not isinstance(q, nn.Parameter) and q.requires_grad
    for made in (q + 1, q.t(), q.detach(), q.clone(), nn.functional.linear(torch.ones(1, 6), q)):
        assert type(made) is torch.Tensor
    assert torch.equal(pickle.loads(pickle.dumps(q)), q)
    one, same = copy.deepcopy([q, q])
    assert one is same and type(one) is torch.Tensor and one.is_leaf and one.requires_grad and torch.equal(one, q)
    one.detach().zero_()
    assert torch.equal(model.weight, q) and q.abs().sum() > 0
    for made in (copy.deepcopy(q.data), q.data.clone()):
        assert torch.equal(nn.Parameter(made), q)
    assert torch.equal(Q.absmax(q), q.abs().max()) and Q.round_clamp(q, 1.0, 3).shape == q.shape
    q.sum().backward()
    assert torch.equal(original(model).grad, torch.ones(4, 6))


def test_state_dicts_of_float_weights_go_in_and_out():
    plain, model = nn.Sequential(nn.Linear(6, 4), nn.LSTM(4, 3)), nn.Sequential(nn.Linear(6, 4), nn.LSTM(4, 3))
    Q.quantize_(model, Q.MSQConfig(bits=3, overrides={"0": {"bits": 5}}))
    model.load_state_dict(plain.state_dict(), strict=False)
    state = Q.float_state_dict(model)
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in plain.state_dict().items())
    back = nn.Sequential(nn.Linear(6, 4), nn.LSTM(4, 3))
    back.load_state_dict(state)
    assert [row.bits for row in Q.bit_report(model).rows] == [5, 3, 3]
    widths = Q.quantize_(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), Q.TruncQuantConfig())
    with pytest.raises(ValueError, match="1: a float network has no batch norm for each width"):
        Q.float_state_dict(widths)


# Other reparametrizations


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_a_parametrization_before_says_how(kind):
    model = getattr(parametrizations, kind)(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="take it off by torch.nn.utils.parametrize.remove_parametrizations"):
        Q.quantize_(model, Q.MSQConfig())


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_hooks_before_say_how(kind):
    model = getattr(nn.utils, kind)(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=f"take that off by torch.nn.utils.remove_{kind}"):
        Q.quantize_(model, Q.MSQConfig())
    model = prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
    with pytest.raises(ValueError, match="prune.remove"):
        Q.quantize_(model, Q.MSQConfig())


@pytest.mark.parametrize(
    "apply",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        nn.utils.weight_norm,  # deprecated
        nn.utils.spectral_norm,
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_after_quantize_they_say_how(apply):
    model = layer(shape=(4, 4))
    expected, x = model.weight.detach().clone(), torch.randn(2, 4)
    before = model(x)
    with pytest.raises(ValueError, match="model: the weight is quantized.*quantops.unquantize_"):
        apply(model)
    assert torch.equal(model.weight, expected) and torch.equal(model(x), before) and len(quantized(model)) == 1
    with pytest.raises(KeyError, match="other"):  # of a parameter that is none
        del pickle.loads(pickle.dumps(model))._parameters["other"]
    for plain in (Q.unquantize_(copy.deepcopy(model)), parametrize.remove_parametrizations(model, "weight")):
        assert type(plain._parameters) is dict
        apply(plain)


class Mask(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, w):
        return w * self.mask


def test_a_mask_composes_behind_the_quantizer():
    model = layer()
    mask = (torch.rand(4, 6) > 0.5).float()
    parametrize.register_parametrization(model, "weight", Mask(mask))
    x = torch.randn(2, 6)
    model(x).square().sum().backward()
    assert bool((model.weight == 0)[mask == 0].all()) and bool((original(model).grad == 0)[mask == 0].all())
    assert torch.equal(Q.plain_model(model).weight, model.weight)
    with pytest.raises(ValueError, match="expected a weight with no other parametrization.*MSQWeight, Mask"):
        Q.to_int(model)
