"""Family ``truncate``: gradients. Run as test_truncate.py is, for the kernels that serve the CPU."""

import pytest
import torch
import torch._dynamo.testing

import quantops as Q
from cases import EXHAUSTIVE, same, scales, weights
from quantops import reference as ref
from quantops.default.truncate import used_gradients
from truncate_cases import COMPANDINGS, KINDS, RULES, expected_layout, gradients, row, widths_of, with_or_without

ops = torch.ops.quantops


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("rule, companding", KINDS)
def test_backward_equals_reference(dtype, per_row, rule, companding):
    w = weights(dtype)
    s, out = scales(w, per_row), with_or_without(w, per_row, rule)
    wide = s[0].dtype == torch.float64
    for count, g_dtype in ((1, dtype), (3, torch.float32), (6, dtype)) if EXHAUSTIVE else ((2, dtype),):
        bits, base = widths_of(w, count)
        # Of some weights one width has no gradient, of weights 5 and 12 none has.
        unused = {1, len(w) + 2, 2 * len(w) + 6} | {i * len(w) + at for i in range(count) for at in (5, 12)}
        g = gradients(w, count, g_dtype, unused)
        for scale_grad in (False, True):
            got = ops.truncate_backward(
                g, w, s, out or [], bits, base, RULES.index(rule), companding is not None, False, scale_grad
            )
            assert len(got[1]) == (len(w) if scale_grad else 0)
            assert len(got[2]) == (len(w) if scale_grad and out else 0)
            for i, t in enumerate(w):
                want = ref.truncate_backward(
                    used_gradients(g[i :: len(w)], t),
                    t,
                    s[i],
                    bits[:, i],
                    base_bits=base[i],
                    rule=rule,
                    companding=companding,
                    out_scale=row(out, i),
                )
                assert same(got[0][i], want[0]), i
                assert expected_layout(t, got[0][i])
                for have, expected in zip(got[1:], want[1:]):
                    if have:
                        torch.testing.assert_close(
                            have[i], expected, equal_nan=True, rtol=1e-10 if wide else 1e-4, atol=1e-9 if wide else 1e-4
                        )


def test_covered_backward_is_the_sum(dtype):
    w = list(weights(dtype, special=False))
    bits, base = widths_of(w, 3)
    g = gradients(w, 3, dtype, unused={0, len(w) + 1, 2, 2 + len(w), 2 + 2 * len(w)})
    s = Q.foreach.absmax(w)
    got, scale_grads, out_grads = ops.truncate_backward(g, w, s, [], bits, base, 1, False, True, False)
    assert scale_grads == out_grads == []
    for i, t in enumerate(w):
        want = torch.zeros(t.shape, dtype=s[0].dtype)
        for v in used_gradients(g[i :: len(w)], t):
            want = want if v is None else want + v.to(want.dtype)
        assert same(got[i], want.to(dtype)) and expected_layout(t, got[i])


class _Chain:
    """The same function as autograd would be told it by hand: a straight-through chain of tensor ops."""

    @staticmethod
    def run(w, s, widths, base, companding, out_scale):
        out = s if out_scale is None else out_scale
        x, v = (torch.tanh(w), torch.tanh(s)) if companding else (w, s)
        inside = (w.abs() <= s).detach()
        u = torch.clamp(x * (0.5 / v) + 0.5, 0, 1)
        code = torch.clamp(torch.floor(u * 2**base), max=2**base - 1).detach()
        result = []
        for n in widths:
            cut = torch.floor(code / 2 ** (base - n))
            ratio = (2 * cut - (2**n - 1)) / (2**n - 1)
            # The value of out * ratio; the slopes of x where inside (whatever out is), and of x/v through s.
            slope = torch.where(inside, x, torch.zeros_like(x))
            through_s = -(torch.where(inside, x, torch.zeros_like(x)) / v).detach() * v
            result.append(out * ratio + slope - slope.detach() + through_s - through_s.detach())
        return result


@pytest.mark.parametrize("companding", [None, "tanh"])
@pytest.mark.parametrize("own_out", [False, True])
def test_gradients_equal_a_hand_written_chain(companding, own_out):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(12, 9, dtype=torch.float64, generator=generator).requires_grad_()
    s = torch.rand(12, 1, dtype=torch.float64, generator=generator).add(0.5).requires_grad_()
    out = torch.rand(12, 1, dtype=torch.float64, generator=generator).add(0.1).requires_grad_() if own_out else None
    leaves = [w, s] + [out] * own_out
    v = [torch.randn(12, 9, dtype=torch.float64, generator=generator) for _ in range(3)]
    found = []
    for run in (
        lambda: Q.truncate(w, s, (8, 4, 1), companding=companding, out_scale=out),
        lambda: _Chain.run(w, s, (8, 4, 1), 8, companding, out),
    ):
        q = run()
        loss = (q[0] * v[0]).sum() + (q[1] ** 3 * v[1]).sum() + (q[2] * q[0] * v[2]).sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum((a * b).sum() for a, b in zip(first[:1], v)), w)
        found.append([loss, *q, *first, *second])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("companding", [None, "tanh"])
