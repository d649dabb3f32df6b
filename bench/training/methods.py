"""What each method adds to the training loop of train.py: a class each, with the settings of recipes.py."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

import quantops
from bench.training import bitlevel
from quantops.report import compression

RE_ESTIMATE = 20  # training batches that batch norms are re-estimated from


class Float:
    """Unquantized training, and what the methods have in common. ``steps``: of the whole run.

    The loop calls ``backward`` for each batch, then its optimizer, then ``after_step``, which says whether Parameters
    have been replaced or are trained no more; ``finish`` once at the end. ``forward(x)`` gives float32 logits; it may
    be compiled, and computes in the arithmetic of the run.
    """

    def __init__(self, model, steps):
        self.model, self.steps, self.log = model, steps, []

    def penalty(self):
        """What is added to the loss, or None."""
        return None

    def backward(self, forward, x, y):
        """Adds to the gradients; gives the task's loss, detached."""
        loss = F.cross_entropy(forward(x), y)
        penalty = self.penalty()
        (loss if penalty is None else loss + penalty).backward()
        return loss.detach()

    def after_step(self, step, x, y):
        """Called with the number of steps taken; whether the optimizer is to start anew."""
        return False

    def finish(self):
        """Makes the weights what is served."""

    def decays(self, parameter):
        """Weight decay is for weights; not for batch norms, biases and scales."""
        acts = (m for m in self.model.modules() if isinstance(m, quantops.UniformActivation))
        return parameter.dim() > 1 and not any(parameter is p for m in acts for p in m.parameters())

    def rate(self, parameter):
        """Its learning rate, as a multiple of that of the run."""
        return 1.0

    def average_bits(self):
        """Of the quantized layers now, or None."""
        return None

    def accuracies(self, accuracy, batches):
        """{name: value} of ``accuracy()`` in every state that counts. ``batches()``: training batches."""
        return {"final": accuracy()}

    def state(self):
        """What the state dict of the model does not hold."""
        return {"log": self.log}

    def load(self, state):
        """Before the model's own state dict is loaded: gives Parameters their shapes."""
        self.log = state["log"]


class MSQ(Float):
    """MSQ with a controller down to ``target``; with target None, training at constant bits. ``nearest``: None, or a
    number f: once the target is reached, the layers train on with the nearest rule, with the bits that they have and a
    scale of f mean|w|."""

    def __init__(
        self,
        model,
        steps,
        *,
        bits,
        k,
        target,
        grid,
        scale,
        penalty,
        hessian,
        threshold,
        strength,
        prune,
        decisions,
        samples,
        sample_size,
        min_bits,
        nearest,
        scale_grad,
        penalty_unit,
        fall_back,
        act_bits=None,
        act_outputs=(),
        overrides=None,
    ):
        super().__init__(model, steps)
        self.nearest, self.found = nearest, None  # the bits of each layer, once they are final
        if nearest is not None and target is None:
            raise ValueError("nearest: expected None, for no bits are found without a target")
        if nearest is not None:
            self._config({"*": bits})  # ValueError now, not when the bits are found
        quantops.quantize_(
            model,
            quantops.MSQConfig(
                bits=bits,
                k=k,
                grid=grid,
                scale=scale,
                penalty=penalty,
                scale_grad=scale_grad,
                penalty_unit=penalty_unit,
                act_bits=act_bits,
                act="input",
                act_outputs=act_outputs,
                overrides=overrides or {},
            ),
        )
        self.decoupled, self.sample_size, self.controller = penalty == "decoupled", sample_size, None
        if target is not None:
            self.controller = quantops.MSQController(
                model,
                target,
                interval=max(1, int(prune * steps / decisions)),
                threshold=threshold,
                strength=strength,
                hessian=hessian,
                samples=samples,
                min_bits=min_bits,
                fall_back=fall_back,
            )
            self.log = self.controller.log

    @property
    def strength(self):
        return 0.0 if self.controller is None else self.controller.strength

    def penalty(self):
        return self.strength * quantops.penalty(self.model) if self.strength and not self.decoupled else None

    def backward(self, forward, x, y):
        loss = super().backward(forward, x, y)
        if self.strength and self.decoupled:
            quantops.add_penalty_grad_(self.model, self.strength)
        return loss

    def after_step(self, step, x, y):
        if self.controller is not None:
            self.controller.step(lambda: self._loss(x[: self.sample_size], y[: self.sample_size]))
            if self.nearest is not None and self.controller.done and self.found is None:
                self._go_on({row.name: row.bits for row in quantops.bit_report(self.model).rows})
        return False

    def _config(self, bits):
        return quantops.TruncQuantConfig(
            bits=(max(bits.values()),),
            rule="nearest",
            scale=self.nearest,
            batch_norm=False,
            overrides={name: {"bits": n} for name, n in bits.items()},
        )

    def _go_on(self, bits):
        """By the nearest rule, with these bits. The weights stay the same Parameters."""
        self.found, config = bits, self._config(bits)
        quantops.quantize_(quantops.unquantize_(self.model), config)

    def _loss(self, x, y):
        """For the Hessian: in float32, and the running statistics of batch norms do not see it."""
        norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]
        before = [(m, m.momentum) for m in norms]
        for m in norms:
            m.momentum = 0.0
        try:
            with sdpa_kernel(SDPBackend.MATH):  # which alone can be differentiated twice
                return F.cross_entropy(self.model(x), y)
        finally:
            for m, momentum in before:
                m.momentum = momentum

    def average_bits(self):
        return quantops.bit_report(self.model).average_bits

    def state(self):
        return {"controller": None if self.controller is None else self.controller.state_dict(), "found": self.found}

    def load(self, state):
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])
            self.log = self.controller.log
        if state["found"] is not None:
            self._go_on(state["found"])


