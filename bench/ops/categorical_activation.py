"""Family ``categorical_activation``: activations of CPQ, which keep q and two bits per element, and what they are
measured against.

The peers are chains of tensor ops that keep the same, hence an autograd.Function, too; the factors of the few places
that there are come from the op for weights in all of them.
"""

import functools

import torch

from bench.ops.peers import step, step_peer
from bench.ops.registry import Case
from bench.ops.uniform import Inputs
from quantops import reference
from quantops.layout import in_memory
from quantops.library import ops
from quantops.reference.categorical import GRADS

BITS = 4
PIECE = 1 << 20  # elements that the reference takes at a time
SOFT = GRADS.index("soft")


class ActivationInputs(Inputs):
    """Tensors with the alpha and sigma that CategoricalActivation begins with."""

    n = BITS

    def __init__(self, shapes, dtype, device):
        super().__init__(shapes, dtype, device)
        self.bits = torch.full((1,), BITS, dtype=torch.int32, device=device)

    @functools.cached_property
    def alpha(self):
        return [2 * t.clamp(min=0).float().mean().reshape(1) / (2**BITS - 1) ** 0.5 for t in self.w]

    @functools.cached_property
    def widths(self):
        """Leaves: alpha of each tensor, then sigma."""
        return [t.clone().requires_grad_() for t in (*self.alpha, *(a / 2 for a in self.alpha))]


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha, sigma, bits):
        inverse = 1 / alpha
        v = x.float() * inverse
        q = (alpha * v.round().clamp(0, 2**BITS - 1)).to(x.dtype)
        k = ((v - (q.float() * inverse).round()) * 4).floor().add(2).clamp(0, 3).to(torch.uint8).flatten()
        k = torch.nn.functional.pad(k, (0, -k.numel() % 4)).view(-1, 4)
        ctx.save_for_backward(q, k[:, 0] | k[:, 1] << 2 | k[:, 2] << 4 | k[:, 3] << 6, alpha, sigma, bits)
        return q

    @staticmethod
    def backward(ctx, grad):
        q, packed, alpha, sigma, bits = ctx.saved_tensors
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=q.device)
        k = (packed[:, None] >> shifts & 3).flatten()[: q.numel()].view(q.shape)
        place = (4 * (q.float() * (1 / alpha)).round().to(torch.int32) + k).flatten()
        x = (torch.arange(4 * 2**BITS, device=q.device) - 1.5) * (alpha / 4)
        x[0], x[-1] = -torch.inf, torch.inf
        rows = [[v.expand(len(x)).contiguous()] for v in (alpha, sigma)]
        factors = ops.categorical_backward(
            [torch.ones_like(x)], [x], *rows, bits, [], None, 0, SOFT, False, True, False
        )[:3]
        by_x, by_alpha, by_sigma = (v[0].index_select(0, place).view(q.shape) for v in factors)
        g = grad.float()
        return (g * by_x).to(q.dtype), (g * by_alpha).sum().reshape(1), (g * by_sigma).sum().reshape(1), None


def _peer(make, **options):
    """A peer of the step; ``make()``: the function of x, alpha, sigma and bits."""

    def prepare(x):
        function, n, leaves = make(), len(x.w), [*x.leaves, *x.widths]
        return leaves, lambda bits: [function(*leaves[i::n], x.bits) for i in range(n)]

    return step_peer(prepare, **options)


def _quantized(x):
    n = len(x.w)
    return [
        ops.categorical_activation(t, a, s, x.bits, SOFT, t.dtype)[0]
        for t, a, s in zip(x.leaves, x.widths[:n], x.widths[n:])
    ]


def _reference(x, i):
    """Gradients of tensor i, alpha and sigma."""
    alpha, sigma = x.alpha[i], x.alpha[i] / 2
    pieces = []
    for t, g in zip(in_memory(x.w[i]).split(PIECE), in_memory(x.grad[i]).split(PIECE)):
        q, quarters = reference.categorical_activation(t, alpha, sigma, x.bits)
        pieces.append(reference.categorical_activation_backward(g, q, quarters, alpha, sigma, x.bits))
    of_x, of_alpha, of_sigma = zip(*pieces)
    return torch.cat(of_x).view_as(x.w[i]), sum(of_alpha), sum(of_sigma)


def _check(got, x):
    """Against the reference; sums to within the rounding of their terms, which are of both signs."""

    def same(i, *gradients):
        want = _reference(x, i)
        eps, room = torch.finfo(x.w[i].dtype).eps, 1e-4 * max(1, x.w[i].numel()) ** 0.5
        return torch.allclose(gradients[0].float(), want[0].float(), rtol=2 * eps, atol=1e-4) and all(
            torch.allclose(a, b, rtol=1e-4, atol=room) for a, b in zip(gradients[1:], want[1:])
        )

    n = len(x.w)
    return all(same(i, *got[i::n]) for i in range(n))


CASES = [
    # x to q and quarters; then dL/dq, q and quarters to dL/dx. Kept: q and two bits.
    Case(
        "categorical activation step",
        ActivationInputs,
        lambda s: 3 * s + 0.25,
        lambda s: 2 * s + 0.25,
        lambda x: step(x, [*x.leaves, *x.widths], _quantized(x)),
        _check,
        {
            "eager": _peer(lambda: _Chain.apply),
            "compiled": _peer(lambda: torch.compile(lambda *args: _Chain.apply(*args)), compiles=True),
        },
        forward=lambda x: (lambda: _quantized(x), [*x.leaves, *x.widths]),
        keeps=lambda s: s + 0.25,
    )
]
