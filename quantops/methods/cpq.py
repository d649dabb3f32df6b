"""CPQ with DropBits (arXiv 2109.02100): categorical weights whose alpha and sigma learn, and bits that drop out."""

import dataclasses
import itertools
import math
from typing import Any, ClassVar, NamedTuple

import torch

from quantops import checks
from quantops.activation import ActivationConfig
from quantops.autograd.common import call, materialize, of_used
from quantops.categorical_activation import CategoricalActivation
from quantops.convert import check_choice, check_int
from quantops.intweight import IntWeight
from quantops.library import ops
from quantops.methods.gates import OPEN, SHIFT, deterministic, drawn, with_first
from quantops.methods.relaxed import relaxed
from quantops.nn import WeightQuantizer, quantized, shown
from quantops.positive import grid_step, positives, range_step
from quantops.reference.categorical import GRADS, MAX_BITS, MAX_SOFT_BITS, MODES
from quantops.reference.uniform import acc_dtype
from quantops.report import BitReport, bit_report
from quantops.sharded import whole

DROPBITS = (None, "fixed", "learned")
STARTS = {"error": grid_step, "range": range_step}  # of alpha
EVALUATIONS = ("threshold", "gate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CPQConfig(ActivationConfig):
    """Categorically quantized weights with learned alpha and sigma, for :func:`quantops.quantize_`; arXiv 2109.02100.

    The weight is ``quantops.categorical(w, alpha, sigma, bits, ...)`` on the grid alpha i, i = -2^(bits-1)..
    2^(bits-1) - 1. Make the optimizer after ``quantize_``: alpha and sigma are parameters, one of each per layer (or
    row), stored as logarithms of factors on their starting values, so that they stay positive whatever the optimizer
    does (:mod:`quantops.positive`). alpha starts where the squared error of the weights is smallest.

    bits: 1..16; 1..8 where soft sums are taken.
    mode: "hard", the most probable grid point; "sample", one drawn from the distribution, with a seed of its own for
        every forward; "soft", the expectation. In evaluation always "hard", so that integers hold it.
    temperature: None, or of mode="sample": the sample is relaxed, as in Relaxed Quantization (arXiv 1810.01875): the
        grid's values under a softmax of log-probabilities and Gumbel noise, over this temperature. For comparison: it
        needs all 2^bits classes, several numbers for each of them and each weight, and bits up to 8.
    grad: of modes hard and sample, see :func:`quantops.categorical`. "soft" is the default by result: with "winner",
        the paper's literal form, a weight at grid point 0 has no gradient, and elsewhere one towards its grid point or
        away from it, whichever makes its class more or less probable. On the digits of the demo at 2, 3 and 4 bits it
        leaves 72, 48 and 25 % of the weights at 0 ("soft" 26, 14, 6) and ends 2 to 4 points below "soft", which is as
        accurate as the plain STE; that with sigma = alpha.
    sigma: sigma/alpha at the start. Smaller ones gather the weights closer around the grid and learn more slowly; 0.15
        was chosen by hand on the digits of the demo, which shows how far they gather.
    offset: True shifts the grid by a learned beta, 0 at first, as Relaxed Quantization does: q = alpha j + beta. Such
        a grid has no exact zero in general, and :func:`quantops.to_int` refuses it.
    per_row: alpha and sigma per row, which are the outputs of a layer; quantops/layers.py has the table of their dims.
    dropbits: None; "fixed": every bit above min_bits has a hard concrete gate, drawn anew in every training forward,
        that is not 0 with probability ``nonzero``; "learned": the same at the start, and then ``log_a`` of each gate is
        learned with ``quantops.penalty(model)`` in the loss (:func:`penalty`), until
        :func:`quantops.finish_dropbits`. A dropped bit drops those above it.
    evaluate: "threshold": in evaluation there are no gates; all bits stay with "fixed", those of which P(z != 0) > 1/2,
        and all bits below them too, with "learned". "gate": the deterministic gate clamp(S(log_a) 1.2 - 0.1, 0, 1) of
        Louizos et al. 2018 stands for the draws, in evaluation and after ``finish_dropbits``; bits whose gate is 0 are
        gone, P(z != 0) <= 0.31.
    gate_rows: None, a draw of the gates for each layer; or so many rows (dim 0) that share one, 1 for a draw of each
        channel. The probabilities are those of the layer. Each group is an entry of the list call.
    nonzero: P(z != 0) of each gate, in (0, 1). Not the part of a bit that is kept: of what is not 0, much lies between
        0 and 1 and weakens the bit's classes. 0.9 gives E[z] = 0.63 and P(z = 1) = 0.27. So a draw in which no bit is
        dropped changes classes too: of normal weights at 4 bits 3 % with sigma = 0.15 alpha, 7 % with alpha/3; with
        0.99, 0.2 and 0.8 %. That stays, for it is the paper's formula, and what the gates learn from.
    min_bits: the bits that have no gate, at least 1.
    start: of alpha, "error", where the squared error of the weights is smallest, or "range", (max w - min w) / 2^bits,
        as Relaxed Quantization (arXiv 1810.01875) starts, on whose code the paper builds.
    act_bits: None, or 1..8: with act="relu" every ReLU becomes a :class:`quantops.CategoricalActivation` of so many
        bits.
    act, act_scale, act_signed, act_keep, act_outputs: see :class:`quantops.activation.ActivationConfig`. What GELU and
        SiLU give, and what act="input" and act_outputs quantize, may be signed: there
        :class:`quantops.UniformActivation` stands, whose grid is the same.
    fuse, cache, tied, first, last, overrides: see QuantConfig. Forwards that draw are not cached. Overrides may set
        "bits", "dropbits", "rows", and of these fields "mode", "grad", "sigma", "per_row", "nonzero", "min_bits" and
        "start". Layers with fixed bits have no gates.

    Raises ValueError naming the field for anything else.
    """

    bits: int = 4
    mode: str = "hard"
    grad: str = "soft"
    sigma: float = 0.15
    per_row: bool = False
    dropbits: str | None = None
    nonzero: float = 0.9
    min_bits: int = 2
    evaluate: str = EVALUATIONS[0]
    gate_rows: int | None = None
    start: str = "error"
    offset: bool = False
    temperature: float | None = None

    settings: ClassVar[tuple[str, ...]] = ("bits", "dropbits", "act_bits")
    fields: ClassVar[tuple[str, ...]] = ("mode", "grad", "sigma", "per_row", "nonzero", "min_bits", "start")

    def __post_init__(self):
        super().__post_init__()
        if self.act == "relu" and self.act_keep is not None:
            raise ValueError(
                "act_keep: expected None with act='relu', whose categorical quantizer keeps two bits, got "
                f"{self.act_keep!r}"
            )
        check_choice("mode", self.mode, MODES)
        check_choice("grad", self.grad, GRADS)
        check_choice("per_row", self.per_row, (True, False))
        check_choice("dropbits", self.dropbits, DROPBITS)
        check_int("bits", self.bits, 1, self.most_bits)
        check_int("min_bits", self.min_bits, 1, MAX_BITS)
        if self.dropbits and self.bits <= self.min_bits:
            raise ValueError(
                f"dropbits: expected bits > min_bits = {self.min_bits}, the bits without a gate, got bits = {self.bits}"
            )
        _check_number("sigma", self.sigma, 2.0**-24, 2.0**24)
        _check_number("nonzero", self.nonzero, 0.0, 1.0)
        check_choice("start", self.start, tuple(STARTS))
        check_choice("evaluate", self.evaluate, EVALUATIONS)
        check_choice("offset", self.offset, (True, False))
        if self.gate_rows is not None:
            check_int("gate_rows", self.gate_rows, 1, 2**31)
        if self.temperature is not None:
            _check_number("temperature", self.temperature, 0.0, math.inf)
            if self.mode != "sample":
                raise ValueError(f"temperature: expected None, or mode='sample' with it, got mode={self.mode!r}")

    @classmethod
    def paper(cls, **settings: Any) -> "CPQConfig":
        """The recipe of arXiv 2109.02100 by its text: the most probable grid point in the forward pass, the multi-class
        straight-through estimator (grad="winner"), alpha from the range of the weights and sigma = alpha/3, as Relaxed
        Quantization starts. ``settings`` replace any of these, e.g. dropbits="fixed" or "learned".

        What cannot be known from public text, and is a guess here: the start of alpha and sigma (those of the code that
        it builds on); that gates are drawn for a layer (``gate_rows``: for a channel, or a group of them); that bits in
        evaluation stay by the threshold P(z != 0) > 1/2 (``evaluate="gate"``: by a deterministic gate); that the grid
        has no ``offset``; and that training takes the most probable point, where Relaxed Quantization samples with a
        ``temperature``.
        """
        return cls(**{"mode": "hard", "grad": "winner", "sigma": 1 / 3, "start": "range", **settings})

    @property
    def most_bits(self) -> int:
        """8 where soft sums are taken or samples relaxed, 16 elsewhere."""
        return MAX_SOFT_BITS if "soft" in (self.mode, self.grad) or self.temperature else MAX_BITS

    def fixed(self, bits: int) -> dict[str, Any]:
        return {"bits": bits, "dropbits": None}

    def quantizer(self, name: str, weight: torch.Tensor, settings: dict[str, Any]) -> Any:
        bits, dropbits = settings.get("bits", self.bits), settings.get("dropbits", self.dropbits)
        check_choice(f"{name}: dropbits", dropbits, DROPBITS)
        config = self.of_layer(name, settings, bits=bits, dropbits=None)
        check_int(f"{name}: bits", bits, 1, config.most_bits)
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name}: expected finite weights, got NaN or infinity")
        return CPQWeight(config, weight, bits, dropbits if bits > config.min_bits else None)

    def check_act_bits(self, name: str, bits: Any) -> None:
        if bits is not None:
            check_int(name, bits, 1, MAX_SOFT_BITS)

    def activation(self, like: torch.Tensor, bits: Any, front: str | None) -> Any:
        if front != "relu":
            return super().activation(like, bits, front)
        return CategoricalActivation(bits, grad=self.grad, device=like.device, dtype=like.dtype)


