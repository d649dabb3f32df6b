"""Family ``uniform``: the quantizers, and their backward, which is linear in the gradients."""

import torch

from quantops.autograd.common import any_given, below_autograd, call, materialize, of_used
from quantops.reference.uniform import GRIDS, per_row, scale_grad_term

ops = torch.ops.quantops


class _Quantizer(torch.autograd.Function):
    """Ops of w and scale whose results are a list of q (or none), then R (or none), then sums without gradient.

    ``tensors``: w, then the scales where they have gradients. Each costs 0.4 us, so that scales without stay out.
    """

    @staticmethod
    def forward(ctx, keyset, op, args, grid, signed, covered, k, *tensors):
        result = below_autograd(keyset, op, args)
        result = (
            tuple(result)
            if isinstance(result, list)
            else (*result[0], *result[1:])
            if isinstance(result[0], list)
            else result
        )
        w, scale, bits = args[:3]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in result[-2:] if k is not None))
        ctx.count, ctx.lists = len(w), len(result) if k is None else len(result) - 3
        ctx.grid, ctx.signed, ctx.covered, ctx.dtype, ctx.q_dtype = grid, signed, covered, w[0].dtype, result[0].dtype
        if k is not None or not covered:  # else the backward is the identity
            ctx.save_for_backward(bits, k, *w, *scale)
        return result

    @staticmethod
    def backward(ctx, *grads):
        grad_q, penalty = grads[: ctx.lists], (grads[ctx.lists :] or (None,))[0]
        none = [None] * ctx.count
        wanted = ctx.needs_input_grad[7 + ctx.count :]  # of the scales, [] where none is
        if penalty is None and (ctx.covered or not any_given(grad_q)):
            grad_scale = none
            grad_w = [g if g is None or g.dtype == ctx.dtype else g.to(ctx.dtype) for g in grad_q or none]
        else:
            bits, k, *saved = ctx.saved_tensors
            w, scale = saved[: ctx.count], saved[ctx.count :]
            k = torch.zeros_like(bits) if k is None else k
            # The scale is a constant in R.
            scale_grad = any(wanted) and any_given(grad_q)
            grad_w, grad_scale = call(
                ops.uniform_backward,
                materialize(grad_q, w, ctx.q_dtype),
                penalty,
                w,
                scale,
                bits,
                k,
                ctx.grid,
                ctx.signed,
                scale_grad,
            )
            grad_w = grad_w if penalty is not None else of_used(grad_q, grad_w)
            grad_scale = of_used(grad_q, grad_scale) if scale_grad else none
        return *[None] * 7, *grad_w, *grad_scale[: len(wanted)]


class _QuantizerBackward(torch.autograd.Function):
    """The backward is linear in g and r; w and s count as constants there, as the STE has it."""

    @staticmethod
    def forward(ctx, keyset, op, args, *tensors):
        grad, penalty, w, scale, bits, k, ctx.grid, ctx.signed, _ = args
        grad_w, grad_scale = below_autograd(keyset, op, args)
        ctx.set_materialize_grads(False)
        ctx.count, ctx.has_penalty, ctx.grad_dtype = len(w), penalty is not None, grad[0].dtype if grad else None
        ctx.save_for_backward(bits, k, *w, *scale)
        return (*grad_w, *grad_scale)

    @staticmethod
    def backward(ctx, *gradients):
        n, (bits, k, *saved) = ctx.count, ctx.saved_tensors
        w, scale = saved[:n], saved[n:]
        gg_w, gg_scale = materialize(gradients[:n], w, w[0].dtype), gradients[n:]
        grad, penalty = [None] * n, None
        if gg_w:
            grad, _ = call(ops.uniform_backward, gg_w, None, w, scale, bits, k, ctx.grid, ctx.signed, False)
            if ctx.has_penalty:
                slopes = [b.sign() for b in ops.lsb(w, scale, bits, k, ctx.grid)]
                penalty = torch.stack([(g * b).sum(dtype=scale[0].dtype) for g, b in zip(grad, slopes)])
        if any_given(gg_scale):
            terms = [
                torch.zeros_like(t)
                if g is None
                else per_row(g, t) * scale_grad_term(t, s, b, GRIDS[ctx.grid], ctx.signed)
                for g, t, s, b in zip(gg_scale, w, scale, bits.reshape(-1))
            ]
            grad = [t if g is None else g + t for g, t in zip(grad, terms)]
        grad = [None if g is None else g.to(ctx.grad_dtype) for g in grad] if ctx.grad_dtype else []
        return None, None, None, *grad, *([penalty] if ctx.has_penalty else [])


def _learned(scale, covered):
    """The scales that the graph has to know."""
    return [] if covered or not torch._C._any_requires_grad(*scale) else scale


def round_clamp(keyset, op, args):
    w, scale, _, grid, signed, covered, _ = args
    return list(_Quantizer.apply(keyset, op, args, grid, signed, covered, None, *w, *_learned(scale, covered)))


def msq(keyset, op, args):
    w, scale, _, k, grid, covered, _ = args
    out = _Quantizer.apply(keyset, op, args, grid, True, covered, k, *w, *_learned(scale, covered))
    return list(out[:-3]), *out[-3:]


def lsb_stats(keyset, op, args):
    w, scale, _, k, grid, covered = args
    return _Quantizer.apply(keyset, op, args, grid, True, covered, k, *w, *_learned(scale, covered))


def uniform_backward(keyset, op, args):
    grad, penalty, w = args[:3]
    out = _QuantizerBackward.apply(keyset, op, args, *grad, *([] if penalty is None else [penalty]))
    return list(out[: len(w)]), list(out[len(w) :])
