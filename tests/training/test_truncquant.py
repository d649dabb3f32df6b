"""TruncQuant training: joint steps, set_bits, resume, integers and plain models."""

import copy
import importlib.util
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantops
from cases import Calls
from networks import close, data, grads, originals, same, state
from quantops import TruncQuantConfig, bit_report, joint_loss, joint_step, plain_model, quantize_, set_bits, to_int
from quantops.methods.joint import _Scope
from quantops.methods.truncquant import network_of
from quantops.nn import quantized
from truncquant_networks import FUSES, RULES, STEPS, TANH, WIDTHS, Net, joint, loss_of, make, separately

pytestmark = pytest.mark.usefixtures("one_thread")

# Forward


@FUSES
@pytest.mark.parametrize("options", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_are_truncate_and_integers_decode_to_them_at_every_width(fuse, options, dtype):
    model = make(dtype, fuse=fuse, **options)
    config = TruncQuantConfig(**{"scale": "absmax", **options})
    weights = to_int(model)
    for m in config.bits:
        set_bits(model, m)
        model(data(dtype)[0])
        for name, w in originals(model).items():
            top, mean = quantops.absmax(w, per_row=config.per_row), quantops.absmean(w, per_row=config.per_row)
            scale = top if config.scale == "absmax" else config.scale * mean
            q = quantops.reference.truncate(
                w.detach(),
                scale,
                m,
                base_bits=config.base_bits,
                rule=config.rule,
                companding=config.companding,
                out_scale=mean if config.out_scale else None,
            )
            v = weights[f"{name}.weight"]
            assert torch.equal(model.get_submodule(name).weight, q) and q.dtype == dtype, (name, m)
            assert torch.equal(v.dequantize(m), q) and torch.equal(v.at(m).dequantize(), q)
            assert v.bits == config.bits[0] and v.dequantize(m).dtype == dtype
    assert not torch.equal(
        weights["fc1.weight"].dequantize(config.bits[0]), weights["fc1.weight"].dequantize(config.bits[1])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_model_is_the_evaluated_model_at_that_width(dtype):
    for options in ({}, {"fuse": "layer"}, {"affine": False}, {"batch_norm": False}, {"first": "skip", "last": 6}):
        model = make(dtype, **options)
        joint(model, dtype=dtype)
        model.eval()
        for m in WIDTHS:
            plain = plain_model(model, m)
            assert {type(p) for p in plain.modules()} == {type(p) for p in Net().modules()}
            assert not plain._forward_pre_hooks and not plain._forward_hooks and not plain._forward_hooks_always_called
            set_bits(model, m)
            assert torch.equal(plain(data(dtype)[0]), model(data(dtype)[0]))
            assert plain.state_dict().keys() == Net(options.get("affine", True)).state_dict().keys()
            pickle.dumps(plain)  # nothing of quantops is left
        assert torch.equal(plain_model(model)(data(dtype)[0]), plain_model(model, 8)(data(dtype)[0]))
        assert len(quantized(model)) >= 3


@pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="safetensors missing")
def test_a_file_gives_the_model_at_any_width(tmp_path):
    model, path = make(first=8, overrides={"fc2": {"bits": 3}}, out_scale="absmean"), tmp_path / "w.safetensors"
    joint(model)
    model.eval()
    quantops.save_int(model, path)
    for m in WIDTHS:
        plain = plain_model(model, m)
        for name in originals(model):
            nn.init.zeros_(plain.get_submodule(name).weight)
        opened = quantops.load_int(path, plain, bits=m)
        assert [v.bits for v in opened.values()] == [8, m, m, 3]
        set_bits(model, m)
        assert torch.equal(plain(data()[0]), model(data()[0]))


def test_layers_with_a_width_of_their_own():
    model = make(first=8, last="skip", overrides={"conv2": {"bits": 3}})
    for m in WIDTHS:
        set_bits(model, m)
        assert [r.bits for r in bit_report(model).rows] == [8, 3, m]
    with Calls() as calls:
        joint(model)
    assert calls.counts["truncate"] == 2  # one for the layers of all widths, one for those of one
    twin = make(first=8, last="skip", overrides={"conv2": {"bits": 3}})
    separately(twin)
    assert close(grads(model), grads(twin))


# Joint steps


@FUSES
@STEPS
@pytest.mark.parametrize("options", RULES)
def test_joint_gradients_are_the_sum_of_those_of_the_widths(fuse, kind, options):
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        model, twin = make(dtype, fuse=fuse, **options), make(dtype, fuse=fuse, **options)
        result, total = joint(model, kind, dtype=dtype), separately(twin, dtype=dtype)
        assert torch.equal(result.loss.detach(), total.detach())
        assert list(result.losses) == list(TruncQuantConfig(**options).bits)
        assert close(grads(model), grads(twin), tolerance) and same(state(model), state(twin))
        assert all(g.abs().max() > 0 for g in grads(model).values())


@STEPS
def test_weights_of_the_losses_and_accumulation(kind):
    model, twin = make(), make()
    weights = [1.0, 0.5, 0.0, 2.0]
    for seed in (1, 2):
        joint(model, kind, seed, weights=weights)
        separately(twin, seed, weights=weights)
    assert close(grads(model), grads(twin))
    first = joint(make(), kind, weights=weights)
    assert first.loss.item() == pytest.approx(sum(w * v.item() for w, v in zip(weights, first.losses.values())))


@FUSES
@STEPS
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("config", [{}, TANH], ids=["default", "tanh"])
def test_one_call_reads_the_weights_for_all_widths(fuse, kind, cache, config):
    model, times = make(fuse=fuse, cache=cache, **config), 1 if fuse == "model" else 4
    scales = {"own_scale": 2, "own_scale_backward": 2} if config else {"absmax": 1}
    for _ in range(2):
        with Calls() as calls:
            joint(model, kind)
        assert calls.counts == {**scales, "truncate": 1, "truncate_backward": 1}
    with Calls() as calls:
        loss_of(model).backward()  # outside of it: the selected width alone, whose default backward is the identity
    if not config:
        assert calls.counts == {"absmax": times, "truncate": times}
    elif not cache:
        assert calls.counts == {k: n * times for k, n in {**scales, "truncate": 1, "truncate_backward": 1}.items()}


@FUSES
@pytest.mark.parametrize("config, lists", [({}, 1), (TANH, 4)], ids=["default", "tanh"])
def test_nothing_is_saved_for_backward_but_parameters_and_scalars(fuse, config, lists):
    """``lists`` of scales: of tanh two, each for its function of the weights and for q."""
    model, saved = make(fuse=fuse, **config), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        scope = _Scope(network_of(model))
        scope.open(detached=False)
    kept = {p.untyped_storage().data_ptr() for p in model.parameters()}
    extra = [t for t in saved if t.untyped_storage().data_ptr() not in kept]
    assert len(saved) > len(extra) and sum(t.numel() for t in extra) <= 4 * (lists + len(WIDTHS) + 1)  # and bits, base
    scope.close()


def test_frozen_weights_have_no_gradient():
    for kind in ("loss", "step"):
        model = make()
        originals(model)["conv2"].requires_grad_(False)
        joint(model, kind)
        twin = make()
        originals(twin)["conv2"].requires_grad_(False)
        separately(twin)
        assert originals(model)["conv2"].grad is None
        have = [{k: v for k, v in grads(m).items() if v is not None} for m in (model, twin)]
        assert close(*have) and len(have[0]) == len(grads(model)) - 1


@STEPS
def test_the_selected_width_stays_and_nothing_is_left_over(kind):
    model = make()
    set_bits(model, 2)
    before = {k: v for k, v in state(model).items() if k.endswith((".bits", ".index"))}
    x, _ = data()
    for fail in (False, True):
        try:
            run = joint_step if kind == "step" else joint_loss
            run(model, lambda out: 1 / 0 if fail else out.sum(), x)
        except ZeroDivisionError:
            pass
        assert same(before, {k: v for k, v in state(model).items() if k in before})
        assert all(p.given.get() is None and p.slot.result is None for _, _, p in quantized(model))
        assert len(model.fc1.weight.unique()) <= 4


@STEPS
def test_distillation(kind):
    x, y = data()
    for share, t in ((1.0, 1.0), (0.3, 2.5)):
        model, twin = make(), make()
        result = joint(model, kind, distill=share, temperature=t)
        outs = []
        for m in WIDTHS:
            set_bits(twin, m)
            outs.append(twin(x))
        target = (outs[0] / t).softmax(-1).detach()
        losses = [F.cross_entropy(outs[0], y)]
        for out in outs[1:]:
            kl = (target * (target.log() - (out / t).log_softmax(-1))).sum() / len(x)
            losses.append(share * t * t * kl + (1 - share) * F.cross_entropy(out, y))
        sum(losses).backward()
        got = [v.item() for v in result.losses.values()]
        assert got == pytest.approx([v.item() for v in losses], rel=1e-5, abs=1e-6)
        assert close(grads(model), grads(twin), 1e-5)
    # The target is detached: the widest learns from its own loss alone.
    model, twin = make(), make()
    joint(model, kind, distill=1.0)
    loss_of(twin).backward()
    assert torch.equal(model.bn1.weight.grad[0], twin.bn1.weight.grad[0])


@FUSES
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts_are_recomputed_at_their_width(fuse, reentrant):
    model, plain = make(fuse=fuse), make(fuse=fuse)
    model.reentrant = reentrant
    x, y = data()
    joint_step(model, lambda out: F.cross_entropy(out, y), x.clone().requires_grad_())
    joint(plain)
    assert close(grads(model), grads(plain))
    with pytest.raises(RuntimeError, match="use quantops.joint_step"):
        joint_loss(model, lambda out: F.cross_entropy(out, y), x.clone().requires_grad_()).loss.backward()
    model.zero_grad(), plain.zero_grad()
    for m in (model, plain):
        set_bits(m, 4)
        F.cross_entropy(m(x.clone().requires_grad_()), y).backward()
    assert close(grads(model), grads(plain))


@FUSES
@STEPS
def test_autocast(fuse, kind):
    model, twin = make(fuse=fuse), make(fuse=fuse)
    with torch.autocast("cpu", torch.bfloat16):
        seen = []
        handle = model.fc1.register_forward_hook(lambda layer, *args: seen.append(layer.weight.dtype))
        joint(model, kind)
        handle.remove()
        separately(twin)
    assert set(seen) == {torch.bfloat16} and len(seen) == len(WIDTHS)
    assert all(g.dtype == torch.float32 for g in grads(model).values()) and close(grads(model), grads(twin), 1e-2)

    class Inside(Net):  # begins inside the model, where the q that was given does not fit
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x).float()

    torch.manual_seed(0)
    inside = quantize_(Inside(), TruncQuantConfig(scale="absmax", fuse=fuse))
    joint(inside, kind)
    assert close(grads(inside), grads(model), 1e-2)


