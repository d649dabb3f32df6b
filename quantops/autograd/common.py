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


def materialize(grads, w):
    """Gradients of a list: [] where none is wanted, zeros for single entries that are not used."""
    if not any_given(grads):
        return []
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, w)]
