"""CPQ training: forward and gradients against the reference, DropBits, activations, compile, resume, integers."""

import copy
import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F
from cases import Calls
from torch import nn
from torch.utils.checkpoint import checkpoint

import quantops
from quantops import (
    CategoricalActivation,
    CPQConfig,
    bit_report,
    finish_dropbits,
    penalty,
    quantize_,
    reference,
    to_int,
)
from quantops.methods.cpq import SHIFT, hard_concrete
from quantops.nn import quantized
from quantops.positive import grid_step, positive

FUSES = pytest.mark.parametrize("fuse", ["model", "layer"])
KINDS = pytest.mark.parametrize("kind", [
    {}, {"grad": "winner", "per_row": True}, {"mode": "soft", "dropbits": "learned"},
    {"mode": "sample", "dropbits": "fixed", "keep": 0.6, "per_row": True},
    {"grad": "winner", "dropbits": "learned", "keep": 0.5, "min_bits": 2}])


pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    recompute = False

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.mid = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 12))
        self.relu, self.head = nn.ReLU(), nn.Linear(12, 5)

    def features(self, x):
        return self.relu(self.mid(self.conv(x).relu().flatten(1)))

    def forward(self, x):
        x = checkpoint(self.features, x, use_reentrant=False) if self.recompute else self.features(x)
        return self.head(x)


def make(dtype=torch.float32, **config):
    torch.manual_seed(0)
    model = quantize_(Net().to(dtype), CPQConfig(**{"bits": 4, "min_bits": 1, **config}))
    with torch.no_grad():  # away from where all start
        for name, p in model.named_parameters():
            if ".log_" in name:
                p.add_(torch.linspace(0.1, 0.3, p.numel()))
    return model


def data(dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 6, 6, generator=g).to(dtype), torch.randint(0, 5, (8,), generator=g)


def objective(model, x, y, strength=0.0):
    loss = F.cross_entropy(model(x), y)
    return loss + strength * penalty(model) if strength else loss


def loss_of(model, strength=0.0, seed=1, dtype=torch.float32):
    return objective(model, *data(dtype, seed), strength)


def one_step(model, strength=0.0, **options):
    torch.manual_seed(7)
    model.zero_grad()
    loss_of(model, strength, **options).backward()
    return grads(model)


