"""DropBits' gates: hard concrete variables (Louizos et al. 2018), drawn in training, and what stands for them later."""

import math

import torch

from quantops.autograd.common import each

TEMPERATURE, GAMMA, ZETA = 2 / 3, -0.1, 1.1
SHIFT = TEMPERATURE * math.log(-GAMMA / ZETA)  # P(z != 0) = S(log_a - SHIFT)
OPEN = math.log(-GAMMA / ZETA)  # the deterministic gate is 0 up to this log_a


def hard_concrete(log_a, u):
    """z = clamp(S((log u - log(1-u) + log_a)/b) (zeta - gamma) + gamma, 0, 1) of uniform u; Louizos et al. 2018."""
    return _stretched((torch.logit(u) + log_a) / TEMPERATURE)


def deterministic(log_a):
    """clamp(S(log_a) (zeta - gamma) + gamma, 0, 1), which Louizos et al. 2018 evaluate with in the place of draws."""
    return _stretched(log_a)


def _stretched(v):
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def drawn(quantizers, w, dtype):
    """A draw for each layer, (bits,), or (groups, bits) where groups of rows draw for themselves; 1 for the bits that
    have no gate."""
    rows = quantizers[0].gate_rows
    if rows is None:
        z = each(
            lambda log_a: hard_concrete(log_a.to(dtype), torch.rand_like(log_a, dtype=dtype)),
            [p.log_a for p in quantizers],
        )
    else:
        z = [
            hard_concrete(
                p.log_a.to(dtype), torch.rand(-(-t.shape[0] // rows), len(p.log_a), dtype=dtype, device=t.device)
            )
            for p, t in zip(quantizers, w)
        ]
    return [with_first(v, p.min_bits) for v, p in zip(z, quantizers)]


def with_first(z, min_bits):
    """Gates of all bits, (..., bits), from those above ``min_bits``, below which all are 1."""
    return torch.cat([z.new_ones(*z.shape[:-1], min_bits), z], -1)
