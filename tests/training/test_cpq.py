"""CPQ training: forward and gradients against the reference, evaluation, state, integers, errors."""

import copy
import importlib.util
import math

import pytest
import torch
from torch import nn

import quantops
from cases import Calls
from networks import (
    LEARNED,
    Net,
    data,
    grads,
    loss_of,
    make_cpq,
    objective,
    one_step,
    originals,
    quantizers,
    same,
    scales,
    separable,
    set_gates,
    state,
)
from quantops import CPQConfig, quantize_, reference, to_int
from quantops.nn import quantized
from quantops.positive import grid_step

pytestmark = pytest.mark.usefixtures("one_thread")
FUSES = pytest.mark.parametrize("fuse", ["model", "layer"])
KINDS = pytest.mark.parametrize(
    "kind",
    [
        {},
        {"grad": "winner", "per_row": True},
        {"mode": "soft", "dropbits": "learned"},
        {"mode": "sample", "dropbits": "fixed", "nonzero": 0.6, "per_row": True},
        {"grad": "winner", "dropbits": "learned", "nonzero": 0.5, "min_bits": 2},
    ],
)


# Forward and gradients


@FUSES
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("mode, grad", [("hard", "soft"), ("hard", "winner"), ("soft", "soft"), ("soft", "winner")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_forward_and_gradients_are_the_reference(fuse, per_row, mode, grad, dtype):
    model = make_cpq(dtype, fuse=fuse, per_row=per_row, mode=mode, grad=grad)
    plain = Net().to(dtype)
    plain.load_state_dict(
        {
            k.replace("parametrizations.weight.original", "weight"): v
            for k, v in state(model).items()
            if ".weight.0." not in k
        }
    )
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
            plain.get_submodule(name).weight.grad, w.detach(), alpha, sigma, 4, mode=mode, grad_of=grad
        )
        for got, expected in (
            (w.grad, by_w),
            (p.log_alpha.grad, by_alpha * alpha),
            (p.log_sigma.grad, by_sigma * sigma),
        ):
            rounded = 1e-2 if got.dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(got, expected.detach().to(got.dtype), rtol=rounded, atol=1e-6)
            assert got.abs().max() > 0


@FUSES
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gradients_reach_every_parameter(fuse, kind, dtype):
    model = make_cpq(dtype, fuse=fuse, act_bits=3, **kind)
    for strength in (0.0, 0.1) if kind.get("dropbits") == "learned" else (0.0,):
        for seed in range(20):  # a gate that was 0 or 1 in one draw has no gradient then
            loss_of(model, strength, seed, dtype).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
        assert p.grad.dtype == (p.dtype if ".log_" in name or name.endswith(".log_alpha") else dtype)
    assert model.head.weight.dtype == dtype and quantizers(model)["head"].log_alpha.dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    )


@FUSES
@KINDS
def test_a_network_is_one_call(fuse, kind):
    model, times = make_cpq(fuse=fuse, **kind), 1 if fuse == "model" else 4
    with Calls() as calls:
        loss_of(model).backward()
    assert calls.counts == {"categorical": times, "categorical_backward": times}
    mixed = make_cpq(fuse="model", **kind, first=2, last="skip", overrides={"mid.0": {"bits": 3}})
    with Calls() as calls:
        loss_of(mixed).backward()
    assert calls.counts["categorical"] == (2 if "dropbits" in kind else 1)  # gates are not for layers with fixed bits
    assert [int(p.bits) for p in quantizers(mixed).values()] == [2, 3, 4]


@FUSES
@KINDS
def test_nothing_is_saved_for_backward_but_parameters_and_scalars(fuse, kind):
    model, saved = make_cpq(fuse=fuse, **kind), []
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
    model, twin = make_cpq(), make_cpq()
    originals(model)["conv"].requires_grad_(False)
    for name in ("log_alpha", "log_sigma"):
        getattr(quantizers(model)["head"], name).requires_grad_(False)
    one_step(model), one_step(twin)
    missing = {k for k, v in grads(model).items() if v is None}
    assert missing == {
        "conv.parametrizations.weight.original",
        "head.parametrizations.weight.0.log_alpha",
        "head.parametrizations.weight.0.log_sigma",
    }
    assert all(torch.equal(v, grads(twin)[k]) for k, v in grads(model).items() if v is not None)
    for p in quantizers(model)["conv"].parameters():
        p.requires_grad_(False)
    model.zero_grad()
    one_step(model)
    assert not model.conv.weight.requires_grad and model.head.weight.requires_grad


