"""Uniform quantization of activations in plain PyTorch: what the kernels of family ``activation`` mean.

The code rules and grids are those of :mod:`quantops.reference.uniform`, on x less an ``offset`` b, if there is one:

    v = h - b,  c = the code of v by ``rule``, on a scale s,  q = m * step + b

where h is x, or with GELU or SiLU in front h(x), see :mod:`quantops.reference.activation_front`,

with the dyadic grid for round_clamp and the full one for floor and nearest. So q without an offset is
``decode(encode(x))``. ``scale`` and ``offset`` have one element, or one per channel (dim 1) of x.

inside: |v| <= s signed, 0 <= v <= s unsigned; with the ReLU in front, which unsigned codes have in them anyway, x > 0,
as ReLU has it. Otherwise v is above (v > s) or below (NaN too). What is kept of an element for the backward pass,
``kept``, is a number of 8 bits:

    input     nothing: the backward pass reads x; behind GELU and SiLU this alone
    bits      1 inside, else 0. Where sums are wanted the side follows from q
    residual  inside 128 + rint(126 clamp(rho, -1, 1)), below 0, above 255

with rho = (m * step - v) / (value of a code step), which so is known to 1/252. Gradients, with g = dL/dq:

    dL/dx = g * inside, behind GELU and SiLU times dh/dx
    dL/ds = (step of a scale of one) * (level of the last code * sum of g above + that of the first * sum of g below
            + learn = "step" alone: levels of a code step * sum of g * rho inside)
    dL/db = sum of g outside

learn = "clip": PACT (arXiv 1805.06085), whose clip is s. learn = "step": LSQ (1902.08153) and LSQ+ (2004.09576), with
both sums divided by sqrt(elements of the scale * the last level). Out of range (bits, a scale that is not in
2^-100..2^100, an offset that is not finite) everything is NaN.
"""

import torch

from quantops.reference.activation_front import SMOOTH, front_and_slope
from quantops.reference.uniform import (
    MAX_BITS,
    _as_int,
    _code,
    _level,
    _nan_where_not,
    _pow2,
    _step,
    _unit,
    _unit_step,
    acc_dtype,
)

FRONTS = (None, "relu", *SMOOTH)
KEEPS = ("input", "bits", "residual")
LEARNS = (None, "clip", "step")
RESIDUALS = 126  # on either side of 128
LEAST_SCALE, MOST_SCALE = 2.0**-100, 2.0**100


def per_channel(v, x):
    """``v`` (one element, or one per channel) shaped to broadcast over ``x``."""
    return v.reshape(()) if v.numel() == 1 else v.reshape(-1, *[1] * (x.dim() - 2))


def _behind(front, x):
    """(h, dh/dx) in the arithmetic dtype; dh/dx is None where h is x."""
    wide = x.detach().to(acc_dtype(x.dtype))
    return front_and_slope(wide, front) if front in SMOOTH else (wide, None)


class _Grid:
    """All that scales, offsets and bits fix, shaped to broadcast over x."""

    def __init__(self, x, scale, bits, offset, rule, signed):
        acc = acc_dtype(x.dtype)
        self.scale, self.offset = (
            None if v is None else per_channel(torch.as_tensor(v, dtype=acc, device=x.device).detach(), x)
            for v in (scale, offset)
        )
        self.rule, self.signed, self.grid = rule, signed, "dyadic" if rule == "round_clamp" else "full"
        self.bits = _as_int(bits, x)
        self.valid = (self.scale >= LEAST_SCALE) & (self.scale <= MOST_SCALE)
        self.valid = self.valid & (self.bits >= 0) & (self.bits <= MAX_BITS)
        if self.offset is not None:
            self.valid = self.valid & self.offset.isfinite()
        self.unit_step = _unit_step(self.bits, acc, self.grid, signed)
        self.step = _nan_where_not(self.valid, _step(self.scale, self.bits, self.grid, signed))
        top = _pow2(self.bits, acc) - 1
        self.first, self.last = (_level(c, self.bits, self.grid, signed) for c in (0 * top, top))
        self.of_code = 2.0 if signed and self.grid == "full" else 1.0  # levels from a code to the next
        self.per_code = torch.where(self.bits == 0, torch.zeros_like(self.step), 1 / (self.of_code * self.step))

    def shifted(self, x):
        v = x.detach().to(self.scale.dtype)
        return v if self.offset is None else v - self.offset

    def level(self, v):
        return _level(_code(_unit(v, self.scale, self.signed), self.bits, self.rule), self.bits, self.grid, self.signed)

    def inside(self, v, front):
        low = v >= -self.scale if self.signed else v > 0 if front == "relu" else v >= 0
        return low & (v <= self.scale)

    def rho(self, v):
        return ((self.level(v) * self.step - v) * self.per_code).clamp(-1, 1)