class Truncated(Float):
    """Weights that are served at any of ``widths``. joint: TruncQuant, every step trains all of them; else ordinary
    training at the widest. distill, distill_from: see quantops.joint_step. shortcuts: False leaves them float."""

    def __init__(self, model, steps, *, widths, joint, distill, distill_from="widest", shortcuts=True, **settings):
        super().__init__(model, steps)
        self.widths, self.joint, self.distill, self.distill_from = widths, joint, distill, distill_from

        def chosen(name, layer):
            return quantops.is_linear_or_conv(name, layer) and (shortcuts or "down" not in name.split("."))

        quantops.quantize_(model, quantops.TruncQuantConfig(bits=widths, **settings), chosen)

    def backward(self, forward, x, y):
        if not self.joint:
            return super().backward(forward, x, y)
        with forward.autocast():  # around the call of the root, where the weights are quantized
            done = quantops.joint_step(
                forward.model,
                lambda out: F.cross_entropy(out.float(), y),
                x,
                weights=[1 / len(self.widths)] * len(self.widths),
                distill=self.distill,
                distill_from=self.distill_from,
            )
        return done.loss

    def average_bits(self):
        return float(self.widths[0])

    def accuracies(self, accuracy, batches):
        found = {}
        for m in self.widths:
            quantops.set_bits(self.model, m)
            found[f"{m} bits"] = accuracy()
        quantops.set_bits(self.model)
        found["final"] = found[f"{self.widths[0]} bits"]
        if not self.joint and len(self.widths) > 1:
            found |= self._re_estimated(accuracy, batches)
        return found

    def _re_estimated(self, accuracy, batches):
        """Each width once more, with batch norms that have seen activations of that width."""
        found, before = {}, copy.deepcopy(self.model.state_dict())
        for m in self.widths:
            quantops.set_bits(self.model, m)
            re_estimate(self.model, batches())
            found[f"{m} bits, norms re-estimated"] = accuracy()
        self.model.load_state_dict(before)
        return found


