"""Family ``packing``: bits that are stored, and the shapes of their bytes."""

import math

import torch

from quantops.checks.arguments import entry, kind, tensors
from quantops.checks.integral import bits, integers, repeated
from quantops.checks.uniform import grid_structure
from quantops.reference.packing import LAYOUTS, data_shape, split_shapes
from quantops.reference.uniform import GRIDS, MAX_BITS, code_bits


def stored_bits(value, count):
    """The bit-widths to pack ``count`` tensors with, as integers: memory is laid out by them."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValueError(f"bits: expected one entry per tensor ({count}), got {len(values)}")
    for n in values:
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"bits: expected an integer, since the size of the result depends on it, got {kind(n)}")
        if not 0 <= n <= MAX_BITS:
            raise ValueError(f"bits: expected 0..{MAX_BITS}, got {n}")
    return values


def packed_data(data, shapes, stored, layout):
    """Raises where packed tensors do not have the shapes that codes of ``shapes`` and ``stored`` bits take."""
    if len(shapes) != len(data):
        raise ValueError(f"dims: expected one entry per weight ({len(data)}), got {len(shapes)}")
    for i, (d, shape, n) in enumerate(
        zip(tensors("data", data, (torch.uint8,)), shapes, stored_bits(stored, len(data)))
    ):
        expected = data_shape(math.prod(shape), n, layout)
        if min(shape, default=0) < 0 or d.shape != expected or not d.is_contiguous():
            raise ValueError(
                f"{entry('data', i, data)}: expected a contiguous tensor of shape {expected} for codes "
                f"of {n} bits and of shape {tuple(shape)} in {layout!r}, got shape {tuple(d.shape)}, "
                f"strides {d.stride()}"
            )


def bits_of_stored(value, stored, data, grid=0):
    """Bit-widths to read, from 0 to those that are stored (None: all), as :func:`bits` has them.

    Where codes have a sign bit, it is among those that are stored.
    """
    most = [max(n - code_bits(1, GRIDS[grid]) + 1, 0) for n in stored]
    value = most if value is None else value
    read = bits(value, data, grid)
    if not isinstance(value, torch.Tensor):
        for m, n in zip(repeated(value, data), most):
            if m > n:
                raise ValueError(f"bits: expected 0..{n}, the bits that are stored, got {m}")
    return read


def structure(arguments):
    """See quantops/checks/__init__.py."""
    if arguments["layout"] not in range(len(LAYOUTS)):
        raise ValueError(f"layout: expected 0..{len(LAYOUTS) - 1}, got {arguments['layout']}")
    if "codes" in arguments:
        stored_bits(arguments["bits"], len(tensors("codes", arguments["codes"], (torch.int32,))))
        return
    if "grid" in arguments:
        grid_structure(arguments)
    data, bits_read = arguments["data"], arguments["bits"]
    shapes = split_shapes(arguments["sizes"], arguments["dims"])
    packed_data(data, shapes, arguments["stored"], LAYOUTS[arguments["layout"]])
    if integers("bits", bits_read, data, 0, MAX_BITS) is not bits_read:
        raise ValueError(f"bits: expected int32, got {bits_read.dtype}")
    if "scale" in arguments:
        scale = tensors("scale", arguments["scale"], (torch.float32, torch.float64))
        if len(scale) != len(data):
            raise ValueError(f"scale: expected a list with one entry per weight ({len(data)}), got {len(scale)}")
        for i, (s, shape) in enumerate(zip(scale, shapes)):
            rows = shape[0] if len(shape) else 1
            if s.device != data[0].device or not s.is_contiguous() or s.numel() not in (1, rows):
                raise ValueError(
                    f"{entry('scale', i, scale)}: expected one element or one per row ({rows}), "
                    f"contiguous, on {data[0].device}, got {kind(s)} on {s.device}"
                )
