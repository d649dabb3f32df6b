"""Grid steps and widths that learn: how they stay positive, and where a grid step starts."""

import torch

from quantops.autograd.common import each
from quantops.reference.uniform import acc_dtype

REACH = 20.0  # |log| at most: factors from 2e-9 to 5e8


def positive(start, log):
    """start * exp(log), positive and finite wherever an optimizer takes ``log``, which is 0 at first.

    In proportion to its value, a step of the optimizer has the same size for all layers, and weight decay pulls a value
    to its start, not to 0.
    """
    return start * log.clamp(-REACH, REACH).exp()


def positives(starts, logs, dtype):
    """:func:`positive` of lists of tensors with one dimension, in as many ops as of one."""
    start = torch.cat(starts) if len(starts) > 1 else starts[0]
    return each(lambda log: positive(start, log).to(dtype), logs)


def range_step(w, bits, *, per_row):
    """(max w - min w) / 2^bits, in the shapes of :func:`grid_step`; 1 where that is 0."""
    count = w.shape[0] if per_row else 1
    if w.numel() == 0:
        return w.new_ones(count, dtype=acc_dtype(w.dtype))
    low, high = w.to(acc_dtype(w.dtype)).reshape(count, -1).aminmax(dim=1)
    step = (high - low) / 2**bits
    return torch.where(step > 0, step, torch.ones_like(step))


def grid_step(w, bits, *, per_row):
    """The step with the smallest sum (q - w)^2 on the signed grid, of 16: max|w| is 0.7 to 10 times the grid's end.

    Shape (1,), or (rows,) with ``per_row``. Weights of zeros count as if max|w| were 1/sqrt(elements of a row).
    """
    count = w.shape[0] if per_row else 1
    if w.numel() == 0:
        return w.new_ones(count, dtype=acc_dtype(w.dtype))
    rows = w.to(acc_dtype(w.dtype)).reshape(count, -1)
    end, fan = 2 ** (bits - 1), w[0].numel()
    top = rows.abs().amax(1, keepdim=True)
    top = torch.where(top > 0, top, fan**-0.5).clamp(2.0**-64, 2.0**64)
    best, least = top, torch.full_like(top, torch.inf)
    for k in range(-2, 14):
        step = top * (2 ** (-k / 4) / end)
        error = ((rows / step).round().clamp(-end, end - 1) * step - rows).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return best.flatten()
