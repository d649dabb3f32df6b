"""Uniform quantization of activations: the module, where quantize_ puts it, and calibration."""

import dataclasses
import fnmatch
import functools
import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from quantops import checks
from quantops.autograd.common import call
from quantops.categorical_activation import CategoricalActivation
from quantops.convert import QuantConfig, check_choice, check_int
from quantops.library import ops
from quantops.methods.multibn import refuse_recomputing, replace
from quantops.per_thread import PerThread
from quantops.reference.activation import FRONTS, KEEPS, LEARNS
from quantops.reference.activation_front import SMOOTH, by_torch
from quantops.reference.uniform import MAX_BITS, RULES, acc_dtype
from quantops.sharded import by_parts, whole
from quantops.state import Settings

SCALES = ("step", "clip", "tracked")
PLACES = ("relu", "input")
RELUS = (torch.nn.ReLU, torch.nn.ReLU6, torch.nn.Hardtanh)
GELUS = {"none": "gelu", "tanh": "gelu_tanh"}  # by their ``approximate``
SAMPLE = 1 << 16  # elements of a batch that a percentile, or an error, is taken of
LEAST_SAMPLE = 256  # of a channel
ENDS = tuple(2.0 ** (-i / 8) for i in range(64))  # where a learned range may end to begin with, of the maximum
LEAST = 2.0**-10  # of where it started: how small a learned value may become