def test_grad_scaler_and_evaluation():
    model, twin = make(), make()
    joint(model, "step", backward=lambda loss: (loss * 8).backward())
    joint(twin, "step")
    assert close({k: v / 8 for k, v in grads(model).items()}, grads(twin))
    model.eval()
    with torch.no_grad():
        result = joint_loss(model, lambda out: out.sum(), data()[0])
    for m in WIDTHS:
        set_bits(model, m)
        assert result.losses[m] == model(data()[0]).sum() and not result.loss.requires_grad


# State


@pytest.mark.parametrize(
    "fuse, kind, cache", [("model", "loss", False), ("layer", "step", False), ("model", "step", True)]
)
def test_resume_is_bit_for_bit(fuse, kind, cache, tmp_path):
    def start():
        model = make(fuse=fuse, cache=cache)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    def train(model, optimizer, steps):
        for seed in steps:
            optimizer.zero_grad()
            joint(model, kind, seed, distill=0.5)
            optimizer.step()
            set_bits(model, WIDTHS[seed % 4])

    whole, first, second = start(), start(), start()
    train(*whole, range(6))
    train(*first, range(3))
    torch.save([part.state_dict() for part in first], tmp_path / "checkpoint.pt")
    for part, saved in zip(second, torch.load(tmp_path / "checkpoint.pt", weights_only=True)):
        part.load_state_dict(saved)
    assert bit_report(second[0]).rows[0].bits == WIDTHS[2]  # the width is part of the state
    train(*second, range(3, 6))
    assert same(state(whole[0]), state(second[0]))
    for a, b in zip(whole[1].state_dict()["state"].values(), second[1].state_dict()["state"].values()):
        assert same(a, b)


