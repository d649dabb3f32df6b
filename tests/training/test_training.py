"""What a training script does around the methods: layers that a pass leaves out, averaged models, tied weights, parts
of a model, models made on the meta device."""

import copy
import importlib.util

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import quantops
from quantops import CPQConfig, MSQConfig, TruncQuantConfig, penalty, plain_model, quantize_, set_bits, to_int
from quantops.nn import quantized

pytestmark = pytest.mark.usefixtures("one_thread")
needs_safetensors = pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="safetensors missing")
CONFIGS = {
    "msq": (MSQConfig, {}),
    "msq, max": (MSQConfig, {"scale": "absmax"}),
    "msq, decoupled": (MSQConfig, {"penalty": "decoupled"}),
    "msq, gradient": (MSQConfig, {"scale": "absmax", "scale_grad": True}),
    "truncquant": (TruncQuantConfig, {}),
    "truncquant, tanh": (
        TruncQuantConfig,
        {"scale": "absmax", "companding": "tanh", "out_scale": "absmean", "scale_grad": True},
    ),
    "cpq": (CPQConfig, {"bits": 3}),
    "dropbits": (CPQConfig, {"bits": 3, "dropbits": "learned"}),
    "sample": (CPQConfig, {"bits": 3, "mode": "sample"}),
}
EACH = pytest.mark.parametrize("config", CONFIGS)


def make(model, config, **options):
    torch.manual_seed(0)
    kind, settings = CONFIGS[config]
    return quantize_(model(), kind(**settings, **options))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, head="a"):
        return getattr(self, head)(x)


def batch(rows=4):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(1))


@EACH
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("amp", [False, True])
def test_a_layer_that_is_not_used_gets_no_gradient(config, cache, amp):
    got = {}
    for fuse in ("model", "layer"):
        model = make(TwoHeads, config, fuse=fuse, cache=cache)
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            out = model(batch())
        out.float().square().sum().backward()
        assert all((p.grad is None) == name.startswith("b.") for name, p in model.named_parameters()), fuse
        got[fuse] = model.a.parametrizations.weight.original.grad
    if config not in ("dropbits", "sample"):  # those draw for each layer otherwise
        assert torch.equal(got["model"], got["layer"])


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("scale", ["absmax", 2.8])
def test_the_penalty_reaches_layers_that_are_not_used(cache, scale):
    """Under autocast too, where q and w differ in dtype."""
    model = quantize_(TwoHeads(), MSQConfig(bits=3, cache=cache, scale=scale))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(batch())
    (0 * out.float().sum() + penalty(model)).backward()
    for _, owner, _ in quantized(model):
        w = owner.original.detach()
        s = quantops.absmax(w) if scale == "absmax" else quantops.absmean(w) * scale
        want = quantops.lsb(w, s, 3).sign() * (w.abs() <= s)
        assert torch.equal(owner.original.grad, want.to(w.dtype)) and want.any()


def test_lists_of_which_a_part_is_used():
    w = [torch.randn(5, 3, requires_grad=True), torch.randn(7, requires_grad=True)]
    scale = [torch.ones((), requires_grad=True) for _ in w]
    q = quantops.foreach.round_clamp(w, scale, 3, out_dtype=torch.bfloat16)
    q[0].float().sum().backward()
    assert w[1].grad is None and scale[1].grad is None and scale[0].grad is not None
    assert torch.equal(w[0].grad, (w[0].detach().abs() <= 1).float())
    x = [t.detach().requires_grad_() for t in w]
    alpha, sigma = ([torch.full((1,), v, requires_grad=True) for _ in w] for v in (0.5, 0.1))
    gates = [torch.full((3,), 0.9, requires_grad=True) for _ in w]
    q = quantops.foreach.categorical(x, alpha, sigma, 3, gates=gates, grad="soft", out_dtype=torch.float16)
    q[1].float().sum().backward()
    for of_unused, of_used in (x, alpha, sigma, gates):
        assert of_unused.grad is None and of_used.grad is not None


