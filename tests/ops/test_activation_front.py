"""GELU and SiLU in front of quantized activations: against torch's in float64, and what derivatives are made of them.

That codes and gradients are the reference's on every backend: test_activation.py.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import quantops as Q
from cases import SPECIAL, same
from quantops.reference.activation import FRONTS
from quantops.reference.activation_front import SMOOTH, by_torch, curvature, front_and_slope

ops = torch.ops.quantops
BITS = torch.tensor([4], dtype=torch.int32)


def exact(x, front):
    """(h, dh/dx) in float64, by the form of torch's functions that cancels nothing."""
    x = x.double()
    if front == "gelu":
        gate, density = 0.5 * torch.erfc(-x / 2**0.5), torch.exp(-x * x / 2) / (2 * math.pi) ** 0.5
    else:
        a, b = (1, 0) if front == "silu" else ((8 / math.pi) ** 0.5, 0.044715 * (8 / math.pi) ** 0.5)
        z = x * (a + b * x * x)
        gate, density = torch.sigmoid(z), torch.sigmoid(z) * torch.sigmoid(-z) * (a + 3 * b * x * x)
    return x * gate, gate + torch.where(density > 0, x * density, 0)


def values(dtype):
    """From one limit past the other, dense; and every power of two."""
    powers = 2.0 ** torch.arange(-140, 128, dtype=torch.float64)
    return torch.cat([torch.linspace(-45, 45, 90_001, dtype=torch.float64), powers, -powers, torch.zeros(1)]).to(dtype)


@pytest.mark.parametrize("front", SMOOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_error_of_values_and_slopes(front, dtype):
    """1.5 units in the last place of max(|x|, 1) of h, and 2 of the slope; torch's own functions agree."""
    x, eps = values(dtype), torch.finfo(dtype).eps
    h, slope = front_and_slope(x, front)
    want, want_slope = exact(x, front)
    for value in (want, by_torch(x.double(), front)):
        assert float(((h - value).abs() / x.double().abs().clamp(min=1)).max()) <= 1.5 * eps
    assert float((slope - want_slope).abs().max()) <= 2 * eps
    far = x.abs() > 45
    assert torch.equal(h[far & (x > 0)], x[far & (x > 0)]) and float(h[far & (x < 0)].abs().max()) <= eps


@pytest.mark.parametrize("front", SMOOTH)
def test_special_values(front):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, inf, -inf, -3e38, 3e38, 0.0, -0.0, 1e-40, -1e-40])
    h, slope = front_and_slope(x, front)
    assert h[0].isnan() and h[1] == inf and h[4] == x[4] and (h[2:4] <= 0).all() and (h[2:4] > -1e-7).all()
    assert h[5] == h[6] == 0 and torch.equal(h[7:], x[7:] / 2) and slope[0] == 0 and (slope[5:] == 0.5).all()
    x = torch.cat([x, torch.tensor(SPECIAL)])
    q = Q.quantize_activation(x, 1.0, 8, signed=True, front=front)
    assert torch.equal(q.isnan(), x.isnan())
    assert same(q, Q.quantize_activation(front_and_slope(x, front)[0], 1.0, 8, signed=True))