@FUSES
def test_deepcopy_and_dtype(fuse):
    model = make(fuse=fuse)
    joint(model)
    twin = copy.deepcopy(model)
    set_bits(twin, 1)
    assert len(twin.fc1.weight.unique()) == 2 < len(model.fc1.weight.unique())
    for m in (model, twin):
        m.zero_grad()
        joint(m)
    assert same(grads(model), grads(twin))
    plain_model(model, 4)
    model(data()[0])  # it has its parametrizations still
    model.double()
    joint(model, dtype=torch.float64)
    assert model.bn1.index.dtype == torch.int64 and model.fc1.weight.dtype == torch.float64


@FUSES
@pytest.mark.parametrize("options", RULES)
def test_cache_computes_once_and_has_the_same_gradients(fuse, options):
    cached, plain = make(fuse=fuse, cache=True, **options), make(fuse=fuse, **options)
    times = 1 if fuse == "model" else 4
    for m in TruncQuantConfig(**options).bits[:2]:
        set_bits(cached, m), set_bits(plain, m)
        with Calls() as calls:
            for seed in range(3):
                loss_of(cached, seed).backward()
        assert calls.counts["truncate"] == times
        for seed in range(3):
            loss_of(plain, seed).backward()
        assert same(grads(cached), grads(plain))