def levels(x, scale, bits, *, offset=None, rule="round_clamp", signed=False):
    """(m, step): integers in the dtype of the arithmetic, and what they are multiplied by, shaped to broadcast."""
    p = _Grid(x, scale, bits, offset, rule, signed)
    return p.level(p.shifted(x)), p.step


def inside_of(x, scale, bits, *, offset=None, rule="round_clamp", signed=False, front=None):
    """Whether elements of x are inside."""
    p = _Grid(x, scale, bits, offset, rule, signed)
    return p.inside(p.shifted(_behind(front, x)[0]), front)


def activation(
    x, scale, bits, *, offset=None, rule="round_clamp", signed=False, front=None, keep="bits", out_dtype=None
):
    """(q, kept) of one tensor; ``kept`` is uint8, in x's shape, None with keep="input"."""
    p = _Grid(x, scale, bits, offset, rule, signed)
    v = p.shifted(_behind(front, x)[0])
    q = p.level(v) * p.step
    q = q if p.offset is None else q + p.offset
    q, inside = _nan_where_not(p.valid, q).to(out_dtype or x.dtype), p.inside(v, front)
    if keep == "input":
        return q, None
    if keep == "bits":
        return q, inside.to(torch.uint8)
    outside = torch.where(v > p.scale, 255, 0)
    rho = torch.where(inside & p.valid, p.rho(v), torch.zeros_like(v))
    return q, torch.where(inside, 128 + (RESIDUALS * rho).round().int(), outside).to(torch.uint8)


def activation_backward(
    grad, x, q, kept, scale, bits, *, offset=None, rule="round_clamp", signed=False, front=None, learn=None, dtype=None
):
    """(dL/dx, dL/ds, dL/db) from ``grad`` = dL/dq; sums in float64, rounded once, None without ``learn``.

    x: with keep="input"; kept: otherwise. q: with bits, where sums are wanted. ``dtype``: x's.
    """
    dtype = dtype or grad.dtype
    p = _Grid(grad.to(acc_dtype(dtype)), scale, bits, offset, rule, signed)
    g, rho, slope = grad.to(p.scale.dtype), None, None
    if x is not None:
        h, slope = _behind(front, x.to(p.scale.dtype))
        v = p.shifted(h)
        inside, above, rho = p.inside(v, front), v > p.scale, p.rho(v)
    elif learn == "clip":
        middle = 0.5 * (p.first + p.last) * p.step
        inside, above = kept == 1, q.to(g.dtype) > (middle if p.offset is None else middle + p.offset)
    elif learn == "step":
        inside, above, rho = (kept > 0) & (kept < 255), kept == 255, (kept.to(g.dtype) - 128) / RESIDUALS
    else:
        inside = (kept > 0) & (kept < 255)
    grad_x = torch.where(inside, g, torch.zeros_like(g))
    grad_x = _nan_where_not(p.valid, grad_x if slope is None else grad_x * slope).to(dtype)
    if learn is None:
        return grad_x, None, None

    def total(t):
        t = t.double()
        return (
            t.sum()
            if scale.numel() == 1
            else per_channel(t.sum([d for d in range(t.dim()) if d != 1]), g).to(torch.float64)
        )

    zero = torch.zeros_like(g)
    above, below = total(torch.where(~inside & above, g, zero)), total(torch.where(~inside & ~above, g, zero))
    of_scale = p.last.double() * above + p.first.double() * below
    if learn == "step":
        of_scale = of_scale + p.of_code * total(torch.where(inside, g * rho, zero))
    of_scale, of_offset = p.unit_step.double() * of_scale, above + below
    if learn == "step":
        count = g.numel() // max(scale.numel(), 1)
        norm = (p.last.double().clamp(min=1) * max(count, 1)).rsqrt()
        of_scale, of_offset = of_scale * norm, of_offset * norm
    return grad_x, *(_nan_where_not(p.valid, v.to(g.dtype)).reshape(scale.shape) for v in (of_scale, of_offset))
