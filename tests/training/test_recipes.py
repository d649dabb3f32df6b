"""Settings of the methods that papers differ in: grids, the unit of the penalty, scales with a gradient, presets."""

import pytest
import torch

import quantops
from networks import Net, data, loss_of, make_msq, originals
from quantops import CPQConfig, MSQConfig, MSQController, TruncQuantConfig, quantize_
from quantops.nn import quantized

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("grid", ["dyadic", "full", "sign"])
@pytest.mark.parametrize("kind", ["loss", "decoupled"])
def test_the_unit_of_the_penalty(grid, kind):
    """Under "code" R is the plain sum of |B_k|, and its gradient sign(B_k) over the value of a code step."""
    model = make_msq(bits=5, k=2, grid=grid, penalty=kind, penalty_unit="code")
    model(data()[0])
    total, want, grads = quantops.penalty(model), 0, []
    for w in originals(model).values():
        s, b = quantops.absmax(w), quantops.lsb(w.detach(), None, 5, 2, grid=grid)
        want += b.abs().sum()
        grads.append(b.sign() / {"dyadic": s * 2**-4, "full": 2 * s / 31, "sign": s * 2**-5}[grid])
    torch.testing.assert_close(total.detach(), want.to(total))
    if kind == "loss":
        (0.5 * total).backward()
    else:
        quantops.add_penalty_grad_(model, 0.5)
    for w, g in zip(originals(model).values(), grads):
        torch.testing.assert_close(w.grad, 0.5 * g)


def test_the_unit_of_a_code_needs_one_step_per_layer():
    with pytest.raises(ValueError, match="penalty_unit: expected 'step' with per_row"):
        MSQConfig(penalty_unit="code", per_row=True)


def scales(w, settings):
    f, per_row = settings["scale"], settings.get("per_row", False)
    if f == "absmax":
        return quantops.absmax(w, per_row=per_row, grad=True)
    return f * quantops.absmean(w, per_row=per_row, grad=True)


def msq_q(w, settings):
    return quantops.round_clamp(w, scales(w, settings), 3, grid=settings.get("grid"))


