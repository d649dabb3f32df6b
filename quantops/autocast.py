"""The dtype of q under torch.autocast: that which autocast casts the weights of its layer to, or the weight's own, of
layers that it lets compute with their weights as they are (see quantops/layers.py)."""

from contextlib import nullcontext

import torch

from quantops import checks


def dtype_for(quantizer, w):
    """The dtype of q of the weights ``w`` now."""
    return checks.dtype_of(None if quantizer.cast else w[0].dtype, w)


def is_cast(quantizer, w):
    """False for a weight that autocast leaves as it is while it casts others: they are no list with those."""
    return quantizer.cast or w.is_meta or not torch.is_autocast_enabled(w.device.type)


def of_layers(quantizers, w):
    """In this context a list call gives q of that dtype."""
    return nullcontext() if is_cast(quantizers[0], w[0]) else torch.autocast(w[0].device.type, enabled=False)
