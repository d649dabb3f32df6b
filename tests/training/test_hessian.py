"""hessian_trace against exact Hessians."""

import pytest
import torch
from torch import nn

from quantops.convert import quantize_
from quantops.hessian import hessian_trace
from quantops.methods.msq import MSQConfig
from quantops.nn import quantized


@pytest.fixture(autouse=True)
def one_thread():
    """The networks here are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_net(dtype=torch.float64):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    x, y = torch.randn(16, 4, dtype=dtype), torch.randint(0, 3, (16,))
    return net, lambda: nn.functional.cross_entropy(net(x), y)


def exact_traces(loss_fn, params):
    """tr(H_ii) by one gradient per element."""
    grads = torch.autograd.grad(loss_fn(), params, create_graph=True)
    traces = []
    for p, g in zip(params, grads):
        rows = [torch.autograd.grad(v, p, retain_graph=True)[0].reshape(-1)[i] for i, v in enumerate(g.reshape(-1))]
        traces.append(torch.stack(rows).sum())
    return torch.stack(traces)


def test_diagonal_hessian_is_exact_in_one_sample():
    a, b = torch.randn(6, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    loss = (a**2 * torch.arange(6.0)).sum() + (b**4).sum()
    traces = hessian_trace(loss, [a, b], samples=1)
    assert torch.allclose(traces, torch.stack([torch.tensor(30.0), 12 * (b.detach() ** 2).sum()]), rtol=1e-6)


def test_estimate_meets_the_exact_trace():
    net, loss_fn = small_net()
    params = list(net.parameters())
    exact = exact_traces(loss_fn, params)
    estimate = hessian_trace(loss_fn(), params, samples=300, seed=1)
    assert estimate.dtype == torch.float64 and estimate.shape == (4,)
    assert torch.allclose(estimate, exact, rtol=0.15), (estimate, exact)


def test_through_a_quantizer_it_is_the_hessian_at_q():
    """The straight-through backward is the identity, so H with respect to the weight is H with respect to q."""
    net, loss_fn = small_net()
    plain, plain_loss = small_net()
    quantize_(net, MSQConfig(bits=4))
    with torch.no_grad():
        for i in (0, 2):
            plain[i].weight.copy_(net[i].weight)
    weights = [owner.original for _, owner, _ in quantized(net)]
    assert torch.allclose(exact_traces(loss_fn, weights), exact_traces(plain_loss, [plain[0].weight, plain[2].weight]))
    ours = hessian_trace(loss_fn(), weights, samples=5, seed=3)
    theirs = hessian_trace(plain_loss(), [plain[0].weight, plain[2].weight], samples=5, seed=3)
    assert torch.allclose(ours, theirs, rtol=1e-10) and ours.abs().min() > 0


def test_draws_follow_the_seed_alone():
    net, loss_fn = small_net()
    params = list(net.parameters())
    first = hessian_trace(loss_fn(), params, 2, seed=7)
    state = torch.get_rng_state()
    assert torch.equal(first, hessian_trace(loss_fn(), params, 2, seed=7))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, hessian_trace(loss_fn(), params, 2, seed=8))
    by_generator = hessian_trace(loss_fn(), params, 2, generator=torch.Generator().manual_seed(7))
    assert torch.equal(first, by_generator)


def test_grad_is_untouched_and_the_loss_can_still_be_used():
    net, loss_fn = small_net()
    loss = loss_fn()
    hessian_trace(loss, net.parameters(), 2)
    assert all(p.grad is None for p in net.parameters())
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())


def test_linear_parameter_has_trace_zero():
    a, b = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    assert hessian_trace(a.sum() + (b**2).sum(), [a, b], 1).tolist() == [0.0, 6.0]
    assert hessian_trace(a.sum(), [a], 1).tolist() == [0.0]


def test_errors_name_what_is_wrong():
    a, b = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    loss = (a**2).sum()
    for args, text in (
        ((loss, [a, b]), r"params\[1\]: the loss does not depend"),
        ((loss, [a, torch.randn(3)]), r"params\[1\]: expected tensors that require grad"),
        ((loss, []), "params: expected at least one"),
        ((a**2, [a]), r"loss: expected a scalar .* shape \(3,\)"),
        ((torch.tensor(1.0), [a]), "loss: .*requires_grad=False"),
        ((1.0, [a]), "loss: .*float"),
        ((loss, [a], 0), "samples: .*got 0"),
    ):
        with pytest.raises(ValueError, match=text):
            hessian_trace(*args)
