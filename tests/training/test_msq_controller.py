"""MSQ's controller: decisions against the equations, limits, errors, resume, a whole training."""

import json

import pytest
import torch
import torch.nn.functional as F

from networks import Net, data, loss_of, make_msq, originals, quantizers, same, separable
from quantops import (
    MSQConfig,
    MSQController,
    add_penalty_grad_,
    bit_report,
    hessian_trace,
    penalty,
    quantize_,
    reference,
)
from quantops.nn import quantized

pytestmark = pytest.mark.usefixtures("one_thread")
FUSES = pytest.mark.parametrize("fuse", ["model", "layer"])


@pytest.mark.parametrize("fall_back", [False, True])
def test_decision_follows_the_equations(fall_back):
    model = make_msq(bits=6, first=7)
    control = MSQController(model, 8.0, threshold=0.55, strength=0.01, samples=3, fall_back=fall_back)
    names = ("mid.0", "mid.2", "head")
    traces = hessian_trace(loss_of(model), [originals(model)[n] for n in names], 3, seed=0).tolist()
    before = {name: w.detach().clone() for name, w in originals(model).items()}
    entry = control.step(lambda: loss_of(model))
    rows = {row["name"]: row for row in entry["layers"]}
    assert tuple(rows) == names  # conv has fixed bits
    omegas = {n: r["omega"] for n, r in rows.items()}
    mean, fell_back = sum(omegas.values()) / 3, None
    for name, row in rows.items():
        w = before[name]
        k = 2 if omegas[name] < mean else 1
        wanted = k  # and so in the penalty that follows
        if fall_back and k == 2 and int(reference.msq(w, reference.absmax(w), 6, 2)[2]) / w.numel() >= 0.55:
            one = int(reference.msq(w, reference.absmax(w), 6, 1)[2]) / w.numel()
            k, fell_back = (1, name) if one < 0.55 else (2, fell_back)
        _, _, nonzero, sq_error = reference.msq(w, reference.absmax(w), 6, k)
        assert row["k"] == k and row["bits"] == 6
        assert int(quantizers(model)[name].k) == wanted
        assert row["beta"] == int(nonzero) / w.numel()
        assert row["sq_error"] == pytest.approx(float(sq_error), rel=1e-5)
        assert row["omega"] == pytest.approx(row["trace"] * row["sq_error"], rel=1e-6)
        assert row["trace"] == traces[names.index(name)]
        pruned = k if row["beta"] < 0.55 else 0
        assert (row["pruned"], row["bits_after"]) == (pruned, 6 - pruned)
    assert {r["k"] for r in rows.values()} == ({1} if fall_back else {1, 2}) and any(r["pruned"] for r in rows.values())
    assert (fell_back is not None) == fall_back
    assert {n: int(p.bits) for n, _, p in quantized(model)} == {
        "conv": 7,
        **{n: r["bits_after"] for n, r in rows.items()},
    }
    assert entry["compression"] == bit_report(model).compression == control.compression
    assert json.loads(json.dumps(control.log)) == control.log


def silent(model):
    """Makes every weight representable with two bits, so that beta is 0 down to two bits."""
    with torch.no_grad():
        for w in originals(model).values():
            w.copy_(torch.randint(-2, 2, w.shape, generator=torch.Generator().manual_seed(3)) * 0.25)
            w.view(-1)[0] = -0.5
    return model


def test_stops_at_the_target_in_order_of_omega():
    model = make_msq(bits=8)
    control = MSQController(model, 4.15, threshold=1.0, strength=0.01, samples=4, seed=1)
    entry = control.step(lambda: loss_of(model))
    assert control.done and control.strength == 0.0 and entry["done"] and control.compression >= 4.15
    order = sorted(entry["layers"], key=lambda r: r["omega"])
    assert order != entry["layers"]
    pruned = [r["pruned"] > 0 for r in order]
    last = pruned.index(False)
    assert 0 < last and not any(pruned[last:])  # a prefix in order of Omega
    row = order[last - 1]  # without the last one pruned the target was not reached
    p = {n: p for n, _, p in quantized(model)}[row["name"]]
    p.set_precision(row["bits"], 0)
    assert control.compression < 4.15
    p.set_precision(row["bits_after"], 0)
    assert control.step(lambda: loss_of(model)) is None and len(control.log) == 1