def test_the_controller_refuses_a_layer_that_the_loss_does_not_reach():
    model = quantize_(TwoHeads(), MSQConfig(scale=2.8))
    controller = quantops.MSQController(model, 12, threshold=1.0, strength=1e-3)
    with pytest.raises(ValueError, match="does not depend on them"):
        controller.step(lambda: model(batch()).square().mean())


@EACH
@pytest.mark.parametrize("fuse", ["model", "layer"])
@pytest.mark.parametrize("how", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_writes_into_a_cached_q_last_no_longer_than_without_the_cache(config, fuse, how):
    model = make(lambda: nn.Sequential(nn.Linear(8, 8)), config, fuse=fuse, cache=True).eval()
    expected = model(batch())
    with how():
        model(batch())
        model[0].weight.detach().mul_(2)
    assert torch.equal(model(batch()), expected)
    with torch.inference_mode():
        assert torch.equal(model(batch()), expected)


# Copies whose tensors are written in place.


def test_an_averaged_model_keeps_the_steps_of_activations():
    model = quantize_(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), CPQConfig(act_bits=4))
    average = AveragedModel(model)
    model(batch())
    average.update_parameters(model)
    average.eval()
    assert torch.equal(average(100 * batch()), model.eval()(100 * batch()))
    assert torch.equal(average.module[1].alpha_start, model[1].alpha_start)


def test_an_averaged_model_has_the_bits_that_stay():
    model = quantize_(nn.Sequential(nn.Linear(8, 8)), CPQConfig(bits=4, dropbits="learned"))
    average = AveragedModel(model)
    average.update_parameters(model)
    with torch.no_grad():
        model[0].parametrizations.weight[0].log_a.fill_(-5)
    quantops.finish_dropbits(model)
    average.update_parameters(model)
    loaded = copy.deepcopy(average.module)
    loaded.load_state_dict(average.module.state_dict())
    bits = [int(m[0].parametrizations.weight[0].bits_that_stay()) for m in (model, average.module, loaded)]
    assert bits == [2, 2, 2]
    assert torch.equal(average.module.eval()[0].weight, loaded.eval()[0].weight)


def test_loading_leaves_frozen_gates_frozen():
    model = quantize_(nn.Sequential(nn.Linear(8, 8)), CPQConfig(bits=4, dropbits="learned"))
    model.requires_grad_(False)
    model.load_state_dict(model.state_dict())
    assert not any(p.requires_grad for p in model.parameters())


# One Parameter in two modules, of which one is quantized. Both: test_tied.py.


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.middle = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, index):
        return self.head(self.middle(self.embedding(index)))


def test_a_plain_model_of_tied_weights_quantizes_what_training_did():
    model, index = make(Tied, "truncquant", tied="chosen"), torch.arange(6)
    set_bits(model, 2)
    before = model(index)
    plain = plain_model(model, 2)
    assert torch.equal(plain(index), before) and torch.equal(model(index), before)
    assert plain.head.weight is not plain.embedding.weight
    assert torch.equal(plain.embedding.weight, model.embedding.weight)


@needs_safetensors
def test_a_file_is_not_read_into_tied_weights(tmp_path):
    model, path = make(Tied, "truncquant", tied="chosen"), tmp_path / "w.safetensors"
    quantops.save_int(model, path)
    target = Tied()
    before = target.embedding.weight.detach().clone()
    with pytest.raises(ValueError, match="head.weight: the model has one parameter for it and embedding.weight"):
        quantops.load_int(path, target)
    assert torch.equal(target.embedding.weight, before)
    target.head.weight = nn.Parameter(before.clone())
    quantops.load_int(path, target)
    assert torch.equal(target.embedding.weight, before) and torch.equal(target.head.weight, model.head.weight)


# Parts of a model, and more than one method in it.


def test_the_penalty_of_a_part_when_compiled():
    model = quantize_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), MSQConfig())
    compiled = torch.compile(lambda part: penalty(part), backend="eager", fullgraph=True)
    for part in (model, model[0], model[1]):
        assert compiled(part).item() == pytest.approx(penalty(part).item(), rel=1e-6)
    assert penalty(model[0]).item() < 0.9 * penalty(model).item()