@FUSES
@KINDS
def test_non_reentrant_checkpoint(fuse, kind):
    model, plain = make_cpq(fuse=fuse, **kind), make_cpq(fuse=fuse, **kind)
    model.reentrant = False
    assert same(one_step(model), one_step(plain))


@FUSES
@KINDS
def test_autocast(fuse, kind):
    model = make_cpq(fuse=fuse, act_bits=4, **kind)
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
    model, x = make_cpq(fuse=fuse, cache=cache, **kind), data()[0]
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
    model = make_cpq(dropbits="fixed", nonzero=0.6)
    model.head.eval()
    heads = [model(data()[0]) is not None and model.head.weight for _ in range(4)]
    convs = [model(data()[0]) is not None and model.conv.weight for _ in range(30)]
    assert all(torch.equal(heads[0], v) for v in heads) and len({v.sum().item() for v in convs}) > 1


@FUSES
def test_draws_follow_the_global_seed(fuse):
    model = make_cpq(fuse=fuse, mode="sample", dropbits="learned")
    expected = one_step(model)
    assert same(one_step(copy.deepcopy(model)), expected) and not same(one_step(model, seed=2), expected)


@FUSES
@pytest.mark.parametrize(
    "kind", [{}, {"grad": "winner", "per_row": True}, {"mode": "soft"}, {"dropbits": "learned", "act_bits": 3}]
)
def test_cache_has_the_same_gradients_and_keeps_no_draw(fuse, kind):
    cached, plain = make_cpq(fuse=fuse, cache=True, **kind), make_cpq(fuse=fuse, **kind)
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
            assert calls.counts.get("categorical_activation", 0) == (3 * 2 if "act_bits" in kind else 0)
            torch.manual_seed(3)
            for seed in range(3):
                loss_of(plain, 0.0, seed).backward()
            for optimizer in optimizers:
                optimizer.step()
            assert same(
                {k: v for k, v in grads(cached).items() if v is not None},
                {k: v for k, v in grads(plain).items() if v is not None},
            )
            for optimizer in optimizers:
                optimizer.zero_grad()
    assert same(state(cached), state(plain))


@FUSES
@pytest.mark.parametrize("cache", [False, True])
def test_changes_of_every_parameter_are_seen(fuse, cache):
    model = make_cpq(fuse=fuse, cache=cache, dropbits="learned").eval()
    for change in ("log_alpha", "log_a"):
        model(data()[0])
        q = model.head.weight
        with torch.no_grad():
            getattr(quantizers(model)["head"], change).sub_(6)
        assert not torch.equal(model.head.weight, q), change


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=1e6),
        lambda p: torch.optim.Adam(p, lr=100.0),
        lambda p: torch.optim.AdamW(p, lr=1.0, weight_decay=0.5),
    ],
)
def test_no_optimizer_makes_alpha_or_sigma_zero(optimizer):
    model = make_cpq(act_bits=3, per_row=True)
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
    assert torch.equal(
        grid_step(torch.zeros(4, 25), 2, per_row=False), grid_step(torch.full((4, 25), 0.2), 2, per_row=False)
    )
    assert grid_step(torch.zeros(0, 3), 2, per_row=True).shape == (0,)
    assert grid_step(torch.zeros(0), 2, per_row=False) == 1
    assert grid_step(torch.full((3,), 1e-40), 2, per_row=False) > 0


# Integers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_row", [False, True])
def test_integers_are_the_evaluated_weights_bit_for_bit(dtype, per_row, tmp_path):
    for bits in (1, 2, 3, 5, 8, 11, 16):
        model = make_cpq(dtype, bits=bits, per_row=per_row, grad="winner")
        weights = to_int(model)
        assert list(weights) == ["conv.weight", "mid.0.weight", "mid.2.weight", "head.weight"]
        model.eval()
        for name, v in weights.items():
            q = model.get_submodule(name.removesuffix(".weight")).weight
            assert v.bits == bits and torch.equal(v.dequantize(), q) and v.dequantize().dtype == dtype
            assert v.grid == "dyadic" and v.scale.shape == ((len(q),) if per_row else (1,))
    model = make_cpq(dtype, per_row=per_row, dropbits="learned")
    set_gates(model, LEARNED)
    plain = Net().to(dtype)
    plain.load_state_dict(
        {
            k.replace("parametrizations.weight.original", "weight"): v
            for k, v in state(model).items()
            if ".weight.0." not in k
        }
    )
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
        model = make_cpq(fuse=fuse, cache=cache, act_bits=3, **kind)
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
    model = make_cpq(fuse=fuse, cache=cache, act_bits=3, **kind)
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
        model = make_cpq(fuse=fuse, dropbits="learned", act_bits=3)
        one_step(model)
        model.to(dtype)
        got = one_step(model, dtype=dtype)
        assert model.head.weight.dtype == dtype and all(v.isfinite().all() for v in got.values())
        assert quantizers(model)["head"].bits.dtype == torch.int32
        model.eval()
        assert torch.equal(to_int(model)["head.weight"].dequantize(), model.head.weight)


