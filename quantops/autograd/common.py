"""What the families' autograd kernels share."""

import torch
from torch.autograd import forward_ad

functions: dict = {}  # {op: its (keyset, op, args) of this folder}, filled by quantops/library.py
chains: dict = {}  # {op: the same in aten ops}, filled by quantops/decompositions.py


def call(op, *args):
    """``op(*args)``, in eager mode without the autograd kernel of the op, of which each list costs two more conversions
    between Python and C++ each way, and 8 us. In torch.onnx.export, which knows no quantops, it is a chain of aten
    ops."""
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return chains[op](*args)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return op(*args)
    refuse_tracing(op)
    if torch.is_grad_enabled() and op in functions and torch._C._any_requires_grad(*args):
        return functions[op](None, op, args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def refuse_tracing(what):
    """NotImplementedError within torch.jit.trace."""
    if torch.jit.is_tracing():
        raise NotImplementedError(f"{what}: torch.jit.trace cannot record it: use torch.export or torch.compile")


def refuse_unsupported(op, args):
    """NotImplementedError for derivatives that would be zeros, or that torch.autograd.Function does not have."""
    in_func, forward_mode = torch._C._are_functorch_transforms_active(), forward_ad._current_level >= 0
    if not in_func and not forward_mode:
        return
    given = (t for v in args for t in (v if isinstance(v, (list, tuple)) else [v]))
    tensors = [t for t in given if isinstance(t, torch.Tensor)]
    if forward_mode and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            f"{op.overloadpacket}: forward-mode derivatives (torch.func.jvp, jacfwd, linearize, "
            "torch.autograd.forward_ad) are not implemented: use reverse mode"
        )
    if in_func and torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        raise NotImplementedError(
            f"{op.overloadpacket}: torch.func transforms of what it quantizes (grad, vjp, "
            "jacrev) are not implemented: use torch.autograd.grad"
        )


def below_autograd(keyset, op, args):
    """The op's result by the kernels below autograd. ``keyset``: of the dispatcher's call, None in one from Python."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args) if keyset is None else op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


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
    if len(tensors) == 1 or torch._C._are_functorch_transforms_active():  # which refuse such a Function
        return [fn(t) for t in tensors]
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
        (found,) = torch.autograd.grad(ctx.value, ctx.joined, given, retain_graph=True)  # the caller may keep its own
        return None, *of_used(grads, found.split(ctx.sizes))
