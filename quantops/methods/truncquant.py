"""TruncQuant (arXiv 2506.11431): train one set of weights at several widths, and serve any of them by dropping bits."""

import copy
import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import torch

from quantops import checks
from quantops.activation import ActivationConfig, UniformActivation
from quantops.autograd.common import call, materialize, of_used
from quantops.autograd.truncate import exact_slope
from quantops.convert import check_choice, check_int, remove_quantizers
from quantops.intweight import IntWeight
from quantops.library import ops
from quantops.methods.multibn import MultiBatchNorm, check_norms, is_batch_norm, refuse_recomputing, replace
from quantops.nn import WeightQuantizer, quantized, shown
from quantops.per_thread import PerThread
from quantops.reference.activation_front import SMOOTH
from quantops.reference.truncate import COMPANDINGS, SLOPES
from quantops.reference.uniform import MAX_BITS, RULES
from quantops.scales import ABSMAX, check_scale, each_measured, largest, weight_scales
from quantops.sharded import as_shards, shards, totals
from quantops.types import ModelT


@dataclasses.dataclass(frozen=True, kw_only=True)
class TruncQuantConfig(ActivationConfig):
    """Weights truncated to any of several widths, for :func:`quantops.quantize_`; arXiv 2506.11431.

    The weight is ``quantops.truncate`` of the width m that :func:`quantops.set_bits` selects, the widest at first.
    :func:`quantops.joint_loss` and :func:`quantops.joint_step` train all widths in one step.

    bits: the widths, distinct, each 1..16. base_bits: N, of the codes that are truncated; default the widest.
    rule: "floor", where the truncated code is the code of m bits; "nearest" and "round_clamp" for comparison.
    companding: None or "tanh".
    scale: a number f, f * mean|w|, where weights beyond it clamp, or "absmax", max|w|. The default, 2.5, is worth 5
        points at 2 bits and costs 0.3 at 8, once trained (bench/README.md). Before any training max|w| loses nothing at
        8 bits, where ResNet-20 starts at 29 % by the default; it suits networks that stay at 4 bits or more.
    out_scale: None (the scale) or "absmean", mean|w|.
    slope: "exact", see :func:`quantops.truncate`, which is 1 without companding and out_scale, or "ste", 1 always. With
        either of them the exact one of a weight of zeros (per_row: a row) is 0/0, which counts as 0: that never trains.
    scale_grad: True takes the scales as the functions of the weights that they are, see MSQConfig. With tanh and
        "absmax", the exact slope is worth 4 points at 2 bits, the gradient two more.
    per_row: scales per row: the outputs of a layer; quantops/layers.py has the table of their dims.
    batch_norm: BatchNorm1d, 2d, 3d, SyncBatchNorm and subclasses become :class:`quantops.MultiBatchNorm`, one for
        each width. False: they are shared by all widths.
    act_bits, act, act_scale, act_signed, act_keep, act_outputs: of activations, see
        :class:`quantops.activation.ActivationConfig`; floor codes, so that m bits are n bits shifted.
        act_bits="weights": those of the width that is selected, as in the paper. The one tensor that the widths of a
        joint step share is the network's input, since what comes to a layer depends on the weights (and norms) of its
        width before it: no pass over activations could serve several. act_shared: one scale for all widths (act_scale
        other than "step"), else one for each.
    fuse, cache, tied, first, last, overrides: see QuantConfig. Joint steps read each weight once whatever ``fuse`` is,
        and do not use the cache. Overrides may set "bits" (the layer then has this one width always), "rows", and of
        these fields "rule", "companding", "scale", "out_scale", "slope", "scale_grad" and "per_row".

    Raises ValueError naming the field for anything else.
    """

    bits: tuple[int, ...] = (8, 4, 2, 1)
    base_bits: int | None = None
    rule: str = "floor"
    companding: str | None = None
    scale: str | float = 2.5
    out_scale: str | None = None
    slope: str = "exact"
    scale_grad: bool = False
    per_row: bool = False
    batch_norm: bool = True
    act_bits: int | str | None = None
    act_shared: bool = False

    settings: ClassVar[tuple[str, ...]] = ("bits", "act_bits")
    fields: ClassVar[tuple[str, ...]] = ("rule", "companding", "scale", "out_scale", "slope", "scale_grad", "per_row")
    act_rule: ClassVar[str] = "floor"

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.bits, (list, tuple)) or not self.bits:
            raise ValueError(f"bits: expected a tuple of widths, such as (8, 4, 2, 1), got {self.bits!r}")
        base = MAX_BITS if self.base_bits is None else check_int("base_bits", self.base_bits, 1, MAX_BITS)
        for n in self.bits:
            if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= base:
                raise ValueError(f"bits: expected widths in 1..base_bits = {base}, got {n!r} in {tuple(self.bits)}")
        if len(set(self.bits)) < len(self.bits):
            raise ValueError(f"bits: expected distinct widths, got {tuple(self.bits)}")
        object.__setattr__(self, "bits", tuple(sorted(self.bits, reverse=True)))
        object.__setattr__(self, "base_bits", self.base_bits or self.bits[0])
        check_choice("rule", self.rule, RULES)
        check_choice("companding", self.companding, COMPANDINGS)
        check_choice("out_scale", self.out_scale, (None, "absmean"))
        check_choice("per_row", self.per_row, (True, False))
        check_choice("batch_norm", self.batch_norm, (True, False))
        check_choice("act_shared", self.act_shared, (True, False))
        if self.act_shared and self.act_scale == "step":
            raise ValueError("act_shared: expected False, or an act_scale other than 'step', which no two widths share")
        check_scale(self.scale)
        check_choice("slope", self.slope, SLOPES)
        check_choice("scale_grad", self.scale_grad, (True, False))

    @classmethod
    def paper(cls, **settings: Any) -> "TruncQuantConfig":
        """The recipe that arXiv 2506.11431 builds on, as the public code of Any-Precision networks (arXiv 1911.07346)
        has it: tanh companding, floor codes of tanh(w)/tanh(max|w|), values on the scale of mean|w|, the slope that
        these give and gradients through the maximum and the mean, a batch norm for each width, the first and the last
        layer in float. ``settings`` replace any of these.

            quantize_(model, TruncQuantConfig.paper(),
                      lambda name, m: is_linear_or_conv(name, m) and "shortcut" not in name)
            joint_step(model, loss, x, distill=1.0, distill_from="wider", teacher=float_model(x))

        Shortcuts stay float by the filter; distillation is recursive, each width teaching the next, by soft cross
        entropy alone (whose gradient is that of KL), with a float network as the first teacher. What cannot be known
        from public text: whether TruncQuant itself keeps tanh, its scales, and whether its float teacher is a frozen
        network, as here, or trained along as a width of its own, as in the Any-Precision code; for that take bits=(16,
        8, 4, 2, 1), whose 16 bits stand for float weights, and no teacher. That code also clamps activations to [0, 1]
        and gives them the bits of the weights, act_bits="weights", act_scale=1.0, in a pre-activation ResNet-20.

        A layer that starts with a weight of zeros alone never trains, see ``slope``: start it from other values, leave
        it float, or give it {"slope": "ste"} in overrides.
        """
        return cls(
            **{
                "companding": "tanh",
                "scale": ABSMAX,
                "out_scale": "absmean",
                "slope": "exact",
                "scale_grad": True,
                "batch_norm": True,
                "first": "skip",
                "last": "skip",
                **settings,
            }
        )

    def fixed(self, bits: int) -> dict[str, Any]:
        return {"bits": bits}

    def quantizer(self, name: str, weight: torch.Tensor, settings: dict[str, Any]) -> Any:
        config = self.of_layer(name, settings)
        if "bits" in settings:
            bits = check_int(f"{name}: bits", settings["bits"], 1, MAX_BITS)
            return TruncQuantWeight(config, weight.device, (bits,), bits)
        return TruncQuantWeight(config, weight.device, self.bits, self.base_bits)

    def check_act_bits(self, name: str, bits: Any) -> None:
        if bits != "weights":
            super().check_act_bits(name, bits)

    def activation(self, like: torch.Tensor, bits: Any, front: str | None) -> Any:
        if bits != "weights":
            return super().activation(like, bits, front)
        return UniformActivation(
            rule=self.act_rule,
            scale=self.act_scale,
            front=front,
            widths=self.bits,
            keep=None if front in SMOOTH else self.act_keep,
            signed=None if front == "relu" else self.act_signed,
            shared=self.act_shared,
            device=like.device,
            dtype=like.dtype,
        )

    def prepare(self, model: torch.nn.Module, layers: dict[str, Any]) -> None:
        if self.batch_norm:
            check_norms(model)
        super().prepare(model, layers)
        if self.batch_norm:
            replace(model, lambda m: MultiBatchNorm(m, self.bits) if is_batch_norm(m) else None)