def test_min_bits_limits_k_and_interval_counts_steps():
    model = silent(make_msq(bits=4))
    control = MSQController(model, 32 / 3, threshold=0.5, strength=0.02, interval=3, min_bits=3, hessian=False)
    calls = []
    assert [control.step(lambda: calls.append(1)) is None for _ in range(3)] == [True, True, False]
    assert not calls  # no Hessian, no loss
    assert {(int(p.bits), int(p.k)) for _, _, p in quantized(model)} == {(3, 0)} and control.done
    row = control.log[0]["layers"][0]
    assert row["omega"] is None and row["trace"] is None and row["k"] == 1 and control.log[0]["step"] == 3
    model = silent(make_msq(bits=5))
    control = MSQController(model, 32 / 2, threshold=0.5, strength=0.02, min_bits=2)
    while not control.done:
        assert control.strength == 0.02
        control.step(lambda: loss_of(model))
        for _, _, p in quantized(model):
            assert int(p.bits) >= 2 and int(p.k) <= max(0, int(p.bits) - 2)
    assert {int(p.bits) for _, _, p in quantized(model)} == {2}


def test_dropping_silent_bits_changes_no_value():
    model = silent(make_msq(bits=8))
    out = model(data()[0])
    control = MSQController(model, 16, threshold=0.01, strength=0.01)
    while not control.done:
        control.step()
    assert bit_report(model).average_bits == 2 and torch.equal(model(data()[0]), out)


def test_layers_above_the_threshold_keep_their_bits():
    model = make_msq(bits=8)
    control = MSQController(model, 8, threshold=1e-3, strength=0.01)
    for _ in range(3):
        control.step(lambda: loss_of(model))
    assert not control.done and {int(p.bits) for _, _, p in quantized(model)} == {8}
    traces = [entry["layers"][0]["trace"] for entry in control.log]
    assert len(set(traces)) == 3  # the same weights and batch, other draws


@pytest.mark.parametrize(
    "options, text",
    [
        ({"target": 17}, "target: 17.0 is out of reach, min_bits = 2 .* allow 16"),
        ({"target": 1}, "target: "),
        (
            {"min_bits": 1},
            "min_bits: expected at least 2, since 1 bit on the dyadic grid has the values -s and 0 and no",
        ),
        ({"target": 12, "min_bits": 3}, "target: 12.0 is out of reach"),
        ({"interval": 0}, "interval: .*got 0"),
        ({"threshold": 0.0}, "threshold: "),
        ({"threshold": 1.5}, "threshold: "),
        ({"strength": -1}, "strength: "),
        ({"strength": float("nan")}, "strength: "),
        ({"strength": None}, "strength: expected a number, or weights with penalty_unit='gradient'"),
        ({"samples": 0}, "samples: "),
        ({"min_bits": 0}, "min_bits: "),
        ({"hessian": 1}, "hessian: "),
        ({"fall_back": 1}, "fall_back: "),
        ({"seed": -1}, "seed: "),
    ],
)
def test_controller_errors(options, text):
    with pytest.raises(ValueError, match=text):
        MSQController(make_msq(), **{"target": 8, "threshold": 0.1, "strength": 0.1, **options})


def test_strength_has_a_default_in_units_of_the_gradient():
    model = make_msq(penalty="decoupled", penalty_unit="gradient")
    assert MSQController(model, 8, threshold=0.1).strength == 0.3
    assert MSQController(model, 8, threshold=0.1, strength=0.25).strength == 0.25


def test_controller_needs_layers_to_prune():
    with pytest.raises(ValueError, match="Net has none"):
        MSQController(Net(), 8, threshold=0.1, strength=0.1)
    with pytest.raises(ValueError, match="all of them have fixed bits"):
        MSQController(make_msq(overrides={"*": {"prune": False}}), 8, threshold=0.1, strength=0.1)
    model = make_msq()
    originals(model)["mid.2"].requires_grad_(False)
    with pytest.raises(ValueError, match="mid.2: expected a weight that requires grad"):
        MSQController(model, 8, threshold=0.1, strength=0.1)
    model = make_msq()
    control = MSQController(model, 8, threshold=0.1, strength=0.1)
    with pytest.raises(ValueError, match="loss_fn: the Hessian trace of conv is nan"):
        control.step(lambda: loss_of(model) * float("nan"))
    assert control.log == [] and {int(p.bits) for _, _, p in quantized(model)} == {5}