def _check_number(name, value, low, high):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < high:
        raise ValueError(f"{name}: expected a number in ({low:g}, {high:g}), got {value!r}")


class Quantized(NamedTuple):
    """What one list call gives: q, and what its gradient needs besides w."""

    q: list | None
    alpha: list
    sigma: list
    bits: torch.Tensor


class CPQWeight(WeightQuantizer):
    """original -> q on the grid of alpha. ``bits`` is a 0-dim int32 buffer; ``log_a`` has a value per gate, if any."""

    def __init__(self, config, w, bits, dropbits):
        super().__init__()
        acc, device = acc_dtype(w.dtype), w.device
        self.start = config.start
        step = STARTS[self.start](w.detach(), bits, per_row=config.per_row)
        self.register_buffer("alpha_start", step)
        self.register_buffer("sigma_start", step * config.sigma)
        self.log_alpha = torch.nn.Parameter(torch.zeros_like(step))
        self.log_sigma = torch.nn.Parameter(torch.zeros_like(step))
        self.register_buffer("bits", torch.full((), bits, dtype=torch.int32, device=device))
        self.beta = torch.nn.Parameter(torch.zeros_like(step)) if config.offset else None
        self.mode, self.grad, self.min_bits, self.all_bits = config.mode, config.grad, config.min_bits, bits
        self.per_row, self.dropbits, self.temperature = config.per_row, dropbits, config.temperature
        self.evaluate, self.gate_rows = config.evaluate, config.gate_rows if dropbits else None
        self.gated = dropbits is not None  # False once finish_dropbits has been called
        if self.gated:
            start = math.log(config.nonzero / (1 - config.nonzero)) + SHIFT
            log_a = torch.full((bits - config.min_bits,), start, dtype=acc, device=device)
            if dropbits == "learned":
                self.log_a = torch.nn.Parameter(log_a)
            else:
                self.register_buffer("log_a", log_a)
            self.register_buffer("finished", torch.zeros((), dtype=torch.uint8, device=device))  # averages fail on bool
            self.counts = {"bits": range(MAX_BITS + 1), "finished": (False, True)}
            self.write(bits=bits, finished=False)
        else:
            self.counts = {"bits": range(MAX_BITS + 1)}
            self.write(bits=bits)

    @property
    def batch_key(self):
        """(method, mode, grad, gates, ...): evaluation draws nothing and takes no expectations."""
        mode, temperature = (self.mode, self.temperature) if self.training else (MODES[0], None)
        gates = "drawn" if self.training and self.gated else "fixed" if self.dropbits and self.by_gate else None
        rows = self.gate_rows if gates == "drawn" else None
        return "cpq", mode, self.grad, gates, temperature, rows, self.per_row, self.beta is not None

    @property
    def by_gate(self):
        """Whether deterministic gates stand for the draws where there are none."""
        return self.evaluate == "gate"

    @property
    def draws(self):
        """Whether a forward now draws gates or grid points."""
        return self.training and (self.gated or self.mode == "sample")

    def bits_that_stay(self):
        """The bits of the evaluated layer, a 0-dim int32 tensor on its device."""
        if not self.dropbits or (not self.gated or self.dropbits == "fixed") and not self.by_gate:
            return self.bits
        closed = ~(self.log_a > (OPEN if self.by_gate else SHIFT))
        stay = (self.min_bits + (closed.cumsum(0) == 0).sum()).to(torch.int32)  # not by cumprod, which ONNX has not
        if self.by_gate:
            return stay
        return torch.where(self.finished.bool(), self.bits, stay)  # copies get buffers in place, and not ``gated``

    def finish(self):
        """The bits that stay are the layer's bits from now on, without gates."""
        if self.gated:
            self.write(bits=int(self.bits if self.by_gate else self.bits_that_stay()), finished=True)
            self._open_gates(False)

    def _open_gates(self, gated):
        if gated == self.gated:
            return
        self.gated = gated
        self.log_a.requires_grad_(gated and self.dropbits == "learned")

    def settings(self):
        found = {"method": "cpq", "per_row": self.per_row, "dropbits": self.dropbits, "min_bits": self.min_bits}
        return {**found, "evaluate": self.evaluate} if self.dropbits and self.by_gate else found

    def training_settings(self):
        return {"mode": self.mode, "grad": self.grad, "temperature": self.temperature, "gate_rows": self.gate_rows}

    @torch.no_grad()
    def state_for(self, w):
        """alpha and sigma start again from that weight."""
        if w.is_meta or self.bits.is_meta or not bool(torch.isfinite(w).all()):
            return self.state_dict()
        step = STARTS[self.start](w.to(self.alpha_start), int(self.bits), per_row=self.per_row)
        zero = torch.zeros_like(step)
        return {
            **self.state_dict(),
            "alpha_start": step,
            "sigma_start": step * (self.sigma_start / self.alpha_start),
            "log_alpha": zero,
            "log_sigma": zero,
            **({} if self.beta is None else {"beta": zero}),
        }

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        if self.dropbits and not self.finished.is_meta:
            self._open_gates(not bool(self.finished))

    @staticmethod
    def launch(quantizers, w):
        _, mode, _, gates_of, *_ = quantizers[0].batch_key
        alpha, sigma = _scales(quantizers, w)
        seed = torch.randint(2**62, (), dtype=torch.int64, device=w[0].device) if mode == "sample" else None
        bits, gates = _drawn(quantizers, w, alpha) if gates_of == "drawn" else _undrawn(quantizers, alpha)
        q = _quantized(quantizers, w, alpha, sigma, bits, gates, mode, seed, checks.dtype_of(None, w))
        return Quantized(q, alpha, sigma, bits)

    @staticmethod
    def revive(quantizers, w, result):
        _, mode, grad, gates, *_, offset = quantizers[0].batch_key
        if gates or offset:  # more than the one op: computed again
            return CPQWeight.launch(quantizers, w)
        alpha, sigma = _scales(quantizers, w)
        q = _Revive.apply(result, (MODES.index(mode), GRADS.index(grad)), *w, *alpha, *sigma)
        return Quantized(list(q), alpha, sigma, result.bits)

    @staticmethod
    def measure(quantizers, w):
        alpha, q = _evaluated(quantizers, w)
        bits = [int(p.bits_that_stay()) for p in quantizers]
        top = [float(a.max()) if a.numel() else 0.0 for a in alpha]
        return [
            (n, 0, 0.0, float((v.double() - t.double()).square().sum()), s * 2 ** (n - 1))
            for v, t, s, n in zip(q, w, top, bits)
        ]

    def to_int(self, w):
        """q = alpha j is the dyadic grid with scale alpha 2^(n-1): its step is alpha, bit for bit."""
        if self.beta is not None:
            raise ValueError(
                f"{self.layer}: expected offset=False, since the integers of a grid alpha j + beta have no zero"
            )
        (alpha,), (q,) = _evaluated([self], [w])
        n = int(self.bits_that_stay())
        step = alpha.reshape(-1, *[1] * (w.dim() - 1)) if self.per_row else alpha
        codes = (q / step).round().to(torch.int32) + 2 ** (n - 1)
        return IntWeight.from_codes(codes, alpha * 2 ** (n - 1), n, dtype=w.dtype)

    def extra_repr(self):
        return (
            f"bits={shown(self.bits_that_stay())}, mode={self.mode!r}, grad={self.grad!r}, per_row={self.per_row}, "
            f"dropbits={self.dropbits!r}"
        )