def grads(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def originals(model):
    return {name: owner.original for name, owner, _ in quantized(model)}


def quantizers(model):
    return {name: p for name, _, p in quantized(model)}


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


def close(a, b, tolerance=1e-6):
    assert a.keys() == b.keys()
    return all(torch.allclose(a[k].double(), b[k].double(), rtol=0, atol=tolerance * (1 + float(b[k].abs().max())))
               if b[k].is_floating_point() else torch.equal(a[k], b[k]) for k in a)


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def scales(p):
    """(alpha, sigma) of a layer."""
    return positive(p.alpha_start, p.log_alpha), positive(p.sigma_start, p.log_sigma)


# Forward and gradients


@FUSES
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("mode, grad", [("hard", "soft"), ("hard", "winner"), ("soft", "soft"), ("soft", "winner")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_forward_and_gradients_are_the_reference(fuse, per_row, mode, grad, dtype):
    model = make(dtype, fuse=fuse, per_row=per_row, mode=mode, grad=grad)
    plain = Net().to(dtype)
    plain.load_state_dict({k.replace("parametrizations.weight.original", "weight"): v for k, v in state(model).items()
                           if ".weight.0." not in k})
    one_step(model, dtype=dtype)
    for name, w in originals(model).items():
        alpha, sigma = scales(quantizers(model)[name])
        q = reference.categorical(w.detach(), alpha, sigma, 4, mode=mode)
        tolerance = {} if mode == "hard" else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(model.get_submodule(name).weight, q, **tolerance or {"rtol": 0, "atol": 0})
        assert alpha.shape == ((len(w),) if per_row else (1,)) and not torch.equal(q, w)
        with torch.no_grad():
            plain.get_submodule(name).weight.copy_(model.get_submodule(name).weight)
    loss_of(plain, dtype=dtype).backward()
    for name, w in originals(model).items():
        p, (alpha, sigma) = quantizers(model)[name], scales(quantizers(model)[name])
        by_w, by_alpha, by_sigma, _ = reference.categorical_backward(
            plain.get_submodule(name).weight.grad, w.detach(), alpha, sigma, 4, mode=mode, grad_of=grad)
        for got, expected in ((w.grad, by_w), (p.log_alpha.grad, by_alpha * alpha),
                              (p.log_sigma.grad, by_sigma * sigma)):
            rounded = 1e-2 if got.dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(got, expected.detach().to(got.dtype), rtol=rounded, atol=1e-6)
            assert got.abs().max() > 0


@FUSES
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gradients_reach_every_parameter(fuse, kind, dtype):
    model = make(dtype, fuse=fuse, act_bits=3, **kind)
    for strength in (0.0, 0.1) if kind.get("dropbits") == "learned" else (0.0,):
        for seed in range(20):  # a gate that was 0 or 1 in one draw has no gradient then
            loss_of(model, strength, seed, dtype).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
        assert p.grad.dtype == (p.dtype if ".log_" in name or name.endswith(".log_alpha") else dtype)
    assert model.head.weight.dtype == dtype and quantizers(model)["head"].log_alpha.dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32)


@FUSES
@KINDS
def test_a_network_is_one_call(fuse, kind):
    model, times = make(fuse=fuse, **kind), 1 if fuse == "model" else 4
    with Calls() as calls:
        loss_of(model).backward()
    assert calls.counts == {"categorical": times, "categorical_backward": times}
    mixed = make(fuse="model", **kind, first=2, last="skip", overrides={"mid.0": {"bits": 3}})
    with Calls() as calls:
        loss_of(mixed).backward()
    assert calls.counts["categorical"] == (2 if "dropbits" in kind else 1)  # gates are not for layers with fixed bits
    assert [int(p.bits) for p in quantizers(mixed).values()] == [2, 3, 4]


@FUSES
@KINDS
def test_nothing_is_saved_for_backward_but_parameters_and_scalars(fuse, kind):
    model, saved = make(fuse=fuse, **kind), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        if fuse == "model":
            quantized(model)[0][2].group(model, ())
        total = sum(model.get_submodule(name).weight.sum() for name in originals(model))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    extra = {t.data_ptr(): t.numel() for t in saved if t.untyped_storage().data_ptr() not in parameters}
    rows = sum(p.log_alpha.numel() for p in quantizers(model).values())
    assert extra and sum(extra.values()) <= 10 * rows + 60  # per scale or gate a few values, whatever the weights
    assert max(extra.values()) < 100 < originals(model)["mid.0"].numel()
    total.backward()


def test_frozen_weights_and_frozen_scales():
    model, twin = make(), make()
    originals(model)["conv"].requires_grad_(False)
    for name in ("log_alpha", "log_sigma"):
        getattr(quantizers(model)["head"], name).requires_grad_(False)
    one_step(model), one_step(twin)
    missing = {k for k, v in grads(model).items() if v is None}
    assert missing == {"conv.parametrizations.weight.original", "head.parametrizations.weight.0.log_alpha",
                       "head.parametrizations.weight.0.log_sigma"}
    assert all(torch.equal(v, grads(twin)[k]) for k, v in grads(model).items() if v is not None)
    for p in quantizers(model)["conv"].parameters():
        p.requires_grad_(False)
    model.zero_grad()
    one_step(model)
    assert not model.conv.weight.requires_grad and model.head.weight.requires_grad


@FUSES
@KINDS
def test_non_reentrant_checkpoint(fuse, kind):
    model, plain = make(fuse=fuse, **kind), make(fuse=fuse, **kind)
    model.recompute = True
    assert same(one_step(model), one_step(plain))


@FUSES
@KINDS
def test_autocast(fuse, kind):
    model = make(fuse=fuse, act_bits=4, **kind)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
        assert model.head.weight.dtype == torch.bfloat16
        assert model.relu(torch.randn(3)).dtype == torch.bfloat16
    loss.backward()
    model.eval()
    q = model.head.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.head.weight, q.bfloat16()) and q.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


# Training and evaluation


@FUSES
@KINDS
@pytest.mark.parametrize("cache", [False, True])
def test_training_draws_and_evaluation_is_hard(fuse, kind, cache):
    model, x = make(fuse=fuse, cache=cache, **kind), data()[0]
    draws = "dropbits" in kind or kind.get("mode") == "sample"
    outs = [model(x) for _ in range(6)]
    assert (len({v.sum().item() for v in outs}) > 1) == draws
    q = model.head.weight
    if fuse == "model":
        assert model.head.weight is q  # until the next forward
    model.eval()
    changes = draws or kind.get("mode") == "soft"
    assert (model.head.weight is q) == (fuse == "model" and not changes)  # what training left is not evaluated
    before = torch.get_rng_state()
    outs = [model(x) for _ in range(3)]
    assert torch.equal(outs[0], outs[1]) and torch.equal(before, torch.get_rng_state())
    for name, w in originals(model).items():
        p, (alpha, sigma) = quantizers(model)[name], scales(quantizers(model)[name])
        q = reference.categorical(w.detach(), alpha, sigma, int(p.bits_that_stay()))
        assert torch.equal(model.get_submodule(name).weight, q)
    outs[0].sum().backward()  # an evaluated model can be differentiated, too
    assert all(w.grad.abs().max() > 0 for w in originals(model).values())
    assert quantizers(model)["head"].draws is False
    model.train()
    assert quantizers(model)["head"].draws is draws


def test_parts_of_a_model_may_be_in_evaluation():
    model = make(dropbits="fixed", keep=0.6)
    model.head.eval()
    heads = [model(data()[0]) is not None and model.head.weight for _ in range(4)]
    convs = [model(data()[0]) is not None and model.conv.weight for _ in range(30)]
    assert all(torch.equal(heads[0], v) for v in heads) and len({v.sum().item() for v in convs}) > 1


@FUSES
def test_draws_follow_the_global_seed(fuse):
    model = make(fuse=fuse, mode="sample", dropbits="learned")
    expected = one_step(model)
    assert same(one_step(copy.deepcopy(model)), expected) and not same(one_step(model, seed=2), expected)


@FUSES
@pytest.mark.parametrize("kind", [{}, {"grad": "winner", "per_row": True}, {"mode": "soft"},
                                  {"dropbits": "learned", "act_bits": 3}])
def test_cache_has_the_same_gradients_and_keeps_no_draw(fuse, kind):
    cached, plain = make(fuse=fuse, cache=True, **kind), make(fuse=fuse, **kind)
    times = 1 if fuse == "model" else 4
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (cached, plain)]
    for train in (True, False):
        cached.train(train), plain.train(train)
        for _ in range(2):
            torch.manual_seed(3)
            with Calls() as calls:
                for seed in range(3):
                    loss_of(cached, 0.0, seed).backward()
            kept = not (train and "dropbits" in kind)
            assert calls.counts["categorical"] == times * (1 if kept else 3)
            assert calls.counts.get("activation", 0) == (3 * 2 if "act_bits" in kind else 0)
            torch.manual_seed(3)
            for seed in range(3):
                loss_of(plain, 0.0, seed).backward()
            for m, optimizer in zip((cached, plain), optimizers):
                optimizer.step()
            assert same({k: v for k, v in grads(cached).items() if v is not None},
                        {k: v for k, v in grads(plain).items() if v is not None})
            for optimizer in optimizers:
                optimizer.zero_grad()
    assert same(state(cached), state(plain))