@pytest.mark.parametrize(
    "fuse, cache, kind", [("model", False, "loss"), ("layer", False, "loss"), ("model", True, "decoupled")]
)
def test_resume_is_bit_for_bit(fuse, cache, kind, tmp_path):
    def start():
        model = make_msq(bits=8, fuse=fuse, cache=cache, penalty=kind)
        return (
            model,
            torch.optim.AdamW(model.parameters(), lr=0.01),
            MSQController(model, 12, interval=2, threshold=0.6, strength=1e-3, samples=2, seed=5),
        )

    def train(model, optimizer, control, steps):
        for i in steps:
            optimizer.zero_grad()
            loss_of(model, control.strength if kind == "loss" else 0.0, i).backward()
            if kind == "decoupled":
                add_penalty_grad_(model, control.strength)
            optimizer.step()
            control.step(lambda: loss_of(model, 0.0, i))

    whole = start()
    train(*whole, range(12))
    first = start()
    train(*first, range(6))
    torch.save([part.state_dict() for part in first], tmp_path / "checkpoint.pt")
    torch.rand(100)  # the global random state plays no part
    second = start()
    for part, state in zip(second, torch.load(tmp_path / "checkpoint.pt", weights_only=True)):
        part.load_state_dict(state)
    train(*second, range(6, 12))
    assert same(whole[0].state_dict(), second[0].state_dict())
    assert whole[2].state_dict() == second[2].state_dict() and len(whole[2].log) > 2
    assert len({row["bits_after"] for row in whole[2].log[-1]["layers"]} | {8}) > 1  # bits were dropped
    for a, b in zip(whole[1].state_dict()["state"].values(), second[1].state_dict()["state"].values()):
        assert same(a, b)


def test_load_state_dict_checks_the_layers():
    control = MSQController(make_msq(), 8, threshold=0.1, strength=0.1)
    state = control.state_dict()
    for bad, text in (
        ({**state, "names": ["conv"]}, r"expected the layers \['conv', 'mid.0'.*got \['conv'\]"),
        ({**state, "version": 3}, "version 2"),
        ({}, "missing"),
    ):
        with pytest.raises(ValueError, match=text):
            control.load_state_dict(bad)
    assert control.state_dict() == state