# Errors


@pytest.mark.parametrize(
    "options, text",
    [
        ({"bits": ()}, r"bits: expected a tuple of widths, .* got \(\)"),
        ({"bits": 8}, "bits: .*got 8"),
        ({"bits": (8, 8)}, r"bits: expected distinct widths, got \(8, 8\)"),
        ({"bits": (8, 0)}, "bits: .*1..base_bits.*got 0"),
        ({"bits": (8, 4), "base_bits": 6}, "bits: expected widths in 1..base_bits = 6, got 8"),
        ({"bits": (17,)}, "bits: .*16, got 17"),
        ({"bits": (4.0,)}, "bits: .*got 4.0"),
        ({"bits": (True,)}, "bits: .*got True"),
        ({"base_bits": 17}, "base_bits: .*got 17"),
        ({"rule": "ceil"}, "rule: .*'ceil'"),
        ({"companding": "mu"}, "companding: .*'mu'"),
        ({"scale": 0}, "scale: .*got 0"),
        ({"scale": "max"}, "scale: .*'max'"),
        ({"scale": True}, "scale: "),
        ({"out_scale": "absmax"}, "out_scale: "),
        ({"per_row": 1}, "per_row: "),
        ({"batch_norm": None}, "batch_norm: "),
        ({"overrides": {"a": {"k": 1}}}, "overrides.*'k'"),
    ],
)
def test_config_errors_name_the_field(options, text):
    with pytest.raises(ValueError, match=text):
        TruncQuantConfig(**options)


def test_fixed_widths_are_checked_with_their_layer():
    for options, text in (
        ({"last": 0}, "fc2: bits: expected an integer 1..16, got 0"),
        ({"overrides": {"fc1": {"bits": (8, 4)}}}, "fc1: bits: "),
    ):
        with pytest.raises(ValueError, match=text):
            make(**options)