class Truncated(NamedTuple):
    """What one list call gives: q, and what its gradient needs. Of several widths q runs width by width."""

    q: list | None
    scale: list
    out_scale: list | None
    bits: torch.Tensor  # (widths, weights)
    base: torch.Tensor


class TruncQuantWeight(WeightQuantizer):
    """original -> q of one width. ``bits``, the width, is a 0-dim int32 buffer that changes in place."""

    by_shards = True

    def __init__(self, config, device, widths, base_bits):
        super().__init__()
        self.model_widths, self.widths, self.base_bits = config.bits, widths, base_bits
        self.register_buffer("bits", torch.full((), widths[0], dtype=torch.int32, device=device))
        self.register_constants(device, base=self.base_bits, all_bits=list(widths))
        self.counts = {"bits": widths}
        self.write(bits=widths[0])
        self.rule, self.tanh = RULES.index(config.rule), config.companding == "tanh"
        self.scale, self.out_scale, self.per_row = config.scale, config.out_scale, config.per_row
        self.slope, self.scale_grad = config.slope, config.scale_grad
        self.exact = config.slope == "exact" and (self.tanh or self.out_scale is not None)  # otherwise it is 1
        self.covered = config.scale == ABSMAX and not config.scale_grad
        self.identity = self.covered and not self.tanh and not self.exact
        self.joint_graph = False  # a joint_loss may wait for its backward pass
        self.joint_place = PerThread()  # that of the width among the network's, while a thread goes through them

    def settings(self):
        return {
            "method": "truncquant",
            "widths": list(self.widths),
            "base_bits": self.base_bits,
            "rule": RULES[self.rule],
            "companding": COMPANDINGS[self.tanh],
            "scale": self.scale,
            "out_scale": self.out_scale,
            "per_row": self.per_row,
        }

    def training_settings(self):
        return {"slope": self.slope, "scale_grad": self.scale_grad}

    @property
    def batch_key(self):
        return (
            "truncquant",
            len(self.widths),
            self.rule,
            self.tanh,
            self.scale,
            self.out_scale,
            self.per_row,
            self.exact,
            self.scale_grad,
            self.joint_place.get(),
        )

    @property
    def fixed(self):
        """True for a layer that has one width while its network has several."""
        return self.widths != self.model_widths

    def select(self, place):
        """Selects the width at ``place`` of the network's widths, in place: nothing recompiles."""
        if not self.fixed:
            self.write(bits=self.widths[place])

    def width(self):
        """The width that a forward has now, a 0-dim int32 tensor."""
        place = None if self.fixed else self.joint_place.get()
        return self.bits if place is None else self.all_bits[place]

    @staticmethod
    def launch(quantizers, w):
        return _truncate(quantizers, w, torch.stack([p.width() for p in quantizers]).unsqueeze(0))

    @staticmethod
    def launch_all(quantizers, w):
        """One list call for all widths, from one read of the weights."""
        return _truncate(quantizers, w, torch.stack([p.all_bits for p in quantizers], 1))

    @staticmethod
    def revive(quantizers, w, result):
        p = quantizers[0]
        scale, out_scale = _scales(quantizers, w, grad=True) if p.scale_grad else ([], None)
        return result._replace(
            q=list(_Revive.apply(result, (p.rule, p.tanh, p.covered, p.exact), *w, *scale, *(out_scale or ())))
        )

    @staticmethod
    def measure(quantizers, w):
        parts = shards(w)
        wrong = totals(torch.stack([torch.isfinite(t).logical_not().sum() for t in parts]), w).tolist()
        if any(wrong):
            return [(int(p.bits), 0, 0.0, math.nan if bad else 0.0, math.nan) for p, bad in zip(quantizers, wrong)]
        result = TruncQuantWeight.launch(quantizers, w)
        errors = [(q.double() - t.double()).square().sum() for q, t in zip(shards(result.q), parts)]
        rows = zip(result.bits[0].tolist(), totals(torch.stack(errors), w).tolist(), largest(result.scale, w))
        return [(n, 0, 0.0, error, top) for n, error, top in rows]

    @staticmethod
    def check_removable(model):
        for name, module in model.named_modules():
            if isinstance(module, MultiBatchNorm):
                raise ValueError(
                    f"{name}: a batch norm for each width cannot stay without the widths; expected a "
                    "model quantized with batch_norm=False, or see quantops.plain_model"
                )

    def to_int(self, w):
        """The codes of the widest width; ``at(m)`` and ``dequantize(m)`` are those of each other one."""
        n, (scale, out_scale) = self.widths[0], _scales([self], [w])
        # With a step of 1 the values are the odd levels 2c - (2^n - 1), by the very kernel of the forward pass.
        units = [torch.full_like(scale[0], 2**n - 1)]
        level = call(
            ops.truncate,
            [w],
            scale,
            units,
            self.all_bits[:1].reshape(1, 1),
            self.base.reshape(1),
            self.rule,
            self.tanh,
            self.covered,
            False,
            scale[0].dtype,
        )[0]
        codes = ((level + (2**n - 1)) / 2).to(torch.int32)
        return IntWeight.from_codes(codes, (out_scale or scale)[0], n, grid="full", dtype=w.dtype, fixed=self.fixed)

    def forward(self, original):
        if self.given.get() is None:
            refuse_recomputing(self)
        return super().forward(original)

    def extra_repr(self):
        return (
            f"bits={shown(self.bits)} of {self.widths}, base_bits={self.base_bits}, rule={RULES[self.rule]!r}, "
            f"companding={COMPANDINGS[self.tanh]!r}, scale={self.scale!r}, out_scale={self.out_scale!r}, "
            f"slope={self.slope!r}, scale_grad={self.scale_grad}, per_row={self.per_row}"
        )