@FUSES
@pytest.mark.parametrize("cache", [False, True])
def test_changes_of_every_parameter_are_seen(fuse, cache):
    model = make(fuse=fuse, cache=cache, dropbits="learned").eval()
    for change in ("log_alpha", "log_a"):
        model(data()[0])
        q = model.head.weight
        with torch.no_grad():
            getattr(quantizers(model)["head"], change).sub_(6)
        assert not torch.equal(model.head.weight, q), change


@pytest.mark.parametrize("optimizer", [
    lambda p: torch.optim.SGD(p, lr=1e6), lambda p: torch.optim.Adam(p, lr=100.0),
    lambda p: torch.optim.AdamW(p, lr=1.0, weight_decay=0.5)])
def test_no_optimizer_makes_alpha_or_sigma_zero(optimizer):
    model = make(act_bits=3, per_row=True)
    scale_parameters = [p for name, p in model.named_parameters() if name.endswith(("log_alpha", "log_sigma"))]
    stepper = optimizer(scale_parameters)
    for sign in (1, 1, -1, -1, -1, -1):
        for p in scale_parameters:
            p.grad = torch.full_like(p, sign * 1e6)
        stepper.step()
        assert loss_of(model).isfinite()
        for p in quantizers(model).values():
            assert all(((v > 0) & (v < math.inf)).all() for v in scales(p))


def test_steps_start_at_the_least_error():
    torch.manual_seed(0)
    for bits, per_row in ((1, False), (2, True), (4, False), (8, True)):
        w = torch.randn(6, 50) * torch.logspace(-4, 4, 6).unsqueeze(1)
        step = grid_step(w, bits, per_row=per_row)
        assert step.shape == ((6,) if per_row else (1,))

        def error(scale):
            q = reference.categorical(w, step * scale, step, bits)
            return (q - w).square().sum(1) if per_row else (q - w).square().sum().reshape(1)

        assert all((error(1.0) <= error(f)).all() for f in (0.5, 2.0))
    assert torch.equal(grid_step(torch.zeros(4, 25), 2, per_row=False), grid_step(torch.full((4, 25), 0.2), 2,
                                                                                 per_row=False))
    assert grid_step(torch.zeros(0, 3), 2, per_row=True).shape == (0,)
    assert grid_step(torch.zeros(0), 2, per_row=False) == 1
    assert grid_step(torch.full((3,), 1e-40), 2, per_row=False) > 0


# DropBits


def test_gates_are_hard_concrete():
    torch.manual_seed(0)
    log_a = torch.tensor([-3.0, -0.5, 0.0, 1.0, 4.0], dtype=torch.float64)
    z = hard_concrete(log_a, torch.rand(200000, 5, dtype=torch.float64))
    assert z.min() == 0 and z.max() == 1
    p = torch.sigmoid(log_a - SHIFT)
    assert ((z != 0).double().mean(0) - p).abs().max() < 4e-3
    one = torch.sigmoid(log_a - 2 / 3 * math.log(11))  # S((logit u + log_a)/b) 1.2 - 0.1 >= 1
    assert ((z == 1).double().mean(0) - one).abs().max() < 4e-3
    assert torch.equal(z.median(0).values > 0, p > 0.5)


