"""The scale that weights are quantized with in training: max|w|, or a multiple of mean|w|."""

import math

import torch

from quantops.autograd.common import call
from quantops.autograd.own_scale import of_each, split
from quantops.library import ops
from quantops.sharded import any_sharded, maxima, means, own_scales, shards

ABSMAX = "absmax"


def check_scale(value):
    """``value`` where it is "absmax" or a positive number; ValueError otherwise."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value != ABSMAX and not (number and 0 < value < math.inf):
        raise ValueError(f"scale: expected 'absmax' or a positive number of times mean|w|, got {value!r}")
    return value


def weight_scales(w, scale, per_row, grad=False):
    """[scale of each weight] from their values now, in one list call; constants for autograd, without ``grad``."""
    if grad or scale == ABSMAX:
        values = each_measured(w, per_row, scale != ABSMAX, grad)
        return values if scale == ABSMAX else [v * scale for v in values]
    return split_scales(measured(w, per_row, True) * scale, w, per_row)


def each_measured(w, per_row, mean, grad=False):
    """[max|w| or mean|w| of each weight], with ``grad`` as functions of the weights."""
    if not grad:
        return split_scales(measured(w, per_row, mean), w, per_row)
    if any_sharded(w):
        return own_scales(_of_parts(w, per_row, mean), w, per_row, mean)
    return of_each(w, per_row, mean)


def measured(w, per_row, mean):
    """max|w| or mean|w| of a list, one after another."""
    if any_sharded(w):
        return torch.cat([v.reshape(-1) for v in _of_parts(w, per_row, mean)])
    return call(ops.absmean if mean else ops.absmax, w, per_row)


def _of_parts(w, per_row, mean):
    """The list, of weights that are sharded."""
    parts = shards([t.detach() for t in w])
    values = split_scales(measured(parts, per_row, mean), parts, per_row)
    return means(values, w, per_row) if mean else maxima(values, w, per_row)


def split_scales(values, w, per_row):
    """What absmax and absmean give for a list, as a list."""
    return split(values, shards(w), per_row)


def largest(scale, w):
    """The largest scale of each weight, as a number; 0 for one without rows."""
    tops = [s.max() if s.numel() else s.new_zeros(()) for s in scale]
    return [float(s) for s in maxima(tops, w)]