def _truncate(quantizers, w, bits):
    p = quantizers[0]
    scale, out_scale = _scales(quantizers, w, p.scale_grad)
    base = torch.stack([p.base for p in quantizers])
    q = call(
        ops.truncate,
        shards(w),
        scale,
        out_scale,
        bits,
        base,
        p.rule,
        p.tanh,
        p.covered,
        p.exact and bool(out_scale),
        checks.dtype_of(None, w),
    )
    return Truncated(as_shards(q, w), scale, out_scale, bits, base)


def _scales(quantizers, w, grad=False):
    """(scale, out_scale) of a list call; out_scale is None where it is the scale, and no slope depends on it."""
    p = quantizers[0]
    if not p.out_scale:
        scale = weight_scales(w, p.scale, p.per_row, grad)
        return scale, scale if p.exact and p.tanh else None
    mean = each_measured(w, p.per_row, True, grad)
    top = each_measured(w, p.per_row, False, grad) if p.scale == ABSMAX else [v * p.scale for v in mean]
    return top, mean


class _Revive(torch.autograd.Function):
    """Gives a cached result a graph of its own, with the backward of ops.truncate."""

    @staticmethod
    def forward(ctx, result, settings, *tensors):  # the weights, and the scales where they have gradients
        w = tensors[: len(result.q)]
        ctx.settings, ctx.dtype, ctx.q_dtype, ctx.size = settings, w[0].dtype, result.q[0].dtype, len(w)
        ctx.scale_grad = len(tensors) > len(w)
        ctx.set_materialize_grads(False)
        _, tanh, covered, exact = settings
        ctx.own_out = bool(result.out_scale)
        ctx.identity = covered and not tanh and not (exact and ctx.own_out)
        if not ctx.identity:
            ctx.save_for_backward(*w, *result.scale, *(result.out_scale or ()), result.bits, result.base)
        return tuple(t.detach() for t in result.q)

    @staticmethod
    def backward(ctx, *grads):
        n, (rule, tanh, _, exact) = ctx.size, ctx.settings
        none = [None] * (n * (1 + ctx.own_out) if ctx.scale_grad else 0)
        if ctx.identity or all(g is None for g in grads):
            return None, None, *(None if g is None else g.to(ctx.dtype) for g in grads), *none
        *tensors, bits, base = ctx.saved_tensors
        w, scale, out_scale = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        grad_w, *sums = call(
            ops.truncate_backward,
            materialize(grads, w, ctx.q_dtype),
            w,
            scale,
            out_scale,
            bits,
            base,
            rule,
            tanh,
            False,
            ctx.scale_grad,
        )
        if exact and out_scale:
            grad_w, sums = exact_slope(grad_w, sums, w, scale, out_scale, tanh)
        return None, None, *of_used(grads, grad_w), *(t for v in sums for t in of_used(grads, v))


