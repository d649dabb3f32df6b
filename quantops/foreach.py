"""The ops over lists of weights: a whole network in one launch.

Same names, arguments and results as the single ops in ``functional``, where the equations are, with lists in the
place of tensors: ``w`` is a list of weights of one dtype and device, ``scale`` a list with an entry per weight
(None: max|w| of each), ``bits`` and ``k`` an integer, a list, or an integer tensor with an entry per weight. The
sums of a list (penalty, nonzero, sq_error) come back as one tensor with an entry per weight.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from quantops import checks, packed
from quantops.autograd import own_scale
from quantops.autograd.common import call
from quantops.layout import dense_rows, each_scale, empty_like
from quantops.library import ops
from quantops.packed import Packed, pack, unpack  # noqa: F401  the list ops of packed codes
from quantops.reference.truncate import SLOPES
from quantops.types import Bits, ListBits, Scale, Scales


class MSQ(NamedTuple):
    """Result of :func:`msq`: q and its sums; for lists, a list of q and one tensor per sum."""

    q: Any  # a tensor; of lists, a list of them
    penalty: torch.Tensor  # R = sum |B_k| * (value of one code step); differentiable in w
    nonzero: torch.Tensor  # int64: number of weights with B_k != 0; beta = nonzero / w.numel()
    sq_error: torch.Tensor  # E = sum (q - w)^2, q before its cast to out_dtype


def _reduce(mean, w, per_row, grad):
    w = checks.listed("w", w)
    checks.choice("grad", grad, (True, False))
    checks.choice("per_row", per_row, (True, False))
    for i, t in enumerate(w):
        if per_row and t.dim() == 0:
            raise ValueError(f"w[{i}]: expected at least one dimension for a scale per row, got a 0-dim tensor")
    if grad:
        return own_scale.of_each(w, per_row, mean)
    return own_scale.split(call(ops.absmean if mean else ops.absmax, w, per_row), w, per_row)


def absmax(w: Sequence[torch.Tensor], *, per_row: bool = False, grad: bool = False) -> list[torch.Tensor]:
    """max|w| of each weight: a list of 0-dim tensors, or of one entry per row, see :func:`quantops.absmax`."""
    return _reduce(False, w, per_row, grad)


def absmean(w: Sequence[torch.Tensor], *, per_row: bool = False, grad: bool = False) -> list[torch.Tensor]:
    """mean|w| of each weight: a list of 0-dim tensors, or of one entry per row, see :func:`quantops.absmean`."""
    return _reduce(True, w, per_row, grad)


def _scales(w, scale):
    """(scales, covered): covered where they are max|w|, so that every weight is inside. In eager mode the ops of family
    ``uniform`` take all of these in one tensor, which saves a view for each."""
    if scale is not None:
        return checks.scales(scale, w), False
    joined = [call(ops.absmax, w, False)]
    return each_scale(joined, w) if torch.compiler.is_compiling() else joined, True


def _written(tensors):
    """Tells autograd, which ops that write to their arguments do not do by themselves."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


