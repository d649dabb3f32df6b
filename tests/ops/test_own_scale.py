"""Family ``own_scale``: scales through which gradients flow, whatever kernels serve the CPU against the reference.

Run as it is, the compiled C++ kernels are tested; under QUANTOPS_BACKEND=triton TRITON_INTERPRET=1, the Triton ones.
"""

import itertools

import pytest
import torch

import quantops as Q
from cases import same, weights
from quantops import reference as ref

ops = torch.ops.quantops


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("mean", [False, True])
def test_backward_equals_reference(dtype, per_row, mean):
    w = [t for t in weights(dtype) if t.dim() or not per_row]
    reduce = ref.absmean if mean else ref.absmax
    s = [reduce(t, per_row=per_row) for t in w]
    g = [torch.randn(v.shape, generator=torch.Generator().manual_seed(i), dtype=v.dtype) for i, v in enumerate(s)]
    for t, v, h, got in zip(w, s, g, ops.own_scale_backward(w, s, g, mean)):
        assert same(got, ref.own_scale_backward(t, v, h, mean=mean)), tuple(t.shape)
        assert got.stride() == Q.layout.empty_like(t, dtype).stride()


def test_ties_share():
    w = torch.tensor([[3.0, -3.0, 1.0, 3.0], [0.0, -2.0, 1.0, 0.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(Q.absmax(w, grad=True) * 6, w)
    assert grad.tolist() == [[2, -2, 0, 2], [0, 0, 0, 0]]
    (grad,) = torch.autograd.grad((Q.absmax(w, per_row=True, grad=True) * torch.tensor([3.0, 5.0])).sum(), w)
    assert grad.tolist() == [[1, -1, 0, 1], [0, -5, 0, 0]]
    (grad,) = torch.autograd.grad((Q.absmean(w, per_row=True, grad=True) * torch.tensor([4.0, 8.0])).sum(), w)
    assert grad.tolist() == [[1, -1, 1, 1], [0, -2, 2, 0]]
    assert not Q.absmax(w).requires_grad and not Q.absmean(w).requires_grad


def test_ties_far_apart_share(dtype):
    """Of rows that lie in several parts, each done apart: none, one, some or all of a part carry gradient."""
    w = torch.randn(3, 1 << 17, generator=torch.Generator().manual_seed(0)).clamp(-3, 3).to(dtype)
    w[0].clamp_(-2.5, 2.5)[[5, 70000, (1 << 17) - 1]] = torch.tensor([3.0, -3.0, 3.0], dtype=dtype)
    w[1] = -1.0
    for per_row in (True, False):
        s = ref.absmax(w, per_row=per_row)
        g = torch.full_like(s, 6.0)
        (got,) = ops.own_scale_backward([w], [s], [g], False)
        assert same(got, ref.own_scale_backward(w, s, g, mean=False))
    assert got[0].nonzero().flatten().tolist() == [5, 70000, (1 << 17) - 1]


def test_a_list_with_an_entry_that_is_not_used():
    w = [torch.randn(5, requires_grad=True), torch.randn(3, 4, requires_grad=True)]
    for name in ("absmax", "absmean"):
        s = getattr(Q.foreach, name)(w, grad=True)
        grads = torch.autograd.grad(s[1], w, allow_unused=True)
        assert torch.equal(grads[1], torch.autograd.grad(getattr(Q, name)(w[1], grad=True), w[1])[0])
        assert grads[0] is None or not grads[0].any()


@pytest.mark.parametrize("name", ["absmax", "absmean"])
def test_gradcheck(name):
    """In float64, against differences; second derivatives with respect to what comes from above."""
    w = torch.randn(4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for per_row in (False, True):

        def scale(w, per_row=per_row):
            return getattr(Q, name)(w, per_row=per_row, grad=True)

        assert torch.autograd.gradcheck(scale, w)
        assert torch.autograd.gradgradcheck(scale, w)


def staircase(q, w, s):
    """q as the straight-through estimator has it: the codes are where w/s is, and move with it."""
    return (q / s).detach() * s + w - (w / s).detach() * s


@pytest.mark.parametrize("grid, scale", list(itertools.product(ref.uniform.GRIDS, ["absmax", "absmean"])))
def test_quantizers_through_their_scales(grid, scale):
    """The gradient is that of a smooth function with the same values and slopes, by differences, in float64."""
    w = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    g = torch.randn(5, 40, dtype=torch.float64)
    factor = 1.0 if scale == "absmax" else 6.0  # all weights inside: outside, the slope of the estimator is 0

    def scales(w):
        return getattr(Q, scale)(w, per_row=True, grad=True) * factor

    with torch.no_grad():
        s = scales(w)
        assert (w.abs() <= s[:, None]).all()
        start = Q.round_clamp(w, s, 3, grid=grid) / s[:, None]
        unit = w / s[:, None]
    (got,) = torch.autograd.grad((Q.round_clamp(w, scales(w), 3, grid=grid) * g).sum(), w)

    def smooth(w):
        s = (w.abs().amax(1) if scale == "absmax" else w.abs().mean(1) * factor)[:, None]
        return ((start - unit) * s + w) * g

    assert torch.autograd.gradcheck(lambda w: smooth(w).sum(), w)
    (want,) = torch.autograd.grad(smooth(w).sum(), w)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("companding", [None, "tanh"])
@pytest.mark.parametrize("slope", ["ste", "exact"])
def test_truncation_through_its_scales(companding, slope):
    """The whole derivative of mean|w| * f(tanh(w) / tanh(max|w|)), the codes moving with their argument."""
    w = (torch.randn(60, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 0.4).requires_grad_()
    g = torch.randn(60, dtype=torch.float64)
    squash = torch.tanh if companding else torch.clone
    with torch.no_grad():
        unit = squash(w) / squash(w.abs().max())
        start = Q.truncate(w, Q.absmax(w), 3, companding=companding, out_scale=Q.absmean(w)) / w.abs().mean()

    def whole(w, factor):
        x, s, out = squash(w), w.abs().max(), w.abs().mean()
        # The codes' argument moves q by out_scale (exact), or as if q were on the scale of its argument (ste).
        return ((start - unit) * out + (unit.detach() * out - unit * factor) + x / squash(s) * factor) * g

    q = Q.truncate(w, Q.absmax(w, grad=True), 3, companding=companding, out_scale=Q.absmean(w, grad=True), slope=slope)
    (got,) = torch.autograd.grad((q * g).sum(), w)
    with torch.no_grad():
        factor = w.abs().mean() if slope == "exact" else squash(w.abs().max())
    assert torch.autograd.gradcheck(lambda w: whole(w, factor).sum(), w)
    (want,) = torch.autograd.grad(whole(w, factor).sum(), w)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("fn", [Q.absmax, Q.absmean])
def test_the_expanded_gradient_of_a_sum(fn):
    w = torch.tensor([[3.0, -4.0], [-2.0, 1.0]], requires_grad=True)
    fn(w, per_row=True, grad=True).sum().backward()
    share = torch.tensor([[0.0, -1.0], [-1.0, 0.0]]) if fn is Q.absmax else torch.sign(w.detach()) / 2
    assert torch.equal(w.grad, share)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_second_derivatives_of_rows_without_elements(shape):
    w = torch.randn(shape, requires_grad=True)
    (first,) = torch.autograd.grad(Q.absmax(w, per_row=True, grad=True).square().sum(), w, create_graph=True)
    first.square().sum().backward()
    assert w.grad is None or w.grad.shape == shape