# Choosing the width.


class Network(NamedTuple):
    """The parts of a model that depend on the width."""

    widths: tuple
    layers: list  # [(ParametrizationList, TruncQuantWeight)]
    norms: list
    acts: list  # of activations that have the width of the weights

    def select(self, place):
        for _, p in self.layers:
            p.select(place)
        for norm in self.norms:
            norm.select(place)
        for act in self.acts:
            act.select(place)

    def note_joint_graph(self, value):
        for part in (*(p for _, p in self.layers), *self.norms, *self.acts):
            part.joint_graph = value

    def place(self, bits):
        if bits is None:
            return 0
        if isinstance(bits, bool) or not isinstance(bits, int) or bits not in self.widths:
            raise ValueError(
                f"bits: expected one of the widths {', '.join(map(str, self.widths))} that the model was "
                f"quantized for, got {bits!r}"
            )
        return self.widths.index(bits)


def network_of(model):
    """The parts of a model that depend on the width. ValueError where it has none, or several sets of widths."""
    layers = [(owner, p) for _, owner, p in quantized(model) if isinstance(p, TruncQuantWeight)]
    if not layers:
        raise ValueError(f"model: expected weights quantized with TruncQuantConfig, {type(model).__name__} has none")
    norms = [m for m in model.modules() if isinstance(m, MultiBatchNorm)]
    acts = [m for m in model.modules() if isinstance(m, UniformActivation) and len(m.widths) > 1]
    found = {p.model_widths for _, p in layers} | {part.widths for part in (*norms, *acts)}
    if len(found) > 1:
        raise ValueError(f"model: expected one set of widths, got {' and '.join(map(str, sorted(found)))}")
    return Network(found.pop(), layers, norms, acts)


