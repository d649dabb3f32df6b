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


def categorical(x, alpha, sigma, bits, *, gates=None, signed=True, mode="hard", grad="winner", u=None):
    """q of the categorical quantizer from the probabilities of all 2^b classes, differentiable by autograd.

    Written from the definition alone, to be the second, independent statement of ``reference.categorical``. ``alpha``,
    ``sigma``: tensors that broadcast over x. ``u``: two tensors of uniforms for mode "sample". Where x is many sigmas
    outside the grid, the difference of sigmoids has no digits left, and none of this is right.
    """
    if signed:
        index = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), device=x.device)
    else:
        index = torch.arange(2**bits, device=x.device)
    edge = [(alpha[..., None] * (index + side) - x[..., None]) / sigma[..., None] for side in (0.5, -0.5)]
    pi = edge[0].sigmoid() - edge[1].sigmoid()
    magnitude = torch.where(index < 0, -index - 1, index).double()
    level = torch.where(magnitude > 0, magnitude.log2().floor().long() + 1, 0)  # counted from 0
    if not signed:
        level = (level - 1).clamp(min=0)
    weight = torch.ones(bits, dtype=pi.dtype, device=x.device)
    if gates is not None:
        factors = torch.cat([torch.ones_like(gates[:1]), gates[1:]])
        weight = torch.where(factors > 0, factors, 0.0).cumprod(0).to(pi.dtype)
    weighted = weight[level] * pi
    r = weighted / weighted.sum(-1, keepdim=True)
    soft = alpha * (r * index).sum(-1)
    if mode == "soft":
        return soft
    if mode == "hard":
        place = r.argmax(-1, keepdim=True)
    else:
        place = _drawn(pi, weight, level, u)[..., None]
    j = index[place.squeeze(-1)]
    if grad == "soft":
        return soft + (alpha * j - soft).detach()
    winner = r.gather(-1, place).squeeze(-1)
    return alpha * j + (winner - winner.detach()) * (alpha * j).detach()


def _drawn(pi, weight, level, u):
    """The place of the class at u[1] of the cumulative sum of pi over levels 0..t, where u[0] chooses t."""
    bits = len(weight)
    steps = weight - torch.cat([weight[1:], weight.new_zeros(1)])
    inside = torch.stack([torch.where(level <= t, pi, 0.0) for t in range(bits)], -2)  # (..., t, class)
    parts = (steps * inside.sum(-1)).cumsum(-1)
    t = (u[0][..., None] * parts[..., -1:] >= parts).sum(-1).clamp(max=bits - 1)
    within = inside.gather(-2, t[..., None, None].expand(*t.shape, 1, pi.shape[-1])).squeeze(-2).cumsum(-1)
    return (u[1][..., None] * within[..., -1:] > within).sum(-1).clamp(max=pi.shape[-1] - 1)
