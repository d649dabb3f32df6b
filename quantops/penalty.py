"""The term that a method adds to the loss."""

import torch

from quantops.methods import cpq, msq
from quantops.nn import quantized


def penalty(model):
    """What the methods of a model's weights add to the loss, summed: 0-dim, differentiable.

        (task_loss + strength * quantops.penalty(model)).backward()

    MSQ: the LSB penalties, :func:`quantops.methods.msq.penalty`. CPQ: the bits that DropBits is expected to keep,
    :func:`quantops.methods.cpq.penalty`, where it learns them. Raises ValueError for a model without either.
    """
    quantizers, parts = [p for _, _, p in quantized(model)], []
    if any(isinstance(p, msq.MSQWeight) for p in quantizers):
        parts.append(msq.penalty(model))
    if any(cpq.learns_bits(p) for p in quantizers):
        parts.append(cpq.penalty(model))
    if not parts:
        raise ValueError("model: expected weights quantized with MSQConfig or CPQConfig(dropbits='learned'), "
                         f"{type(model).__name__} has none")
    return torch.stack(parts).sum() if len(parts) > 1 else parts[0]