def _scales(quantizers, w):
    """(alpha, sigma), lists of one contiguous tensor per layer, whatever the number of layers in few ops."""
    acc = acc_dtype(w[0].dtype)
    alpha = positives([p.alpha_start for p in quantizers], [p.log_alpha for p in quantizers], acc)
    return alpha, positives([p.sigma_start for p in quantizers], [p.log_sigma for p in quantizers], acc)


def _drawn(quantizers, w, alpha):
    """(bits, gates) of a forward that draws gates."""
    return torch.stack([p.bits for p in quantizers]), drawn(quantizers, w, alpha[0].dtype)


def _undrawn(quantizers, alpha):
    """(bits, gates) of one that does not: evaluation, and layers without gates."""
    first = quantizers[0]
    if not first.dropbits or not first.by_gate:
        return torch.stack([p.bits_that_stay() for p in quantizers]), None
    gates = [with_first(deterministic(p.log_a.to(alpha[0].dtype)), p.min_bits) for p in quantizers]
    return torch.stack([p.bits for p in quantizers]), gates


def _evaluated(quantizers, w):
    """(alpha, q) as in evaluation, in the arithmetic of alpha."""
    alpha, sigma = _scales(quantizers, w)
    of_each = _undrawn(quantizers, alpha)
    return alpha, _quantized(quantizers, w, alpha, sigma, *of_each, MODES[0], None, alpha[0].dtype)


