"""Weights of which each process has a part (DTensor: FSDP2 and tensor parallel). Everything is computed where the parts
lie, by the same list calls; what is over all elements, maxima and sums, is then reduced over the processes.

A layer's elements are spread over those dimensions of its device mesh that shard it; over the others they are repeated.
"""

import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist

from quantops.reference.uniform import per_row


def any_sharded(w):
    """Whether any of a list is a DTensor, without the import that takes two seconds where there are none. Compiled
    graphs see whole weights."""
    if torch.compiler.is_compiling():
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(t, module.DTensor) for t in w)


def is_sharded(t):
    """Whether one tensor is."""
    return any_sharded((t,))


def fsdp_modules(model):
    """The modules whose parameters FSDP2 shards, and makes whole for their forward."""
    module = sys.modules.get("torch.distributed.fsdp")
    return [] if module is None else [m for m in model.modules() if isinstance(m, module.FSDPModule)]


def shards(w):
    """The parts of a list of tensors that lie here, differentiable; plain tensors as they are."""
    return [t.to_local() if is_sharded(t) else t for t in w] if any_sharded(w) else w


def whole(t):
    """All of a tensor, on every process, differentiable; a plain one as it is."""
    return t.full_tensor() if is_sharded(t) else t


def as_shards(results, w):
    """Parts of results as DTensors that are laid out as ``w``; list by list where there are several per weight."""
    if not any_sharded(w):
        return results
    return [
        type(t).from_local(v, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride())
        if is_sharded(t)
        else v
        for v, t in zip(results, list(w) * (len(results) // max(len(w), 1)))
    ]


def _split_dims(t, rows):
    """Mesh dimensions over which the elements of a weight, or ``rows`` those of each row, are spread."""
    for placement in t.placements:
        if placement.is_partial():
            raise ValueError(f"weight: expected one that is sharded or replicated, got {t.placements}")
    return [i for i, p in enumerate(t.placements) if p.is_shard() and not (rows and p.dim == 0)]


def _reduce(values, w, op, rows=False):
    """``values``, a tensor per weight, reduced in place over the processes that have a part of it: a call per group."""
    groups: dict[tuple, list] = {}
    if not any_sharded(w):
        return values
    for v, t in zip(values, w):
        if is_sharded(t):
            for dim in _split_dims(t, rows):
                groups.setdefault((t.device_mesh, dim), []).append(v)
    for (mesh, dim), parts in groups.items():
        flat = torch.cat([v.reshape(-1) for v in parts])
        dist.all_reduce(flat, op, mesh.get_group(dim))
        for v, reduced in zip(parts, flat.split([v.numel() for v in parts])):
            v.copy_(reduced.view_as(v))
    return values


def maxima(values, w, rows=False):
    """The largest of all parts' values; ``rows``: values are per row."""
    return _reduce(values, w, dist.ReduceOp.MAX, rows)


def means(values, w, rows=False):
    """mean|w| of whole weights from those of the parts, to the last places of a sum."""
    found = []
    for v, t, part in zip(values, w, shards(w)):
        if not is_sharded(t):
            found.append(v)
            continue
        found.append(v.double() * (part.numel() // max(part.shape[0], 1) if rows else part.numel()))
    _reduce(found, w, dist.ReduceOp.SUM, rows)
    count = [t.numel() // max(t.shape[0], 1) if rows else t.numel() for t in w]
    return [(f / max(n, 1)).to(v.dtype) if is_sharded(t) else v for f, n, v, t in zip(found, count, values, w)]


class _OwnScales(torch.autograd.Function):
    """Gradients of all parts add up, and reach the maxima, or all elements, wherever they lie."""

    @staticmethod
    def forward(ctx, w, rows, mean, count, *tensors):
        ctx.w, ctx.rows, ctx.mean, ctx.count = w, rows, mean, count
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        values, parts = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        used, grads = grads, [torch.zeros_like(v) if g is None else g for g, v in zip(grads, values)]
        if ctx.mean:
            here = [torch.full_like(v, part.numel() // max(v.numel(), 1)) for v, part in zip(values, parts)]
        else:
            here = [(part.abs() >= per_row(v, part)).to(v.dtype) for v, part in zip(values, parts)]
            # Not by reshape(..., -1): a process may have no part of a weight.
            here = [(h.flatten(1).sum(1) if ctx.rows else h.sum()).reshape(v.shape) for h, v in zip(here, values)]
        # The op divides by how many elements of this part have a share of the gradient, not by how many there are.
        total = _reduce([g.double() for g in grads], ctx.w, dist.ReduceOp.SUM, ctx.rows)
        everywhere = _reduce([h.double() for h in here], ctx.w, dist.ReduceOp.SUM, ctx.rows)
        given = [(g * h / n.clamp(min=1)).to(v.dtype) for g, h, n, v in zip(total, here, everywhere, values)]
        found = torch.ops.quantops.own_scale_backward(list(parts), list(values), given, ctx.mean)
        return (None,) * (4 + ctx.count) + tuple(None if g is None else f for g, f in zip(used, found))


def own_scales(values, w, rows, mean):
    """``values``, max|w| or mean|w| of whole weights, as functions of the weights: what own_scale is, of parts."""
    return list(_OwnScales.apply(w, rows, mean, len(values), *values, *shards(w)))


class _Total(torch.autograd.Function):
    """The gradient of a sum over processes is that of each part of it."""

    @staticmethod
    def forward(ctx, values, *w):
        # In float64, so that a sum of parts is rounded once.
        parts = list(values.to(torch.float64 if values.is_floating_point() else values.dtype, copy=True).unbind())
        return torch.stack(_reduce(parts, w, dist.ReduceOp.SUM)).to(values.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, *[None] * (len(ctx.needs_input_grad) - 1)


def totals(values, w):
    """Sums over all parts: ``values`` has an entry per weight, the sum over the part that lies here."""
    return _Total.apply(values, *(t.detach() for t in w)) if any_sharded(w) else values


@contextmanager
def gathered(module):
    """While it is open the parameters of a quantizer are whole."""
    own = {name: p for name, p in module._parameters.items() if p is not None and is_sharded(p)}
    module._parameters.update({name: whole(p.detach()) for name, p in own.items()})
    try:
        yield
    finally:
        module._parameters.update(own)


def laid_out_as(t, like):
    """A DTensor with the placements of another; a plain tensor as it is."""
    return t.redistribute(placements=like.placements) if is_sharded(like) else t


def slice_of(t, like):
    """The part of a whole tensor that ``like`` has here, as a DTensor."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=None)


# Activations. (Strategies of register_sharding cannot say how the backward ops' lists of sums are laid out.)


class _OfAllParts(torch.autograd.Function):
    """A value that every process uses on its part: its gradient is the sum of theirs, weighted by ``weight``."""

    @staticmethod
    def forward(ctx, value, like, weight):
        ctx.like, ctx.weight = like, weight
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        total = (grad.double() * ctx.weight).contiguous()
        return _reduce([total], [ctx.like], dist.ReduceOp.SUM)[0].to(grad.dtype), None, None


def by_parts(fn, x, *values, lsq=False):
    """``fn(x, *values)`` of elementwise ops; of a DTensor, of the part of each process, with ``values`` (None or plain
    tensors of one element) for all of them. ``lsq``: gradients of values are divided by sqrt(number of elements)."""
    if not is_sharded(x):
        return fn(x, *values)
    if any(v is not None and v.numel() > 1 for v in values):
        raise ValueError("scale: expected one element for activations that are sharded, got one per channel")
    if any(p.is_partial() for p in x.placements):
        from torch.distributed.tensor import Replicate

        x = x.redistribute(placements=[Replicate() if p.is_partial() else p for p in x.placements])
    part, like = x.to_local(), x.detach()
    weight = (part.numel() / max(x.numel(), 1)) ** 0.5 if lsq else 1.0
    q = fn(part, *(None if v is None else _OfAllParts.apply(v, like, weight) for v in values))
    return type(x).from_local(q, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())
