"""MSQ (arXiv 2507.22349): train with a penalty on the least significant bits, and drop the bits that fall silent."""

import dataclasses
import math
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch

from quantops import checks, foreach
from quantops.activation import ActivationConfig
from quantops.autograd.common import call, materialize, of_used
from quantops.convert import check_choice, check_int
from quantops.intweight import IntWeight
from quantops.layers import ROWS, from_rows
from quantops.library import ops
from quantops.nn import WeightQuantizer, as_weights, batches, launch, quantized, rows_of, shown, used_up
from quantops.reference.uniform import GRIDS, MAX_BITS, code_bits, most_bits
from quantops.scales import ABSMAX, check_scale, largest, measured, weight_scales
from quantops.sharded import any_sharded, as_shards, shards, totals
from quantops.types import Scale

PENALTIES = ("loss", "decoupled")
UNITS = ("step", "code", "gradient")
# Of a layer whose bits may go. On the dyadic grid, 1 bit has the values -s and 0, and none above.
LEAST_BITS = {"dyadic": 2, "full": 1, "sign": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MSQConfig(ActivationConfig):
    """Weights quantized by the round-clamp rule, for :func:`quantops.quantize_`; arXiv 2507.22349.

    bits: n at the start, 0..16. k: LSBs under the penalty, 0 <= k < bits; 0: none, the layer keeps its bits.
    grid: "dyadic" (exact zero; dropping a zero LSB changes no value; of use from 2 bits on), "full", or "sign" (the
        same of ``bits`` of magnitude beside a sign: symmetric, three values at 1 bit). Compression is told without the
        signs, as papers count it, and as stored, see :func:`quantops.bit_report`.
    scale: a number f, f * mean|w|, where weights beyond it clamp and get no gradient, or "absmax", max|w|. The default,
        2.8, is a departure from the paper's max|w|, for the bits to come: at 2 bits the squared error of many normal
        weights is within 2 % of the least, a third of that with max|w|, which leaves most of them at 0, and networks
        end 4 points higher (bench/README.md). Before any training 8 bits lose accuracy by it, since 1 in 40 of normal
        weights clamps: ResNet-20 starts at 38 %, with "absmax" at 82 (float weights: 81).
    scale_grad: True takes the scale as the function of the weights that it is: its gradient reaches the weight that is
        the maximum, or all of them. The backward pass is then no identity: it sums up the gradient of the scale, a
        pass over the weights makes each one's part of it (the bench's own_scale), and autograd adds that. Worth 3
        points at 2 bits with max|w|, and nothing with f * mean|w| (bench/README.md).
    per_row: a scale per row, which are the outputs of a layer; quantops/layers.py has the table of their dims.
    penalty: "loss", for ``loss + strength * quantops.penalty(model)``, or "decoupled", for
        ``quantops.add_penalty_grad_(model, strength)`` after backward. The backward pass is then the identity with
        scale="absmax" and scale_grad=False; otherwise it masks the weights that clamp.
    penalty_unit: what |B_k| is counted in. "step": the value of a code step, so that dR/dw = sign(B_k), a strength has
        the size of a gradient, and means the same at any number of bits. "code": 1, a plain sum of |B_k|, through the
        straight-through estimator; dR/dw is 2^n / (2 s) times as much on the dyadic grid, and falls by half with every
        bit that is dropped. The paper's strength of 5e-5 stands for 5e-5 under the one, and under the other at 8 bits,
        where 2^n / (2 s) was found to be 87 to 515 in ResNet-20's layers, for 0.004 to 0.026 under "step". Its text
        does not say which is meant. Not with per_row, where a layer has many steps.
    act_bits, act, act_scale, act_signed, act_keep, act_outputs: of activations, see
        :class:`quantops.activation.ActivationConfig`; by the round-clamp rule.
    fuse, cache, tied, first, last, overrides: see QuantConfig. Overrides may set "bits", "k", "prune", "rows", and of
        these fields "grid", "scale", "scale_grad", "per_row" and "penalty_unit". "prune": False means that
        MSQControllers leave the bits alone, and k is then 0 unless set.

    Raises ValueError naming the field for anything else.
    """

    bits: int = 8
    k: int = 1
    grid: str = GRIDS[0]
    scale: str | float = 2.8
    scale_grad: bool = False
    per_row: bool = False
    penalty: str = "loss"
    penalty_unit: str = UNITS[0]

    settings: ClassVar[tuple[str, ...]] = ("bits", "k", "prune", "act_bits")
    fields: ClassVar[tuple[str, ...]] = ("grid", "scale", "scale_grad", "per_row", "penalty_unit")

    def __post_init__(self):
        super().__post_init__()
        check_choice("grid", self.grid, GRIDS)
        _check_precision("bits, k", self.bits, self.k, self.grid)
        check_scale(self.scale)
        check_choice("scale_grad", self.scale_grad, (True, False))
        check_choice("per_row", self.per_row, (True, False))
        check_choice("penalty", self.penalty, PENALTIES)
        check_choice("penalty_unit", self.penalty_unit, UNITS)
        if self.penalty_unit == "gradient" and self.penalty != "decoupled":
            raise ValueError(
                "penalty_unit: expected 'step' or 'code', or penalty='decoupled', where the task's gradient is known "
                f"when the penalty's is added, got 'gradient' with penalty={self.penalty!r}"
            )
        if self.penalty_unit == "code" and self.per_row:
            raise ValueError("penalty_unit: expected 'step' with per_row, where a layer has many steps, got 'code'")

    @classmethod
    def paper(cls, **settings: Any) -> "MSQConfig":
        """The recipe of arXiv 2507.22349 by its text: the full grid (codes over 2^n - 1), 8 bits at the start, k = 1, a
        scale of max|w| taken as a constant, and the LSBs' sum in the loss. ``settings`` replace any of these.

        What the text leaves open, and is a guess here: the unit of its strength (:attr:`penalty_unit`, "code" as the
        formula of its penalty has it), whether a gradient reaches the scale (no), whether the first and the last layer
        are quantized (as all others), and how activations are. Controller, threshold 0.3 and strength 5e-5, interval
        and schedule are arguments of :class:`MSQController` and the caller's.
        """
        return cls(
            **{
                "bits": 8,
                "k": 1,
                "grid": "full",
                "scale": ABSMAX,
                "penalty": "loss",
                "penalty_unit": "code",
                **settings,
            }
        )

    def fixed(self, bits: int) -> dict[str, Any]:
        return {"bits": bits, "prune": False}

    def quantizer(self, name: str, weight: torch.Tensor, settings: dict[str, Any]) -> Any:
        prune = check_choice(f"{name}: prune", settings.get("prune", True), (True, False))
        bits, k = settings.get("bits", self.bits), settings.get("k", self.k if prune else 0)
        config = self.of_layer(name, settings, bits=bits, k=k)
        _check_precision(name, bits, k, config.grid)
        return MSQWeight(config, weight.device, bits, k, prune)


def _check_precision(name, bits, k, grid):
    check_int(f"{name}: bits", bits, 0, most_bits(grid))
    check_int(f"{name}: k", k, 0, MAX_BITS)
    if k >= max(bits, 1):
        raise ValueError(f"{name}: expected k < bits = {bits} (0: no penalty), got k = {k}")


class Quantized(NamedTuple):
    """What one list call gives: q and what its penalty's gradient needs."""

    q: list | None
    penalty: torch.Tensor | None  # one entry per weight
    scale: list
    bits: torch.Tensor
    k: torch.Tensor


class MSQWeight(WeightQuantizer):
    """original -> q by the round-clamp rule. ``bits`` and ``k`` are 0-dim int32 buffers that change in place."""

    def __init__(self, config, device, bits, k, prune):
        super().__init__()
        self.register_buffer("bits", torch.full((), bits, dtype=torch.int32, device=device))
        self.register_buffer("k", torch.full((), k, dtype=torch.int32, device=device))
        self.write(bits=bits, k=k)
        self.grid, self.decoupled, self.prune = GRIDS.index(config.grid), config.penalty == "decoupled", prune
        self.scale, self.scale_grad, self.per_row = config.scale, config.scale_grad, config.per_row
        self.covered = self.identity = config.scale == ABSMAX and not config.scale_grad
        self.unit = config.penalty_unit
        self.penalized = False  # whether a penalty was computed, of the model whose first layer this is
        self.batch_key = ("msq", self.grid, self.scale, self.scale_grad, self.per_row, self.decoupled, self.unit)

    counts = {"bits": range(MAX_BITS + 1), "k": range(MAX_BITS + 1)}
    by_shards = True

    def settings(self):
        return {"method": "msq", "grid": GRIDS[self.grid], "scale": self.scale, "per_row": self.per_row}

    def training_settings(self):
        penalty = "decoupled" if self.decoupled else "loss"
        return {"penalty": penalty, "penalty_unit": self.unit, "scale_grad": self.scale_grad}

    def set_precision(self, bits, k):
        """Sets both in place: nothing recompiles. Raises ValueError out of range."""
        _check_precision("set_precision", bits, k, GRIDS[self.grid])
        self.write(bits=bits, k=k)

    @staticmethod
    def launch(quantizers, w):
        p, dtype = quantizers[0], checks.dtype_of(None, w)
        scale, bits, k = _arguments(quantizers, w, p.scale_grad)
        if p.decoupled or any_sharded(w):  # of which the penalty is taken once their forward is over
            q = call(ops.round_clamp, shards(w), scale, bits, p.grid, True, p.covered, dtype)
            return Quantized(as_shards(q, w), None, scale, bits, k)
        q, penalty, _, _ = call(ops.msq, w, scale, bits, k, p.grid, p.covered, dtype)
        return Quantized(q, penalty, scale, bits, k)

    @staticmethod
    def revive(quantizers, w, result):
        p = quantizers[0]
        scale = weight_scales(w, p.scale, p.per_row, grad=True) if p.scale_grad else []
        out = _Revive.apply(result, (p.grid, p.covered), *w, *scale)
        return result._replace(q=list(out[: len(w)]), penalty=None if result.penalty is None else out[-1])

    @staticmethod
    def measure(quantizers, w):
        scale, bits, k = _arguments(quantizers, w)
        _, *sums = call(ops.lsb_stats, shards(w), scale, bits, k, quantizers[0].grid, quantizers[0].covered)
        nonzero, sq_error = (totals(v, w) for v in sums)
        top = largest(scale, w)
        rows = zip(w, bits.tolist(), k.tolist(), nonzero.tolist(), sq_error.tolist(), top)
        # A negative count is what a GPU says of weights that have a NaN or an infinity.
        return [
            (n, kk, count / max(t.numel(), 1), error if count >= 0 else math.nan, s)
            for t, n, kk, count, error, s in rows
        ]

    def stored_bits(self, bits):
        return code_bits(bits, GRIDS[self.grid])

    def to_int(self, w):
        bits, scale = int(self.bits), weight_scales([w], self.scale, self.per_row)[0]
        codes = foreach.encode([w], [scale], bits, grid=GRIDS[self.grid])[0]
        return IntWeight.from_codes(codes, scale, bits, grid=GRIDS[self.grid], dtype=w.dtype)

    def extra_repr(self):
        return (
            f"bits={shown(self.bits)}, k={shown(self.k)}, grid={GRIDS[self.grid]!r}, scale={self.scale!r}, "
            f"scale_grad={self.scale_grad}, per_row={self.per_row}, prune={self.prune}"
        )


def _arguments(quantizers, w, scale_grad=False):
    """(scales, bits, k) of a list call."""
    scale = weight_scales(w, quantizers[0].scale, quantizers[0].per_row, scale_grad)
    precision = torch.stack([p.bits for p in quantizers] + [p.k for p in quantizers])
    return scale, precision[: len(w)], precision[len(w) :]


class _Revive(torch.autograd.Function):
    """Gives a cached result a graph of its own, with the backward of ops.msq."""

    @staticmethod
    def forward(ctx, result, settings, *tensors):  # the weights, and the scales where they have gradients
        w = tensors[: len(result.q)]
        (ctx.grid, ctx.covered), ctx.dtype, ctx.q_dtype, ctx.size = settings, w[0].dtype, result.q[0].dtype, len(w)
        ctx.scale_grad = len(tensors) > len(w)
        ctx.has_penalty = result.penalty is not None
        ctx.set_materialize_grads(False)
        q = [t.detach() for t in result.q]
        if ctx.has_penalty or not ctx.covered:
            ctx.save_for_backward(*w, *result.scale, result.bits, result.k)
        return (*q, result.penalty.detach()) if ctx.has_penalty else tuple(q)

    @staticmethod
    def backward(ctx, *grads):
        grad_q, r = grads[: ctx.size], grads[ctx.size] if ctx.has_penalty else None
        if r is None and (ctx.covered or all(g is None for g in grad_q)):
            grad_w = [None if g is None else g.to(ctx.dtype) for g in grad_q]
            return None, None, *grad_w, *[None] * (ctx.size * ctx.scale_grad)
        *tensors, bits, k = ctx.saved_tensors
        w, scale = tensors[: ctx.size], tensors[ctx.size :]
        grad_w, grad_scale = call(
            ops.uniform_backward,
            materialize(grad_q, w, ctx.q_dtype),
            r,
            w,
            scale,
            bits,
            k,
            ctx.grid,
            True,
            ctx.scale_grad,
        )
        return None, None, *(grad_w if r is not None else of_used(grad_q, grad_w)), *of_used(grad_q, grad_scale)


# The penalty.


def msq_layers(model):
    """[(layer name, ParametrizationList, MSQWeight)] of a model. ValueError where it has none."""
    layers = [(name, owner, p) for name, owner, p in quantized(model) if isinstance(p, MSQWeight)]
    if not layers:
        raise ValueError(f"model: expected weights quantized with MSQConfig, {type(model).__name__} has none")
    return layers


def penalty(model: torch.nn.Module) -> torch.Tensor:
    """Sum of the LSB penalties R = sum |B_k| * (value of one code step) over the layers: 0-dim, differentiable.

        (task_loss + strength * quantops.penalty(model)).backward()      dR/dw = sign(B_k)

    With penalty_unit="code" R = sum |B_k|, and dR/dw = sign(B_k) / (value of one code step). With "gradient" this is R
    as with "step", to be looked at.

    Taken from the forward pass that just ran, without reading the weights again, where that one is still valid (same
    weights and bits, graph not used up); computed otherwise, as for penalty="decoupled", where it serves to be looked
    at. In a compiled step it is the same op on the same arguments, so that the compiler computes it once.
    Layers with k = 0 count 0. See arXiv 2507.22349.

    Raises ValueError for a model without MSQ weights.
    """
    return penalty_of(msq_layers(model))


def penalty_of(layers):
    """That of [(layer name, ParametrizationList, MSQWeight)]."""
    layers[0][2].penalized = True
    parts = _traced_penalties(layers) if torch.compiler.is_compiling() else _penalties(layers)
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total


def _penalties(layers):
    taken, missing, usable = {}, [], {}
    for _, owner, p in layers:
        w, (done, i) = owner.original, p.slot.result or (None, 0)
        if done is not None and done not in usable:
            usable[done] = _usable(done)
        if done is not None and usable[done] and done.unchanged(i, p, w):
            taken.setdefault(id(done.value.penalty), (done, []))[1].append(i)
        else:
            missing.append((p, w))
    parts = []
    for done, index in taken.values():
        of_each = _in_units(done.value.penalty, done.quantizers[0], done.value.scale, done.value.bits)
        parts.append(of_each.sum() if len(index) == len(done.w) else of_each[index].sum())
    return parts + [_stats(quantizers, w)[0].sum() for quantizers, w in batches(missing)]


def _in_units(v, p, scale, bits):
    """R, or a strength of it, of each weight in the unit of ``p``, from what it is in the value of code steps."""
    if p.unit != "code":
        return v
    s = torch.cat([v.detach().reshape(1) for v in scale])
    if GRIDS[p.grid] == "full":
        step = 2 * s / (torch.ldexp(torch.ones_like(s), bits) - 1).clamp(min=1)
    else:
        step = torch.ldexp(s, (1 if GRIDS[p.grid] == "dyadic" else 0) - bits)
    return v / torch.where(step > 0, step, torch.ones_like(step))  # a scale of 0 has no LSBs


def _usable(done):
    r = done.value.penalty
    if r is None or done.task != torch._C._current_graph_task_id():
        return False
    return not torch.is_grad_enabled() or (
        r.requires_grad == any(t.requires_grad for t in done.w) and not used_up(r.grad_fn)
    )


def _traced_penalties(layers):
    groups, counted = [], [p for _, _, p in layers]
    for p in counted:
        if p.group not in groups:
            groups.append(p.group)
    parts = []
    for group in groups:
        for quantizers, w in group.batches():
            # The call of the forward pass, with all of its layers, of which these may be a part.
            count = [i for i, p in enumerate(quantizers) if p in counted]
            if count:
                if quantizers[0].decoupled:
                    of_each = _stats(quantizers, w)[0]
                else:
                    done = launch(quantizers, w)
                    of_each = _in_units(done.penalty, quantizers[0], done.scale, done.bits)
                parts.append(of_each.sum() if len(count) == len(w) else torch.stack([of_each[i] for i in count]).sum())
    return parts


@contextmanager
def holding_q(layers):
    """While it is open the weights hold q, which their layers read as it is, so that moving a weight moves q. Gives
    where the gradient of a weight is that of q, a tensor of 0 and 1 per weight. Scales are constants."""
    weights, found = [owner.original for _, owner, _ in layers], {}
    for quantizers, w in batches([(p, owner.original) for _, owner, p in layers]):
        with torch.enable_grad():
            w = [t.detach().requires_grad_() for t in w]
            rows, p = rows_of(quantizers, w), quantizers[0]
            scale, bits, k = _arguments(quantizers, rows)
            q = call(ops.round_clamp, shards(rows), scale, bits, p.grid, True, p.covered, w[0].dtype)
            q = as_weights(quantizers, w, Quantized(as_shards(q, rows), None, scale, bits, k)).q
        inside = torch.autograd.grad(q, w, [torch.ones_like(t) for t in q])
        found.update(zip(quantizers, zip(q, inside)))
    with torch.no_grad():
        parts = shards(weights)
        kept = [t.clone() for t in parts]
    try:
        with torch.no_grad():
            for t, v in zip(parts, shards([found[p][0] for _, _, p in layers])):
                t.copy_(v)
        for _, _, p in layers:
            p.bypassed = True
        yield [found[p][1] for _, _, p in layers]
    finally:
        for _, _, p in layers:
            p.bypassed = False
        with torch.no_grad():
            for t, v in zip(parts, kept):
                t.copy_(v)


@contextmanager
def constant_scales(layers):
    """While it is open scales are constants for autograd, as in a Hessian of q."""
    following = [p for _, _, p in layers if p.scale_grad]
    for p in following:
        p.scale_grad = False
    try:
        yield
    finally:
        for p in following:
            p.scale_grad = True


def _stats(quantizers, w):
    """(penalty, nonzero, sq_error), an entry per weight."""
    w = rows_of(quantizers, w)
    scale, bits, k = _arguments(quantizers, w)
    sums = call(ops.lsb_stats, shards(w), scale, bits, k, quantizers[0].grid, quantizers[0].covered)
    penalty, *sums = (totals(v, w) for v in sums)
    return _in_units(penalty, quantizers[0], scale, bits), *sums


@torch.no_grad()
def add_penalty_grad_(model: torch.nn.Module, strength: Scale) -> None:
    """Adds strength * dR/dw to the ``.grad`` of every weight: the gradient of ``strength * penalty(model)``.

    Call it between ``loss.backward()`` and ``optimizer.step()``, once per optimizer step, with MSQConfig(penalty=
    "decoupled"): one list call, and nothing of the penalty in the backward pass. The gradients equal those of the loss
    term bit for bit, where each ``.grad`` holds one backward pass (sums of several round in another order). Weights
    without a ``.grad`` get one, as from the loss term; frozen weights do not. With a GradScaler call it after
    ``scaler.unscale_(optimizer)``: until then gradients are multiplied by its scale, and this one is not.

    With penalty_unit="gradient": strength * mean |.grad| * sign(B_k), the mean over a layer as it is at the call: so
    before or after ``unscale_`` is the same, and gradients should have been accumulated, clipped and averaged over
    processes. Layers without a gradient get none.

    strength: a number >= 0 or a tensor with one element. Raises ValueError for a model without MSQ weights.
    """
    if not isinstance(strength, torch.Tensor):
        checks.strength(strength)
    layers = msq_layers(model)
    layers[0][2].penalized = True
    pairs = [(p, owner.original) for _, owner, p in layers if owner.original.requires_grad]
    pairs = [(p, w) for p, w in pairs if p.unit != "gradient" or w.grad is not None]
    for quantizers, w in batches(pairs):
        for t in w:
            if t.grad is None:
                t.grad = torch.zeros_like(t)
        grads, w = [t.grad for t in w], rows_of(quantizers, w)
        (scale, bits, k), p = _arguments(quantizers, w), quantizers[0]
        each = strength
        if p.unit == "code":
            each = _in_units(torch.as_tensor(strength, dtype=scale[0].dtype, device=w[0].device), p, scale, bits)
        elif p.unit == "gradient":
            each = strength * measured(grads, False, True)
        in_rows = rows_of(quantizers, grads)
        foreach.add_lsb_grad_(shards(in_rows), shards(w), scale, bits, k, each, grid=GRIDS[p.grid])
        for q, grad, t in zip(quantizers, grads, in_rows):
            if q.row_dims != ROWS and t.data_ptr() != grad.data_ptr():  # a copy: no view has such rows in front
                grad.copy_(from_rows(t, q.row_dims, grad.shape))
