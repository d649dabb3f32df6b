"""Family ``uniform`` by the reference, weight by weight."""

import torch

from quantops import reference
from quantops.layout import laid_out
from quantops.reference.uniform import GRIDS, RULES, code_bits
from quantops.values import check_codes, check_values


def _flat(results, per_row):
    if per_row:
        return torch.cat(results) if len(results) > 1 else results[0]
    return torch.stack(results)


def absmax(w, per_row):
    return _flat([reference.absmax(t, per_row=per_row) for t in w], per_row)


def absmean(w, per_row):
    return _flat([reference.absmean(t, per_row=per_row) for t in w], per_row)


def round_clamp(w, scale, bits, grid, signed, covered, dtype):
    check_values(scale, bits, grid=grid)
    return laid_out(
        [
            reference.round_clamp(t, s, n, signed=signed, grid=GRIDS[grid], out_dtype=dtype)
            for t, s, n in zip(w, scale, bits.reshape(-1))
        ],
        w,
    )


def round_clamp_out(w, scale, bits, grid, signed, q):
    for out, value in zip(q, round_clamp(w, scale, bits, grid, signed, False, q[0].dtype)):
        out.copy_(value)


def msq(w, scale, bits, k, grid, covered, dtype):
    check_values(scale, bits, k, grid)
    each = [
        reference.msq(t, s, n, kk, grid=GRIDS[grid], out_dtype=dtype)
        for t, s, n, kk in zip(w, scale, bits.reshape(-1), k.reshape(-1))
    ]
    q, *sums = zip(*each)
    return laid_out(q, w), *(torch.stack(v) for v in sums)


def msq_out(w, scale, bits, k, grid, q, penalty, nonzero, sq_error):
    values, *sums = msq(w, scale, bits, k, grid, False, q[0].dtype)
    for out, value in zip([*q, penalty, nonzero, sq_error], [*values, *sums]):
        out.copy_(value)


def lsb(w, scale, bits, k, grid):
    check_values(scale, bits, k, grid)
    return laid_out(
        [
            reference.lsb(t, s, n, kk, grid=GRIDS[grid])
            for t, s, n, kk in zip(w, scale, bits.reshape(-1), k.reshape(-1))
        ],
        w,
    )


def lsb_stats(w, scale, bits, k, grid, covered):
    return tuple(msq(w, scale, bits, k, grid, covered, w[0].dtype)[1:])


def uniform_backward(grad, grad_penalty, w, scale, bits, k, grid, signed, scale_grad):
    check_values(scale, bits, k, grid)
    each = [
        reference.uniform_backward(g, r, t, s, n, kk, grid=GRIDS[grid], signed=signed)
        for g, r, t, s, n, kk in zip(
            grad or [None] * len(w),
            [None] * len(w) if grad_penalty is None else grad_penalty.reshape(-1),
            w,
            scale,
            bits.reshape(-1),
            k.reshape(-1),
        )
    ]
    grad_w, grad_scale = zip(*each)
    return laid_out(grad_w, w), list(grad_scale) if scale_grad else []


def add_lsb_grad_(grad, w, scale, bits, k, grid, strength):
    check_values(scale, bits, k, grid)
    for g, t, s, n, kk, v in zip(grad, w, scale, bits.reshape(-1), k.reshape(-1), strength.reshape(-1)):
        g.copy_(reference.add_lsb_grad(g, v, t, s, n, kk, grid=GRIDS[grid]))


def encode(w, scale, bits, rule, grid, signed):
    check_values(scale, bits, grid=grid)
    return laid_out(
        [
            reference.encode(t, s, n, rule=RULES[rule], grid=GRIDS[grid], signed=signed)
            for t, s, n in zip(w, scale, bits.reshape(-1))
        ],
        w,
    )


def decode(codes, scale, bits, grid, signed, dtype):
    check_values(scale, bits, grid=grid)
    each = [
        reference.decode(c, s, n, grid=GRIDS[grid], signed=signed, dtype=dtype)
        for c, s, n in zip(codes, scale, bits.reshape(-1))
    ]
    check_codes(codes, code_bits(bits.reshape(-1), GRIDS[grid]))
    return laid_out(each, codes)
