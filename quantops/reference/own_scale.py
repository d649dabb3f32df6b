"""Gradients of scales that are functions of their weights, in plain PyTorch: what the kernels of family ``own_scale``
mean."""

import torch

from quantops.reference.uniform import acc_dtype, per_row


def own_scale_backward(w, scale, grad_scale, *, mean):
    """dL/dw of a scale of max|w| (``mean``: mean|w|), per tensor or per row, from ``grad_scale`` = dL/ds.

    max     sign(w) g / (number of weights of that size)   where |w| >= s, else 0: ties share
    mean    sign(w) g / (number of weights)
    """
    acc = acc_dtype(w.dtype)
    wide, s, g = w.to(acc), per_row(scale.to(acc), w), per_row(grad_scale.to(acc), w)
    if mean:
        count = w.new_tensor(max(w.numel() // max(scale.numel(), 1), 1), dtype=acc)
        hit = torch.ones_like(wide, dtype=torch.bool)
    else:
        hit = wide.abs() >= s
        if scale.numel() == 1:
            count = hit.sum().to(acc)
        else:
            count = hit.sum(tuple(range(1, w.dim())), keepdim=True).to(acc) if w.dim() > 1 else hit.to(acc)
    each = g / count
    signed = torch.where(wide > 0, each, torch.where(wide < 0, -each, torch.zeros_like(each)))
    return torch.where(hit, signed, torch.zeros_like(wide)).to(w.dtype)