@pytest.mark.parametrize("dropbits", ["fixed", "learned"])
def test_dropped_bits_drop_those_above(dropbits):
    model = make(dropbits=dropbits, keep=0.5, min_bits=2, bits=5, mode="sample", sigma=4.0)
    if dropbits == "learned":
        with torch.no_grad():
            for p in quantizers(model).values():
                p.log_a.fill_(SHIFT)
    counts = {n: 0 for n in range(2, 6)}
    for _ in range(300):
        model(data()[0])
        alpha = scales(quantizers(model)["mid.0"])[0]
        j = (model.mid[0].weight / alpha).round()
        bits = max(1 + (-j.min()).long().sub(1).item().bit_length(), 1 + j.max().long().item().bit_length())
        counts[bits] += 1
    # Bits 3, 4 and 5 each stay in half the draws: 2 bits in 1/2, 3 in 1/4, 4 and 5 in 1/8.
    for bits, expected in ((2, 150), (3, 75), (4, 37.5), (5, 37.5)):
        assert abs(counts[bits] - expected) < 4 * expected**0.5, counts


def test_fixed_gates_are_no_parameters_and_all_bits_stay():
    model = make(dropbits="fixed", keep=0.2)
    assert not any(name.endswith("log_a") for name, _ in model.named_parameters())
    assert {r.bits for r in bit_report(model).rows} == {4}
    with pytest.raises(ValueError, match=r"CPQConfig\(dropbits='learned'\), Net has none"):
        penalty(model)


def set_gates(model, values):
    """Sets P(z != 0) of the gates of each layer."""
    with torch.no_grad():
        for p, v in zip(quantizers(model).values(), values):
            p.log_a.copy_(torch.logit(torch.tensor(v)) + SHIFT)


LEARNED = [[0.9, 0.8, 0.7], [0.9, 0.2, 0.9], [0.3, 0.9, 0.9], [0.6, 0.51, 0.49]]  # 4, 2, 1 and 3 bits stay


