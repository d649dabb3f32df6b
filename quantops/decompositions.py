"""Ops as chains of aten ops, for graphs that run without quantops: their default kernels, which compute the reference.

For exported programs, see :func:`quantops.export.to_aten`, and for torch.onnx.export. Results are equal bit for bit,
but for means, which may differ in their last place, and for codes behind GELU and SiLU, see :func:`_activation`.
torch's own table of decompositions has none of these: Inductor would refuse our ops.
"""

import torch

from quantops import default
from quantops.autograd.common import chains
from quantops.default.activation import by_reference
from quantops.library import OPS, ops
from quantops.reference.activation import FRONTS, KEEPS
from quantops.reference.activation_front import SMOOTH, by_torch
from quantops.reference.categorical import MODES
from quantops.reference.categorical_activation import QUARTER_BITS
from quantops.reference.packing import pack
from quantops.reference.uniform import acc_dtype, per_row

# What no exported program has: the backward passes of activations, and of classes, whose number no chain depends on.
_LEFT_OUT = ("activation_backward", "categorical_backward", "categorical_activation_backward")


def table():
    """{op overload: function}, for ``ExportedProgram.run_decompositions``."""
    found = {}
    for family, schemas in OPS.items():
        for name in schemas:
            op = getattr(ops, name).default
            if not op._schema.is_mutable and name not in _LEFT_OUT:
                found[op] = getattr(getattr(default, family), name)
    found[ops.own_scale.default] = _own_scale
    found[ops.categorical.default] = _categorical
    found[ops.activation.default] = _activation
    found[ops.categorical_activation.default] = _categorical_activation
    return found


def _own_scale(w, per_row, mean):
    """Its default is another op."""
    return (default.uniform.absmean if mean else default.uniform.absmax)(w, per_row)


def _activation(x, scale, offset, bits, rule, signed, front, keep, learn, dtype):
    """q, and what is kept as it is of a contiguous x. GELU and SiLU are aten's own, an op that readers of a graph know,
    so that codes may differ from the kernels' where h is within its last places of an edge."""
    if FRONTS[front] in SMOOTH:
        x, front = by_torch(x.to(acc_dtype(x.dtype)), FRONTS[front]), 0
    q, kept = by_reference(x, scale, offset, bits, rule, signed, front, keep, dtype)
    if kept is None:
        return q, x.new_empty(0, dtype=torch.uint8)
    return q, pack(kept.to(torch.int32), 1, layout="dense") if KEEPS[keep] == "bits" else kept.reshape(-1)


def _categorical(x, alpha, sigma, bits, gates, seed, mode, grad_of, signed, dtype):
    """The hard value without gates: the class nearest to x."""
    if MODES[mode] != "hard" or gates:
        raise ValueError(
            f"categorical: expected mode 'hard' without gates in a graph of aten ops, got "
            f"{MODES[mode]!r}{' with gates' if gates else ''}; call model.eval() before the export, or export "
            "quantops.plain_model(model)"
        )
    return [_nearest(*values, signed).to(dtype) for values in zip(x, alpha, sigma, bits.reshape(-1))]


def _categorical_activation(x, alpha, sigma, bits, grad_of, dtype):
    """The same of an activation, and the quarter of its cell that x lies in."""
    alpha, bits = alpha.reshape(()), bits.reshape(())
    q = _nearest(x, alpha, sigma.reshape(()), bits, False).to(dtype)
    inverse = 1 / alpha
    j = torch.minimum((q.to(alpha.dtype) * inverse).clamp(min=0), _ends(bits, False)[1].to(alpha.dtype)).round()
    k = ((4 * (x.to(alpha.dtype) * inverse - j)).floor() + 2).clamp(0, 3)
    return q, pack(torch.where(k.isnan(), 0, k).to(torch.int32), QUARTER_BITS, layout="dense")


def _ends(bits, signed):
    """The lowest and the highest class, integers."""
    span = torch.bitwise_left_shift(torch.ones_like(bits), bits)
    low = torch.where(bits == 0, 0, -(span >> 1)) if signed else torch.zeros_like(span)
    return low, low + span - 1


def _nearest(x, alpha, sigma, bits, signed):
    acc = acc_dtype(x.dtype)
    alpha, sigma = per_row(alpha, x), per_row(sigma, x)
    low, high = (v.to(acc) for v in _ends(bits, signed))
    inverse = 1 / alpha
    j = torch.minimum(torch.maximum((x.to(acc) * inverse).round(), low), high)
    valid = (alpha > 0) & (inverse > 0) & (inverse < torch.inf) & (sigma > 0) & (sigma < torch.inf)
    return torch.where(valid, alpha * j, torch.full_like(j, torch.nan))


chains.update({op.overloadpacket: chain for op, chain in table().items()})
