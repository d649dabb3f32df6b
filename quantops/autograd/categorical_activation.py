"""Family ``categorical_activation``: keeps q, as the next layer does, and the quarters; no second derivatives."""

import torch

from quantops.autograd.common import below_autograd, call

ops = torch.ops.quantops


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keyset, op, args, x, alpha, sigma):
        q, quarters = below_autograd(keyset, op, args)
        *_, bits, ctx.grad_of, _ = args
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(quarters)
        ctx.dtype, ctx.stride = x.dtype, q.stride()
        ctx.save_for_backward(q, quarters, alpha, sigma, bits)
        return q, quarters

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 6
        q, *saved = ctx.saved_tensors
        if q.stride() != ctx.stride:  # what hooks on saved tensors give back, the quarters are in the order of memory
            q = torch.empty_strided(q.shape, ctx.stride, dtype=q.dtype, device=q.device).copy_(q)
        scale_grad = any(ctx.needs_input_grad[4:])
        grad_x, sums = call(ops.categorical_activation_backward, grad, q, *saved, ctx.grad_of, scale_grad, ctx.dtype)
        return None, None, None, grad_x, *(sums or (None, None))


class _ActivationBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keyset, op, args, *tensors):
        grad_x, sums = below_autograd(keyset, op, args)
        return grad_x, *sums

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(
            "categorical_activation: second derivatives are not implemented; call backward() or "
            "torch.autograd.grad() without create_graph=True on its result"
        )


def categorical_activation(keyset, op, args):
    return _Activation.apply(keyset, op, args, *args[:3])


def categorical_activation_backward(keyset, op, args):
    grad, q, _, alpha, sigma, *_ = args
    grad_x, *sums = _ActivationBackward.apply(keyset, op, args, grad, q, alpha, sigma)
    return grad_x, sums