@FUSES
def test_learned_bits_in_evaluation_reports_and_integers(fuse):
    model = make(fuse=fuse, dropbits="learned")
    set_gates(model, LEARNED)
    for train in (True, False):
        model.train(train)
        report = bit_report(model)
        assert [r.bits for r in report.rows] == [4, 2, 1, 3]
        assert [v.bits for v in to_int(model).values()] == [4, 2, 1, 3]
    for row, (name, w) in zip(report.rows, originals(model).items()):
        alpha, sigma = scales(quantizers(model)[name])
        q = reference.categorical(w.detach(), alpha, sigma, row.bits)
        assert torch.equal(model.get_submodule(name).weight, q) and (row.k, row.beta) == (0, 0)
        assert row.sq_error == pytest.approx(float((q - w).detach().double().square().sum()), rel=1e-5)
        assert row.scale == float(alpha.detach()) * 2 ** (row.bits - 1)
    with torch.no_grad():
        originals(model)["head"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        bit_report(model)


def test_penalty_is_the_expected_number_of_gates():
    model = make(dropbits="learned", first=3, overrides={"mid.0": {"dropbits": "fixed"}, "mid.2": {"dropbits": None}})
    r = penalty(model)
    p = quantizers(model)["head"]
    assert r.shape == () and r.item() == pytest.approx(torch.sigmoid(p.log_a - SHIFT).sum().item(), rel=1e-6)
    r.backward()
    chance = torch.sigmoid(p.log_a.detach() - SHIFT)
    torch.testing.assert_close(p.log_a.grad, chance * (1 - chance))
    assert all(v.grad is None for k, v in model.named_parameters() if not k.endswith("log_a"))
    with pytest.raises(ValueError, match="expected weights quantized with MSQConfig or CPQConfig"):
        penalty(Net())
    both = nn.ModuleList([make(dropbits="learned"), quantize_(Net(), quantops.MSQConfig())])
    assert torch.equal(penalty(both), penalty(both[0]) + penalty(both[1]))


@FUSES
@pytest.mark.parametrize("dropbits", ["fixed", "learned"])
def test_finishing_changes_nothing_that_is_evaluated(fuse, dropbits, tmp_path):
    model = make(fuse=fuse, dropbits=dropbits)
    if dropbits == "learned":
        set_gates(model, LEARNED)
    expected = [4, 2, 1, 3] if dropbits == "learned" else [4] * 4
    before = model.eval()(data()[0])
    report = finish_dropbits(model)
    assert [r.bits for r in report.rows] == expected and torch.equal(model(data()[0]), before)
    model.train()
    assert torch.equal(model(data()[0]), before)  # no more draws
    with Calls() as calls:
        loss_of(model).backward()
    assert calls.counts["categorical"] == (1 if fuse == "model" else 4)
    if dropbits == "learned":
        assert penalty(model) == 0 and quantizers(model)["head"].log_a.grad is None
        (loss_of(model) + penalty(model)).backward()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = make(fuse=fuse, dropbits=dropbits)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert [r.bits for r in bit_report(other).rows] == expected and torch.equal(other(data()[0]), before)
    assert torch.equal(copy.deepcopy(model)(data()[0]), before)
    finish_dropbits(other)
    assert same(state(other), state(model))
    other.load_state_dict(make(fuse=fuse, dropbits=dropbits).state_dict())  # and gates are back
    assert quantizers(other)["head"].draws and {r.bits for r in bit_report(other).rows} == {4}
    assert quantizers(other)["head"].log_a.requires_grad == (dropbits == "learned")
    for bad in (Net(), make()):
        with pytest.raises(ValueError, match=r"CPQConfig\(dropbits=...\), Net has none"):
            finish_dropbits(bad)


def test_the_penalty_takes_bits_away_and_the_loss_keeps_them():
    finals = {}
    for strength in (0.0, 0.5):
        model = make(dropbits="learned", bits=6, keep=0.6, sigma=0.5)
        optimizer = torch.optim.Adam([p for name, p in model.named_parameters() if name.endswith("log_a")], lr=0.1)
        for seed in range(30):
            optimizer.zero_grad()
            loss_of(model, strength, seed).backward()
            optimizer.step()
        finals[strength] = bit_report(model).average_bits
    assert finals[0.5] < 2 < finals[0.0]


# Integers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_row", [False, True])
def test_integers_are_the_evaluated_weights_bit_for_bit(dtype, per_row, tmp_path):
    for bits in (1, 2, 3, 5, 8, 11, 16):
        model = make(dtype, bits=bits, per_row=per_row, grad="winner")
        weights = to_int(model)
        assert list(weights) == ["conv.weight", "mid.0.weight", "mid.2.weight", "head.weight"]
        model.eval()
        for name, v in weights.items():
            q = model.get_submodule(name.removesuffix(".weight")).weight
            assert v.bits == bits and torch.equal(v.dequantize(), q) and v.dequantize().dtype == dtype
            assert v.grid == "dyadic" and v.scale.shape == ((len(q),) if per_row else (1,))
    model = make(dtype, per_row=per_row, dropbits="learned")
    set_gates(model, LEARNED)
    plain = Net().to(dtype)
    plain.load_state_dict({k.replace("parametrizations.weight.original", "weight"): v for k, v in state(model).items()
                           if ".weight.0." not in k})
    if importlib.util.find_spec("safetensors"):
        quantops.save_int(model, tmp_path / "w.safetensors")
        quantops.load_int(tmp_path / "w.safetensors", plain)
        assert torch.equal(plain(data(dtype)[0]), model.eval()(data(dtype)[0]))


# State


@pytest.mark.parametrize("fuse, cache", [("model", False), ("layer", False), ("model", True)])
@KINDS
def test_resume_is_bit_for_bit(fuse, cache, kind, tmp_path):
    strength = 0.02 if kind.get("dropbits") == "learned" else 0.0

    def start():
        model = make(fuse=fuse, cache=cache, act_bits=3, **kind)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    def train(model, optimizer, steps):
        for seed in steps:
            optimizer.zero_grad()
            loss_of(model, strength, seed).backward()
            optimizer.step()

    whole, first, second = start(), start(), start()
    torch.manual_seed(5)
    train(*whole, range(6))
    torch.manual_seed(5)
    train(*first, range(3))
    torch.save([*(part.state_dict() for part in first), torch.get_rng_state()], tmp_path / "checkpoint.pt")
    torch.rand(100)
    *states, rng = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for part, saved in zip(second, states):
        part.load_state_dict(saved)
    torch.set_rng_state(rng)
    train(*second, range(3, 6))
    assert same(state(whole[0]), state(second[0]))
    for a, b in zip(whole[1].state_dict()["state"].values(), second[1].state_dict()["state"].values()):
        assert same(a, b)


@FUSES
@KINDS
@pytest.mark.parametrize("cache", [False, True])
def test_deepcopy_is_independent(fuse, kind, cache):
    model = make(fuse=fuse, cache=cache, act_bits=3, **kind)
    one_step(model)
    twin = copy.deepcopy(model)
    assert same(one_step(twin), one_step(model))
    with torch.no_grad():
        for p in quantizers(twin).values():
            p.log_alpha.add_(1)
    assert not torch.equal(twin.eval()(data()[0]), model.eval()(data()[0]))


@FUSES
def test_dtype_moves(fuse):
    for dtype in (torch.float64, torch.bfloat16):
        model = make(fuse=fuse, dropbits="learned", act_bits=3)
        one_step(model)
        model.to(dtype)
        got = one_step(model, dtype=dtype)
        assert model.head.weight.dtype == dtype and all(v.isfinite().all() for v in got.values())
        assert quantizers(model)["head"].bits.dtype == torch.int32
        model.eval()
        assert torch.equal(to_int(model)["head.weight"].dequantize(), model.head.weight)


# torch.compile


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("fuse, kind", [
    ("layer", {}), ("model", {"mode": "soft", "dropbits": "learned", "per_row": True}),
    ("model", {"mode": "sample", "dropbits": "fixed"}), ("layer", {"grad": "winner", "dropbits": "learned"})])
def test_compiled_step_is_one_graph_and_equals_eager(fuse, kind, fresh_compiler):
    from torch._dynamo.testing import CompileCounterWithBackend

    strength = 0.1 if kind.get("dropbits") == "learned" else 0.0
    compiled, eager = make(fuse=fuse, **kind), make(fuse=fuse, **kind)
    backend = CompileCounterWithBackend("aot_eager")
    step = torch.compile(objective, fullgraph=True, backend=backend)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (compiled, eager)]
    for seed in range(3):
        for m, fn, optimizer in zip((compiled, eager), (step, objective), optimizers):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            fn(m, *data(seed=seed), strength).backward()
            optimizer.step()
        assert close(grads(compiled), grads(eager), 1e-5)
    assert backend.frame_count == 1 and close(state(compiled), state(eager), 1e-5)
    compiled.eval(), eager.eval()
    assert torch.allclose(step(compiled, *data()), objective(eager, *data()))
    if fuse == "model" and "dropbits" in kind:
        finish_dropbits(compiled), finish_dropbits(eager)
        losses = []
        for m, fn in ((compiled.train(), step), (eager.train(), objective)):
            torch.manual_seed(3)
            losses.append(fn(m, *data()))
        assert torch.allclose(*losses)


