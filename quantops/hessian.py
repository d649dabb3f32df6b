"""Hutchinson's estimate of Hessian traces."""

from collections.abc import Iterable
from contextlib import contextmanager

import torch

from quantops.sharded import any_sharded, is_sharded, laid_out_as, shards, slice_of, totals


def hessian_trace(
    loss: torch.Tensor,
    params: Iterable[torch.Tensor],
    samples: int = 8,
    *,
    seed: int = 0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """tr(H_ii) of each parameter's own block of the Hessian of ``loss``: a tensor with one entry per parameter.

        tr(H_ii) = E[v_i . (H v)_i],  v uniform in {-1, +1}

    One gradient with a graph, then one Hessian-vector product of the whole network per sample. Exact in one sample
    where H is diagonal; the error falls with 1/sqrt(samples). Through a quantizer this is the Hessian that the
    straight-through estimator sees. ``.grad`` is not touched and the graph of ``loss`` is kept. MSQ
    (arXiv 2507.22349) weighs its layers by these traces.

    Args:
        loss: scalar with a graph. Every op on the way needs a double backward. Fused attention has none: compute the
            loss within ``torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)``.
        params: tensors that require grad and that the loss was computed from.
        samples: number of vectors v.
        seed: seed of the vectors, which are drawn on each parameter's device. torch's own random state is not used.
        generator: draws the vectors instead, on its own device.

    Returns float32 (float64 if any parameter is) on the first parameter's device.
    Raises ValueError for a loss that is not a scalar with a graph and for parameters that do not require grad or that
    the loss does not reach, named by index, RuntimeError for a loss without second derivatives. A parameter that the
    loss is linear in has trace 0.
    """
    params = list(params)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            "loss: expected a scalar tensor that requires grad, got "
            + (
                f"shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}"
                if isinstance(loss, torch.Tensor)
                else type(loss).__name__
            )
        )
    if not params:
        raise ValueError("params: expected at least one tensor, got none")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples: expected an integer >= 1, got {samples!r}")
    frozen = [i for i, p in enumerate(params) if not p.requires_grad]
    if frozen:
        raise ValueError(f"params{frozen}: expected tensors that require grad")
    with _second_derivatives():
        grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    unused = [i for i, g in enumerate(grads) if g is None]
    if any_sharded([params[i] for i in unused]):
        raise ValueError(
            f"params{unused}: the loss does not depend on these sharded weights, but on the whole ones that FSDP2 "
            "makes of them, which have no second derivatives; MSQController of the model in FSDP2 takes differences of "
            "gradients"
        )
    if unused:
        raise ValueError(f"params{unused}: the loss does not depend on them")

    dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
    curved = [i for i, g in enumerate(grads) if g.requires_grad]
    total = [torch.zeros((), dtype=dtype, device=p.device) for p in params]
    draw = Signs(seed, generator)
    for _ in range(samples if curved else 0):
        v = [draw(p) for p in params]
        with _second_derivatives():
            products = torch.autograd.grad(
                [grads[i] for i in curved], params, [v[i] for i in curved], retain_graph=True, allow_unused=True
            )
        for t, h, s, p in zip(total, products, v, params):
            if h is not None:
                h, s = shards([laid_out_as(h.detach(), p), s])
                t += (h * s).sum(dtype=dtype)
    return totals(torch.stack([t.to(params[0].device) for t in total]), params) / samples


@contextmanager
def _second_derivatives():
    """Errors of torch that say that an op has none, with what to do about it."""
    try:
        yield
    except RuntimeError as error:
        if not any(text in str(error) for text in ("is not implemented", "double backward", "once_differentiable")):
            raise
        raise RuntimeError(
            "loss: expected one with second derivatives, of a model that is not compiled and whose attention is eager "
            "or torch's scaled_dot_product_attention within torch.nn.attention.sdpa_kernel(SDPBackend.MATH), as "
            f"MSQController has it; got: {error}. By differences of gradients: "
            "MSQController(hessian='differences'); without traces: hessian=False"
        ) from error


class Signs:
    """Draws tensors of -1 and +1."""

    def __init__(self, seed, generator):
        self.seed, self.generator, self.own = seed, generator, {}

    def __call__(self, like):
        g = self.generator
        if g is None:
            if like.device not in self.own:
                self.own[like.device] = torch.Generator(like.device).manual_seed(self.seed)
            g = self.own[like.device]
        v = torch.empty(like.shape, dtype=like.dtype, device=g.device).bernoulli_(0.5, generator=g)
        v = v.mul_(2).sub_(1).to(like.device)
        return slice_of(v, like) if is_sharded(like) else v