@pytest.mark.parametrize("front", SMOOTH)
@pytest.mark.parametrize("learn", ["clip", "step"])
def test_is_the_quantizer_behind_the_front(front, learn):
    """q, and gradients of x, scale and offset, are those of the two one after the other, in float64 to its rounding."""
    g = torch.randn(3000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = 3 * torch.randn(3000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for signed, has_offset in ((True, False), (False, False), (False, True)):
        found = []
        for fused in (True, False):
            t = x.clone().requires_grad_()
            scale = torch.full((1,), 1.7, dtype=torch.float64, requires_grad=True)
            offset = torch.full((1,), -0.17, dtype=torch.float64, requires_grad=True) if has_offset else None
            h, options = (t, {"front": front}) if fused else (by_torch(t, front), {"keep": "input"})
            q = Q.quantize_activation(h, scale, 4, offset=offset, signed=signed, learn=learn, **options)
            leaves = [t, scale, *([offset] if has_offset else [])]
            found.append([q.detach(), *torch.autograd.grad(q, leaves, g)])
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("front", SMOOTH)
def test_second_derivatives(front):
    """In the gradient and in x, where the front is curved; through torch's double backward of a network too."""
    x = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    t = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(by_torch(t, front).sum(), t, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), t)
    torch.testing.assert_close(curvature(x, front), second, rtol=1e-9, atol=1e-11)
    x, w = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64, requires_grad=True)

    def quantized(h):
        return Q.quantize_activation(h, 2.0, 4, signed=True, front=front)

    points = torch.tensor([-7.0, -2.0, -0.3, 0.2, 1.1, 2.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(quantized, points)

    def ste(h):
        h = by_torch(h, front)
        inside = (h.detach().abs() <= 2).double()
        return (h * inside) + (Q.quantize_activation(h.detach(), 2.0, 4, signed=True) - h * inside).detach()

    products = []
    for quantize in (quantized, ste):
        (grad,) = torch.autograd.grad((quantize(x @ w) ** 3).sum(), w, create_graph=True)
        products.append(torch.autograd.grad((grad * torch.ones_like(grad).cumsum(0)).sum(), w)[0])
    torch.testing.assert_close(*products)


def test_x_alone_is_kept():
    x, scale = torch.randn(1000, requires_grad=True), torch.ones(1, requires_grad=True)
    for learn in (None, "clip", "step"):
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            Q.quantize_activation(x, scale, 4, signed=True, front="silu", learn=learn)
        assert sum(t.numel() for t in found) <= 1000 + 2 and any(t.data_ptr() == x.data_ptr() for t in found)


def test_graphs_of_aten():
    """The chain that exported programs have: q but for neighbours where h is next to an edge."""
    from quantops.decompositions import table

    chain, x = table()[ops.activation.default], torch.randn(4000, generator=torch.Generator().manual_seed(0))
    for front, dtype in itertools.product((2, 3, 4), (torch.float32, torch.bfloat16)):
        args = torch.ones(1), None, BITS, 0, True, front, 0, 0, dtype
        got, want = (fn(x.to(dtype), *args)[0].float() for fn in (chain, ops.activation))
        assert int((got != want).sum()) <= 4 and float((got - want).abs().max()) <= 1 / 8 + 1e-6


def test_compile_and_layouts():
    torch._dynamo.reset()
    x = torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last)
    scale = torch.rand(3) + 0.5
    for t, s in ((x, scale), (x[..., ::2], scale[:1])):
        t, s = t.detach().requires_grad_(), s.clone().requires_grad_()
        call = lambda t, s: Q.quantize_activation(t * 1, s, 4, signed=True, front="gelu", learn="step") * 1  # noqa: E731
        got, want = (fn(t, s) for fn in (torch.compile(call, fullgraph=True, backend="aot_eager"), call))
        assert torch.equal(got, want) and got.stride() == want.stride()
        for a, b in zip(*(torch.autograd.grad(q.square().sum(), (t, s)) for q in (got, want))):
            torch.testing.assert_close(a, b)


def test_opcheck():
    args = torch.ones(1), None, BITS, 0, True, FRONTS.index("gelu"), 0, 2, torch.bfloat16
    torch.library.opcheck(ops.activation.default, (torch.randn(3, 5, requires_grad=True), *args))
    g, none = torch.randn(3, 5, requires_grad=True), torch.zeros(0, dtype=torch.uint8)
    args = none, torch.ones(1), None, BITS, 0, True, FRONTS.index("silu"), 0, 0, torch.float32
    torch.library.opcheck(ops.activation_backward.default, (g, torch.randn(3, 5, requires_grad=True), None, *args))


def test_bfloat16_is_the_float32_value_rounded_once():
    x = (3 * torch.randn(500)).to(torch.bfloat16).requires_grad_()
    q = Q.quantize_activation(x, 2.0, 16, rule="nearest", signed=True, front="gelu")
    want = Q.quantize_activation(x.float(), 2.0, 16, rule="nearest", signed=True, front="gelu")
    assert torch.equal(q, want.to(torch.bfloat16))
    assert float((q.detach().float() - F.gelu(x.detach().float()).clamp(-2, 2)).abs().max()) <= 2**-8
    q.sum().backward()
    inside = F.gelu(x.detach().double()).abs() <= 2
    assert float((x.grad.double() - inside * exact(x.detach(), "gelu")[1]).abs().max()) <= 2**-8