@FUSES
def test_compiled_forwards_draw_each_their_own(fuse, fresh_compiler):
    model = make(fuse=fuse, mode="sample", dropbits="fixed")
    twice = torch.compile(lambda x: (model(x), model(x)), fullgraph=True, backend="aot_eager")
    first, second = twice(data()[0])
    assert not torch.equal(first, second) and not torch.equal(first, twice(data()[0])[0])


def test_inductor(fresh_compiler):
    model, eager = make(act_bits=3), make(act_bits=3)
    one_step(model), one_step(eager)  # activations start with the first batch
    step = torch.compile(objective, fullgraph=True)
    model.zero_grad()
    step(model, *data()).backward()
    assert close(grads(model), one_step(eager), 1e-4)


# Activations


ACTS = pytest.mark.parametrize("bits, grad", [(1, "soft"), (2, "soft"), (4, "winner"), (4, "soft"), (8, "soft")])


def activation(bits, grad="soft", dtype=torch.float32, sigma=0.5):
    act = CategoricalActivation(bits, grad=grad, sigma=sigma, dtype=dtype)
    act(torch.randn(50, generator=torch.Generator().manual_seed(9)).to(dtype))
    return act


@ACTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_activations_are_the_unsigned_quantizer(bits, grad, dtype):
    act = activation(bits, grad, dtype)
    alpha = positive(act.alpha_start, act.log_alpha)
    for shape in ((), (0,), (7,), (3, 5, 8, 8)):
        x = 3 * torch.randn(shape).to(dtype)
        q = act(x)
        assert torch.equal(q, reference.categorical(x, alpha, 1.0, bits, signed=False)) and q.dtype == dtype
        with torch.no_grad():
            assert torch.equal(act(x), q)
    assert (q.unique().numel() == 2**bits or bits == 8) and q.min() == 0