def test_the_penalty_of_two_methods():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    quantize_(model[0], MSQConfig())
    quantize_(model[1], CPQConfig())
    assert penalty(model).item() == penalty(model[0]).item() > 0
    assert penalty(model[1]).item() == 0
    with pytest.raises(ValueError, match="has none"):
        penalty(nn.Linear(8, 8))
    quantize_(model[2], CPQConfig(dropbits="learned"))
    assert penalty(model).item() == pytest.approx(penalty(model[0]).item() + penalty(model[2]).item())


def test_integers_are_those_of_the_weight_that_is_used():
    model = quantize_(nn.Sequential(nn.Linear(8, 8)), MSQConfig(bits=3))
    assert list(to_int(torch.compile(model))) == ["0.weight"]
    with pytest.raises(ValueError, match="0: the weight is quantized; expected SpectralNorm on a plain one"):
        nn.utils.parametrizations.spectral_norm(model[0])
    assert torch.equal(to_int(model)["0.weight"].dequantize(), model[0].weight)
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Hardtanh())
    with pytest.raises(ValueError, match="0: expected a weight with no other parametrization.*MSQWeight, Hardtanh"):
        to_int(model)


def test_a_transformer_layer_evaluates_the_activation_it_was_given():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation=nn.ReLU(), batch_first=True)
    model, x = quantize_(nn.Sequential(layer), CPQConfig(act_bits=2)), torch.randn(2, 5, 8)
    model(x)
    want = model.eval()(x)
    with torch.no_grad():
        got = model(x)
    assert torch.allclose(got, want, atol=1e-5)


# The meta device.


@EACH
def test_a_model_on_the_meta_device_gets_its_values_from_a_state_dict(config):
    model = make(lambda: nn.Sequential(nn.Linear(8, 8)), config)
    lean = copy.deepcopy(model).to("meta")
    assert "bits=?" in repr(lean)
    lean.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(lean.eval()(batch()), model.eval()(batch())) and repr(lean) == repr(model)


def test_an_activation_on_the_meta_device_gets_its_values_from_a_state_dict():
    act = quantops.CategoricalActivation(3)
    act(batch())
    lean = copy.deepcopy(act).to("meta")
    lean.load_state_dict(act.state_dict(), assign=True)
    assert torch.equal(lean(batch()), act(batch())) and repr(lean) == repr(act)


def test_tensors_on_the_meta_device_are_not_mixed_with_others():
    w, scale, bits = torch.randn(4), torch.ones(()), torch.tensor([3], dtype=torch.int32)
    with pytest.raises(ValueError, match="bits: expected device cpu, where w is, got meta"):
        torch.ops.quantops.encode([w], [scale], bits.to("meta"), 0, 0, True)
    with pytest.raises(ValueError, match="scale: expected device meta, where w is, got cpu"):
        torch.ops.quantops.encode([w.to("meta")], [scale], bits.to("meta"), 0, 0, True)
    codes = torch.ops.quantops.encode([w.to("meta")], [scale.to("meta")], bits.to("meta"), 0, 0, True)
    assert codes[0].is_meta and codes[0].shape == (4,)


def test_the_decoupled_penalty_with_a_gradient_scaler():
    model = quantize_(nn.Sequential(nn.Linear(8, 8)), MSQConfig(penalty="decoupled", bits=3))
    w = model[0].parametrizations.weight.original
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=65536.0), torch.optim.SGD(model.parameters(), 1.0)
    scaler.scale(model(batch()).square().mean() * 0).backward()
    scaler.unscale_(optimizer)
    before = w.detach().clone()
    quantops.add_penalty_grad_(model, 0.5)
    scaler.step(optimizer)
    scale = 2.8 * quantops.absmean(before)
    push = quantops.lsb(before, scale, 3).sign() * (before.abs() <= scale)
    assert torch.equal(w.detach(), before - 0.5 * push)
