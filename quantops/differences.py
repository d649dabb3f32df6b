"""Hutchinson's estimate of Hessian traces by differences of gradients, where there are no second derivatives."""

from contextlib import contextmanager

import torch

from quantops.hessian import Signs
from quantops.sharded import any_sharded, fsdp_modules, shards, totals

STEP = 1e-2  # of the weights' root mean square: larger than what rounds gradients, small beside what bends them


@torch.no_grad()
def trace_by_differences(loss_fn, params, samples, *, model, inside, seed):
    """tr(H_ii) of each parameter's own block, as of :func:`quantops.hessian_trace`, with the same v:

        tr(H_ii) = E[v_i . (grad_i(w + eps v) - grad_i(w - eps v))] / (2 eps),    v uniform in {-1, +1} where ``inside``

    The weights are moved in place, each process its own part, and set back exactly. ``loss_fn`` is called twice for a
    v, from the same random state. ``.grad`` of the parameters of ``model`` is not touched.
    """
    parts, draw = shards(params), Signs(seed, None)
    at = [t.clone() for t in parts]
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
    total = [torch.zeros((), dtype=dtype, device=p.device) for p in params]
    squares = _sums([t.square().sum(dtype=dtype) for t in at], params).sum() / sum(p.numel() for p in params)
    eps = STEP * (float(squares) ** 0.5 or 1.0)
    try:
        for _ in range(samples):
            v = shards([draw(p).mul_(m) for p, m in zip(params, inside)])
            with _random_state_of(params):
                plus = _gradients(_moved(loss_fn, parts, at, v, eps, model), params, model)
            minus = _gradients(_moved(loss_fn, parts, at, v, -eps, model), params, model)
            for t, d, a, b in zip(total, v, shards(plus), shards(minus)):
                t += (d * (a - b)).sum(dtype=dtype)
    finally:
        _write(parts, at, model)
    return _sums(total, params) / (2 * eps * samples)


def _sums(values, params):
    return totals(torch.stack([t.to(params[0].device) for t in values]), params)


def _write(parts, values, model):
    for t, v in zip(parts, values):
        t.copy_(v)
    for m in fsdp_modules(model):
        m.reshard()  # whole weights that FSDP2 has kept are those from before


def _moved(loss_fn, parts, at, v, eps, model):
    _write(parts, [t.add(d, alpha=eps) for t, d in zip(at, v)], model)
    with torch.enable_grad():
        return loss_fn()


def _gradients(loss, params, model):
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(f"loss_fn: expected a scalar tensor that requires grad, got {loss!r}")
    if not any_sharded(params):
        found = torch.autograd.grad(loss, params, allow_unused=True)
    else:  # FSDP2 sums over the processes in the backward pass alone
        parameters = list(model.parameters())
        kept = [p.grad for p in parameters]
        try:
            for p in parameters:
                p.grad = None
            loss.backward()
            found = [p.grad for p in params]
        finally:
            for p, grad in zip(parameters, kept):
                p.grad = grad
    unused = [i for i, g in enumerate(found) if g is None]
    if unused:
        raise ValueError(
            f"params{unused}: the loss does not depend on them, or FSDP2 has been told not to sum gradients; expected "
            "set_requires_gradient_sync(True)"
        )
    return found


@contextmanager
def _random_state_of(params):
    """What draws random numbers within (dropout) leaves the states as they were."""
    devices = {p.device for p in params if p.device.type != "cpu"}
    kind = next(iter(devices)).type if devices else "cuda"
    with torch.random.fork_rng([d.index for d in devices], device_type=kind):
        yield
