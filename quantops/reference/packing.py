"""Packed codes in plain PyTorch: what the kernels of family ``packing`` mean. Integers only, exact.

A tensor of ``numel`` codes of n bits, in the order of its elements as if it were contiguous, becomes uint8 ``data``:

    planes  shape (n, plane_bytes(numel)). Row j is a bit plane: bit n-1-j of every code, so row 0 has the most
            significant bits and the first m rows are the codes c >> (n-m). Element i is bit i % 8 (of value
            2^(i % 8)) of byte i // 8. Rows are padded with zeros to a multiple of 16 bytes, for 128-bit loads.
    dense   shape (ceil(numel * n / 8),). The bits follow each other, those of code i at places n*i .. n*i + n-1, least
            significant first. Place j is bit j % 8 of byte j // 8. The last byte is padded with zeros.
"""

import math

import torch

from quantops.reference.uniform import INVALID, _as_int

LAYOUTS = ("planes", "dense")
PLANE_ALIGNMENT = 16  # bytes


def plane_bytes(numel):
    """Bytes of one bit plane of ``numel`` elements."""
    return -(-numel // (8 * PLANE_ALIGNMENT)) * PLANE_ALIGNMENT


def data_shape(numel, bits, layout):
    """The shape of the packed data of ``numel`` codes of ``bits`` bits."""
    return (bits, plane_bytes(numel)) if layout == "planes" else (-(-numel * bits // 8),)


def split_shapes(sizes, dims):
    """The shapes whose sizes follow each other in ``sizes``, ``dims`` of them in each."""
    if sum(dims) != len(sizes) or min(dims, default=0) < 0:
        raise ValueError(f"dims: expected counts that add up to {len(sizes)}, the number of sizes, got {dims}")
    shapes, at = [], 0
    for n in dims:
        shapes.append(sizes[at : at + n])
        at += n
    return shapes


def _weights(count, device):
    """2^0 .. 2^(count-1)."""
    return torch.bitwise_left_shift(1, torch.arange(count, dtype=torch.int32, device=device))


def _bits_to_bytes(bits):
    """Bytes of bits that lie along the last dim, 8 per byte."""
    bits = bits.reshape(*bits.shape[:-1], bits.shape[-1] // 8, 8)
    return (bits * _weights(8, bits.device)).sum(-1).to(torch.uint8)


def _bytes_to_bits(data):
    bits = torch.bitwise_and(data.unsqueeze(-1).to(torch.int32), _weights(8, data.device)) != 0
    return bits.reshape(*data.shape[:-1], 8 * data.shape[-1])


def pack(codes, bits, *, layout="planes"):
    """The packed data (uint8) of integer codes. Of codes outside 0..2^bits - 1, the low ``bits`` bits."""
    codes, shape = codes.reshape(-1).to(torch.int32), data_shape(codes.numel(), bits, layout)
    each = torch.bitwise_and(codes.unsqueeze(-1), _weights(bits, codes.device)) != 0  # (numel, bits)
    lines = each.t().flip(0) if layout == "planes" else each.reshape(-1)
    return _bits_to_bytes(torch.nn.functional.pad(lines.to(torch.int32), (0, 8 * shape[-1] - lines.shape[-1])))


def unpack(data, shape, stored, bits=None, *, layout="planes"):
    """The ``bits`` most significant of ``stored`` bits of each code: c >> (stored - bits), int32, of ``shape``.

    ``INVALID`` where ``bits`` is not in 0..stored.
    """
    numel, bits = math.prod(shape), _as_int(stored if bits is None else bits, data)
    if layout == "planes":
        each = _bytes_to_bits(data)[:, :numel].flip(0).t()
    else:
        each = _bytes_to_bits(data)[: numel * stored].reshape(numel, stored)
    codes = (each * _weights(stored, data.device)).sum(1).to(torch.int32)
    valid = (bits >= 0) & (bits <= stored)
    codes = codes >> (stored - bits.clamp(0, stored)).to(torch.int32)
    return torch.where(valid, codes, torch.full_like(codes, INVALID)).reshape(shape)
