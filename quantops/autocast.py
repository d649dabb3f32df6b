"""The dtype of q under torch.autocast: that which autocast casts the weights of its layer to, or the weight's own, of
layers that it lets compute with their weights as they are (see quantops/layers.py)."""

from contextlib import nullcontext

import torch

from quantops import checks


def dtype_for(quantizer, w):
    """The dtype of q of the weights ``w`` now."""
    return checks.dtype_of(None if quantizer.cast else w[0].dtype, w)


def of_layers(quantizers, w):
    """In this context a list call gives q of that dtype."""
    device = w[0].device.type
    off = not quantizers[0].cast and device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if off else nullcontext()
