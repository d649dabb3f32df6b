"""Family ``truncate``: many widths of one weight, whose gradients flow into one."""

import torch

from quantops.autograd.common import any_given, below_autograd, call, materialize
from quantops.default.truncate import used_gradients
from quantops.reference.tanh import tanh as tanh_of
from quantops.reference.truncate import COMPANDINGS, tanh_curvature, truncate_scale_terms
from quantops.reference.uniform import RULES, _inverse, per_row

ops = torch.ops.quantops


class _Truncate(torch.autograd.Function):
    """The list of q of w, scale and out_scale."""

    @staticmethod
    def forward(ctx, keyset, op, args, *tensors):
        w, _, _, bits, base_bits, ctx.rule, ctx.tanh, ctx.covered, ctx.exact, ctx.q_dtype = args
        ctx.set_materialize_grads(False)
        ctx.count, ctx.dtype = len(w), w[0].dtype
        ctx.save_for_backward(*tensors, bits, base_bits)
        return tuple(below_autograd(keyset, op, args))

    @staticmethod
    def backward(ctx, *grads):
        n = ctx.count
        wanted = ctx.needs_input_grad[3:]  # of w, scale, out_scale
        scale_grad = any_given(grads) and any(wanted[2 * n :] if ctx.covered else wanted[n:])
        covered = ctx.covered and not ctx.tanh and not scale_grad and not ctx.exact  # dL/dw is the sum of the gradients
        used = [[g for g in grads[i::n] if g is not None] for i in range(n)]
        grad_scale, grad_out_scale = [None] * n, [None] * (len(wanted) - 2 * n)
        if covered and all(len(g) <= 1 for g in used):  # what is saved is not asked for: checkpoints need not recompute
            grad_w = [g[0].to(ctx.dtype) if g else None for g in used]
        elif not any_given(grads):
            grad_w = [None] * n
        else:
            *tensors, bits, base_bits = ctx.saved_tensors
            w, scale, out_scale = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
            grad_w, *sums = call(
                ops.truncate_backward,
                _fill_in(grads, ctx.q_dtype),
                w,
                scale,
                out_scale,
                bits,
                base_bits,
                ctx.rule,
                ctx.tanh,
                covered,
                scale_grad,
            )
            if ctx.exact:
                grad_w, sums = exact_slope(grad_w, sums, w, scale, out_scale, ctx.tanh)
            grad_w = [t if g else None for t, g in zip(grad_w, used)]
            if scale_grad:
                sums = [[t if g else None for t, g in zip(v, used)] for v in sums]
                grad_scale, grad_out_scale = [None] * n if ctx.covered else sums[0], sums[1]
        return None, None, None, *grad_w, *grad_scale, *grad_out_scale


def exact_slope(grad_w, sums, w, scale, out_scale, tanh):
    """dL/dw and dL/ds of a slope of out_scale/scale in the place of 1: both are proportional to it."""
    factor = [(o * _inverse(tanh_of(s) if tanh else s)).detach() for s, o in zip(scale, out_scale)]
    grad_w = [(g * per_row(f, t)).to(g.dtype) for g, f, t in zip(grad_w, factor, w)]
    return grad_w, [[g * f for g, f in zip(v, factor)] if i == 0 else v for i, v in enumerate(sums)]


def _fill_in(grads, dtype):
    """Empty tensors in the place of gradients that are not there."""
    some = next(g for g in grads if g is not None)
    return [some.new_empty(0, dtype=dtype) if g is None else g for g in grads]


class _TruncateBackward(torch.autograd.Function):
    """Linear in the gradients of q. w counts as a constant but for the slope of tanh, s as one."""

    @staticmethod
    def forward(ctx, keyset, op, args, *tensors):
        grads, w, scale, out_scale, bits, base_bits, ctx.rule, ctx.tanh, ctx.covered, _ = args
        ctx.set_materialize_grads(False)
        ctx.count, ctx.own_out, ctx.grad_dtype = len(w), bool(out_scale), grads[0].dtype
        ctx.used = [g.numel() > 0 for g in grads]
        ctx.save_for_backward(*w, *scale, *out_scale, bits, base_bits, *(grads if ctx.tanh else ()))
        return tuple(t for result in below_autograd(keyset, op, args) for t in result)

    @staticmethod
    def backward(ctx, *gradients):
        n, saved = ctx.count, list(ctx.saved_tensors)
        w, scale = saved[:n], saved[n : 2 * n]
        bits, base_bits, *grads = saved[(2 + ctx.own_out) * n :]
        gg_w, gg_scale, gg_out = gradients[:n], gradients[n : 2 * n], gradients[2 * n :]
        # dL/dq has the same factor for every width.
        each, grad_w = [None] * n, [None] * n
        if any_given(gg_w):
            gg_w = materialize(gg_w, w, w[0].dtype)
            each = call(
                ops.truncate_backward, gg_w, w, scale, [], bits[:1], base_bits, ctx.rule, ctx.tanh, ctx.covered, False
            )[0]
            if ctx.tanh:
                grad_w = [
                    tanh_curvature(v, used_gradients(grads[i::n], t), t, s)
                    for i, (v, t, s) in enumerate(zip(gg_w, w, scale))
                ]
        result = [None if v is None or not used else v for v, used in zip(list(each) * bits.shape[0], ctx.used)]
        if any_given(gg_scale) or any_given(gg_out):
            options = {"rule": RULES[ctx.rule], "companding": COMPANDINGS[ctx.tanh]}
            for at, used in enumerate(ctx.used):
                if not used:
                    continue
                i = at % n
                ratio, inner = truncate_scale_terms(
                    w[i], scale[i], bits[at // n, i], base_bits=base_bits.reshape(-1)[i], **options
                )
                for v, term in (
                    (gg_scale[i] if gg_scale else None, -inner if ctx.own_out else ratio - inner),
                    (gg_out[i] if gg_out else None, ratio),
                ):
                    if v is not None:
                        v = per_row(v, w[i]) * term
                        result[at] = v if result[at] is None else result[at] + v
        result = [None if g is None else g.to(ctx.grad_dtype) for g in result]
        return None, None, None, *result, *(grad_w if ctx.tanh else ())


def truncate(keyset, op, args):
    w, scale, out_scale = args[:3]
    return list(_Truncate.apply(keyset, op, args, *w, *scale, *(out_scale or ())))


def truncate_backward(keyset, op, args):
    grads, w, scale, out_scale = args[:4]
    tanh, scale_grad = args[7], args[9]
    out = list(_TruncateBackward.apply(keyset, op, args, *grads, *(w if tanh else ())))
    n = len(w)
    return out[:n], out[n : 2 * n] if scale_grad else [], out[2 * n :] if scale_grad else []
