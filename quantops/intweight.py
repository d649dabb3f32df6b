"""Integer weights: what training ends with."""

import dataclasses
import math
from typing import Any

import torch

from quantops import checks, foreach
from quantops.layers import ROWS, from_rows
from quantops.nn import check_only, parameter_name, quantized
from quantops.packed import Packed
from quantops.reference.uniform import GRIDS, code_bits
from quantops.sharded import gathered, whole
from quantops.tied import shared_names

MOST = 2**40  # elements of a weight, and of each of its dims: a file of no bits at all may claim any number


@dataclasses.dataclass(frozen=True, eq=False)
class IntWeight:
    """One weight as n-bit codes in bit planes, which can be read at any lower precision: q = m * step.

    packed: the codes, a :class:`quantops.Packed` of planes. scale: 0-dim or (rows,), what the step is made of; the
    equations are in :mod:`quantops.functional`. dtype: of the trained weight and of :meth:`dequantize`. fixed: a layer
    that keeps its bits where the others of its network have fewer, as :func:`load_int` knows. rows: the dims of the
    weight that have a scale per element, see quantops/layers.py; where they are not (0,), the packed codes lie with
    these in front, as one dim, and ``whole`` is the shape of the weight. shared: names of other parameters of the model
    that have this very weight.

    At m < n bits the codes are c >> (n-m) and the step is that of m bits. On the full grid and with floor codes
    (TruncQuant, arXiv 2506.11431) that is the weight that was trained at m bits, ``quantops.truncate``, bit for bit. On
    the dyadic grid (MSQ, arXiv 2507.22349) it rounds down to a multiple of 2^(n-m) steps, on the sign grid towards 0,
    and changes nothing where the bits that are cut off are zero, as its penalty makes them. On the sign grid n does not
    count the sign: the first plane has the signs, and the n below it the magnitude.
    """

    packed: Packed
    scale: torch.Tensor
    _: dataclasses.KW_ONLY
    grid: str = GRIDS[0]
    signed: bool = True
    dtype: torch.dtype = torch.float32
    fixed: bool = False
    rows: tuple = ROWS
    whole: torch.Size | None = None
    shared: tuple = ()

    def __post_init__(self):
        if self.packed.layout != "planes":
            raise ValueError(f"packed: expected the layout 'planes', got {self.packed.layout!r}")

    @classmethod
    def from_codes(cls, codes: torch.Tensor, scale: torch.Tensor, bits: int, **settings: Any) -> "IntWeight":
        """The weight of integer codes of ``bits`` bits. ValueError for codes out of range, on every device."""
        stored = code_bits(bits, settings.get("grid", GRIDS[0]))
        if codes.device.type != "cpu" and codes.numel():
            low, high = codes.aminmax()
            if not 0 <= int(low) <= int(high) < 2**stored:
                raise ValueError(f"codes: expected values in 0..2^{stored} - 1, got {int(low)}..{int(high)}")
        return cls(foreach.pack([codes], stored)[0], scale, **settings)

    @property
    def bits(self) -> int:
        """n, the bits of each code, a sign aside."""
        return self.packed.bits - 1 if self.grid == "sign" and self.packed.bits else self.packed.bits

    @property
    def shape(self) -> torch.Size:
        """The weight's shape."""
        return torch.Size(self.packed.shape if self.whole is None else self.whole)

    def _laid_out(self, t):
        return from_rows(t, self.rows, self.shape)

    @property
    def codes(self) -> torch.Tensor:
        """The codes: uint8 up to 8 bits (with a sign), int32 above, in the weight's shape."""
        codes = self._laid_out(foreach.unpack([self.packed])[0])
        return codes.to(torch.uint8) if self.packed.bits <= 8 else codes

    @property
    def unit(self) -> int:
        """The scale whose step is 1."""
        if self.grid == "dyadic":
            return 2 ** max(self.bits - self.signed, 0)
        return 2**self.bits if self.grid == "sign" else 2**self.bits - 1

    @property
    def levels(self) -> torch.Tensor:
        """m, the integers of which q = m * step: int32, in the weight's shape; all 0 for 0 bits."""
        unit = torch.full_like(self.scale, self.unit)
        levels = foreach.decode([self.packed], [unit], grid=self.grid, signed=self.signed, out_dtype=unit.dtype)[0]
        return self._laid_out(levels.to(torch.int32))

    @property
    def level_range(self) -> tuple[int, int]:
        """(lowest, highest) level that the grid has."""
        top = 2**self.bits - 1
        if not self.bits:
            return 0, 0
        if self.grid == "dyadic" and self.signed:
            return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return (-top if self.signed else 0), top

    @property
    def step(self) -> torch.Tensor:
        """What the levels are multiplied by: in the scale's shape and dtype; 0 for 0 bits."""
        return self.scale / self.unit if self.bits else torch.zeros_like(self.scale)

    @property
    def step_of_each(self) -> torch.Tensor:
        """The step in a shape that the levels can be multiplied by: 1 but for the dims that are rows."""
        if self.step.numel() == 1:
            return self.step.reshape(())
        shape = [n if d in self.rows else 1 for d, n in enumerate(self.shape)]
        order = sorted(self.rows)
        return (
            self.step.reshape([self.shape[d] for d in self.rows]).permute(*map(self.rows.index, order)).reshape(shape)
        )

    def at(self, bits: int) -> "IntWeight":
        """The same weight at ``bits`` <= n bits, from the same memory."""
        return dataclasses.replace(self, packed=self.packed.truncate(code_bits(bits, self.grid)))

    def dequantize(self, bits: int | None = None) -> torch.Tensor:
        """The weights, at n bits as the training forward had them, bit for bit. ``bits``: fewer of them, see above."""
        q = foreach.decode([self.packed], [self.scale], bits, grid=self.grid, signed=self.signed, out_dtype=self.dtype)
        return self._laid_out(q[0])


