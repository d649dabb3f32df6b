"""What the families' autograd kernels share."""

import torch


def call(op, *args):
    """``op(*args)``, past autograd's Python kernel (8 us) where no argument wants a gradient."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def below_autograd(keyset, op, args):
    """The op's result by the kernels below autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def any_given(grads):
    return any(g is not None for g in grads)


def materialize(grads, w, dtype):
    """Gradients of a list: [] where none is wanted, zeros of ``dtype`` for single entries that are not used."""
    if not any_given(grads):
        return []
    return [torch.zeros_like(t, dtype=dtype) if g is None else g for g, t in zip(grads, w)]


def of_used(grads, results):
    """``results``, None where the gradient of that entry is not there: optimizers leave such weights alone."""
    return [None if g is None else t for g, t in zip(grads, results)]


def each(fn, tensors):
    """[fn(t) for t in tensors] of tensors with one dimension, for an elementwise ``fn`` that is called with all of them
    in a row; ``None`` is the gradient of those whose result is not used, as if they had been taken one by one."""
    if len(tensors) == 1:
        return [fn(tensors[0])]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and any(t.requires_grad for t in tensors):
        return list(_Each.apply(fn, *tensors))
    return list(fn(torch.cat(tensors)).split([t.numel() for t in tensors]))


class _Each(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fn, *tensors):
        ctx.sizes = [t.numel() for t in tensors]
        ctx.set_materialize_grads(False)
        with torch.enable_grad():
            ctx.joined = torch.cat([t.detach() for t in tensors]).requires_grad_()
            ctx.value = fn(ctx.joined)
        return tuple(ctx.value.detach().split(ctx.sizes))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        if not any_given(grads):
            return None, *grads
        given = torch.cat(materialize(grads, ctx.value.split(ctx.sizes), ctx.value.dtype))
        found, = torch.autograd.grad(ctx.value, ctx.joined, given, retain_graph=True)  # the caller may keep its own
        return None, *of_used(grads, found.split(ctx.sizes))