@ACTS
def test_activation_gradients_are_those_of_the_quarter_of_the_cell(bits, grad):
    torch.manual_seed(0)
    act = activation(bits, grad, torch.float64)
    alpha = (act.alpha_start * act.log_alpha.exp()).item()
    top = 2**bits - 1
    x = (torch.rand(4000, 1, dtype=torch.float64) * (top + 4) - 2) * alpha
    x.requires_grad_()
    g = torch.randn_like(x)
    act(x).backward(g)
    v = x.detach() / alpha
    j = v.round().clamp(0, top)
    near = alpha * (j + ((4 * (v - j)).floor().clamp(-2, 1) + 0.5) / 4)
    scales = torch.tensor([[alpha], [alpha / 2]], dtype=torch.float64)
    far = torch.where(v < -0.25, -1e9, torch.where(v >= top + 0.25, 1e9, near))
    expected = reference.categorical_backward(g, far, *scales, bits, signed=False, grad_of=grad)
    torch.testing.assert_close(x.grad, expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(act.log_alpha.grad, expected[1] * alpha, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(act.log_sigma.grad, expected[2] * alpha / 2, rtol=1e-9, atol=1e-9)
    assert (x.grad[(v < -0.25) | (v > top + 0.25)].abs() < 1e-9).all() and x.grad.abs().max() > 0
    inside = (v > 1) & (v < top - 1)
    if grad == "soft" and bits > 2:  # close to the exact ones, and on the average equal to them
        exact = reference.categorical_backward(torch.ones_like(x), x.detach(), *scales, bits, signed=False,
                                               grad_of=grad)[0]
        assert ((x.grad / g - exact)[inside].abs() < 0.1).all()
        assert abs((x.grad / g)[inside].mean() - exact[inside].mean()) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_keep_two_bits_per_element_beyond_what_the_next_layer_keeps(dtype):
    conv, act, last = nn.Conv2d(2, 8, 3).to(dtype), activation(4), nn.Conv2d(8, 2, 3).to(dtype)

    def kept(nonlinear, scale_parameters=()):
        found = {}

        def pack(t):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = last(nonlinear(conv(torch.ones(4, 2, 20, 20, dtype=dtype))))
        del out
        return sum(found.values())

    elements = 4 * 8 * 18 * 18
    extra = kept(act) - kept(nn.ReLU())
    assert 0 < extra <= elements // 4 + 64, extra


@ACTS
def test_activations_of_nan_infinities_and_layouts(bits, grad):
    act = activation(bits, grad)
    x = torch.tensor([float("nan"), math.inf, -math.inf, 1e30, -1e30, 0.0], requires_grad=True)
    q = act(x)
    top = (positive(act.alpha_start, act.log_alpha) * (2**bits - 1)).item()
    assert q[0].isnan() and q[1:].tolist() == [top, 0, top, 0, 0]
    q[1:].sum().backward()
    assert x.grad[1:].isfinite().all() and x.grad[[1, 2, 3, 4]].abs().max() < 1e-6
    a = torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    b = a.detach().contiguous().requires_grad_()
    g = torch.randn(2, 3, 5, 5)
    act(a).backward(g), act(b).backward(g)
    assert torch.equal(a.grad, b.grad) and torch.equal(act(a), act(b))


def test_activations_start_with_the_first_batch_and_keep_it(tmp_path):
    act, x = CategoricalActivation(4), torch.randn(1000)
    act(x)
    assert act.alpha_start.item() == pytest.approx(2 * x.relu().mean().item() / 15**0.5, rel=1e-6)
    act(10 * x)
    other = CategoricalActivation(4)
    assert act.alpha_start.item() < 0.5 and other.alpha_start == 0
    other.load_state_dict(act.state_dict())
    assert torch.equal(other(10 * x), act(10 * x))
    fresh = CategoricalActivation(4)
    fresh.load_state_dict(CategoricalActivation(4).state_dict())
    fresh(x)
    assert torch.equal(fresh.alpha_start, act.alpha_start)
    for bad in (-1.0, math.nan, math.inf):
        dead = CategoricalActivation(2)
        dead(torch.full((3,), bad))
        assert dead.alpha_start == 1


def test_relus_become_activations():
    model = Net()
    model.again = model.relu
    quantize_(model, CPQConfig(act_bits=3, grad="winner"))
    assert isinstance(model.mid[1], CategoricalActivation) and model.again is model.relu is not model.mid[1]
    assert model.relu.grad == "winner" and int(model.relu.bits) == 3
    out = model.mid[1](torch.randn(100))
    assert out.unique().numel() <= 8
    before = list(nn.Sequential(nn.Linear(2, 2)).state_dict())
    plain = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="act_bits: expected modules of nn.ReLU or nn.ReLU6 .* Sequential has none"):
        quantize_(plain, CPQConfig(act_bits=4))
    assert list(plain.state_dict()) == before


def test_activations_compile(fresh_compiler):
    from torch._dynamo.testing import CompileCounterWithBackend

    backend = CompileCounterWithBackend("aot_eager")
    model, eager = make(act_bits=3), make(act_bits=3)
    step = torch.compile(objective, fullgraph=True, backend=backend)
    for seed in range(4):
        step(model, *data(seed=seed)).backward(), objective(eager, *data(seed=seed)).backward()
    assert close(grads(model), grads(eager), 1e-5) and same(state(model), state(eager))
    assert backend.frame_count == 2  # the first batch, from which alpha starts, is a graph of its own


# Errors


@pytest.mark.parametrize("options, text", [
    ({"bits": 0}, "bits: expected an integer 1..8, got 0"), ({"bits": 9}, "bits: expected an integer 1..8, got 9"),
    ({"bits": 17, "grad": "winner"}, "bits: expected an integer 1..16, got 17"),
    ({"bits": 9, "mode": "soft", "grad": "winner"}, "bits: .*1..8, got 9"), ({"bits": 4.0}, "bits: .*got 4.0"),
    ({"bits": True}, "bits: "), ({"mode": "argmax"}, "mode: expected one of 'hard', 'soft', 'sample', got 'argmax'"),
    ({"grad": "ste"}, "grad: expected one of 'winner', 'soft', got 'ste'"), ({"per_row": 1}, "per_row: "),
    ({"sigma": 0}, "sigma: expected a number .* got 0"), ({"sigma": -1.0}, "sigma: .*got -1.0"),
    ({"sigma": math.nan}, "sigma: .*nan"), ({"sigma": True}, "sigma: "), ({"sigma": "1"}, "sigma: "),
    ({"dropbits": "random"}, "dropbits: expected one of None, 'fixed', 'learned', got 'random'"),
    ({"dropbits": True}, "dropbits: "), ({"keep": 0.0}, r"keep: expected a number in \(0, 1\), got 0.0"),
    ({"keep": 1}, "keep: .*got 1"), ({"min_bits": 0}, "min_bits: expected an integer 1..16, got 0"),
    ({"bits": 2, "dropbits": "fixed"}, "dropbits: expected bits > min_bits = 2, .* got bits = 2"),
    ({"act_bits": 0}, "act_bits: .*1..8, got 0"),
    ({"act_bits": 9}, "act_bits: .*got 9"), ({"overrides": {"a": {"k": 1}}}, "overrides.*'k'")])
def test_config_errors_name_the_field(options, text):
    with pytest.raises(ValueError, match=text):
        CPQConfig(**options)


def test_layer_errors_leave_the_model_untouched():
    for options, text in (({"last": 9}, "head: bits: expected an integer 1..8, got 9"),
                          ({"first": 0}, "conv: bits: expected an integer 1..8, got 0"),
                          ({"overrides": {"mid.*": {"bits": 9}}}, "mid.0: bits: "),
                          ({"overrides": {"head": {"dropbits": 0.5}}}, "head: dropbits: .*got 0.5")):
        model = Net()
        before = list(model.state_dict())
        with pytest.raises(ValueError, match=text):
            quantize_(model, CPQConfig(act_bits=4, **options))
        assert list(model.state_dict()) == before and isinstance(model.relu, nn.ReLU)
    model = Net()
    with torch.no_grad():
        model.head.weight[0, 0] = math.inf
    with pytest.raises(ValueError, match="head: expected finite weights, got NaN or infinity"):
        quantize_(model, CPQConfig())


def test_values_that_went_bad_are_errors_of_the_forward():
    model = make(dropbits="learned")
    p = quantizers(model)["head"]
    for parameter, text in ((p.log_alpha, r"alpha\[3\]: expected finite values > 0"),
                            (p.log_sigma, r"sigma\[3\]: expected finite values > 0"),
                            (p.log_a, r"gates\[3\]: expected values in \[0, 1\]")):
        old = parameter.detach().clone()
        with torch.no_grad():
            parameter.fill_(math.nan)
        with pytest.raises(ValueError, match=text):
            model(data()[0])
        with torch.no_grad():
            parameter.copy_(old)
    for bad in (-1, 17):
        p.bits.fill_(bad)
        with pytest.raises(ValueError, match="bits"):
            model(data()[0])
    p.bits.fill_(3)
    with pytest.raises(ValueError, match=r"gates\[3\]: expected one value per bit \(3\)"):
        model(data()[0])


@pytest.mark.parametrize("options, text", [
    ({"bits": 0}, "bits: expected an integer 1..8, got 0"), ({"bits": 9}, "bits: .*got 9"), ({"grad": "ste"}, "grad: "),
    ({"sigma": 0}, "sigma: .*got 0"), ({"sigma": True}, "sigma: ")])
def test_activation_errors(options, text):
    with pytest.raises(ValueError, match=text):
        CategoricalActivation(**options)
    with pytest.raises(TypeError, match="x: expected one of float32"):
        CategoricalActivation()(torch.ones(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        CategoricalActivation()([1.0])


# The scheme as a whole


@pytest.mark.parametrize("options", [{}, {"dropbits": "fixed"}, {"dropbits": "learned"}, {"act_bits": 4},
                                     {"mode": "sample", "sigma": 0.2}, {"mode": "soft", "sigma": 0.2}])
def test_training_learns(options):
    torch.manual_seed(0)
    x = torch.randn(128, 1, 6, 6)
    y = (x[:, 0, :3].sum((1, 2)) > 0).long() + 2 * (x[:, 0, 3:].sum((1, 2)) > 0).long()
    model = make(bits=4, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(120):
        optimizer.zero_grad()
        objective(model, x, y, 1e-3 if options.get("dropbits") == "learned" else 0.0).backward()
        optimizer.step()
    model.eval()
    assert (model(x).argmax(1) == y).float().mean() > 0.9  # a quarter by chance
