"""Packed codes: n bits each in a buffer of bytes. The list ops; ``functional`` has those for one tensor."""

import dataclasses
import math
from collections.abc import Sequence

import torch

from quantops import checks
from quantops.autograd.common import call
from quantops.checks.arguments import entry, kind
from quantops.library import ops
from quantops.reference.packing import LAYOUTS
from quantops.types import ListBits, Scales


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Codes of ``bits`` bits n in the order of a contiguous tensor of ``shape``, as uint8 ``data``.

    layout "planes": data of shape (n, B). Row j is a bit plane, bit n-1-j of every code: the most significant come
    first, so the first m rows are the codes truncated to m bits. Element i is bit i % 8 (of value 2^(i % 8)) of byte
    i // 8. B is ceil(numel / 8) rounded up to a multiple of 16, so that planes are aligned; the padding is zeros.

    layout "dense": data of shape (ceil(numel * n / 8),). The bits of code i are at the places n*i .. n*i + n-1 of one
    stream, least significant first; place j is bit j % 8 of byte j // 8.
    """

    data: torch.Tensor
    shape: torch.Size
    bits: int
    layout: str = LAYOUTS[0]

    @property
    def device(self) -> torch.device:
        """Where the data are."""
        return self.data.device

    def numel(self) -> int:
        """The number of codes."""
        return math.prod(self.shape)

    def to(self, device: torch.device | str) -> "Packed":
        """The same on another device."""
        return dataclasses.replace(self, data=self.data.to(device))

    def truncate(self, bits: int) -> "Packed":
        """The codes c >> (n - bits), packed: with planes a view of the first ``bits`` of them, no copy."""
        checks.bits_of_stored(checks.stored_bits(bits, 1), [self.bits], [self.data])
        if self.layout == "dense":
            return pack(unpack([self], bits), bits, layout=self.layout)[0]
        return dataclasses.replace(self, data=self.data[:bits], bits=bits)


def _check(packed):
    """Raises where that is no list of Packed of one layout. That their data fit their shapes, the ops check."""
    if not isinstance(packed, (list, tuple)) or not packed:
        raise TypeError(
            f"packed: expected a non-empty list of Packed, got {kind(packed)}"
            + (" of length 0" if isinstance(packed, (list, tuple)) else "")
        )
    for i, p in enumerate(packed):
        if not isinstance(p, Packed):
            raise TypeError(f"{entry('packed', i, packed)}: expected a Packed, got {kind(p)}")
        if p.layout != packed[0].layout:
            raise ValueError(
                f"packed: expected one layout, got {packed[0].layout!r} in entry 0 and {p.layout!r} in entry {i}"
            )
    checks.choice("packed.layout", packed[0].layout, LAYOUTS)


def _arguments(packed):
    """What the ops take of a list: data, sizes, dims, stored; and the layout."""
    _check(packed)
    sizes = [size for p in packed for size in p.shape]
    shared = [p.data for p in packed], sizes, [len(p.shape) for p in packed], [p.bits for p in packed]
    return shared, LAYOUTS.index(packed[0].layout)


def pack(codes: Sequence[torch.Tensor], bits: int | Sequence[int], *, layout: str = LAYOUTS[0]) -> list[Packed]:
    """Packed codes of each tensor, see :func:`quantops.pack`. ``bits``: an integer or a list of integers."""
    codes = checks.codes(codes)
    n = checks.stored_bits(bits, len(codes))
    data = call(ops.pack, codes, n, LAYOUTS.index(checks.choice("layout", layout, LAYOUTS)))
    return [Packed(d, c.shape, m, layout) for d, c, m in zip(data, codes, n)]


def unpack(packed: Sequence[Packed], bits: ListBits | None = None) -> list[torch.Tensor]:
    """Codes of each packed tensor, see :func:`quantops.unpack`."""
    shared, layout = _arguments(packed)
    return call(ops.unpack, *shared, checks.bits_of_stored(bits, shared[-1], shared[0]), layout)


def decode(
    packed: Sequence[Packed],
    scale: Scales,
    bits: ListBits | None = None,
    *,
    grid: str | None = None,
    signed: bool = True,
    out_dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """Weights of each packed tensor, see :func:`quantops.decode`."""
    shared, layout = _arguments(packed)
    grid = checks.grid_index(grid, signed)
    m = checks.bits_of_stored(bits, shared[-1], shared[0], grid)
    scale, dtype = checks.decode_scales(scale, packed, out_dtype)
    return call(ops.decode_packed, *shared, scale, m, layout, grid, signed, dtype)
