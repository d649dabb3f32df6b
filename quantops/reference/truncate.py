"""Truncation in plain PyTorch: what the kernels of family ``truncate`` mean.

One tensor at a time, as in :mod:`quantops.reference.uniform`: every operation rounded on its own, in float32 (float64
for float64 weights). ``scale`` and ``out_scale`` have one element, or one per row (dim 0) of ``w``. A width, base width
or scale out of range gives NaN; on CPU the ops raise instead.
"""

import torch

from quantops.reference.tanh import tanh
from quantops.reference.uniform import (
    MAX_BITS,
    _as_int,
    _code,
    _inside,
    _inverse,
    _nan_where_not,
    _pow2,
    _unit,
    acc_dtype,
    per_row,
)

COMPANDINGS = (None, "tanh")
SLOPES = ("ste", "exact")


def _prepare(w, scale, out_scale, bits, base_bits):
    acc = acc_dtype(w.dtype)
    bits, base = _as_int(bits, w), _as_int(base_bits, w)
    s, out = (
        per_row(torch.as_tensor(v, dtype=acc, device=w.device), w) + 0.0  # -0 is 0
        for v in (scale, scale if out_scale is None else out_scale)
    )
    valid = (bits >= 1) & (bits <= base) & (base <= MAX_BITS)
    for v in (s, out):
        valid = valid & (v >= 0) & (v < torch.inf)
    return w.to(acc), s, out, bits.clamp(1, MAX_BITS), base.clamp(1, MAX_BITS), valid


def _companded(w, scale, companding):
    """The weight and the scale that the codes are taken of."""
    if companding == "tanh":
        return tanh(w), tanh(scale)
    return w, scale


def _level(w, scale, bits, base, rule, companding):
    """The odd level 2 c_m - (2^m - 1) of the full grid, as a float."""
    code = _code(_unit(*_companded(w, scale, companding), True), base, rule)
    code = torch.floor(code / _pow2(base - bits, code.dtype))  # >> (base - bits), exactly
    return 2 * code - (_pow2(bits, code.dtype) - 1)


def truncate(w, scale, bits, *, base_bits=8, rule="floor", companding=None, out_scale=None, out_dtype=None):
    """q of one width: the code of ``base_bits``, shifted right by base_bits - bits, on the full grid."""
    dtype = out_dtype or w.dtype
    w, s, out, bits, base, valid = _prepare(w, scale, out_scale, bits, base_bits)
    step = out / (_pow2(bits, w.dtype) - 1)
    return _nan_where_not(valid, _level(w, s, bits, base, rule, companding) * step).to(dtype)


def truncate_scale_terms(w, scale, bits, *, base_bits=8, rule="floor", companding=None, out_scale=None):
    """(q / out_scale, what |dq/ds| is but for that), per element; see :func:`truncate_backward`."""
    w, s, _, bits, base, valid = _prepare(w, scale, out_scale, bits, base_bits)
    ratio = _level(w, s, bits, base, rule, companding) * (1 / (_pow2(bits, w.dtype) - 1))
    x, v = _companded(w, s, companding)
    factor = _inverse(v) if companding is None else _inverse(v) * (1 - v * v)
    inner = torch.where(_inside(w, s, True), x * factor, torch.zeros_like(w))
    return _nan_where_not(valid, ratio), _nan_where_not(valid, inner)


def _total(grads, w):
    """The sum of the gradients that are there, in their order; None without any."""
    total = None
    for g in grads:
        if g is not None:
            g = g.to(acc_dtype(w.dtype))
            total = g if total is None else total + g
    return total


def tanh_curvature(v, grads, w, scale):
    """v * d/dw of dL/dw, as companding with tanh has it: -2 tanh(w) (1 - tanh(w)^2) * (g_1 + g_2 + ...) * inside."""
    total = _total(grads, w)
    if total is None:
        return None
    t = torch.tanh(w.to(total.dtype))
    inside = _inside(w.to(total.dtype), per_row(scale, w), True)
    return torch.where(inside, v.to(total.dtype) * total * (-2 * t * (1 - t * t)), torch.zeros_like(total)).to(w.dtype)


def truncate_backward(
    grads, w, scale, bits, *, base_bits=8, rule="floor", companding=None, out_scale=None, covered=False
):
    """(dL/dw, dL/ds, dL/d out_scale) of several widths: ``grads`` and ``bits`` have an entry for each; None: not used.

    dL/dw = (g_1 + g_2 + ...) * inside, added in that order; with tanh times 1 - tanh(w)^2. With q/out the level over
    2^m - 1, and x = w/s, with tanh x = (tanh(w) / tanh(s)) * (1 - tanh(s)^2),

        out_scale = None: dL/ds = sum over widths and elements of g * (q/s - x * inside)
        else: dL/ds = - sum g * x * inside;  dL/d out_scale = sum g * q/out

    taken in float64 and rounded once, in the shape of ``scale`` and ``out_scale``. Without an out_scale the last is
    None. ``covered`` promises that every weight is inside: dL/dw alone is wanted, and is the sum of the gradients.
    """
    wide, total = w.to(acc_dtype(w.dtype)), _total(grads, w)
    if total is None:
        total = torch.zeros_like(wide)
    if covered:
        return total.to(w.dtype), None, None
    if companding == "tanh":
        t = tanh(wide)
        total = total * (1 - t * t)
    _, s, *_ = _prepare(w, scale, out_scale, 1, base_bits)
    grad_w = torch.where(_inside(wide, s, True), total, torch.zeros_like(wide))
    term_s = term_out = torch.zeros_like(wide, dtype=torch.float64)
    options = {"base_bits": base_bits, "out_scale": out_scale}
    for g, n in zip(grads, bits):
        if g is None:
            continue
        g = g.to(wide.dtype)
        grad_w = _nan_where_not(_prepare(w, scale, out_scale, n, base_bits)[-1], grad_w)
        ratio, inner = truncate_scale_terms(w, scale, n, rule=rule, companding=companding, **options)
        term_out = term_out + (g * ratio).double()
        term_s = term_s + (g * (ratio - inner if out_scale is None else -inner)).double()

    def add_up(term, like):
        summed = term.sum() if like.numel() == 1 else term.reshape(like.numel(), w[:1].numel()).sum(1)
        return summed.to(wide.dtype).reshape(like.shape)

    return grad_w.to(w.dtype), add_up(term_s, scale), None if out_scale is None else add_up(term_out, out_scale)
