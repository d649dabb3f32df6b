"""Gates, x over a grid, and the widths of bins that tests of family ``categorical`` go through."""

import torch

from quantops.reference.categorical import cumulative_gates, levels

RATIOS = (100, 10, 3, 1, 0.3, 0.1, 0.01)  # alpha/sigma
KINDS = ("none", "fractions", "mixed", "ones")


def make_gates(kind, bits, dtype, generator, least=0.05):
    """None; or in (0, 1); or some of them exactly 0 or 1; or all 1."""
    if kind == "none":
        return None
    gates = least + (1 - least) * torch.rand(bits, generator=generator, dtype=torch.float64)
    if kind == "mixed":
        choice = torch.rand(bits, generator=generator)
        gates[choice < 0.4] = 1
        gates[choice > 0.85] = 0
    return (torch.ones_like(gates) if kind == "ones" else gates).to(dtype)


def interval(bits, signed, gates=None):
    """The lowest and the highest class that is in."""
    count = bits if gates is None else int((cumulative_gates(gates, bits) > 0).sum())
    return levels(bits, signed)[count - 1]


def inputs(n, bits, signed, ratio, gates, generator, dtype=torch.float64, beyond=3.0):
    """x over the grid and ``beyond`` sigmas more, with its alpha and sigma."""
    low, high = interval(bits, signed, gates)
    alpha = torch.rand(1, generator=generator, dtype=torch.float64) + 0.5
    more = min(beyond / ratio, 3.0)
    x = torch.rand(n, generator=generator, dtype=torch.float64) * (high - low + 1 + 2 * more) + low - 0.5 - more
    return (x * alpha).to(dtype), alpha.to(dtype), (alpha / ratio).to(dtype)