def test_errors_of_the_functions():
    model, x = make(), data()[0]
    for call in (lambda m: set_bits(model, m), lambda m: plain_model(model, m)):
        for bad in (3, 16, 0, True, "8", 8.0):
            with pytest.raises(ValueError, match=f"bits: expected one of the widths 8, 4, 2, 1 .* got {bad!r}"):
                call(bad)
    for call in (set_bits, lambda m: joint_loss(m, torch.sum, x), lambda m: joint_step(m, torch.sum, x)):
        with pytest.raises(ValueError, match="expected weights quantized with TruncQuantConfig, Net has none"):
            call(Net())
    with pytest.raises(ValueError, match="expected weights quantized by quantops.quantize_, Net has none"):
        plain_model(Net())
    before = state(model)
    for options, error, text in (
        ({"weights": [1, 1]}, ValueError, r"weights: expected 4 numbers .*got \[1, 1\]"),
        ({"weights": [1, 1, 1, -1]}, ValueError, "weights: "),
        ({"weights": 1.0}, ValueError, "weights: "),
        ({"distill": 1.5}, ValueError, "distill: .*got 1.5"),
        ({"distill": True}, ValueError, "distill: "),
        ({"temperature": 0}, ValueError, "temperature: .*got 0"),
    ):
        for run in (joint_loss, joint_step):
            with pytest.raises(error, match=text):
                run(model, torch.sum, x, **options)
    with pytest.raises(TypeError, match="loss_fn: expected a function of the output, got Tensor"):
        joint_loss(model, x)
    assert same(before, state(model))
    several = nn.ModuleList([quantize_(nn.Linear(2, 2), TruncQuantConfig(bits=b)) for b in ((8, 4), (8, 2))])
    with pytest.raises(ValueError, match=r"expected one set of widths, got \(8, 2\) and \(8, 4\)"):
        set_bits(several, 8)
    with pytest.raises(TypeError, match="distill: expected a model whose output is one tensor"):
        pair = quantize_(nn.Sequential(nn.Linear(3, 3), Pair()), TruncQuantConfig())
        joint_loss(pair, sum, torch.ones(2, 3), distill=1)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


# Reports


def test_bit_report():
    model = make()
    for m in WIDTHS:
        set_bits(model, m)
        report = bit_report(model)
        assert report.average_bits == m and report.compression == 32 / m
        for row, (name, w) in zip(report.rows, originals(model).items()):
            q = model.get_submodule(name).weight
            assert (row.name, row.bits, row.k, row.beta) == (name, m, 0, 0)
            assert row.scale == float(w.detach().abs().max())
            assert row.sq_error == pytest.approx(float((q - w).detach().double().square().sum()), rel=1e-5)
    with torch.no_grad():
        originals(model)["fc1"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        bit_report(model)


def test_training_learns_at_every_width():
    torch.manual_seed(0)
    x = torch.randn(128, 1, 6, 6)
    y = (x[:, 0, :3].sum((1, 2)) > 0).long() + 2 * (x[:, 0, 3:].sum((1, 2)) > 0).long()
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)
    for _ in range(120):
        optimizer.zero_grad()
        joint_step(model, lambda out: F.cross_entropy(out, y), x)
        optimizer.step()
        schedule.step()
    model.eval()
    for m in WIDTHS:
        set_bits(model, m)
        assert (model(x).argmax(1) == y).float().mean() > (0.75 if m > 1 else 0.5), m  # a quarter by chance


@pytest.mark.parametrize("slope, moves", [("exact", False), ("ste", True)])
def test_a_weight_of_zeros_trains_by_the_straight_slope_alone(slope, moves):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    nn.init.zeros_(model[2].weight)
    settings = {"batch_norm": False, "first": "quantize", "last": "quantize", "overrides": {"2": {"slope": slope}}}
    quantize_(model, TruncQuantConfig.paper(bits=(4, 2), **settings))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        joint_step(model, lambda out: (out - 1).square().mean(), torch.randn(8, 4))
        optimizer.step()
    assert bool(originals(model)["2"].any()) == moves
