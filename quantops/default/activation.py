"""Family ``activation`` by the reference; what is kept lies in the order of memory, bits eight to a byte."""

import torch

from quantops import reference
from quantops.layout import dense, empty_like, in_layout_of, in_memory
from quantops.reference.activation import FRONTS, KEEPS, LEARNS
from quantops.reference.uniform import RULES
from quantops.values import check_activation


def by_reference(x, scale, offset, bits, rule, signed, front, keep, dtype):
    """(q, what is kept or None) of the reference, from the ops' numbers for its options."""
    return reference.activation(
        x,
        scale,
        bits,
        offset=offset,
        rule=RULES[rule],
        signed=signed,
        front=FRONTS[front],
        keep=KEEPS[keep],
        out_dtype=dtype,
    )


def activation(x, scale, offset, bits, rule, signed, front, keep, learn, dtype):
    check_activation(scale, offset, bits)
    x = dense(x)
    values, kept = by_reference(x, scale, offset, bits, rule, signed, front, keep, dtype)
    q = empty_like(x, dtype).copy_(values)
    if kept is None:
        return q, x.new_empty(0, dtype=torch.uint8)
    kept = in_memory(empty_like(x, torch.uint8).copy_(kept))
    return q, reference.pack(kept, 1, layout="dense") if KEEPS[keep] == "bits" else kept.clone()


def activation_backward(grad, x, q, kept, scale, offset, bits, rule, signed, front, keep, learn, dtype):
    check_activation(scale, offset, bits)
    grad = dense(grad)
    if KEEPS[keep] != "input":
        flat = reference.unpack(kept, (grad.numel(),), 1, layout="dense") if KEEPS[keep] == "bits" else kept
        kept = empty_like(grad, torch.uint8)
        in_memory(kept).copy_(flat)
    x, q = (None if t is None else in_layout_of(t, grad) for t in (x, q))
    values, *sums = reference.activation_backward(
        grad,
        x,
        q,
        kept,
        scale,
        bits,
        offset=offset,
        rule=RULES[rule],
        signed=signed,
        front=FRONTS[front],
        learn=LEARNS[learn],
        dtype=dtype,
    )
    return empty_like(grad, dtype).copy_(values), sums if learn else []
