"""The methods as the papers' public code writes them: chains of eager tensor ops. The peers of benches and of the demo.

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


class _FloorSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        return torch.floor(v)

    @staticmethod
    def backward(ctx, grad):
        return grad


def truncate(w, bits, base_bits=8):
    """q of ``bits`` of a weight that TruncQuant trains at ``base_bits``, with a scale of max|w|, differentiable."""
    scale = w.detach().abs().max()
    u = torch.clamp(w * (0.5 / scale) + 0.5, 0, 1)
    code = torch.clamp(_FloorSTE.apply(u * 2**base_bits), max=2**base_bits - 1)
    code = _FloorSTE.apply(code / 2 ** (base_bits - bits))
    return ((2 * code - (2**bits - 1)) * (scale / (2**bits - 1))).to(w.dtype)