@torch.no_grad()
def re_estimate(model, batches):
    """The running statistics of batch norms as the plain mean over ``RE_ESTIMATE`` batches."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
    model.train()
    for _, (x, _) in zip(range(RE_ESTIMATE), batches):
        model(x)
    for m, momentum in zip(norms, momenta):
        m.momentum = momentum


class CPQ(Float):
    """The categorical quantizer; ``settings``: of quantops.CPQConfig. With DropBits, gates are drawn for ``search``,
    a part of the steps; then the bits that stay are trained on. strength: of the gates' penalty, gate_rate: their
    learning rate as a multiple of the run's."""

    def __init__(self, model, steps, *, search, strength, gate_rate, **settings):
        super().__init__(model, steps)
        if not 0 < search <= 1:
            raise ValueError(f"search: expected a part of the steps, in (0, 1], got {search!r}")
        quantops.quantize_(model, quantops.CPQConfig(**settings))
        self.until, self.strength, self.gate_rate = max(1, int(search * steps)), strength, gate_rate
        self.drops, self.learned = settings["dropbits"] is not None, settings["dropbits"] == "learned"
        self.gates = {id(p) for name, p in model.named_parameters() if name.endswith("log_a")}

    def penalty(self):
        return self.strength * quantops.penalty(self.model) if self.learned and self.drops else None

    def after_step(self, step, x, y):
        if not self.drops or step < self.until:
            return False
        self._finish_dropbits()
        report = quantops.bit_report(self.model)
        self.log.append(
            {
                "step": step,
                "compression": report.compression,
                "average_bits": report.average_bits,
                "layers": [{"name": row.name, "bits_after": row.bits} for row in report.rows],
            }
        )
        return True

    def _finish_dropbits(self):
        quantops.finish_dropbits(self.model)
        self.drops = False

    def rate(self, parameter):
        return self.gate_rate if id(parameter) in self.gates else 1.0

    def average_bits(self):
        return quantops.bit_report(self.model).average_bits

    def state(self):
        return super().state() | {"drops": self.drops}

    def load(self, state):
        super().load(state)
        if self.drops and not state["drops"]:
            self._finish_dropbits()


class _BitLevel(Float):
    """Every bit a parameter; ``kind`` is the parametrization."""

    kind = None

    def __init__(self, model, steps, bits):
        super().__init__(model, steps)
        for name, layer in list(model.named_modules()):
            if quantops.is_linear_or_conv(name, layer):
                parametrize.register_parametrization(layer, "weight", self.kind(layer.weight, bits), unsafe=True)
        self.layers = bitlevel.parametrized(model, self.kind)  # once: a walk through the modules is not free

    def _compression(self, widths):
        """(average bits, compression) of {name: (weights, bits)}."""
        sizes, bits = zip(*widths.values())
        return sum(n * b for n, b in zip(sizes, bits)) / sum(sizes), compression(sizes, bits)

    def widths(self):
        """{name: (weights, bits)}."""
        return {name: (p.shape.numel(), p.bits) for name, _, p in self.layers}

    def average_bits(self):
        return self._compression(self.widths())[0]

    def note(self, step):
        """Adds the bits to the log."""
        average, ratio = self._compression(self.widths())
        self.log.append(
            {
                "step": step,
                "compression": ratio,
                "average_bits": average,
                "layers": [{"name": name, "bits_after": bits} for name, (_, bits) in self.widths().items()],
            }
        )