def truncquant_q(w, settings):
    out = quantops.absmean(w, grad=True) if settings["out_scale"] else None
    return quantops.truncate(
        w,
        scales(w, settings),
        3,
        base_bits=3,
        companding=settings.get("companding"),
        out_scale=out,
        slope=settings.get("slope", "exact"),
    )


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize(
    "config, settings",
    [
        (MSQConfig, {"scale": "absmax"}),
        (MSQConfig, {"scale": 2.0, "grid": "sign"}),
        (MSQConfig, {"scale": "absmax", "per_row": True, "penalty": "decoupled"}),
        (TruncQuantConfig, {"scale": "absmax", "companding": None, "out_scale": None}),
        (TruncQuantConfig, {"scale": "absmax", "companding": "tanh", "slope": "exact", "out_scale": None}),
        (TruncQuantConfig, {"scale": "absmax", "companding": "tanh", "out_scale": "absmean", "slope": "exact"}),
    ],
)
def test_scales_with_a_gradient(config, settings, cache):
    """The gradients of a model are those of the op with scales that are functions of the weights."""
    bits = (3,) if config is TruncQuantConfig else 3
    torch.manual_seed(0)
    model = quantize_(Net(), config(bits=bits, scale_grad=True, cache=cache, **settings))
    loss_of(model)  # fills the cache
    loss_of(model).backward()
    own = [w.detach().clone().requires_grad_() for w in originals(model).values()]
    names = [f"{name}.weight" for name, _, _ in quantized(model)]
    plain = quantops.unquantize_(model)
    q = [(msq_q if config is MSQConfig else truncquant_q)(w, settings) for w in own]
    x, y = data()
    out = torch.func.functional_call(plain, dict(zip(names, q)), (x,))
    torch.nn.functional.cross_entropy(out, y).backward()
    for name, w in zip(names, own):
        got = plain.get_parameter(name).grad
        torch.testing.assert_close(got, w.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("grid, least", [("dyadic", 2), ("full", 1), ("sign", 1)])
def test_the_least_bits_follow_from_the_grid(grid, least):
    control = MSQController(make_msq(bits=3, grid=grid), 4, threshold=0.5, strength=0.1)
    assert control.min_bits == least


def test_compression_is_told_with_and_without_signs():
    report = quantops.bit_report(make_msq(bits=3, grid="sign", first=7))
    sizes = [row.numel for row in report.rows]
    assert [row.bits for row in report.rows] == [7, 3, 3, 3] and [row.stored for row in report.rows] == [8, 4, 4, 4]
    assert report.compression == 32 * sum(sizes) / sum(n * row.bits for n, row in zip(sizes, report.rows))
    assert report.stored == 32 * sum(sizes) / sum(n * row.stored for n, row in zip(sizes, report.rows))
    assert f"{report.compression:.2f}x" in str(report) and f"{report.stored:.2f}x as stored" in str(report)
    plain = quantops.bit_report(make_msq(bits=3))
    assert plain.stored == plain.compression and "stored" not in str(plain).splitlines()[-1]


def test_recursive_distillation_with_a_teacher():
    """Each width learns from the next wider one, the widest from the teacher, by soft cross entropy alone."""
    torch.manual_seed(0)
    model, (x, y) = quantize_(Net(), TruncQuantConfig(bits=(8, 3, 1))), data()
    teacher = torch.randn(len(x), 5)
    outs = {}
    for m in (8, 3, 1):
        quantops.set_bits(model, m)
        outs[m] = model(x).detach()
    quantops.set_bits(model)
    for settings, before in (
        ({}, {8: None, 3: 8, 1: 8}),
        ({"distill_from": "wider"}, {8: None, 3: 8, 1: 3}),
        ({"distill_from": "wider", "teacher": teacher}, {8: teacher, 3: 8, 1: 3}),
    ):
        for call in (quantops.joint_loss, quantops.joint_step):
            losses = call(
                model,
                lambda out: torch.nn.functional.cross_entropy(out, y),
                x,
                distill=1.0,
                temperature=2.0,
                **settings,
            ).losses
            for m, b in before.items():
                out = outs[m]
                if b is None:
                    want = torch.nn.functional.cross_entropy(out, y)
                else:
                    p = ((b if isinstance(b, torch.Tensor) else outs[b]) / 2).softmax(-1)
                    want = 4 * (p * (p.log() - (out / 2).log_softmax(-1))).sum(-1).mean()
                torch.testing.assert_close(losses[m], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings, kind, text",
    [
        ({"teacher": torch.zeros(2, 5)}, ValueError, "teacher: expected distill > 0"),
        ({"teacher": 3, "distill": 0.5}, TypeError, "teacher: expected a tensor of logits"),
        ({"teacher": torch.zeros(2, 4), "distill": 0.5}, ValueError, "teacher: expected logits of 5 classes, got 4"),
        ({"distill_from": "widestt"}, ValueError, "distill_from: expected one of 'widest', 'wider'"),
    ],
)
def test_errors_of_distillation(settings, kind, text):
    model, (x, y) = quantize_(Net(), TruncQuantConfig(bits=(3, 1))), data()
    with pytest.raises(kind, match=text):
        quantops.joint_loss(model, lambda out: torch.nn.functional.cross_entropy(out, y), x, **settings)


def test_presets_train():
    for config in (MSQConfig.paper(), MSQConfig.paper(bits=4), TruncQuantConfig.paper()):
        torch.manual_seed(0)
        model = quantize_(Net(), config)
        before = {name: w.detach().clone() for name, w in originals(model).items()}
        loss = loss_of(model)
        if isinstance(config, MSQConfig):
            loss = loss + 5e-5 * quantops.penalty(model)
        loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert all(not torch.equal(w, before[name]) and w.isfinite().all() for name, w in originals(model).items())
    assert len(originals(model)) == 2  # of TruncQuant: neither the first nor the last of four
    assert MSQConfig.paper(bits=4).bits == 4 and MSQConfig.paper().grid == "full"


@pytest.mark.parametrize("per_row", [False, True])
def test_cpq_as_in_the_paper(per_row):
    torch.manual_seed(0)
    model = quantize_(Net(), CPQConfig.paper(bits=3, per_row=per_row))
    for name, owner, p in quantized(model):
        w = owner.original.detach()
        low, high = w.reshape(len(w) if per_row else 1, -1).aminmax(dim=1)
        torch.testing.assert_close(p.alpha_start, (high - low) / 8)
        torch.testing.assert_close(p.sigma_start, p.alpha_start / 3)
        assert (p.mode, p.grad, p.dropbits) == ("hard", "winner", None), name
    loss_of(model).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert CPQConfig.paper(bits=3, dropbits="learned").dropbits == "learned"


def test_a_weight_without_a_range_starts_at_one():
    assert torch.equal(quantops.positive.range_step(torch.full((2, 3), 0.5), 4, per_row=True), torch.ones(2))
    assert torch.equal(quantops.positive.range_step(torch.zeros(0), 4, per_row=False), torch.ones(1))
