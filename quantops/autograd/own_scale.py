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
            found.append((part.sum() if s.numel() == 1 else part.reshape(s.numel(), -1).sum(1)).reshape(s.shape))
        return None, None, None, *found


def own_scale(keyset, op, args):
    return _OwnScale.apply(keyset, op, args, *args[0])


def own_scale_backward(keyset, op, args):
    return list(_OwnScaleBackward.apply(keyset, op, args, *args[2]))