@torch.no_grad()
def to_int(model: torch.nn.Module) -> dict[str, IntWeight]:
    """Integer weights of a model that :func:`quantops.quantize_` changed: {parameter name: IntWeight}.

    Names are those of the plain model's state dict ("conv1.weight"), tensors stay on their devices, and each
    ``dequantize()`` equals the training forward bit for bit (without autocast), with CPQ the evaluated one. Biases and
    layers that are not quantized are not in it. Sharded weights are gathered one at a time, and every process, all of
    which have to call it, gets the whole.

    Raises ValueError for a model without quantized weights, for weights with NaN or inf and for those that have other
    parametrizations too, naming the layer.
    """
    model = getattr(model, "_orig_mod", model)
    layers = quantized(model)
    if not layers:
        raise ValueError(f"model: expected weights quantized by quantops.quantize_, {type(model).__name__} has none")
    weights, shared = {}, shared_names(model)
    for name, owner, quantizer in layers:
        check_only(name, owner)
        if owner.original.is_meta:
            raise ValueError(f"{name or 'model'}: expected a weight with values, got one on the meta device")
        w = whole(owner.original)
        if not bool(torch.isfinite(w).all()):
            raise ValueError(f"{name or 'model'}: the weight has NaN or inf values, which no code stands for")
        with gathered(quantizer):
            v = quantizer.to_int(quantizer.rows(w))
        if quantizer.row_dims != ROWS:
            v = dataclasses.replace(v, rows=quantizer.row_dims, whole=owner.original.shape)
        weights[parameter_name(name, quantizer)] = dataclasses.replace(v, shared=tuple(shared.get(quantizer, ())))
    return weights


def rows_shape(shape, rows):
    """The shape of a weight of ``shape`` with the dims ``rows`` in front, as one."""
    if tuple(rows) == ROWS:
        return tuple(shape)
    return (math.prod(shape[d] for d in rows), *(n for d, n in enumerate(shape) if d not in rows))


def check(name, v):
    """Raises ValueError where an IntWeight contradicts itself."""
    rows = v.packed.shape[0] if v.packed.shape else 1
    acc = torch.float64 if v.dtype == torch.float64 else torch.float32
    for wrong, text in (
        (
            len(v.shape) > 64 or max((math.prod(v.shape), *v.shape)) > MOST,
            f"expected a shape of at most 64 dims and 2^40 elements, got {tuple(v.shape)}",
        ),
        (
            tuple(v.packed.shape) != rows_shape(v.shape, v.rows),
            f"expected codes of shape {rows_shape(v.shape, v.rows)}, got {tuple(v.packed.shape)}",
        ),
        (v.packed.device.type == "meta", "expected codes with values, got some on the meta device"),
        (v.grid not in GRIDS, f"expected a grid of {GRIDS}, got {v.grid!r}"),
        (type(v.fixed) is not bool, f"expected fixed true or false, got {v.fixed!r}"),
        (type(v.signed) is not bool, f"expected signed true or false, got {v.signed!r}"),
        (v.dtype not in checks.FLOATS, f"expected a dtype of {[str(d) for d in checks.FLOATS]}, got {v.dtype}"),
        (v.scale.dtype != acc, f"expected a scale of {acc}, got {v.scale.dtype}"),
        (
            v.scale.shape not in ((), (1,), (rows,)),
            f"expected one scale or one per row ({rows}), got shape {tuple(v.scale.shape)}",
        ),
    ):
        if wrong:
            raise ValueError(f"{name}: {text}")
    if not bool(((v.scale >= 0) & (v.scale < torch.inf)).all()):
        raise ValueError(f"{name}: expected finite scales >= 0")
    try:
        checks.packed_data([v.packed.data], [v.shape], [v.packed.bits], v.packed.layout)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{name}: {e}") from e
