"""Shared inputs, weights of every kind that a kernel must get right, and a counter of calls."""

import os

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Triton's interpreter takes milliseconds for a program: there, fewer and smaller cases of the same kinds.
EXHAUSTIVE = os.environ.get("TRITON_INTERPRET") != "1"

SPECIAL = [
    0.0,
    -0.0,
    1e-45,
    -1e-45,
    1e-38,
    3e38,
    -3e38,
    1.0,
    -1.0,
    0.5,
    -0.5,
    0.25,
    1 / 3,
    float("inf"),
    -float("inf"),
    float("nan"),
]


def weights(dtype=torch.float32, seed=0, special=True):
    """Weights of many shapes, sizes and layouts; the last has NaN, infinities, huge and denormal values."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    long, channels, edges = (40000, 16, 512) if EXHAUSTIVE else (5000, 4, 64)
    made = [
        randn(7),
        randn(1),
        randn(()),
        randn(0),
        randn(3, 0, 2),
        randn(channels, 5, 3, 3),
        randn(channels, 8, 3, 3).to(memory_format=torch.channels_last),
        randn(2 * channels + 1, 10).t(),
        randn(20, 30)[::2, ::3],
        randn(1, 9).expand(4, 9),
        randn(2, long)[:, 3:],
        randn(long)[3:].view(1, -1),  # dense, not aligned, more than one chunk
        torch.zeros(17, dtype=dtype),
        torch.full((4, 4), 1e-39, dtype=torch.float64).to(dtype),
        torch.arange(-edges, edges + 1, dtype=torch.float64).div(edges).to(dtype),  # on the bin edges of every width
    ]
    if special:
        made.append(torch.tensor(SPECIAL * 3, dtype=torch.float64).to(dtype).reshape(4, 12))
    return made


def scales(w, per_row, seed=1):
    """A scale for each weight, somewhat below its maximum, so that some weights are outside; some are 0 or tiny."""
    generator = torch.Generator().manual_seed(seed)
    acc = torch.float64 if w[0].dtype == torch.float64 else torch.float32
    out = []
    for i, t in enumerate(w):
        rows = t.shape[0] if per_row and t.dim() else 1
        s = torch.rand(rows, generator=generator, dtype=torch.float64).mul(2).to(acc)
        if i % 5 == 4:
            s[:1] = [0.0, 1e-39, -0.0, 3e38, 1e-30][(i // 5 + seed) % 5]
        out.append(s)
    return out


def same(a, b):
    """Equal value for value in one dtype and shape; NaN equals NaN."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.masked_fill(a.isnan(), 0), b.masked_fill(b.isnan(), 0))
    )


def free_gigabytes():
    """Of memory, as far as the system tells."""
    try:
        with open("/proc/meminfo") as f:
            return int(next(line for line in f if line.startswith("MemAvailable")).split()[1]) >> 20
    except OSError:
        return 0


class Calls(TorchDispatchMode):
    """Counts calls of quantops ops by name."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "quantops":
            name = func._schema.name.removeprefix("quantops::")
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def check_scale_grad(got, grad, w, s, bits, grid, signed, what):
    """dL/ds against sums in float64 of the same codes: off by no more than 4 roundings of each of the two numbers that
    a term is the difference of, and of numbers too small to be normal. ``grad``: dL/dq, None for zeros."""
    from quantops.reference import uniform as ref

    acc = s.dtype
    g = torch.zeros(w.shape, dtype=torch.float64) if grad is None else grad.to(acc).double()
    scale = ref.per_row(s, w)
    codes = ref.encode(w, s, bits, grid=grid, signed=signed)
    ratio = ref.decode(codes, torch.ones_like(s, dtype=torch.float64), bits, grid=grid, signed=signed)
    inner = torch.where(ref._inside(w.to(acc), scale, signed), w.double() * ref._inverse(scale).double(), 0.0)
    ratio = torch.where(w == w, ratio, torch.nan)
    finfo = torch.finfo(acc)
    room = g.abs() * (2 * finfo.eps * (ratio.abs() + inner.abs()) + finfo.tiny * finfo.eps) + finfo.tiny * finfo.eps
    want, bound = (
        (v.reshape(s.numel(), -1).sum(1) if v.numel() else v.new_zeros(s.numel())) for v in (g * (ratio - inner), room)
    )
    bound = bound + finfo.eps * want.abs()
    assert got.shape == s.shape and got.dtype == acc, what
    off = (got.reshape(-1).double() - want).abs()
    assert torch.equal(got.reshape(-1).isnan(), want.isnan()), f"{what}: {got} {want}"
    wrong = off > bound
    assert not wrong.any(), f"{what}: {off[wrong]} off {want[wrong]}, expected at most {bound[wrong]}"