def test_training_drops_bits_and_learns():
    """The scheme as a whole: a separable problem, from 8 bits to 4 on average, at full accuracy."""
    torch.manual_seed(0)
    x, y = separable()
    model = make_msq(bits=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    control = MSQController(model, 8, interval=10, threshold=0.5, strength=5e-3, samples=2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if not control.done:
            loss = loss + control.strength * penalty(model)
        loss.backward()
        optimizer.step()
        control.step(lambda: F.cross_entropy(model(x), y))
    assert control.done and bit_report(model).compression >= 8
    assert (model(x).argmax(1) == y).float().mean() > 0.95


@pytest.mark.parametrize(
    "change, text",
    [
        ({"steps": -5}, "state: steps: expected an integer"),
        ({"steps": 1.5}, "state: steps"),
        ({"steps": "7"}, "steps"),
        ({"steps": True}, "steps"),
        ({"decisions": None}, "state: decisions"),
        ({"decisions": 99}, "state: decisions"),
        ({"done": "no"}, "state: done: expected one of True, False, got 'no'"),
        ({"done": 1}, "done"),
        ({"seed": -1}, "state: seed"),
        ({"log": None}, "expected log"),
        ({"log": [3]}, "expected log"),
        ({"log": [{"layers": []}]}, "expected log"),
        ({"log": [{"step": 2, "compression_before": 5, "compression": 6, "layers": [3, 3, 3, 3]}]}, "expected log"),
        ({"log": lambda good: [{**good[0], "step": None}]}, "expected log"),
        ({"log": lambda good: [{**good[0], "layers": good[0]["layers"][1:]}]}, "of the layers .'conv', 'mid.0'"),
        (
            {"log": lambda good: [{**good[0], "layers": [{**r, "beta": "0"} for r in good[0]["layers"]]}]},
            "expected log",
        ),
        ({"names": "conv"}, "expected the layers"),
        ({"sizes": [1, 2, 3, 4]}, "expected layers of so many weights"),
        ({"version": 3}, "expected version 2"),
        ({"version": True}, "expected version 2"),
    ],
)
def test_load_state_dict_is_checked_whole_before_anything_changes(change, text):
    model = silent(make_msq(bits=6))
    control = MSQController(model, 16, threshold=0.5, strength=0.02, interval=2, hessian=False, seed=4)
    for _ in range(3):
        control.step()
    good = control.state_dict()
    other = MSQController(make_msq(bits=6), 16, threshold=0.5, strength=0.02, interval=2, hessian=False)
    before = other.state_dict()
    change = {key: value(good[key]) if callable(value) else value for key, value in change.items()}
    with pytest.raises(ValueError, match=text):
        other.load_state_dict({**good, **change})
    assert other.state_dict() == before
    for key in good:
        with pytest.raises(ValueError, match="expected version 2"):
            other.load_state_dict({k: v for k, v in good.items() if k != key})
    with pytest.raises(TypeError, match="state: expected what"):
        other.load_state_dict(None)
    assert other.state_dict() == before
    other.load_state_dict({**{k: v for k, v in good.items() if k != "sizes"}, "version": 1})  # of earlier versions
    assert other.state_dict() == good


@pytest.mark.parametrize("hessian", [True, False])
def test_a_decision_that_fails_is_made_by_the_next_step(hessian):
    model, twin = make_msq(bits=6), make_msq(bits=6)
    a, b = (MSQController(m, 8, threshold=1.0, strength=0.02, interval=2, hessian=hessian) for m in (model, twin))
    weight, finite = originals(model)["head"], originals(model)["head"].detach().clone()

    def broken():
        raise ZeroDivisionError

    for control in (a, b):
        assert control.step(lambda: loss_of(model)) is None
    before, entry = a.state_dict(), b.step(lambda: loss_of(twin))
    if hessian:
        with pytest.raises(ZeroDivisionError):
            a.step(broken)
    with torch.no_grad():
        weight[0, 0] = float("nan")
    with pytest.raises(ValueError):
        a.step(lambda: loss_of(model))
    with torch.no_grad():
        weight.copy_(finite)
    assert a.state_dict() == before and {(int(p.bits), int(p.k)) for _, _, p in quantized(model)} == {(6, 1)}
    assert a.step(lambda: loss_of(model)) == entry and a.state_dict() == b.state_dict()


def test_a_decision_that_fails_half_way_leaves_bits_and_k(monkeypatch):
    model = make_msq(bits=6)
    control = MSQController(model, 8, threshold=1.0, strength=0.02, seed=3)
    before, set_precision, calls = control.state_dict(), type(quantized(model)[0][2]).set_precision, []

    def fails(self, bits, k):
        calls.append((bits, k))
        set_precision(self, bits, k)
        if bits == 5:
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(type(quantized(model)[0][2]), "set_precision", fails)
    with pytest.raises(KeyboardInterrupt):
        control.step(lambda: loss_of(model))
    assert (6, 2) in calls and control.state_dict() == before
    assert {(int(p.bits), int(p.k)) for _, _, p in quantized(model)} == {(6, 1)}


def test_decisions_and_likely_mistakes_are_logged(caplog):
    caplog.set_level("INFO", "quantops.controller")
    model = make_msq(bits=8)
    control = MSQController(model, 8, interval=2, threshold=1e-9, strength=0.01, hessian=False, patience=3)

    def decide(with_penalty):
        caplog.clear()
        for _ in range(2):
            loss_of(model, 0.01 if with_penalty else 0.0).backward()
            control.step()
        return [(r.levelname, r.getMessage()) for r in caplog.records]

    (told,) = decide(True)
    assert told == ("INFO", "step 2: compression 4.00x, 0 of 4 layers lose bits")
    assert [level for level, _ in decide(True)] == ["INFO"]
    told = decide(False)
    assert [level for level, _ in told] == ["INFO", "WARNING", "WARNING"]
    assert "no penalty was computed since the last decision" in told[1][1]
    assert "no bits have fallen for 3 decisions: the least beta is " in told[2][1]
    add_penalty_grad_(model, 0.01)
    assert [level for level, _ in decide(False)] == ["INFO"]  # it counts, and patience starts again
    silent(model)
    assert decide(True)[0][1].startswith("step 10: compression 4.57x, 4 of 4 layers lose bits: conv 8 -> 7, mid.0 8 ->")


def test_no_penalty_is_missed_where_there_is_to_be_none(caplog):
    control = MSQController(make_msq(bits=8), 8, threshold=1e-9, strength=0.0)
    control.step()
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_plot_is_a_picture_of_the_log(tmp_path):
    model = silent(make_msq(bits=8))
    control = MSQController(model, 16, threshold=0.5, strength=0.01, hessian=False)
    with pytest.raises(ValueError, match="log: expected at least one decision"):
        control.plot(tmp_path / "bits.png")
    while not control.done:
        control.step()
    control.plot(tmp_path / "bits.svg")
    text = (tmp_path / "bits.svg").read_text()
    assert "<svg" in text
    control.plot(tmp_path / "bits.png")
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")


def test_a_loss_through_fused_attention_has_traces():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(8, 24)

        def forward(self, x):
            return F.scaled_dot_product_attention(*self.qkv(x).unflatten(-1, (2, 12)).transpose(1, 2).chunk(3, -1))

    torch.manual_seed(0)
    model, x = quantize_(Attention(), MSQConfig(bits=5)), torch.randn(3, 6, 8)
    with pytest.raises(RuntimeError, match="loss: expected one with second derivatives"):
        hessian_trace(model(x).square().mean(), [originals(model)["qkv"]])
    row = MSQController(model, 8, threshold=0.1, strength=0.1).step(lambda: model(x).square().mean())["layers"][0]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = hessian_trace(model(x).square().mean(), [originals(model)["qkv"]])
    assert row["trace"] == expected.item() != 0


@pytest.mark.parametrize(
    "options, compiled", [({}, False), ({"scale": 2.0, "grid": "sign"}, True), ({"per_row": True, "scale": 2.5}, False)]
)
def test_differences_of_gradients_give_the_same_traces(options, compiled):
    x, traces = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), []
    for hessian in (True, "differences"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Dropout(0.3), torch.nn.Linear(16, 6), torch.nn.Tanh()
        )
        quantize_(model, MSQConfig(bits=4, **options))
        before = {name: w.detach().clone() for name, w in originals(model).items()}
        run = (
            torch.compile(model, backend="aot_eager", fullgraph=True)
            if compiled and hessian == "differences"
            else model
        )
        run(x).sum().backward()
        grads = {name: w.grad.clone() for name, w in originals(model).items()}
        control = MSQController(model, 14, threshold=0.5, strength=0.01, samples=1, hessian=hessian)
        torch.manual_seed(1)  # one mask of dropout, on both sides of the weights
        traces.append([row["trace"] for row in control.step(lambda: run(x).square().mean())["layers"]])
        for name, w in originals(model).items():
            assert torch.equal(w, before[name]) and torch.equal(w.grad, grads[name])
    assert traces[1] == pytest.approx(traces[0], rel=2e-2, abs=2e-3 * max(map(abs, traces[0])))
    assert min(map(abs, traces[0])) > 0


@pytest.mark.parametrize("hessian", [True, "differences"])
def test_traces_need_a_loss_of_all_weights(hessian):
    model = make_msq(bits=6)
    control = MSQController(model, 8, threshold=0.5, strength=0.01, hessian=hessian)
    with pytest.raises(ValueError, match="^loss.*: expected a scalar tensor that requires grad"):
        control.step(lambda: loss_of(model).detach())
    with pytest.raises(ValueError, match=r"^loss_fn: conv, mid.0, mid.2: the loss does not depend on them"):
        control.step(lambda: originals(model)["head"].square().sum())
    originals(model)["mid.2"].requires_grad_(False)
    with pytest.raises(ValueError, match="^mid.2: expected a weight that requires grad, got one that was frozen"):
        control.step(lambda: loss_of(model))
    originals(model)["mid.2"].requires_grad_()
    assert control.step(lambda: loss_of(model))["layers"][0]["trace"] != 0
