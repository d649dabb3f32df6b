"""Quantizers of activations as QuantizeLinear and DequantizeLinear of ONNX, and as Quant of QONNX."""

import torch

from quantops.calibration import activation_scales
from quantops.methods.multibn import replace
from quantops.reference.activation import levels, per_channel
from quantops.reference.activation_front import SMOOTH, by_torch
from quantops.reference.uniform import acc_dtype

# (lowest, highest level), number of the type in ONNX, its dtype in torch or None, the first opset that quantizes to it
_INTEGERS = (
    ((0, 15), 21, None, 21),
    ((-8, 7), 22, None, 21),
    ((0, 255), 2, torch.uint8, 13),
    ((-128, 127), 3, torch.int8, 13),
    ((0, 2**16 - 1), 4, None, 21),
    ((-(2**15), 2**15 - 1), 5, None, 21),
)


def use_integers(plain, opset, exact):
    """Puts nodes of ONNX in the place of a plain model's quantizers of activations, in place, where the opset has
    integers for their levels. The others stay: they leave as float ops, of the same values."""
    made = {}
    for name, about in activation_scales(plain).items():
        kind = integer_of(level_range(about), opset)
        if kind is not None and about["bits"] > 0:
            made[plain.get_submodule(name)] = _behind(about, _Integers(about, kind, opset, exact))
    replace(plain, made.get)


def use_quant(plain, domain):
    """Puts QONNX's Quant in the place of a plain model's quantizers of activations, in place, where it has their grid:
    the dyadic one, without an offset. The others stay."""
    made = {}
    for name, about in activation_scales(plain).items():
        if about["rule"] == "round_clamp" and about["offset"] is None and about["bits"] > 0 + about["signed"]:
            made[plain.get_submodule(name)] = _behind(about, _Quant(about, domain))
    replace(plain, made.get)


def _behind(about, module):
    """A module behind what the quantizer has in front. A ReLU is in unsigned codes."""
    return _Behind(about["front"], module) if about["front"] in SMOOTH else module


class _Behind(torch.nn.Module):
    """A module behind GELU or SiLU as readers of ONNX have it, in the arithmetic dtype: where the last places of that
    decide, a code may be the neighbour."""

    def __init__(self, front, module):
        super().__init__()
        self.front, self.module = front, module

    def forward(self, x):
        return self.module(by_torch(x.to(acc_dtype(x.dtype)), self.front)).to(x.dtype)


class _Quant(torch.nn.Module):
    """Quant with the step as scale, of as many bits as the codes: q of all values but some next to the middle of two
    codes, which get the neighbour."""

    def __init__(self, about, domain):
        super().__init__()
        self.name = f"{domain}::Quant"
        self.settings = {"signed": int(about["signed"]), "narrow": 0, "rounding_mode": "ROUND"}
        scale = about["scale"]
        self.register_buffer("step", scale * 2.0 ** (about["signed"] - about["bits"]))
        self.register_buffer("zero", scale.new_zeros(()))
        self.register_buffer("bits", scale.new_full((), about["bits"]))

    def forward(self, x):
        v = x.to(self.step.dtype), per_channel(self.step, x), self.zero, self.bits
        q = torch.onnx.ops.symbolic(self.name, v, self.settings, dtype=torch.float32, shape=x.shape, version=1)
        return q.to(x.dtype)


def level_range(about):
    """(lowest, highest) level of an entry of :func:`quantops.activation_scales`."""
    top, dyadic = 2 ** about["bits"] - 1, about["rule"] == "round_clamp"
    if not about["signed"]:
        return 0, top
    return (-((top + 1) // 2), top // 2) if dyadic else (-top, top)


def integer_of(found, opset):
    """(number in ONNX, dtype or None) of the least integers that QuantizeLinear gives and that hold lowest..highest, or
    None."""
    for (lowest, highest), number, dtype, first in _INTEGERS:
        if opset >= first and lowest <= found[0] and found[1] <= highest:
            return number, dtype
    return None


class _Integers(torch.nn.Module):
    """QuantizeLinear and DequantizeLinear in the place of a quantizer of activations.

    exact: QuantizeLinear rounds x over the step, where the code rules round x times 1/scale, and only round_clamp has
    its edges there: so it gets the levels, from the very float ops of the reference, and a scale of 1; q is the same
    bit for bit. Else it gets x, where the rule is round_clamp; of values next to the middle of two codes some then have
    the neighbour.
    """

    def __init__(self, about, kind, opset, exact):
        super().__init__()
        (self.number, dtype), self.opset = kind, opset
        self.bits, self.rule, self.signed = about["bits"], about["rule"], about["signed"]
        self.exact = exact or self.rule != "round_clamp"
        self.levels = level_range(about)
        scale, offset = about["scale"], about["offset"]
        like = torch.zeros(1, scale.numel(), dtype=scale.dtype, device=scale.device)
        step = levels(like, scale, self.bits, rule=self.rule, signed=self.signed)[1]
        many = scale.numel() > 1
        self.register_buffer("step", step.reshape(-1) if many else step.reshape(()))
        self.register_buffer("inverse", (0.5 if self.signed else 1.0) / scale.reshape(-1 if many else ()))
        self.register_buffer("offset", None if offset is None else offset.reshape(-1 if many else ()))
        self.register_buffer("divisor", torch.ones((), device=scale.device) if self.exact else self.step.clone())
        self.register_buffer("zero", None if dtype is None else torch.zeros_like(self.divisor, dtype=dtype))
        # Told, too: onnxruntime gives a DequantizeLinear without a zero point that of its QuantizeLinear, of any shape.
        self.register_buffer("zeros", None if dtype is None else torch.zeros_like(self.step, dtype=dtype))

    def forward(self, x):
        v = x.to(self.step.dtype) if self.offset is None else x.to(self.step.dtype) - per_channel(self.offset, x)
        v = self._level(v) if self.exact else self._clipped(v)
        axis = {"axis": 1} if self.divisor.dim() else {}
        made = {"shape": x.shape, "version": self.opset}
        if self.zero is None:
            axis["output_dtype"] = self.number
            m = torch.onnx.ops.symbolic("QuantizeLinear", (v, self.divisor), axis, dtype=self.number, **made)
        else:
            given = (v, self.divisor, self.zero)
            m = torch.onnx.ops.symbolic("QuantizeLinear", given, axis, dtype=self.number, **made)
        axis = {"axis": 1} if self.step.dim() else {}
        given = (m, self.step) if self.zeros is None else (m, self.step, self.zeros)
        q = torch.onnx.ops.symbolic("DequantizeLinear", given, axis, dtype=torch.float32, **made)
        return (q if self.offset is None else q + per_channel(self.offset, x)).to(x.dtype)

    def _level(self, v):
        """The level of v as quantops/reference/uniform.py has it, of bits that are known: few nodes."""
        u = v * per_channel(self.inverse, v)
        u = (u + 0.5 if self.signed else u).clamp(0, 1)
        top = 2.0**self.bits - 1
        if self.rule == "nearest":
            c = (u * top).round()
        else:
            c = u * 2.0**self.bits
            c = (c.round() if self.rule == "round_clamp" else c.floor()).clamp(max=top)
        if not self.signed:
            return c
        return c - 2.0 ** (self.bits - 1) if self.rule == "round_clamp" else 2 * c - top

    def _clipped(self, v):
        """v within the grid, which may be narrower than the integers."""
        step = per_channel(self.step, v)
        return torch.minimum(torch.maximum(v, self.levels[0] * step), self.levels[1] * step)
