"""tanh and the exponential that it is made of, in plain PyTorch, of operations that have the same bits everywhere, as
torch.tanh and torch.exp have not: codes behind them are equal on every backend."""

import math

import torch


def _reduced(y):
    """(2^k, e^r - 1) of y = k ln(2) + r for 0 <= y < 43 (21 in float32, where 2^k is an int32), |r| <= ln(2) / 2."""
    wide = y.dtype == torch.float64
    k = torch.round(y * 1.44269504088896340736)
    k = torch.where(k > 0, k, torch.zeros_like(k))  # for NaN, which has no power
    # ln(2) in two parts, the first with so few bits that its product with k is exact.
    high, low = (6.93145751953125e-1, 1.42860682030941723212e-6) if wide else (0.693359375, -2.12194440e-4)
    r = (y - k * high) - k * low
    tail = torch.zeros_like(r)  # (e^r - 1 - r) / r^2, by its series
    for n in range(13 if wide else 7, 1, -1):
        tail = tail * r + 1 / math.factorial(n)
    power = torch.bitwise_left_shift(torch.ones_like(k, dtype=torch.int64), k.to(torch.int64)).to(y.dtype)
    return power, r + r * r * tail


def exponential(y):
    """e^y for 0 <= y < 43 (21 in float32), to a few units in the last place."""
    power, small = _reduced(y)
    return power * (small + 1)


def exponential_minus_one(y):
    """e^y - 1 = 2^k (e^r - 1) + (2^k - 1), likewise."""
    power, small = _reduced(y)
    return power * small + (power - 1)


def tanh(x):
    """E / (E + 2) with E = e^(2|x|) - 1, to a few units in the last place."""
    e = exponential_minus_one(torch.clamp(x.abs() * 2, max=40 if x.dtype == torch.float64 else 20))
    t = e / (e + 2)
    return torch.where(x < 0, -t, t)
