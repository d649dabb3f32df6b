"""MSQ as the papers' public code writes it: a chain of eager tensor ops. The peer of benches and of the demo.

Values equal the specification's; what differs is the cost: every op reads and writes the whole weight, and autograd
keeps several copies of it.
"""

import torch


class _RoundSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        return torch.round(v)

    @staticmethod
    def backward(ctx, grad):
        return grad


def msq(w, bits, k=1):
    """(q, penalty, nonzero, sq_error) of a signed weight on the dyadic grid with a scale of max|w|, differentiable."""
    scale = w.detach().abs().max()
    u = torch.clamp(w * (0.5 / scale) + 0.5, 0, 1)
    code = torch.clamp(_RoundSTE.apply(u * 2**bits), max=2**bits - 1)
    low = torch.clamp(torch.round(u.detach() * 2 ** (bits - k)), max=2 ** (bits - k) - 1)
    step = scale * 2.0 ** (1 - bits)
    residual = code - 2**k * low
    penalty = residual.abs().sum() * step
    q = (code - 2 ** (bits - 1)) * step
    return q, penalty, (residual != 0).sum(), (q - w).detach().square().sum()