def _quantized(quantizers, w, alpha, sigma, bits, gates, mode, seed, dtype):
    """[q] of ``dtype``; on a shifted grid where there is a beta."""
    first, beta, out = quantizers[0], None, dtype
    if first.beta is not None:
        out = alpha[0].dtype
        beta = [p.beta.to(out).reshape(-1, *[1] * (t.dim() - 1)) for p, t in zip(quantizers, w)]
        w = [t.to(out) - b for t, b in zip(w, beta)]
    options = (seed, MODES.index(mode), GRADS.index(first.grad), True, out)
    is_relaxed, grouped = mode == "sample" and first.temperature is not None, bool(gates) and gates[0].dim() > 1
    if is_relaxed:
        of_each = zip(w, alpha, sigma, bits, [p.all_bits for p in quantizers], gates or [None] * len(w))
        q = [relaxed(t, a, s, n, most, first.temperature, z).to(out) for t, a, s, n, most, z in of_each]
    elif grouped:
        q = _in_groups(w, alpha, sigma, bits, gates, first.gate_rows, options)
    else:
        q = call(ops.categorical, w, alpha, sigma, bits, gates, *options)
    if beta is not None:
        q = [(v + b).to(dtype) for v, b in zip(q, beta)]
    of_one_op = not is_relaxed and not grouped and beta is None
    return q if of_one_op or torch.compiler.is_compiling() else list(_OneNode.apply(*q))