class BSQ(_BitLevel):
    """BSQ: group lasso on bit planes, now and then an adjustment of the precisions, then finetuning at fixed bits."""

    kind = bitlevel.BSQWeight

    def __init__(self, model, steps, *, bits, strength, adjustments, search):
        super().__init__(model, steps, bits)
        self.strength, self.interval, self.fixed = strength, max(1, int(search * steps / adjustments)), None
        self.until = self.interval * adjustments

    def penalty(self):
        if self.fixed is not None:
            return None
        return self.strength * bitlevel.group_lasso([(p.bits, bitlevel.planes(layer)) for _, layer, p in self.layers])

    @torch.no_grad()
    def after_step(self, step, x, y):
        if self.fixed is not None:
            for _, layer, p in self.finetuned:
                p.clamp_(layer.parametrizations.weight.original)
            return False
        every = [bitlevel.planes(layer) for _, layer, _ in self.layers]
        torch._foreach_clamp_min_(every, 0.0)
        torch._foreach_clamp_max_(every, 2.0)
        if step % self.interval:
            return False
        self.finish()
        self.note(step)
        if step >= self.until:
            self.fix({name: p.bits for name, _, p in self.layers})
        return True

    def finish(self):
        """Adjusts the precisions: planes of zeros and ones, no more of them than the weights need."""
        for _, layer, p in self.layers:
            bitlevel.set_planes(layer, p.adjust(bitlevel.planes(layer)))

    def fix(self, widths):
        """Float weights from here on, quantized to the bits that were found."""
        self.fixed = widths
        for name, layer, p in self.layers:
            fixed = bitlevel.FixedBits(p, layer.weight, widths[name])
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            parametrize.register_parametrization(layer, "weight", fixed, unsafe=True)
        self.layers, self.finetuned = [], bitlevel.parametrized(self.model, bitlevel.FixedBits)

    def widths(self):
        if self.fixed is None:
            return super().widths()
        return {name: (self.model.get_submodule(name).weight.numel(), bits) for name, bits in self.fixed.items()}

    def state(self):
        return {"log": self.log, "fixed": self.fixed, "bits": {name: p.bits for name, _, p in self.layers}}

    def load(self, state):
        super().load(state)
        if state["fixed"] is not None:
            self.fix(state["fixed"])
        for name, layer, p in self.layers:
            p.resize(state["bits"][name])
            bitlevel.set_planes(layer, bitlevel.planes(layer).new_zeros(p.bits, 2, p.shape.numel()))


class CSQ(_BitLevel):
    """CSQ: sigmoids in the place of bits and of their choice, hotter with every step; the choice is made first."""

    kind = bitlevel.CSQWeight

    def __init__(self, model, steps, *, bits, target, strength, hottest, search):
        super().__init__(model, steps, bits)
        self.target, self.strength, self.hottest = target, strength, hottest
        self.until, self.chosen = max(1, int(search * steps)), None
        self.sizes = torch.tensor([float(p.shape.numel()) for _, _, p in self.layers])

    def penalty(self):
        if self.chosen is not None:
            return None
        gates = torch.stack([p.gates for _, _, p in self.layers])
        self.sizes = self.sizes.to(gates.device)
        average = self.sizes @ (gates > 0).sum(1).float() / self.sizes.sum()
        kept = torch.sigmoid(torch.stack([p.beta_gates for _, _, p in self.layers])[:, None] * gates).sum()
        return self.strength * (average - self.target) * kept

    def after_step(self, step, x, y):
        self._heat([p.beta for _, _, p in self.layers], step / self.steps)
        if self.chosen is not None:
            return False
        self._heat([p.beta_gates for _, _, p in self.layers], step / self.until)
        if step < self.until:
            return False
        self.chosen = {name: (p.gates > 0).nonzero().flatten().tolist() for name, _, p in self.layers}
        self.note(step)
        for _, layer, p in self.layers:
            bitlevel.set_planes(layer, p.keep_chosen(bitlevel.planes(layer)))
        return True

    def _heat(self, betas, part):
        torch._foreach_zero_(betas)
        torch._foreach_add_(betas, self.hottest ** min(part, 1.0))

    def finish(self):
        for _, layer, p in self.layers:
            p.harden(bitlevel.planes(layer))

    def decays(self, parameter):
        return super().decays(parameter) and not any(parameter is bitlevel.planes(m) for _, m, _ in self.layers)

    def state(self):
        return {"log": self.log, "chosen": self.chosen}

    def load(self, state):
        super().load(state)
        self.chosen = state["chosen"]
        for name, layer, p in self.layers if self.chosen is not None else ():
            p.resize(self.chosen[name])
            bitlevel.set_planes(layer, bitlevel.planes(layer).new_zeros(len(self.chosen[name]), 2, p.shape.numel()))
