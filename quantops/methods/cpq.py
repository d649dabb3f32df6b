"""CPQ with DropBits (arXiv 2109.02100): categorical weights whose alpha and sigma learn, and bits that drop out."""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import torch

from quantops import checks
from quantops.activation import ActivationConfig
from quantops.autograd.common import call, each, materialize, of_used
from quantops.categorical_activation import CategoricalActivation
from quantops.convert import check_choice, check_int
from quantops.intweight import IntWeight
from quantops.library import ops
from quantops.nn import WeightQuantizer, quantized, shown
from quantops.positive import grid_step, positives, range_step
from quantops.reference.categorical import GRADS, MAX_BITS, MAX_SOFT_BITS, MODES
from quantops.reference.uniform import acc_dtype
from quantops.report import bit_report

DROPBITS = (None, "fixed", "learned")
STARTS = ("error", "range")
# The hard concrete distribution of Louizos et al. 2018.
TEMPERATURE, GAMMA, ZETA = 2 / 3, -0.1, 1.1
SHIFT = TEMPERATURE * math.log(-GAMMA / ZETA)  # P(z != 0) = S(log_a - SHIFT)


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
    grad: of modes hard and sample, see :func:`quantops.categorical`. "soft" is the default by result: with "winner",
        the paper's literal form, a weight at grid point 0 has no gradient, and elsewhere one towards its grid point or
        away from it, whichever makes its class more or less probable. On the digits of the demo at 2, 3 and 4 bits it
        leaves 72, 48 and 25 % of the weights at 0 ("soft" 26, 14, 6) and ends 2 to 4 points below "soft", which is as
        accurate as the plain STE; that with sigma = alpha.
    sigma: sigma/alpha at the start. Smaller ones gather the weights closer around the grid and learn more slowly; 0.15
        was chosen by hand on the digits of the demo, which shows how far they gather.
    per_row: alpha and sigma per row (dim 0: output channels of Linear and Conv, input channels of ConvTranspose).
    dropbits: None; "fixed": every bit above min_bits has a hard concrete gate, drawn anew in every training forward,
        that is not 0 with probability ``nonzero``; "learned": the same at the start, and then ``log_a`` of each gate is
        learned with ``quantops.penalty(model)`` in the loss (:func:`penalty`), until
        :func:`quantops.finish_dropbits`. A dropped bit drops those above it. In evaluation no gate is drawn: all bits
        stay with "fixed", those of which P(z != 0) > 1/2, and all bits below them too, with "learned".
    nonzero: P(z != 0) of each gate, in (0, 1). Not the part of a bit that is kept: of what is not 0, much lies between
        0 and 1 and weakens the bit's classes. 0.9 gives E[z] = 0.63 and P(z = 1) = 0.27.
    min_bits: the bits that have no gate, at least 1.
    start: of alpha, "error", where the squared error of the weights is smallest, or "range", (max w - min w) / 2^bits,
        as Relaxed Quantization (arXiv 1810.01875) starts, on whose code the paper builds.
    act_bits: None, or 1..8: with act="relu" every ReLU becomes a :class:`quantops.CategoricalActivation` of so many
        bits.
    act, act_scale, act_signed, act_outputs: see :class:`quantops.activation.ActivationConfig`. What act="input" and
        act_outputs quantize may be signed: there :class:`quantops.UniformActivation` stands, whose grid is the same.
    fuse, cache, first, last, overrides: see QuantConfig. Forwards that draw are not cached. Overrides may set "bits"
        and "dropbits"; layers with fixed bits have no gates.

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
    start: str = STARTS[0]

    settings: ClassVar[tuple[str, ...]] = ("bits", "dropbits", "act_bits")

    def __post_init__(self):
        super().__post_init__()
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
        check_choice("start", self.start, STARTS)

    @classmethod
    def paper(cls, **settings):
        """The recipe of arXiv 2109.02100 by its text: the most probable grid point in the forward pass, the multi-class
        straight-through estimator (grad="winner"), alpha from the range of the weights and sigma = alpha/3, as Relaxed
        Quantization starts. ``settings`` replace any of these, e.g. dropbits="fixed" or "learned".

        What cannot be known from public text, and is a guess here: the start of alpha and sigma (those of the code that
        it builds on), that one set of gates serves a layer (not a channel, or a group of them), and that bits in
        evaluation stay by the threshold P(z != 0) > 1/2, not by a deterministic gate. Relaxed Quantization's offset of
        the grid and its Gumbel temperature are not offered: integers of a shifted grid have no exact zero, and a
        relaxed sample needs all 2^bits classes.
        """
        return cls(**{"mode": "hard", "grad": "winner", "sigma": 1 / 3, "start": "range", **settings})

    @property
    def most_bits(self):
        """8 where soft sums are taken, 16 elsewhere."""
        return MAX_SOFT_BITS if "soft" in (self.mode, self.grad) else MAX_BITS

    def fixed(self, bits):
        return {"bits": bits, "dropbits": None}

    def quantizer(self, name, weight, settings):
        bits = check_int(f"{name}: bits", settings.get("bits", self.bits), 1, self.most_bits)
        dropbits = check_choice(f"{name}: dropbits", settings.get("dropbits", self.dropbits), DROPBITS)
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name}: expected finite weights, got NaN or infinity")
        return CPQWeight(self, weight, bits, dropbits if bits > self.min_bits else None)

    def check_act_bits(self, name, bits):
        if bits is not None:
            check_int(name, bits, 1, MAX_SOFT_BITS)

    def activation(self, like, bits, relu):
        if not relu:
            return super().activation(like, bits, relu)
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
        step = (range_step if config.start == "range" else grid_step)(w.detach(), bits, per_row=config.per_row)
        self.register_buffer("alpha_start", step)
        self.register_buffer("sigma_start", step * config.sigma)
        self.log_alpha = torch.nn.Parameter(torch.zeros_like(step))
        self.log_sigma = torch.nn.Parameter(torch.zeros_like(step))
        self.register_buffer("bits", torch.full((), bits, dtype=torch.int32, device=device))
        self.mode, self.grad, self.min_bits = config.mode, config.grad, config.min_bits
        self.per_row, self.dropbits = config.per_row, dropbits
        self.gated = dropbits is not None  # False once finish_dropbits has been called
        if self.gated:
            start = math.log(config.nonzero / (1 - config.nonzero)) + SHIFT
            log_a = torch.full((bits - config.min_bits,), start, dtype=acc, device=device)
            if dropbits == "learned":
                self.log_a = torch.nn.Parameter(log_a)
            else:
                self.register_buffer("log_a", log_a)
            self.register_buffer("finished", torch.zeros((), dtype=torch.bool, device=device))
            self.counts = {"bits": range(MAX_BITS + 1), "finished": (False, True)}
            self.write(bits=bits, finished=False)
        else:
            self.counts = {"bits": range(MAX_BITS + 1)}
            self.write(bits=bits)

    @property
    def batch_key(self):
        """(method, mode, grad, whether gates are drawn): evaluation neither draws nor takes expectations."""
        if not self.training:
            return "cpq", MODES[0], self.grad, False
        return "cpq", self.mode, self.grad, self.gated

    @property
    def draws(self):
        """Whether a forward now draws gates or grid points."""
        return self.training and (self.gated or self.mode == "sample")

    def bits_that_stay(self):
        """The bits of the evaluated layer, a 0-dim int32 tensor on its device."""
        if not self.gated or self.dropbits == "fixed":
            return self.bits
        stay = (self.min_bits + (self.log_a > SHIFT).to(torch.int32).cumprod(0).sum()).to(torch.int32)
        return torch.where(self.finished, self.bits, stay)  # copies get buffers in place, and not ``gated``

    def finish(self):
        """The bits that stay are the layer's bits from now on, without gates."""
        if self.gated:
            self.write(bits=int(self.bits_that_stay()), finished=True)
            self._open_gates(False)

    def _open_gates(self, gated):
        if gated == self.gated:
            return
        self.gated = gated
        self.log_a.requires_grad_(gated and self.dropbits == "learned")

    def settings(self):
        return {"method": "cpq", "per_row": self.per_row, "dropbits": self.dropbits, "min_bits": self.min_bits}

    @torch.no_grad()
    def state_for(self, w):
        """alpha and sigma start again from that weight."""
        if w.is_meta or self.bits.is_meta or not bool(torch.isfinite(w).all()):
            return self.state_dict()
        step = grid_step(w.to(self.alpha_start), int(self.bits), per_row=self.per_row)
        zero = torch.zeros_like(step)
        return {
            **self.state_dict(),
            "alpha_start": step,
            "sigma_start": step * (self.sigma_start / self.alpha_start),
            "log_alpha": zero,
            "log_sigma": zero,
        }

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        if self.dropbits and not self.finished.is_meta:
            self._open_gates(not bool(self.finished))

    @staticmethod
    def launch(quantizers, w):
        _, mode, grad, gated = quantizers[0].batch_key
        alpha, sigma = _scales(quantizers, w)
        gates, seed = _gates(quantizers, alpha[0].dtype) if gated else None, None
        bits = torch.stack([v.bits if v.training else v.bits_that_stay() for v in quantizers])
        if mode == "sample":
            seed = torch.randint(2**62, (), dtype=torch.int64, device=w[0].device)
        q = call(
            ops.categorical,
            w,
            alpha,
            sigma,
            bits,
            gates,
            seed,
            MODES.index(mode),
            GRADS.index(grad),
            True,
            checks.dtype_of(None, w),
        )
        return Quantized(q, alpha, sigma, bits)

    @staticmethod
    def revive(quantizers, w, result):
        _, mode, grad, _ = quantizers[0].batch_key
        alpha, sigma = _scales(quantizers, w)
        q = _Revive.apply(result, (MODES.index(mode), GRADS.index(grad)), *w, *alpha, *sigma)
        return Quantized(list(q), alpha, sigma, result.bits)

    @staticmethod
    def measure(quantizers, w):
        alpha, sigma = _scales(quantizers, w)
        bits = torch.stack([p.bits_that_stay() for p in quantizers])
        q = call(ops.categorical, w, alpha, sigma, bits, None, None, 0, 0, True, alpha[0].dtype)
        top = [float(a.max()) if a.numel() else 0.0 for a in alpha]
        return [
            (n, 0, 0.0, float((v.double() - t.double()).square().sum()), s * 2 ** (n - 1))
            for v, t, s, n in zip(q, w, top, bits.tolist())
        ]

    def to_int(self, w):
        """q = alpha j is the dyadic grid with scale alpha 2^(n-1): its step is alpha, bit for bit."""
        alpha, sigma = _scales([self], [w])
        bits = self.bits_that_stay().reshape(1)
        n, alpha = int(bits), alpha[0]
        q = call(ops.categorical, [w], [alpha], sigma, bits, None, None, 0, 0, True, alpha.dtype)[0]
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


def _gates(quantizers, dtype):
    """A draw of the gates of each layer: z in [0, 1], and 1 for the bits that have none."""
    draw = each(
        lambda log_a: hard_concrete(log_a.to(dtype), torch.rand_like(log_a, dtype=dtype)), [p.log_a for p in quantizers]
    )
    one = draw[0].new_ones(max(p.min_bits for p in quantizers))
    return [torch.cat([one[: p.min_bits], z]) for p, z in zip(quantizers, draw)]


def hard_concrete(log_a, u):
    """z = clamp(S((log u - log(1-u) + log_a)/b) (zeta - gamma) + gamma, 0, 1) of uniform u; Louizos et al. 2018."""
    return (torch.sigmoid((torch.logit(u) + log_a) / TEMPERATURE) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


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
    total = layers[0].log_a.new_zeros(())
    for p in layers:
        if p.gated:
            total = total + torch.sigmoid(p.log_a - SHIFT).sum().to(total)
    return total


@torch.no_grad()
def finish_dropbits(model):
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
