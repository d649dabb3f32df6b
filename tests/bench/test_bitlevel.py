"""The bit-level peers, BSQ and CSQ, on toy weights."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from bench.training import bitlevel, methods


def layer(kind, weight, bits, **more):
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight.data = weight.clone()
    parametrize.register_parametrization(made, "weight", kind(made.weight, bits, **more), unsafe=True)
    return made, made.parametrizations.weight[0]


def integers(bits, shape=(6, 10), seed=0):
    """Integers of which one is the largest there is."""
    w = torch.randint(-(2**bits) + 1, 2**bits, shape, generator=torch.Generator().manual_seed(seed)).float()
    w[0, 0] = 2**bits - 1
    return w


def test_planes_are_binary_digits():
    w = torch.tensor([5.0, -6.0, 0.0])
    planes = bitlevel.planes_of(w, 3)
    assert planes.tolist() == [[[1, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 1, 0]], [[1, 0, 0], [0, 1, 0]]]


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_bsq_weights_are_those_of_the_integers(bits):
    w = integers(bits)
    made, p = layer(bitlevel.BSQWeight, w * 0.37, bits)
    assert torch.equal(made.weight, w * p.step)
    torch.testing.assert_close(made.weight, w * 0.37)
    assert set(bitlevel.planes(made).unique().tolist()) == {0.0, 1.0} and bitlevel.planes(made).shape == (bits, 2, 60)


def test_bsq_gradients_are_straight_through():
    made, p = layer(bitlevel.BSQWeight, torch.randn(4, 5), 3)
    grad = torch.randn(4, 5)
    (made.weight * grad).sum().backward()
    expected = torch.stack([torch.stack([2.0**b * grad.flatten(), -(2.0**b) * grad.flatten()]) for b in range(3)])
    torch.testing.assert_close(bitlevel.planes(made).grad, expected * p.step.detach())
    torch.testing.assert_close(p.scale.grad, (grad * made.weight).sum().detach() / p.scale.detach())


@pytest.mark.parametrize("low, most, bits", [(0, 255, 8), (2, 63, 4), (3, 8, 1), (0, 3, 2), (0, 0, 0)])
def test_bsq_adjustment_drops_planes_and_changes_no_weight(low, most, bits):
    w = integers(8)
    made, p = layer(bitlevel.BSQWeight, w * 0.1, 8)
    kept = (w.abs().clamp(max=most).int() >> low << low).float() * w.sign()
    bitlevel.planes(made).data.copy_(bitlevel.planes_of(kept, 8))
    before, unit = made.weight.detach().clone(), float(p.unit)
    bitlevel.set_planes(made, p.adjust(bitlevel.planes(made)))
    assert p.bits == bits and bitlevel.planes(made).shape == (bits, 2, 60)
    assert torch.equal(made.weight, before) and float(p.unit) == unit * 2 ** (low if bits else 0)
    made.weight.sum().backward()
    assert bitlevel.planes(made).grad.shape == (bits, 2, 60)


def test_bsq_adjustment_rounds_and_grows():
    """Planes anywhere in [0, 2]: the rounded weights stay, and one more bit is there where they need it."""
    made, p = layer(bitlevel.BSQWeight, torch.randn(6, 10), 3)
    bitlevel.planes(made).data.uniform_(0, 2, generator=torch.Generator().manual_seed(0))
    bitlevel.planes(made).data[:, :, 0] = torch.tensor([2.0, 0.0])
    before = made.weight.detach().clone()
    bitlevel.set_planes(made, p.adjust(bitlevel.planes(made)))
    assert p.bits == 4 and torch.equal(made.weight, before)
    assert set(bitlevel.planes(made).unique().tolist()) == {0.0, 1.0}


def test_group_lasso():
    """By the definition; planes that are 0 have a gradient of 0, not NaN."""
    a, b = torch.rand(3, 2, 5), torch.rand(2, 2, 15)
    a[1] = 0
    a.requires_grad_()
    got = bitlevel.group_lasso([(3, a), (2, b)])
    expected = 5 / 20 * 3 * sum(a[i].square().sum().sqrt() for i in (0, 2)) + 15 / 20 * 2 * sum(
        b[i].square().sum().sqrt() for i in range(2)
    )
    torch.testing.assert_close(got, expected)
    got.backward()
    assert torch.equal(a.grad[1], torch.zeros(2, 5)) and (a.grad[0] > 0).all()


def test_bsq_finetunes_at_the_bits_it_found():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 3))
    given = model[0].weight.detach().abs().mean()
    method = methods.BSQ(model, 10, bits=8, strength=0.1, adjustments=2, search=0.4)
    assert sum(p.numel() for p in model.parameters() if p.dim() == 3) == 16 * 52
    w = bitlevel.planes(model[0])
    w.data[4:] = 0
    assert not method.after_step(1, None, None) and method.after_step(2, None, None)
    assert method.widths() == {"0": (40, 4), "1": (12, 8)} and method.penalty() is not None
    before = model[0].weight.detach().clone()
    assert method.after_step(4, None, None) and method.penalty() is None and not method.after_step(6, None, None)
    torch.testing.assert_close(model[0].weight, before)
    assert sum(p.numel() for p in model.parameters()) == 52 + 7 + 2  # and a step each
    assert len(model[0].weight.unique()) <= 31
    assert method.average_bits() == (40 * 4 + 12 * 8) / 52 and [e["step"] for e in method.log] == [2, 4]
    model[0].weight.sum().backward()
    fixed, u = model[0].parametrizations.weight[0], model[0].parametrizations.weight.original
    torch.testing.assert_close(u.grad, torch.ones(4, 10) * fixed.gain)
    torch.testing.assert_close(u.detach() * fixed.gain, before)
    torch.testing.assert_close(u.abs().mean().detach(), given)  # however small the steps have become
    torch.testing.assert_close(fixed.step.grad, torch.zeros(()), atol=1e-4, rtol=0)  # u is on the levels
    with torch.no_grad():
        u[0], u[1, 0] = 100.0, 0.4 * fixed.step
    fixed.step.grad = None
    model[0].weight[:2].sum().backward()
    levels = u.detach() / fixed.step.detach()
    over = 15 * 10 + float(levels[1, 1:].sum() - levels[:2].sum())  # of the levels over u/step
    torch.testing.assert_close(float(fixed.step.grad), over * float(fixed.gain) * (40 * 15) ** -0.5, rtol=1e-4, atol=0)
    method.after_step(7, None, None)
    torch.testing.assert_close(u[0].min().item(), 15 * fixed.step.item())


def test_bsq_finetunes_layers_without_bits():
    model = nn.Sequential(nn.Linear(3, 2))
    method = methods.BSQ(model, 2, bits=2, strength=0.1, adjustments=1, search=0.5)
    bitlevel.planes(model[0]).data.zero_()
    assert method.after_step(1, None, None) and method.widths() == {"0": (6, 0)}
    model[0](torch.ones(1, 3)).sum().backward()
    assert torch.equal(model[0].weight, torch.zeros(2, 3))
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_csq_starts_at_the_weights_and_ends_binary():
    w = integers(5)
    made, p = layer(bitlevel.CSQWeight, w * 0.2, 5)
    torch.testing.assert_close(made.weight, w * 0.2)
    with torch.no_grad():
        p.gates[1] = -0.5
        bitlevel.planes(made)[0, 0, 3] = 0.0
    hot = []
    for beta in (1.0, 30.0, 1000.0):
        p.beta.fill_(beta), p.beta_gates.fill_(beta)
        hot.append(made.weight.detach().clone())
    p.harden(bitlevel.planes(made))
    planes = bitlevel.planes(made).detach()
    digits = (planes[:, 0] > 0).float() - (planes[:, 1] > 0).float()
    powers = torch.tensor([1.0, 0.0, 4.0, 8.0, 16.0])
    hard = (powers @ digits).view(6, 10) * (p.scale * p.unit).detach()
    assert p.bits == 4
    torch.testing.assert_close(made.weight.detach(), hard, rtol=1e-6, atol=0)
    errors = [float((v - hard).abs().flatten()[torch.arange(60) != 3].max()) for v in hot]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-6


def test_csq_gradients():
    """All of them by autograd through the definition, in float64."""
    made, p = layer(bitlevel.CSQWeight, torch.randn(4, 5), 3)
    made.double()
    p.beta.fill_(1.7), p.beta_gates.fill_(0.8)
    grad = torch.randn(4, 5, dtype=torch.float64)
    (made.weight * grad).sum().backward()
    planes, gates, scale = (t.detach().clone().requires_grad_() for t in (bitlevel.planes(made), p.gates, p.scale))
    soft, powers = torch.sigmoid(1.7 * planes), 2.0 ** torch.arange(3, dtype=torch.float64)
    w = scale / 7 * ((powers * torch.sigmoid(0.8 * gates))[:, None] * (soft[:, 0] - soft[:, 1])).sum(0)
    torch.testing.assert_close(made.weight.detach().flatten(), w.detach())
    (w * grad.flatten()).sum().backward()
    for got, expected in ((bitlevel.planes(made), planes), (p.gates, gates), (p.scale, scale)):
        torch.testing.assert_close(got.grad, expected.grad)


def test_csq_chooses_bits_for_good():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 3))
    method = methods.CSQ(model, 10, bits=8, target=2.0, strength=0.1, hottest=200.0, search=0.5)
    first, second = (m.parametrizations.weight[0] for m in model)
    with torch.no_grad():
        first.gates[:6] = -1.0
    # budget: strength * (average bits - target) * the sum of all gates
    average = (40 * 2 + 12 * 8) / 52
    kept = 6 * torch.sigmoid(torch.tensor(-1.0)) + 10 * torch.sigmoid(torch.tensor(1.0))
    torch.testing.assert_close(method.penalty(), 0.1 * (average - 2.0) * kept)
    assert not method.after_step(4, None, None) and method.after_step(5, None, None) and method.penalty() is None
    assert bitlevel.planes(model[0]).shape == (2, 2, 40) and first.powers.tolist() == [64.0, -64.0, 128.0, -128.0]
    assert float(second.beta_gates) == np.float32(bitlevel.HARD) and method.average_bits() == average
    method.after_step(10, None, None)
    torch.testing.assert_close(float(first.beta), 200.0)
    method.finish()
    assert len(model[0].weight.unique()) <= 7  # -192, -128, -64, 0, ... times the step


@pytest.mark.parametrize("kind", [bitlevel.BSQWeight, bitlevel.CSQWeight])
def test_bits_are_summed_in_float32_under_autocast(kind):
    made, _ = layer(kind, integers(8) * 0.01, 8)
    with torch.autocast("cpu", torch.bfloat16):
        w = made.weight
    assert w.dtype == torch.float32 and torch.equal(w, made.weight)
