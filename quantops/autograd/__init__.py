"""Autograd of the ops: one file per family, with a function ``(keyset, op, args)`` for every op of quantops/library.py
through which gradients flow. Only inputs are saved, so that nothing is kept for backward beyond the parameters; of
activations, which are no parameters, what activation.py and
categorical_activation.py say.

These are kernels under the Autograd key, with autograd.Functions over flat tensors, as
torch.library.register_autograd would make them: its walk over the lists' pytrees took 70 us a call for one weight.
"""

from quantops.autograd import activation, categorical, categorical_activation, own_scale, truncate, uniform

__all__ = ["activation", "categorical", "categorical_activation", "own_scale", "truncate", "uniform"]