def _in_groups(w, alpha, sigma, bits, gates, rows, options):
    """One list call with an entry for each group of ``rows`` rows, which has gates of its own."""
    parts = [t.split(rows) for t in w]

    def spread(v, part):
        return v.split(rows) if v.numel() > 1 else [v] * len(part)

    flat = [[t for part in parts for t in part]]
    flat += [[t for v, part in zip(values, parts) for t in spread(v, part)] for values in (alpha, sigma)]
    bits = torch.cat([n.expand(len(part)) for n, part in zip(bits, parts)])
    q = call(ops.categorical, *flat, bits, [z for of_layer in gates for z in of_layer.unbind()], *options)
    ends = list(itertools.accumulate(map(len, parts)))
    return [torch.cat(q[end - len(part) : end]) for end, part in zip(ends, parts)]


class _OneNode(torch.autograd.Function):
    """q of several ops as results of one node, of which a WeightGroup asks whether a backward pass has been there."""

    @staticmethod
    def forward(ctx, *q):
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in q)

    @staticmethod
    def backward(ctx, *grads):
        return grads


class _Revive(torch.autograd.Function):
    """Gives a cached result, for which nothing was drawn, a graph of its own, with the backward of ops.categorical."""

    @staticmethod
    def forward(ctx, result, options, *tensors):
        ctx.options, ctx.count, ctx.dtype = options, len(result.q), result.q[0].dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, result.bits)
        return tuple(t.detach() for t in result.q)

    @staticmethod
    def backward(ctx, *grads):
        n, (*tensors, bits) = ctx.count, ctx.saved_tensors
        w, alpha, sigma = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        if all(g is None for g in grads):
            return None, None, *[None] * (3 * n)
        of_each = call(
            ops.categorical_backward,
            materialize(grads, w, ctx.dtype),
            w,
            alpha,
            sigma,
            bits,
            [],
            None,
            *ctx.options,
            True,
            True,
            False,
        )
        return None, None, *(t for listed in of_each[:3] for t in of_used(grads, listed))


