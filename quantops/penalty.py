"""The term that a method adds to the loss."""

import torch

from quantops.methods import cpq, msq
from quantops.nn import quantized
from quantops.reference.uniform import acc_dtype


def penalty(model: torch.nn.Module) -> torch.Tensor:
    """What the methods of a model's weights add to the loss, summed: 0-dim, differentiable.

        (task_loss + strength * quantops.penalty(model)).backward()

    MSQ: the LSB penalties, :func:`quantops.methods.msq.penalty`. CPQ: the bits that DropBits is expected to keep,
    :func:`quantops.methods.cpq.penalty`, where it learns them. 0 where no weight has either, so that a training loop
    need not know the method. Raises ValueError for a model without quantized weights.
    """
    layers, parts = quantized(model), []
    if not layers:
        raise ValueError(f"model: expected weights quantized by quantops.quantize_, {type(model).__name__} has none")
    of_msq = [layer for layer in layers if isinstance(layer[2], msq.MSQWeight)]
    if of_msq:
        parts.append(msq.penalty_of(of_msq))
    if any(cpq.learns_bits(p) for _, _, p in layers):
        parts.append(cpq.penalty(model))
    if not parts:
        w = layers[0][1].original
        return torch.zeros((), dtype=acc_dtype(w.dtype), device=w.device)  # plain where w is sharded
    return torch.stack(parts).sum() if len(parts) > 1 else parts[0]