class UniformActivation(Settings, torch.nn.Module):
    """A quantizer of activations, see :func:`quantops.quantize_activation`: q of x at ``bits``, by ``rule``.

    Args:
        bits: 0..16; kept in an int32 buffer, which :meth:`set_bits` changes.
        scale: "step": LSQ (arXiv 1902.08153), the step is a parameter, ``step``. "clip": PACT (1805.06085), the end of
            the range is a parameter, ``clip``. "tracked": the running maximum of |x|, or its ``percentile``, in
            training forwards, with ``momentum``; static in evaluation. Or a number, the end of the range, fixed.
        signed: True, False, or None: signed if the first batch has negative values. Negative values that come to an
            unsigned quantizer are no error: the report says which part they were of the first batch, or of calibrate's.
        front: None, or what is fused in front, in whose place the module stands: "relu", unsigned; "gelu", "gelu_tanh"
            (approximated by tanh) or "silu". "What comes in" is what these give.
        offset: LSQ+ (2004.09576): unsigned codes of x less a parameter, ``offset``, which starts at the minimum.
        channels: None, or the channels (dim 1 of x), each with values of its own.
        keep: "bits", "residual" or "input", see :func:`quantops.quantize_activation`; None: its default.
        percentile, momentum: of "tracked", and of the first batch.
        widths: None, or the widths of a network that has several (TruncQuant), of which :meth:`select` chooses;
            ``bits`` is the one chosen. shared: one scale for all widths (not a step, which none of them share), else
            one for each.

    Values start with the first training batch, or with those of :func:`calibrate`: what is learned at the least squared
    error of q on a sample of 65,536 of its elements, as LSQ+ starts, with an offset at the minimum; what is tracked at
    the maximum or the percentile. (LSQ itself starts at 2 mean|x| / sqrt(last level).)
    An evaluation before either raises RuntimeError. Before a model is wrapped in DDP, calibrate it or run a forward:
    each process would start from a batch of its own. A learned value that an optimizer takes below 1/1024 of its start
    counts as that, with its gradient. In a joint step each thread has the width that it trains, for itself.

    x: any shape, float32, bfloat16, float16 or float64; q has its dtype, under autocast the autocast dtype.
    """

    bits: torch.Tensor
    start: torch.Tensor
    clip: torch.Tensor
    negative: torch.Tensor
    asks_sign = False  # whether the first batch says whether codes are signed

    def __init__(
        self,
        bits: int | None = 4,
        *,
        rule: str = "round_clamp",
        scale: float | str = "step",
        signed: bool | None = None,
        front: str | None = None,
        offset: bool = False,
        channels: int | None = None,
        keep: str | None = None,
        percentile: float = 100.0,
        momentum: float = 0.1,
        widths: Sequence[int] | None = None,
        shared: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        super().__init__()
        check_choice("rule", rule, RULES)
        check_choice("signed", signed, (None, True, False))
        check_choice("front", front, FRONTS)
        for name, flag in (("offset", offset), ("shared", shared)):
            check_choice(name, flag, (True, False))
        if widths and shared and scale == "step":
            raise ValueError("shared: expected False, or another scale, where widths have a step each, got True")
        number = scale if isinstance(scale, (int, float)) and not isinstance(scale, bool) else 0.0
        if scale not in SCALES and not 2.0**-100 <= number <= 2.0**100:
            raise ValueError(f"scale: expected one of {', '.join(map(repr, SCALES))} or a number > 0, got {scale!r}")
        relu = front == "relu"
        if (relu or offset) and (signed or (relu and offset)):
            raise ValueError(
                "front, offset: expected 'relu' or an offset alone, and unsigned codes, got "
                f"front={front!r}, offset={offset}, signed={signed}"
            )
        for name, value, low, high in (("percentile", percentile, 0, 100), ("momentum", momentum, 0, 1)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= high:
                raise ValueError(f"{name}: expected a number in ({low}, {high}], got {value!r}")
        self.learn = "step" if scale == "step" else "clip" if scale == "clip" or offset else None
        keep = checks.activation.default_keep(front, self.learn) if keep is None else keep
        checks.activation.choices(rule, bool(signed), front, keep, self.learn, None)
        self.widths = (
            tuple(check_int("widths", n, 1, MAX_BITS) for n in widths)
            if widths
            else (check_int("bits", bits, 0, MAX_BITS),)
        )
        self.counts = {
            "bits": self.widths if widths else range(MAX_BITS + 1),
            "index": range(len(self.widths)),  # of the row that is used
            "is_signed": (-1, 0, 1),  # -1: the first batch will say it
        }
        self.rule, self.front, self.keep, self.scale, self.per_width = rule, front, keep, scale, not shared
        self.percentile, self.momentum, self.joint_graph = percentile, momentum, False
        self.given = PerThread()  # the place of the width, a tensor, while a thread goes through the widths
        rows = len(self.widths) if self.per_width else 1
        count = 1 if channels is None else check_int("channels", channels, 1, 2**31)
        made = {"device": device, "dtype": acc_dtype(dtype)}
        for name, type_ in (("bits", torch.int32), ("index", torch.int64), ("is_signed", torch.int8)):
            self.register_buffer(name, torch.zeros((), dtype=type_, device=device))
        self.register_constants(device, all_bits=list(self.widths))
        self.register_buffer("start", torch.zeros(rows, count, **made))  # 0 until values are known
        self.register_buffer("negative", torch.zeros(1, **made))  # part of x below 0, where values came from
        values = torch.zeros(rows, count, **made)
        if scale in ("step", "clip"):
            self.register_parameter(scale, torch.nn.Parameter(values))
        else:
            self.register_buffer("clip", values)
        self.offset = torch.nn.Parameter(torch.zeros(rows, count, **made)) if offset else None
        self.seen = PerThread()  # statistics of what comes in, while a thread calibrates
        if number:
            self.clip.fill_(float(scale))
            self.start.fill_(0.0 if offset else float(scale))
        known = False if relu or offset else signed
        self.asks_sign = known is None
        self.signed, self.place, self.started = known, 0, [number and known is not None and not offset] * rows
        self.write(bits=self.widths[0], index=0, is_signed=-1 if known is None else int(known))

    def settings(self) -> dict[str, Any]:
        return {
            "method": "uniform activation",
            "rule": self.rule,
            "scale": self.scale,
            "front": self.front,
            "offset": self.offset is not None,
            "widths": list(self.widths) if len(self.widths) > 1 else None,
        }

    def training_settings(self) -> dict[str, Any]:
        return {"keep": self.keep, "percentile": self.percentile, "momentum": self.momentum}

    # The width, and what is known of values.

    def _note(self):
        super()._note()
        if self.start.is_meta:
            return
        sign, self.place = int(self.is_signed), int(self.index)
        self.signed = None if sign < 0 else bool(sign)
        self.started = [bool((row > 0).all()) and sign >= 0 for row in self.start]

    def select(self, place: int) -> None:
        """Selects the width at ``place`` of ``widths``, in place: nothing recompiles."""
        self._change(bits=self.widths[place], index=place if self.per_width else 0)

    def set_bits(self, bits: int | None) -> None:
        """Sets the bits of a module that has one width, in place: nothing recompiles. The scale stays as it is."""
        if len(self.widths) > 1:
            raise ValueError(f"bits: expected a module of one width, which this is not; it has {self.widths}")
        self._change(bits=check_int("bits", bits, 0, MAX_BITS))

    def _change(self, **counts):
        self.check_written()
        self.write(**{name: int(self._buffers[name]) for name in self.counts} | counts)

    def _width(self):
        """(bits, the row of values) that this thread uses now, tensors of one element."""
        given = self.given.get()
        if given is not None:
            place = given.reshape(1)
            return self.all_bits.index_select(0, place), place
        if len(self.widths) == 1:
            return self.bits, self.index.reshape(1)
        return self.bits.clone(), self.index.clone().reshape(1)  # autograd keeps them, and the width may change

    def _place(self):
        """The row of values that this thread uses now, an int."""
        given = self.given.get() if self.per_width else None
        return self.place if given is None else int(given)

    # Values.

    def _steps_of_a_scale(self, bits):
        """The end of the range in steps, a tensor of one element."""
        if self.rule == "round_clamp":
            return torch.exp2(bits - int(bool(self.signed))).to(self.start.dtype)
        return (torch.exp2(bits) - 1).to(self.start.dtype)

    def values(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(scale, offset) that are used now, one element or one per channel; offset may be None."""
        return self._values(*self._width())

    def _values(self, bits, place):
        def row(t):
            return t[0] if len(t) == 1 else t.index_select(0, place).squeeze(0)

        scale = row(self.step if self.scale == "step" else self.clip)
        if self.learn == self.scale:
            least = LEAST * row(self.start)
            scale = torch.where(scale < least, least + (scale - scale.detach()), scale)
        if self.scale == "step":
            scale = scale * self._steps_of_a_scale(bits)
        return scale, None if self.offset is None else row(self.offset)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """q of x."""
        checks.tensors("x", [x])
        if not torch.compiler.is_compiling() and self.versions() != self.noted:
            self.check_written()
        if len(self.widths) > 1:
            refuse_recomputing(self)
        seen = self.seen.get()
        if seen is not None:
            if x.numel():
                seen.append(self._statistics(x))
            return by_torch(x, self.front)
        if x.is_meta or self.start.is_meta:  # a shape alone
            checks.all_or_none_on_meta({"x": x, "scale": self.start})
        elif not all(self.started) and not self.started[self._place()]:
            if not self.training:
                raise RuntimeError(
                    "UniformActivation: evaluated before it has a scale; expected a training forward, "
                    "quantops.calibrate(model, batches) or a state dict first"
                )
            if x.numel() == 0:  # as of an expert without tokens: the next batch will start it
                return by_torch(x, self.front).to(checks.dtype_of(None, [x]))
            first = self._statistics(x)
            if not torch.compiler.is_compiling() and not finite([first]):
                raise ValueError("x: expected finite values to take a scale from, got NaN or infinity")
            self._begin([first])
        elif self.scale == "tracked" and self.training and x.numel():
            self._track(x)
        acc, (bits, place) = acc_dtype(x.dtype), self._width()
        scale, offset = (None if v is None else v.to(acc) for v in self._values(bits, place))
        options = (
            RULES.index(self.rule),
            bool(self.signed),
            FRONTS.index(self.front),
            KEEPS.index(self.keep),
            LEARNS.index(self.learn),
        )
        dtype = checks.dtype_of(None, [x])

        def quantized(x, scale, offset):
            return call(ops.activation, x, scale, offset, bits, *options, dtype)[0]

        return by_parts(quantized, x, scale, offset, lsq=self.learn == "step")

    # Where values come from.

    @torch.no_grad()
    def _statistics(self, x):
        """(a sample, end of the range, minimum and maximum, part below 0) of what is quantized, one or one per channel;
        the sample, (n, channels), is empty where nothing is learned."""
        if x.is_meta:
            raise ValueError("x: expected values to take a scale from, got a tensor on the meta device")
        x = whole(x.detach()).to(self.start.dtype)
        x = by_torch(x, self.front)
        count = self.start.shape[1]
        if count > 1 and (x.dim() < 2 or x.shape[1] != count):
            raise ValueError(f"x: expected {count} channels in dim 1, got shape {tuple(x.shape)}")
        rows = x.transpose(0, 1).reshape(count, -1) if count > 1 else x.reshape(1, -1)
        size = rows.abs()
        if self.percentile < 100:
            end = _sample(size, SAMPLE).quantile(self.percentile / 100, dim=1)
        else:
            end = size.amax(1)
        sample = _sample(rows, max(LEAST_SAMPLE, SAMPLE // count) if self.learn else 0).t()
        return sample, end, rows.amin(1), rows.amax(1), (x < 0).to(self.start.dtype).mean().reshape(1)

    @torch.no_grad()
    def _begin(self, statistics):
        """Takes values from [what :meth:`_statistics` gives for a batch]."""
        sample = torch.cat([s for s, *_ in statistics])
        end, low, high, negative = (torch.stack(v) for v in list(zip(*statistics))[1:])
        place = self._place()
        if self.offset is None:  # codes of x less an offset have none below 0
            self.negative.copy_(negative.mean(0))
        if self.signed is None:
            self._change(is_signed=int(low.min() < 0))
        end, low, high = end.amax(0) if self.percentile == 100 else end.mean(0), low.amin(0), high.amax(0)
        if self.offset is not None:
            self.offset[place].copy_(low)
            end, sample = high - low, sample - low
        end = torch.where((end > 2.0**-80) & (end < 2.0**80), end, torch.ones_like(end))
        bits = self.all_bits.amax(0, keepdim=True) if len(self.widths) > len(self.start) else self._width()[0]
        start = self._least_error(sample, end, bits) if self.scale in ("step", "clip") else end
        if self.scale == "step":
            start = start / self._steps_of_a_scale(bits)
        if isinstance(self.scale, str):
            # A copy whose buffers are those of a module that has begun (an average of models) keeps what it was given.
            given = self.start[place] > 0
            self.start[place].copy_(torch.where(given, self.start[place], start))
            target = self.step if self.scale == "step" else self.clip
            target[place].copy_(torch.where(given, target[place], start))
        else:
            self.start[place].fill_(float(self.scale))
        self.started[place] = True

    def _least_error(self, sample, end, bits):
        """``end``, or the part of it, one or one per channel, with which a sample (n, channels) has the least squared
        error."""
        best, least = end, torch.full_like(end, float("inf"))
        options = (
            RULES.index(self.rule),
            bool(self.signed),
            FRONTS.index(None),
            KEEPS.index("input"),
            LEARNS.index(None),
        )
        for part in ENDS:
            q = ops.activation(sample, part * end, None, bits, *options, sample.dtype)[0]
            error = (q - sample).square().mean(0)
            best, least = torch.where(error < least, part * end, best), torch.minimum(error, least)
        return best

    @torch.no_grad()
    def _track(self, x):
        end, place = self._statistics(x)[1], self._width()[1]
        old = self.clip if len(self.clip) == 1 else self.clip.index_select(0, place)
        end = torch.where((end > 2.0**-80) & (end < 2.0**80), end, old)
        if len(self.clip) == 1:
            self.clip.lerp_(end, self.momentum)
        else:
            self.clip.index_copy_(0, place, old.lerp(end, self.momentum))

    @torch.no_grad()
    def report(self) -> tuple[Any, ...]:
        """(bits, signed, end of the grid, part below 0), see :class:`quantops.report.ActivationBits`."""
        scale, offset = self.values()
        end = scale if offset is None else scale + offset
        shown = float(end.max()) if self.started[self.place] else float("nan")
        return int(self.bits), bool(self.signed), shown, float(self.negative)

    def extra_repr(self) -> str:
        bits = "?" if self.bits.is_meta else int(self.bits)
        return (
            f"bits={bits}{f' of {self.widths}' if len(self.widths) > 1 else ''}, rule={self.rule!r}, "
            f"scale={self.scale!r}, signed={self.signed}, front={self.front!r}, keep={self.keep!r}"
        )


def _sample(rows, most):
    """About ``most`` elements of each row; an odd number lies between two, since images have even sides."""
    return rows[:, :: max(1, rows.shape[1] // most) | 1] if most else rows[:, :0]


def finite(statistics):
    """Whether all of x were finite in [what :meth:`UniformActivation._statistics` gives for a batch]."""
    return all(bool(low.isfinite().all() & high.isfinite().all()) for _, _, low, high, _ in statistics)


# Where they stand in a network.

INPUT, OUTPUT = "input_quantizer", "output_quantizer"
WITHOUT_INPUT = (NonDynamicallyQuantizableLinear, torch.nn.Embedding, torch.nn.EmbeddingBag)


def _quantize_input(name, layer, args, kwargs):
    """Forward pre-hook; looks the module up, so that a copied layer has its own. name: of forward's first argument."""
    quantizer = getattr(layer, INPUT)
    if args:
        return (quantizer(args[0]), *args[1:]), kwargs
    if name not in kwargs:
        raise TypeError(
            f"{type(layer).__name__}: expected its input first or as {name}=, got {', '.join(kwargs) or 'none'}"
        )
    return args, {**kwargs, name: quantizer(kwargs[name])}


def _quantize_output(layer, args, output):
    if not isinstance(output, torch.Tensor):
        raise TypeError(
            f"act_outputs: expected modules that give a tensor, {type(layer).__name__} gave {type(output).__name__}"
        )
    return getattr(layer, OUTPUT)(output)


def front_of(m):
    """What a quantizer has in front that stands in the place of a module: an entry of FRONTS, None where none does."""
    if type(m) in RELUS:
        return "relu" if getattr(m, "min_val", 0) == 0 else None
    if type(m) is torch.nn.GELU:
        return GELUS[m.approximate]
    return "silu" if type(m) is torch.nn.SiLU else None


def replace_fronts(model, make):
    """Puts ``make(a parameter of the model, front)`` in the place of each ReLU, ReLU6, Hardtanh(0, ...), GELU and SiLU,
    one for all uses of a module. ValueError for a model without them."""
    like = next(model.parameters())
    if not any(front_of(m) for m in model.modules()):
        raise ValueError(
            "act_bits: expected modules of nn.ReLU, nn.ReLU6, nn.Hardtanh(0, ...), nn.GELU or nn.SiLU to quantize, "
            f"{type(model).__name__} has none; act='input' quantizes what goes into each layer"
        )
    replace(model, lambda m: make(like, front_of(m)) if front_of(m) else None)


def leave_fused_evaluation(model):
    """Takes torch's fused evaluation from transformer layers and encoders that have quantizers of activations."""
    kinds = (UniformActivation, CategoricalActivation)
    for m in model.modules():
        if isinstance(getattr(m, "activation", None), kinds) and hasattr(m, "activation_relu_or_gelu"):
            m.activation_relu_or_gelu = 0  # by this number a layer evaluates a fused ReLU or GELU
        if isinstance(m, torch.nn.TransformerEncoder) and any(isinstance(part, kinds) for part in m.modules()):
            m.use_nested_tensor = False  # what it makes of padded batches, which no op of ours takes


def quantize_inputs(layers, make):
    """Puts ``make(weight, bits)`` in front of each of [(layer, bits)], in the place of a quantizer that stands there.

    bits None: the layer keeps the input that it has."""
    for layer, bits in layers:
        # nn.MultiheadAttention reads the weight of its output layer, and does not call it. Embeddings
        # take integers, and a layer of weights alone nothing.
        first = next(iter(inspect.signature(layer.forward).parameters.values()), None)
        if bits is None or first is None or isinstance(layer, WITHOUT_INPUT):
            continue
        if not hasattr(layer, INPUT):
            name = (
                "input" if first.kind in (first.VAR_POSITIONAL, first.VAR_KEYWORD) else first.name
            )  # as torch's have it
            layer.register_forward_pre_hook(functools.partial(_quantize_input, name), with_kwargs=True)
        layer.add_module(INPUT, make(layer.weight, bits))


def outputs_named(model, patterns):
    """[(name, module)] of modules whose names match ``patterns``. ValueError for a pattern that matches none."""
    found = {}
    for pattern in patterns:
        matched = [(n, m) for n, m in model.named_modules() if n and fnmatch.fnmatchcase(n, pattern)]
        if not matched:
            raise ValueError(f"act_outputs: {pattern!r} matches none of the modules of {type(model).__name__}")
        found |= dict(matched)
    return list(found.items())


def quantize_outputs(modules, make, like):
    """Puts ``make(like)`` behind each module, or in the place of the quantizer that stands there."""
    for _, module in modules:
        if not hasattr(module, OUTPUT):
            module.register_forward_hook(_quantize_output)
        module.add_module(OUTPUT, make(like))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationConfig(QuantConfig):
    """What configs say of activations; by default they stay float.

    act_bits: None, or 1..16. act: "relu", every nn.ReLU, nn.ReLU6 and nn.Hardtanh(0, ...) becomes an unsigned quantizer
        with the ReLU fused, and every nn.GELU (both of its approximations) and nn.SiLU one with these fused, signed as
        act_signed says (modules that are called twice have one scale for both; functions are not seen). Or "input": a
        quantizer stands in front of every layer that is quantized, which is the way for LayerNorm and attention.
    act_scale: "step" (LSQ), "clip" (PACT), "tracked" or a number, see :class:`UniformActivation`.
    act_signed: but for ReLUs, whether codes are signed; None: if the first batch has values below 0.
    act_keep: None, or what a quantizer keeps for the backward pass, see :func:`quantops.quantize_activation`: "input",
        which costs nothing where x is kept anyhow, as between a ReLU that stays and a layer. Those with a GELU or SiLU
        keep their input whatever it says.
    act_outputs: patterns of the names of modules whose output is quantized too: those whose results are multiplied with
        each other, as the projections of queries, keys and values are in attention.

    With act="input" overrides may set "act_bits" of a layer, None for a float input; a layer that "skip" leaves float
    keeps a float input too. Modules inside nn.MultiheadAttention are not called by it: their inputs stay float, as do
    those of layers whose weights have other names than "weight" (LSTM, GRU, attention), and of embeddings.
    """

    act_bits: int | str | None = None
    act: str = "relu"
    act_scale: str | float = "step"
    act_signed: bool | None = None
    act_keep: str | None = None
    act_outputs: tuple[str, ...] = ()

    act_rule: ClassVar[str] = "round_clamp"

    def __post_init__(self):
        super().__post_init__()
        check_choice("act", self.act, PLACES)
        check_choice("act_signed", self.act_signed, (None, True, False))
        self.check_act_bits("act_bits", self.act_bits)
        for pattern, settings in self.overrides.items():
            if "act_bits" in settings and (self.act != "input" or self.act_bits is None):
                raise ValueError(
                    f"overrides[{pattern!r}]: act_bits: expected act='input' and act_bits with it, got "
                    f"act={self.act!r}, act_bits={self.act_bits}"
                )
            self.check_act_bits(f"overrides[{pattern!r}]: act_bits", settings.get("act_bits"))
        number = isinstance(self.act_scale, (int, float)) and not isinstance(self.act_scale, bool)
        if self.act_scale not in SCALES and not (number and 2.0**-100 <= self.act_scale <= 2.0**100):
            raise ValueError(
                f"act_scale: expected one of {', '.join(map(repr, SCALES))} or a number > 0, got {self.act_scale!r}"
            )
        keeps = {"step": ("residual", "input"), "clip": ("bits", "input")}.get(self.act_scale, KEEPS)
        check_choice(f"act_keep, with act_scale={self.act_scale!r}", self.act_keep, (None, *keeps))
        patterns = self.act_outputs
        if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
            raise ValueError(f"act_outputs: expected a tuple of patterns of module names, got {patterns!r}")
        if patterns and self.act_bits is None:
            raise ValueError("act_outputs: expected act_bits with it, got None")

    def check_act_bits(self, name: str, bits: Any) -> None:
        """ValueError for what cannot be the bits of activations."""
        if bits is not None:
            check_int(name, bits, 1, MAX_BITS)

    def activation(self, like: torch.Tensor, bits: Any, front: str | None) -> Any:
        """The quantizer of ``bits`` behind ``front`` for a model of parameters like ``like``."""
        return UniformActivation(
            bits,
            rule=self.act_rule,
            scale=self.act_scale,
            front=front,
            keep=None if front in SMOOTH else self.act_keep,
            signed=None if front == "relu" else self.act_signed,
            device=like.device,
            dtype=like.dtype,
        )

    def prepare(self, model: torch.nn.Module, layers: dict[str, Any]) -> None:
        super().prepare(model, layers)
        if self.act_bits is None:
            return
        outputs, like = outputs_named(model, self.act_outputs), next(model.parameters())
        if self.act == "relu":
            replace_fronts(model, lambda like, front: self.activation(like, self.act_bits, front))
        else:
            quantize_inputs(
                [(module, settings.get("act_bits", self.act_bits)) for module, settings in layers.values()],
                lambda like, n: self.activation(like, n, None),
            )
        quantize_outputs(outputs, lambda like: self.activation(like, self.act_bits, None), like)
        leave_fused_evaluation(model)