def set_bits(model: torch.nn.Module, bits: int | None = None) -> None:
    """Selects the width that the model computes with, its batch norms included; ``None``: the widest.

    In place, in integer buffers on the model's device: nothing is recompiled or read back, and the float weights and
    what was stored stay as they are. The width is part of the state dict. ``model`` may be compiled. With checkpointed
    parts call backward before the width changes: what is computed again there has the width that is selected then.

    Raises ValueError for a width the model was not quantized for, and for a model without TruncQuant weights.
    """
    network = network_of(model)
    network.select(network.place(bits))
    network.note_joint_graph(False)


def plain_model(model: ModelT, bits: int | None = None) -> ModelT:
    """A copy of a model quantized by any method, at one width, that needs no quantops but for its activations.

    Its layers have plain Parameters with the values that ``model`` computes with when evaluated, and no hooks:
    evaluated it equals ``model``, bit for bit. ``bits``, of TruncQuant alone: the width, default the widest; it then
    equals ``model`` with ``set_bits(model, bits)`` and has the batch norms of that width. ``load_int(path, plain,
    bits)`` fills it from a file.

    Raises ValueError for a model without quantizers, for ``bits`` where the model has one width, and as
    :func:`set_bits` does.
    """
    model = getattr(model, "_orig_mod", model)
    widths = any(isinstance(p, TruncQuantWeight) for _, _, p in quantized(model))
    if not quantized(model):
        raise ValueError(f"model: expected weights quantized by quantops.quantize_, {type(model).__name__} has none")
    if bits is not None and not widths:
        raise ValueError(
            f"bits: expected None, since the weights are not truncated to widths (TruncQuantConfig), got {bits!r}"
        )
    place = network_of(model).place(bits) if widths else 0
    plain = copy.deepcopy(model)
    if widths:
        network_of(plain).select(place)
    training = {m: m.training for m in plain.modules()}
    with torch.no_grad():
        remove_quantizers(plain.eval(), leave_quantized=True)
    replace(plain, lambda m: m.plain(place) if isinstance(m, MultiBatchNorm) else None)
    for m in plain.modules():
        m.training = training.get(m, model.training)
    return plain