# The bits of a model.


def learns_bits(quantizer):
    """Whether it is a CPQWeight with gates that are, or were, learned."""
    return isinstance(quantizer, CPQWeight) and quantizer.dropbits == "learned"


def penalty(model):
    """The expected number of gates that are not 0, over all layers with learned gates: 0-dim, differentiable.

        R = sum over layers and gates of P(z != 0),  P(z != 0) = S(log_a - b log(-gamma/zeta))
        (task_loss + strength * quantops.penalty(model)).backward()

    with b = 2/3, gamma = -0.1, zeta = 1.1 (Louizos et al. 2018). It learns how many bits each layer keeps, the
    heterogeneous mode of arXiv 2109.02100. Layers whose bits :func:`quantops.finish_dropbits` has settled count 0.
    Gates want a learning rate of their own, ten times that of the weights, say: their parameters end in ``log_a``.

    Raises ValueError for a model without learned gates.
    """
    layers = [p for _, _, p in quantized(model) if learns_bits(p)]
    if not layers:
        raise ValueError(
            f"model: expected weights quantized with CPQConfig(dropbits='learned'), {type(model).__name__} has none"
        )
    total = whole(layers[0].log_a).new_zeros(())
    for p in layers:
        if p.gated:
            total = total + torch.sigmoid(whole(p.log_a) - SHIFT).sum().to(total)
    return total


@torch.no_grad()
def finish_dropbits(model: torch.nn.Module) -> BitReport:
    """Ends DropBits: the bits that stay are the bits of each layer from now on; no more gates are drawn or learned.

    In place; returns ``quantops.bit_report(model)``. What is evaluated does not change. The state dict keeps it: a
    model that was quantized as this one was and loads it is finished too. Compiled models compile once more. Some
    epochs should follow: batch norms have averaged over what was dropped.

    Raises ValueError for a model without gates.
    """
    layers = [p for _, _, p in quantized(model) if isinstance(p, CPQWeight) and p.dropbits]
    if not layers:
        raise ValueError(
            f"model: expected weights quantized with CPQConfig(dropbits=...), {type(model).__name__} has none"
        )
    for p in layers:
        p.finish()
    return bit_report(model)
