"""Family ``categorical``: gradients to x, alpha, sigma and gates; no second derivatives."""

import torch

from quantops.autograd.common import any_given, below_autograd, call, materialize, of_used

ops = torch.ops.quantops


class _Categorical(torch.autograd.Function):
    """q of x, alpha, sigma and gates; the backward computes from these what it needs, draws included."""

    @staticmethod
    def forward(ctx, keyset, op, args, *tensors):
        q = below_autograd(keyset, op, args)
        x, _, _, bits, gates, seed, *ctx.options, _ = args
        ctx.set_materialize_grads(False)
        ctx.count, ctx.gate_count, ctx.has_seed, ctx.dtype = len(x), len(gates or ()), seed is not None, q[0].dtype
        ctx.save_for_backward(*tensors, bits, *([seed] if ctx.has_seed else []))
        return tuple(q)

    @staticmethod
    def backward(ctx, *grads):
        n = ctx.count
        if not any_given(grads):
            return *[None] * 3, *[None] * (3 * n + ctx.gate_count)
        saved = list(ctx.saved_tensors)
        x, alpha, sigma, gates = (
            saved[:n],
            saved[n : 2 * n],
            saved[2 * n : 3 * n],
            saved[3 * n : 3 * n + ctx.gate_count],
        )
        bits, seed = saved[3 * n + ctx.gate_count], saved[-1] if ctx.has_seed else None
        wanted = ctx.needs_input_grad[3:]  # of x, alpha, sigma, gates
        scale_grad, gate_grad = any(wanted[n : 3 * n]), any(wanted[3 * n :])
        grad_x, grad_alpha, grad_sigma, grad_gates = call(
            ops.categorical_backward,
            materialize(grads, x, ctx.dtype),
            x,
            alpha,
            sigma,
            bits,
            gates,
            seed,
            *ctx.options,
            scale_grad,
            gate_grad,
        )
        none = [None] * n
        found = (grad_x, grad_alpha or none, grad_sigma or none, grad_gates or none[: ctx.gate_count])
        return None, None, None, *(t for listed in found for t in of_used(grads, listed))


class _CategoricalBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keyset, op, args, *tensors):
        return tuple(t for listed in below_autograd(keyset, op, args) for t in listed)

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(
            "categorical: second derivatives are not implemented; call backward() or "
            "torch.autograd.grad() without create_graph=True on its result"
        )


def categorical(keyset, op, args):
    x, alpha, sigma, _, gates, *_ = args
    return list(_Categorical.apply(keyset, op, args, *x, *alpha, *sigma, *(gates or ())))


def categorical_backward(keyset, op, args):
    grad, x, alpha, sigma, _, gates, *_, scale_grad, gate_grad = args
    out = _CategoricalBackward.apply(keyset, op, args, *grad, *x, *alpha, *sigma, *gates)
    n, scales = len(x), len(x) if scale_grad else 0
    return list(out[:n]), list(out[n : n + scales]), list(out[n + scales : n + 2 * scales]), list(out[n + 2 * scales :])
