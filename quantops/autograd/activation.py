"""Family ``activation``: what is kept, see the reference; linear in the gradient, so that second derivatives of dL/dx
are there, behind GELU and SiLU those in x too. q itself is kept, as by the next layer, where PACT's gradient needs to
know the side."""

import torch

from quantops.autograd.common import below_autograd, call
from quantops.layout import relaid
from quantops.reference.activation import FRONTS, KEEPS, inside_of
from quantops.reference.activation_front import SMOOTH, curvature
from quantops.reference.uniform import RULES

ops = torch.ops.quantops
INPUT, BITS = KEEPS.index("input"), KEEPS.index("bits")


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keyset, op, args, x, scale, offset):
        q, kept = below_autograd(keyset, op, args)
        *_, bits, rule, signed, front, keep, learn, _ = args
        ctx.settings, ctx.learn, ctx.dtype = (rule, signed, front, keep), learn, x.dtype
        ctx.stride, ctx.input = q.stride(), keep == INPUT
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(kept)
        sides = keep == BITS and learn and any(t is not None and t.requires_grad for t in (scale, offset))
        ctx.save_for_backward(x if ctx.input else None, q if sides else None, kept, scale, offset, bits)
        return q, kept

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 6
        x, q, *saved = ctx.saved_tensors
        learn = ctx.learn if any(ctx.needs_input_grad[4:]) else 0
        # The kept numbers are in the order of memory that q had; hooks on saved tensors may give back another.
        grad, x, q = (None if t is None else relaid(t, ctx.stride) for t in (grad, x, q))
        grad_x, sums = call(ops.activation_backward, grad, x, q, *saved, *ctx.settings, learn, ctx.dtype)
        of_scale, of_offset = sums or (None, None)
        return (
            None,
            None,
            None,
            grad_x if ctx.needs_input_grad[3] else None,
            of_scale if ctx.needs_input_grad[4] else None,
            of_offset if ctx.needs_input_grad[5] else None,
        )


class _ActivationBackward(torch.autograd.Function):
    """dL/dx is g on the places inside, which count as constants, as the STE has it; behind a smooth front times its
    slope, a function of ``smooth_x``, which is x there and None elsewhere."""

    @staticmethod
    def forward(ctx, keyset, op, args, grad, smooth_x):
        grad_x, sums = below_autograd(keyset, op, args)
        _, x, q, kept, scale, offset, bits, *settings, _, _ = args
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.dtype, ctx.stride = settings, grad.dtype, grad.stride()
        ctx.save_for_backward(x, kept, scale, offset, bits, None if smooth_x is None else grad)
        return grad_x, *sums

    @staticmethod
    def backward(ctx, gg, *of_sums):
        if any(g is not None for g in of_sums):
            raise NotImplementedError(
                "activation: second derivatives of the scale's and the offset's gradient are not "
                "implemented; those of dL/dx are"
            )
        if gg is None:
            return (None,) * 5
        x, *saved, grad = ctx.saved_tensors
        gg, of_grad, of_x = relaid(gg, ctx.stride), None, None
        if ctx.needs_input_grad[3]:
            of_grad, _ = call(ops.activation_backward, gg, x, None, *saved, *ctx.settings, 0, saved[1].dtype)
            of_grad = of_grad.to(ctx.dtype)
        if ctx.needs_input_grad[4]:
            _, scale, offset, bits = saved
            rule, signed, front, _ = ctx.settings
            inside = inside_of(x, scale, bits, offset=offset, rule=RULES[rule], signed=signed, front=FRONTS[front])
            wide = x.to(scale.dtype)
            of_x = torch.where(inside, gg.to(scale.dtype) * grad.to(scale.dtype) * curvature(wide, FRONTS[front]), 0)
            of_x = of_x.to(x.dtype)
        return None, None, None, of_grad, of_x


def activation(keyset, op, args):
    return _Activation.apply(keyset, op, args, *args[:3])


def activation_backward(keyset, op, args):
    grad, x, front = args[0], args[1], args[9]
    grad_x, *sums = _ActivationBackward.apply(keyset, op, args, grad, x if FRONTS[front] in SMOOTH else None)
    return grad_x, sums