# Errors


@pytest.mark.parametrize(
    "options, text",
    [
        ({"bits": 0}, "bits: expected an integer 1..8, got 0"),
        ({"bits": 9}, "bits: expected an integer 1..8, got 9"),
        ({"bits": 17, "grad": "winner"}, "bits: expected an integer 1..16, got 17"),
        ({"bits": 9, "mode": "soft", "grad": "winner"}, "bits: .*1..8, got 9"),
        ({"bits": 4.0}, "bits: .*got 4.0"),
        ({"bits": True}, "bits: "),
        ({"mode": "argmax"}, "mode: expected one of 'hard', 'soft', 'sample', got 'argmax'"),
        ({"grad": "ste"}, "grad: expected one of 'winner', 'soft', got 'ste'"),
        ({"per_row": 1}, "per_row: "),
        ({"sigma": 0}, "sigma: expected a number .* got 0"),
        ({"sigma": -1.0}, "sigma: .*got -1.0"),
        ({"sigma": math.nan}, "sigma: .*nan"),
        ({"sigma": True}, "sigma: "),
        ({"sigma": "1"}, "sigma: "),
        ({"dropbits": "random"}, "dropbits: expected one of None, 'fixed', 'learned', got 'random'"),
        ({"dropbits": True}, "dropbits: "),
        ({"nonzero": 0.0}, r"nonzero: expected a number in \(0, 1\), got 0.0"),
        ({"nonzero": 1}, "nonzero: .*got 1"),
        ({"min_bits": 0}, "min_bits: expected an integer 1..16, got 0"),
        ({"bits": 2, "dropbits": "fixed"}, "dropbits: expected bits > min_bits = 2, .* got bits = 2"),
        ({"act_bits": 0}, "act_bits: .*1..8, got 0"),
        ({"act_bits": 9}, "act_bits: .*got 9"),
        ({"overrides": {"a": {"k": 1}}}, "overrides.*'k'"),
    ],
)
def test_config_errors_name_the_field(options, text):
    with pytest.raises(ValueError, match=text):
        CPQConfig(**options)


def test_layer_errors_leave_the_model_untouched():
    for options, text in (
        ({"last": 9}, "head: bits: expected an integer 1..8, got 9"),
        ({"first": 0}, "conv: bits: expected an integer 1..8, got 0"),
        ({"overrides": {"mid.*": {"bits": 9}}}, "mid.0: bits: "),
        ({"overrides": {"head": {"dropbits": 0.5}}}, "head: dropbits: .*got 0.5"),
    ):
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
    model = make_cpq(dropbits="learned")
    p = quantizers(model)["head"]
    for parameter, text in (
        (p.log_alpha, r"^head: alpha: expected finite values > 0"),
        (p.log_sigma, r"^head: sigma: expected finite values > 0"),
        (p.log_a, r"^head: gates: expected values in \[0, 1\]"),
    ):
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
    with pytest.raises(ValueError, match=r"^head: gates: expected one value per bit \(3\)"):
        model(data()[0])


# The scheme as a whole


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dropbits": "fixed"},
        {"dropbits": "learned"},
        {"act_bits": 4},
        {"mode": "sample", "sigma": 0.2},
        {"mode": "soft", "sigma": 0.2},
    ],
)
def test_training_learns(options):
    torch.manual_seed(0)
    x, y = separable()
    model = make_cpq(bits=4, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(120):
        optimizer.zero_grad()
        objective(model, x, y, 1e-3 if options.get("dropbits") == "learned" else 0.0).backward()
        optimizer.step()
    model.eval()
    assert (model(x).argmax(1) == y).float().mean() > 0.9  # a quarter by chance