def round_clamp(
    w: Sequence[torch.Tensor],
    scale: Scales | None,
    bits: ListBits,
    *,
    signed: bool = True,
    grid: str | None = None,
    out_dtype: torch.dtype | None = None,
    out: list[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Quantized weights, see :func:`quantops.round_clamp`."""
    w = checks.listed("w", w)
    grid = checks.grid_index(grid, signed)
    n = checks.bits(bits, w, grid)
    scale, covered = _scales(w, scale)
    covered = covered and signed
    if out is not None:
        out = checks.outputs(out, w, [*scale, n], out_dtype)
        ops.round_clamp_out(w, scale, n, grid, signed, out)
        _written(out)
        return out
    return call(ops.round_clamp, w, scale, n, grid, signed, covered, checks.dtype_of(out_dtype, w))


def msq(
    w: Sequence[torch.Tensor],
    scale: Scales | None,
    bits: ListBits,
    k: ListBits = 1,
    *,
    grid: str | None = None,
    out_dtype: torch.dtype | None = None,
    out: list[torch.Tensor] | None = None,
) -> MSQ:
    """Quantized weights and their LSB sums, see :func:`quantops.msq`."""
    w = checks.listed("w", w)
    grid = checks.grid_index(grid)
    n, k = checks.bits_and_k(bits, k, w, grid)
    s, covered = _scales(w, scale)
    if out is not None:
        out = checks.outputs(out, w, [*s, n, k], out_dtype)
        sums = [torch.empty(len(w), dtype=t, device=w[0].device) for t in (s[0].dtype, torch.int64, s[0].dtype)]
        ops.msq_out(w, s, n, k, grid, out, *sums)
        _written(out)
        return MSQ(out, *sums)
    return MSQ(*call(ops.msq, w, s, n, k, grid, covered, checks.dtype_of(out_dtype, w)))


def lsb(
    w: Sequence[torch.Tensor], scale: Scales | None, bits: ListBits, k: ListBits = 1, *, grid: str | None = None
) -> list[torch.Tensor]:
    """LSB residuals, see :func:`quantops.lsb`."""
    w, grid = checks.listed("w", w), checks.grid_index(grid)
    n, k = checks.bits_and_k(bits, k, w, grid)
    return call(ops.lsb, w, _scales(w, scale)[0], n, k, grid)


def lsb_stats(
    w: Sequence[torch.Tensor], scale: Scales | None, bits: ListBits, k: ListBits = 1, *, grid: str | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(penalty, nonzero, sq_error) of :func:`msq` without writing q: one read of the weights."""
    w, grid = checks.listed("w", w), checks.grid_index(grid)
    n, k = checks.bits_and_k(bits, k, w, grid)
    scale, covered = _scales(w, scale)
    return call(ops.lsb_stats, w, scale, n, k, grid, covered)


def lsb_penalty(
    w: Sequence[torch.Tensor], scale: Scales | None, bits: ListBits, k: ListBits = 1, *, grid: str | None = None
) -> torch.Tensor:
    """LSB penalties R, one tensor with an entry per weight, see :func:`quantops.lsb_penalty`."""
    return lsb_stats(w, scale, bits, k, grid=grid)[0]


def add_lsb_grad_(
    grad: Sequence[torch.Tensor],
    w: Sequence[torch.Tensor],
    scale: Scales | None,
    bits: ListBits,
    k: ListBits,
    strength: Scale,
    *,
    grid: str | None = None,
) -> Sequence[torch.Tensor]:
    """grad += strength * sign(B_k) * inside, in place: the gradient of strength * R, without a graph.

    ``grad``: list of tensors in the shapes and dtype of ``w``, each in memory of its own. ``strength``: a number, or a
    tensor with one element or one per weight.
    """
    w, grid = checks.listed("w", w), checks.grid_index(grid)
    n, k = checks.bits_and_k(bits, k, w, grid)
    checks.gradients(grad, w)
    s, _ = _scales(w, scale)
    if not isinstance(strength, torch.Tensor):
        checks.strength(strength)
        strength = torch.full((), strength, dtype=s[0].dtype, device=w[0].device)
    if strength.numel() not in (1, len(w)) or strength.device != w[0].device:
        raise ValueError(
            f"strength: expected one element or one per weight ({len(w)}) on {w[0].device}, got shape "
            f"{tuple(strength.shape)} on {strength.device}"
        )
    strength = strength.reshape(-1).expand(len(w)).to(s[0].dtype).contiguous()
    checks.own_memory({"grad": grad}, [*w, *s, n, k, strength])
    # Autograd may have laid a gradient out in another way than its weight; the kernel walks both alike.
    same = [
        g if g.stride() == t.stride() and dense_rows(t) else empty_like(t, g.dtype).copy_(g) for g, t in zip(grad, w)
    ]
    ops.add_lsb_grad_(same, w, s, n, k, grid, strength)
    for g, s in zip(grad, same):
        if g is not s:
            g.copy_(s)
    _written(grad)
    return grad


def encode(
    w: Sequence[torch.Tensor],
    scale: Scales | None,
    bits: ListBits,
    *,
    rule: str = "round_clamp",
    grid: str | None = None,
    signed: bool = True,
) -> list[torch.Tensor]:
    """Integer codes, see :func:`quantops.encode`."""
    w, rule_index = checks.listed("w", w), checks.rule_index(rule)
    grid = checks.grid_index(grid, signed, rule)
    n = checks.bits(bits, w, grid)
    return call(ops.encode, w, _scales(w, scale)[0], n, rule_index, grid, signed)


def decode(
    codes: Sequence[torch.Tensor | Packed],
    scale: Scales,
    bits: ListBits | None = None,
    *,
    grid: str | None = None,
    signed: bool = True,
    out_dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """Weights of codes or of packed codes, see :func:`quantops.decode`."""
    if isinstance(codes, (list, tuple)) and codes and isinstance(codes[0], Packed):
        return packed.decode(codes, scale, bits, grid=grid, signed=signed, out_dtype=out_dtype)
    codes, grid = checks.codes(codes), checks.grid_index(grid, signed)
    n = checks.bits(bits, codes, grid)
    scale, dtype = checks.decode_scales(scale, codes, out_dtype)
    return call(ops.decode, codes, scale, n, grid, signed, dtype)


def truncate(
    w: Sequence[torch.Tensor],
    scale: Scales | None,
    bits: Any,
    *,
    base_bits: ListBits = 8,
    rule: str = "floor",
    companding: str | None = None,
    out_scale: Scales | None = None,
    slope: str = "ste",
    out_dtype: torch.dtype | None = None,
) -> Any:
    """Weights truncated to one or several widths from one read, see :func:`quantops.truncate`.

    Unlike elsewhere a list of ``bits`` is a list of widths, not of weights: an int, or an integer tensor with an entry
    per weight, is one width and gives a list of q. A list or tuple of these, or an integer tensor (widths, weights),
    gives a tuple of such lists, one per width.
    """
    w = checks.listed("w", w)
    n, base, one = checks.widths(bits, base_bits, w)
    rule, tanh = checks.rule_index(rule), checks.tanh(companding)
    scale, covered = _scales(w, scale)
    scale = each_scale(scale, w)
    exact = checks.choice("slope", slope, SLOPES) == "exact" and (out_scale is not None or tanh)
    scale, out_scale = checks.out_scales(scale if exact and out_scale is None else out_scale, scale, w)
    q = call(ops.truncate, w, scale, out_scale, n, base, rule, tanh, covered, exact, checks.dtype_of(out_dtype, w))
    return q if one else tuple(q[i : i + len(w)] for i in range(0, len(q), len(w)))


def categorical(
    x: Sequence[torch.Tensor],
    alpha: Scales,
    sigma: Scales,
    bits: ListBits,
    *,
    gates: Sequence[torch.Tensor] | None = None,
    signed: bool = True,
    mode: str = "hard",
    grad: str = "winner",
    seed: Bits | None = None,
    out_dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """Categorically quantized tensors, see :func:`quantops.categorical`.

    ``gates``: None, or a list with a tensor per entry of ``x``. One seed serves the list: its elements are counted
    through, so that element i of entry k has the counter numel(x[0]) + ... + numel(x[k-1]) + i.
    """
    x = checks.listed("x", x)
    options = checks.categorical_mode(mode, grad)
    checks.choice("signed", signed, (True, False))
    n = checks.categorical_bits(bits, x, mode, grad)
    alpha, sigma = checks.alpha_and_sigma(alpha, sigma, x)
    return call(
        ops.categorical,
        x,
        alpha,
        sigma,
        n,
        checks.gates(gates, bits, x),
        checks.seed(seed, mode, x),
        *options,
        signed,
        checks.dtype_of(out_dtype, x),
    )
