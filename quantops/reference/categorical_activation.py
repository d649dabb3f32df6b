"""Categorical quantization of activations that keeps two bits per element: family ``categorical_activation``.

q is the unsigned hard categorical quantizer of :mod:`quantops.reference.categorical`, without gates and with one alpha
and sigma. The backward pass does not get x but q, hence the class j, and the quarter of its cell that x lies in:

    j = clamp(rint(q * (1/alpha)), 0, 2^bits - 1),  k = clamp(floor(4 (x * (1/alpha) - j)) + 2, 0, 3)
    x' = alpha (j + (k - 3/2)/4),  -inf for j = k = 0, inf for the last j with k = 3

The gradients are those of the categorical quantizer at x', of which there are only 4 2^bits: tables of the factors by
which dL/dq is multiplied are looked up at the place 4 j + k. Where q is NaN, k and the place are 0.
"""

import torch

from quantops.reference.categorical import MAX_SOFT_BITS, categorical
from quantops.reference.categorical import factors as factors_at
from quantops.reference.packing import pack, unpack
from quantops.reference.uniform import acc_dtype

QUARTER_BITS = 2


def _class(q, alpha, bits):
    """j of q = alpha j, also where q has been rounded to 16 bits, up to 8 of j."""
    return (q.to(alpha.dtype) * (1 / alpha)).clamp(0, 2 ** _width(bits) - 1).round()


def _width(bits):
    """``bits`` where they are in range; else results are NaN whatever is taken."""
    return min(max(int(bits), 0), MAX_SOFT_BITS)


def categorical_activation(x, alpha, sigma, bits, *, out_dtype=None):
    """(q, quarters) of one tensor. quarters: k of the elements in 2 bits each, dense, as :func:`pack` has them."""
    alpha = torch.as_tensor(alpha, dtype=acc_dtype(x.dtype), device=x.device).detach().reshape(())
    q = _checked_bits(categorical(x, alpha, sigma, bits, signed=False, out_dtype=out_dtype), bits)
    offset = x.detach().to(alpha.dtype) * (1 / alpha) - _class(q, alpha, bits)
    k = ((4 * offset).floor() + 2).clamp(0, 3)
    return q, pack(torch.where(k.isnan(), 0, k).to(torch.int32), QUARTER_BITS, layout="dense")


def _checked_bits(v, bits):
    return v if 0 <= int(bits) <= MAX_SOFT_BITS else torch.full_like(v, torch.nan)


def factors(alpha, sigma, bits, grad_of):
    """What dL/dq is multiplied by in the gradients of x, alpha and sigma, for each of the places 4 j + k."""
    x = (torch.arange(4 * 2 ** _width(bits), dtype=alpha.dtype, device=alpha.device) - 1.5) * (alpha / 4)
    x[0], x[-1] = -torch.inf, torch.inf
    return [_checked_bits(v, bits) for v in factors_at(x, alpha, sigma, bits, signed=False, grad_of=grad_of)]


def categorical_activation_backward(grad, q, quarters, alpha, sigma, bits, *, grad_of="soft", dtype=None):
    """(dL/dx, dL/dalpha, dL/dsigma) from ``grad`` = dL/dq; sums in float64, rounded once. ``dtype``: x's."""
    flat = alpha.reshape(())
    k = unpack(quarters, q.shape, QUARTER_BITS, layout="dense")
    place = 4 * _class(q, flat, bits) + k
    place = torch.where(place.isnan(), 0, place).long()
    by_x, by_alpha, by_sigma = (v[place] for v in factors(flat, sigma.reshape(()), bits, grad_of))
    g = grad.to(flat.dtype)
    sums = ((g * by).double().sum().to(flat.dtype).reshape(alpha.shape) for by in (by_alpha, by_sigma))
    return (g * by_x).to(dtype or q.dtype), *sums
