"""Family ``own_scale``: scales as the functions of their weights that they are."""

import torch

from quantops.autograd.common import below_autograd, call, materialize
from quantops.reference.own_scale import own_scale_backward as slope

ops = torch.ops.quantops


class _OwnScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keyset, op, args, *w):
        scale = below_autograd(keyset, op, args)
        _, ctx.per_row, ctx.mean = args
        ctx.save_for_backward(scale, *w)
        return scale

    @staticmethod
    def backward(ctx, grad):
        scale, *w = ctx.saved_tensors
        sizes = [t.shape[0] if ctx.per_row else 1 for t in w]
        return (
            None,
            None,
            None,
            *call(ops.own_scale_backward, w, list(scale.split(sizes)), list(grad.contiguous().split(sizes)), ctx.mean),
        )


class _EachOwnScale(torch.autograd.Function):
    """The same for a list, whose backward pass leaves out the weights whose scale is not used."""

    @staticmethod
    def forward(ctx, per_row, mean, *w):
        with torch._C._AutoDispatchBelowAutograd():
            scale = ops.own_scale(w, per_row, mean)
        ctx.per_row, ctx.mean = per_row, mean
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scale, *w)
        return tuple(split(scale, w, per_row))

    @staticmethod
    def backward(ctx, *grads):
        scale, *w = ctx.saved_tensors
        used = [i for i, g in enumerate(grads) if g is not None]
        found = [None] * len(w)
        if used:
            parts = [s.reshape(-1) for s in split(scale, w, ctx.per_row)]
            given = [grads[i].reshape(-1).contiguous() for i in used]  # that of a sum is expanded
            slopes = call(ops.own_scale_backward, [w[i] for i in used], [parts[i] for i in used], given, ctx.mean)
            for i, slope_ in zip(used, slopes):
                found[i] = slope_
        return None, None, *found


class _OwnScaleBackward(torch.autograd.Function):
    """It is linear in the gradients of the scales; the weights count as constants there, as they have the same sign."""

    @staticmethod
    def forward(ctx, keyset, op, args, *grad_scale):
        w, scale, _, ctx.mean = args
        ctx.save_for_backward(*w, *scale)
        ctx.set_materialize_grads(False)
        return tuple(below_autograd(keyset, op, args))

    @staticmethod
    def backward(ctx, *grads):
        n = len(ctx.saved_tensors) // 2
        w, scale = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        found = []
        for t, s, g in zip(w, scale, materialize(grads, w, w[0].dtype) or [None] * n):
            if g is None:
                found.append(None)
                continue
            part = g.to(s.dtype) * slope(t, s, torch.ones_like(s), mean=ctx.mean).to(s.dtype)
            rows = part.reshape(s.numel(), part.numel() if s.numel() == 1 else t[:1].numel())
            found.append(rows.sum(1).reshape(s.shape))
        return None, None, None, *found


def split(values, w, per_row):
    """What the ops give for a list, as a list."""
    return list(values.split([t.shape[0] for t in w]) if per_row else values.unbind())


def of_each(w, per_row, mean):
    """[max|w| or mean|w|] of a list as functions of the weights. Weights whose scale is not used get no gradient."""
    in_python = not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    if in_python and torch.is_grad_enabled() and any(t.requires_grad for t in w):
        return list(_EachOwnScale.apply(per_row, mean, *w))
    return split(call(ops.own_scale, w, per_row, mean), w, per_row)


def own_scale(keyset, op, args):
    return _OwnScale.apply(keyset, op, args, *args[0])


def own_scale_backward(keyset, op, args):
    return list(_OwnScaleBackward.apply(keyset, op, args, *args[2]))