@pytest.mark.parametrize("own_out", [False, True])
def test_double_backward(companding, own_out):
    """The backward is linear in the gradients of all widths, as finite differences show."""
    torch.manual_seed(0)
    rows, inner = (6, 5) if EXHAUSTIVE else (2, 3)
    w = torch.randn(rows, inner, dtype=torch.float64, requires_grad=True)
    s = torch.full((rows,), 1.1, dtype=torch.float64, requires_grad=True)
    out = torch.full((rows,), 0.7, dtype=torch.float64, requires_grad=True) if own_out else None
    g = [torch.randn(rows, inner, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def backward(*g):
        q = Q.truncate(w, s, (6, 3, 1), companding=companding, out_scale=out)
        return torch.autograd.grad(
            (q[0] * g[0]).sum() + (q[2] * g[1]).sum(), [w, s] + [out] * own_out, create_graph=True
        )

    assert torch.autograd.gradcheck(backward, g)


def test_hessian_vector_product_with_max_w_as_scale():
    torch.manual_seed(0)
    w = torch.randn(12, requires_grad=True)
    a = torch.randn(12, 12)
    a = a @ a.t()
    q, low = Q.truncate(w, None, (8, 2))
    (grad,) = torch.autograd.grad(0.5 * q @ a @ q + low.square().sum(), w, create_graph=True)
    v = torch.randn(12)
    torch.testing.assert_close(torch.autograd.grad(grad, w, v)[0], a @ v + 2 * v)


def test_one_width_of_a_covered_weight_hands_the_gradient_on():
    w = torch.randn(64, 64, requires_grad=True)
    for pick in (0, 1):
        seen = []
        q = Q.truncate(w, None, (4, 2))[pick]
        q.register_hook(lambda g: seen.append(g.data_ptr()))
        hook = w.register_hook(lambda g: seen.append(g.data_ptr()))
        (q * torch.randn(64, 64)).sum().backward()
        hook.remove()
        assert seen[0] == seen[1]


def test_unused_entries_of_a_list():
    w = [torch.randn(5, requires_grad=True), torch.randn(6, requires_grad=True), torch.randn(3)]
    for s in (None, [torch.tensor(10.0)] * 3):
        q = Q.foreach.truncate(w, s, (8, 2))
        got = torch.autograd.grad(q[0][0].sum() + 2 * q[1][0].sum(), w[:2], allow_unused=True)
        assert torch.equal(got[0], torch.full((5,), 3.0)) and got[1] is None
    assert not Q.foreach.truncate(w[2:], None, 3)[0].requires_grad


def test_an_out_scale_is_learned_while_the_scale_is_max_w():
    w = torch.randn(40, 30, requires_grad=True)
    out = torch.tensor(0.3, requires_grad=True)
    g = [torch.randn(40, 30) for _ in range(2)]
    q = Q.truncate(w, None, (4, 1), out_scale=out)
    got = torch.autograd.grad(q, (w, out), g)
    s = Q.absmax(w)
    want = ref.truncate_backward(g, w.detach(), s, (4, 1), out_scale=out.detach())
    assert same(got[0], want[0]) and torch.equal(got[0], g[0] + g[1])
    torch.testing.assert_close(got[1], want[2], rtol=1e-4, atol=1e-3)


def test_gradients_reach_scales_that_were_spread_over_rows():
    w, one = torch.randn(4, 30), torch.tensor(0.8, requires_grad=True)
    rows = torch.rand(4).add(0.5).requires_grad_()
    for s, out in ((one, rows), (rows, one)):
        for v in torch.autograd.grad(Q.truncate(w, s, 3, out_scale=out).square().sum(), (s, out)):
            assert v.abs().min() > 0


@pytest.mark.parametrize("companding", COMPANDINGS)
def test_an_empty_weight_without_a_gradient(companding):
    """The gradient that is not there is an empty tensor, too, of another shape."""
    w, s = [torch.ones(0, 4), torch.ones(2, 4)], [torch.ones(())] * 2
    grads = [torch.empty(0), torch.ones(2, 4)]
    for kernel in (ops.truncate_backward, Q.default.truncate.truncate_backward):
        grad_w, _, _ = kernel(
            grads,
            w,
            s,
            [],
            torch.tensor([[4, 4]], dtype=torch.int32),
            torch.tensor([8, 8], dtype=torch.int32),
            1,
            companding == "tanh",
            False,
            False,
        )
        assert [g.shape for g in grad_w] == [t.shape for t in w]
