"""The controller of MSQ (arXiv 2507.22349): drops the bits that have fallen silent while training goes on."""

import copy
import logging
import math
import re
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantops import processes
from quantops.convert import check_choice, check_int
from quantops.differences import trace_by_differences
from quantops.hessian import hessian_trace
from quantops.methods.msq import LEAST_BITS, constant_scales, holding_q, msq_layers
from quantops.nn import quantized
from quantops.reference.uniform import GRIDS, MAX_BITS
from quantops.report import compression, measure
from quantops.sharded import fsdp_modules
from quantops.types import Path

STRENGTH = 0.3  # in units of the gradient
_PARAMS = re.compile(r"params\[([0-9, ]+)\]")  # in errors of traces, which know weights by their places

logger = logging.getLogger("quantops.controller")


class MSQController:
    """Drops bits while training goes on, until the model is small enough; arXiv 2507.22349.

        controller = MSQController(model, target=10.7, interval=100, threshold=0.3, strength=5e-5)
        for x, y in batches:
            (loss(model(x), y) + controller.strength * quantops.penalty(model)).backward()
            optimizer.step(); optimizer.zero_grad()
            controller.step(lambda: loss(model(x), y))

    Every ``interval`` calls of :meth:`step` it decides, from the weights as they are:

        E_l = sum (q - w)^2,  Omega_l = tr(H_l) * E_l                     tr(H_l) by :func:`quantops.hessian_trace`
        k_l = 2 where Omega_l < mean(Omega) else 1,  with n_l - k_l >= min_bits, 0 where no bit can go
        beta_l = fraction of weights with B_(k_l) != 0
        n_l -= k_l where beta_l < threshold (k_l = 1 for 2, see fall_back), in order of increasing Omega, until
        compression = 32 * sum(numel) / sum(numel * n_l) >= target

    so that no layer loses a bit after the target is reached. Omega, and its mean, are over the layers with "prune" on.
    The compression is over all weights quantized with MSQConfig, those with fixed bits too; other weights do not count,
    nor, as papers have it, do the signs of the sign grid.
    The new k_l stays, limited again, for the penalty of the steps that follow.

    Args:
        target: compression to reach, e.g. 32 / 3 for 3 bits on average.
        interval: calls of step() per decision.
        threshold: beta below which a layer loses k bits, in (0, 1].
        strength: lambda of the penalty, read back through :attr:`strength`. None: 0.3 with
            penalty_unit="gradient", the one unit in which it means the same for all networks and optimizers; chosen
            with a threshold of 0.5, on ResNet-20 and a ViT.
        hessian: True: traces by second derivatives, and by differences of gradients with FSDP2, through which there
            are none; scales are constants in both. "differences": by these everywhere, as through compiled models
            and ops with a first derivative alone. False: k stays 1, and layers are taken in order of increasing beta;
            so also where step() gets no loss_fn.
        samples: Hutchinson vectors per decision.
        min_bits: bits that a layer keeps; default and least: 2 on the dyadic grid, where 1 bit has the values -s and 0
            and no positive one, 1 on the others.
        fall_back: True: a layer with k = 2 whose beta is not below the threshold is measured at k = 1 too, and loses
            one bit where that beta is. False: the rule of the paper alone, by which layers that the Hessian calls
            insensitive may keep their bits longest: of weights that lie anywhere 1/2 have B_1 != 0 and 3/4 B_2 != 0.
            With ResNet-20 on CIFAR-10, 15 steps a decision and a threshold of 0.5, layers with k = 1 lost bits in 91 %
            of the first ten decisions, those with k = 2 in 13 %, and training ended short of the target, at 2.23
            bits and 79.6 %; with True at 2.00 bits and 81.8 % (300 steps, one seed).
        seed: with the number of decisions taken, the seed of the vectors.
        process_group: with torch.distributed, the processes that decide together; None: the default group. All of them
            call :meth:`step`, each with a loss of its own batch, and take one decision, from the means over them. Where
            one raises, after the collectives of the model itself, all raise.
        patience: decisions without a bit that falls, after which a warning is logged.

    Traces need a second derivative, which fused attention has not: while ``loss_fn`` runs,
    torch.nn.functional.scaled_dot_product_attention is computed by torch's own "math" kernels. Differences do without:

        tr(H_l) = E[v_l . (grad_l(q + eps v) - grad_l(q - eps v))] / (2 eps),  eps = 1 % of the weights' rms

    with the same v, so the same traces but for the curvature's own change over eps, which is most where gradients
    jump (ReLU, quantized activations) or are rounded (bfloat16). They call ``loss_fn`` twice for each of ``samples``,
    with one random state: it must compute the loss of one batch. Scales are constants for them. Weights are moved in
    place meanwhile, each process its part, and are then what they were, bit for bit.

    Decisions are logged to the logger "quantops.controller", by one process for all: INFO, and WARNING where no bits
    fall for ``patience`` decisions, or where none of the penalty was computed since the last one.

    ``log`` is a list with a dict per decision, fit for JSON: step, compression_before, compression, done, and layers,
    each with name, bits and k (those beta was measured at), beta, sq_error, trace and omega (None without Hessian),
    pruned (bits dropped) and bits_after. :meth:`plot` draws it.

    Checkpoints: the bits are in the model's state dict, the rest in :meth:`state_dict`. With model, optimizer and
    controller restored, training goes on bit for bit.

    Raises ValueError for a model without MSQ layers to prune, frozen ones among them, a target that min_bits keeps out
    of reach, and options out of range.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        target: float,
        *,
        interval: int = 1,
        threshold: float,
        strength: float | None = None,
        hessian: bool | str = True,
        samples: int = 8,
        min_bits: int | None = None,
        fall_back: bool = True,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
        patience: int = 10,
    ) -> None:
        self._model, self.process_group = model, process_group
        self._all = msq_layers(model)
        self._layers = [entry for entry in self._all if entry[2].prune]
        if not self._layers:
            raise ValueError("model: expected MSQ layers with prune on, all of them have fixed bits")
        for name, owner, _ in self._layers:
            if not owner.original.requires_grad:
                raise ValueError(
                    f"{name or 'model'}: expected a weight that requires grad; set "
                    '{"prune": False} for it in MSQConfig.overrides'
                )
        self.interval = check_int("interval", interval, 1, 2**62)
        self.samples = check_int("samples", samples, 1, 2**31)
        of_use = max(LEAST_BITS[GRIDS[p.grid]] for _, _, p in self._layers)
        self.min_bits = check_int("min_bits", of_use if min_bits is None else min_bits, 1, MAX_BITS)
        if self.min_bits < of_use:
            raise ValueError(
                f"min_bits: expected at least {of_use}, since 1 bit on the dyadic grid has the values -s "
                f"and 0 and no positive one (the grids 'sign' and 'full' have one), got {min_bits}"
            )
        self.seed = check_int("seed", seed, 0, 2**32)
        self.patience = check_int("patience", patience, 1, 2**31)
        self.hessian = check_choice("hessian", hessian, (True, False, "differences"))
        self.fall_back = check_choice("fall_back", fall_back, (True, False))
        self.target = _number("target", target, 1, math.inf)
        self.threshold = _number("threshold", threshold, 0, 1)
        if strength is None:
            if any(p.unit != "gradient" for _, _, p in self._all):
                raise ValueError("strength: expected a number, or weights with penalty_unit='gradient', got None")
            strength = STRENGTH
        self._strength = _number("strength", strength, 0, math.inf)
        least = [min(n, self.min_bits) if p.prune else n for (_, _, p), n in zip(self._all, self._bits())]
        if compression(self._sizes(), least) < self.target:
            raise ValueError(
                f"target: {self.target} is out of reach, min_bits = {self.min_bits} and the layers with "
                f"fixed bits allow {compression(self._sizes(), least):.4g}"
            )
        self.log: list[dict[str, Any]] = []
        self._steps, self._decisions = 0, 0
        self._since, self._idle = 0, 0  # steps since the last decision that this object saw; decisions without a drop
        self._done = self.compression >= self.target

    def _sizes(self):
        return [owner.original.numel() for _, owner, _ in self._all]

    def _bits(self):
        return [int(p.bits) for _, _, p in self._all]

    @property
    def compression(self) -> float:
        """32 * sum(numel) / sum(numel * bits) of the MSQ weights now."""
        return compression(self._sizes(), self._bits())

    @property
    def done(self) -> bool:
        """True once the target is reached: finetune from here."""
        return self._done

    @property
    def strength(self) -> float:
        """lambda while bits are being dropped, 0.0 once done."""
        return 0.0 if self._done else self._strength

    def step(self, loss_fn: Callable[[], torch.Tensor] | None = None) -> dict[str, Any] | None:
        """Counts a training step; at every ``interval``-th decides and returns the log entry, otherwise None.

        ``loss_fn``: called without arguments at a decision, gives the scalar task loss on some batch (leave the penalty
        out: it is linear). Whatever else it changes (batch norm statistics, random state) is the caller's; ``.grad`` is
        not touched. Where it raises, nothing is decided and this step is not counted: the next call decides.
        """
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(f"loss_fn: expected a function without arguments, got {type(loss_fn).__name__}")
        if self._done or (self._steps + 1) % self.interval:
            self._steps += 1
            self._since += 1
            return None
        for name, _, p in self._layers:
            if p.group is None:
                raise ValueError(
                    f"model: {name or 'it'} is not quantized any more; expected the quantizers that the "
                    "controller was made for"
                )
        before = [(p, int(p.bits), int(p.k)) for _, _, p in self._layers]
        try:
            entry = self._decide(loss_fn if self.hessian else None)
        except BaseException:
            for p, bits, k in before:
                p.set_precision(bits, k)
            raise
        self._steps += 1
        self.log.append(entry)
        self._tell(entry)
        return entry

    def _tell(self, entry):
        """Logs a decision and what looks like a mistake in the training loop."""
        dropped = [r for r in entry["layers"] if r["pruned"]]
        used = [p for _, _, p in self._all if p.penalized]
        unused = self._strength and not used and self._since + 1 >= self.interval
        self._since, self._idle = 0, 0 if dropped else self._idle + 1
        for p in used:
            p.penalized = False
        if not processes.leads(self.process_group):
            return
        logger.info(
            "step %d: compression %.2fx, %d of %d layers lose bits%s%s",
            entry["step"],
            entry["compression"],
            len(dropped),
            len(entry["layers"]),
            ": " + ", ".join(f"{r['name']} {r['bits']} -> {r['bits_after']}" for r in dropped) if dropped else "",
            "; the target is reached" if entry["done"] else "",
        )
        if entry["done"]:
            return
        if unused:
            logger.warning(
                "step %d: no penalty was computed since the last decision: add strength * quantops.penalty(model) to "
                'the loss, or call quantops.add_penalty_grad_ with penalty="decoupled"',
                entry["step"],
            )
        if self._idle and self._idle % self.patience == 0:
            least = min(r["beta"] for r in entry["layers"])
            logger.warning(
                "step %d: no bits have fallen for %d decisions: the least beta is %.3g, the threshold %g; a larger "
                "strength, or a longer interval, lowers beta",
                entry["step"],
                self._idle,
                least,
                self.threshold,
            )

    def _measure(self, pairs):
        """{quantizer: (k, beta, sq_error)}, the means over the processes."""
        found = {}

        def own():
            found.update(measure(pairs))
            return [v for p, _ in pairs for v in found[p][2:4]]

        means = processes.mean(own, 2 * len(pairs), self.process_group, pairs[0][1].device)
        return {p: (found[p][1], means[2 * i], means[2 * i + 1]) for i, (p, _) in enumerate(pairs)}

    def _decide(self, loss_fn):
        traces = None if loss_fn is None else self._traces(loss_fn)
        with torch.no_grad():
            pairs = [(p, owner.original) for _, owner, p in self._layers]
            bits = [int(p.bits) for p, _ in pairs]
            omegas, wanted = [None] * len(pairs), [1] * len(pairs)
            if traces is not None:
                measured = self._measure(pairs)
                omegas = [t * measured[p][2] for t, (p, _) in zip(traces, pairs)]
                mean = sum(omegas) / len(omegas)
                wanted = [2 if v < mean else 1 for v in omegas]
            for (p, _), n, k in zip(pairs, bits, wanted):
                p.set_precision(n, self._limit(k, n))
            measured = self._measure(pairs)
            if self.fall_back:
                measured |= self._one_instead(pairs, measured)
            rows = [
                {
                    "name": name or "model",
                    "bits": n,
                    "k": measured[p][0],
                    "beta": measured[p][1],
                    "sq_error": measured[p][2],
                    "trace": t,
                    "omega": v,
                    "pruned": 0,
                    "bits_after": n,
                }
                for (name, _, p), n, t, v in zip(self._layers, bits, traces or omegas, omegas)
            ]
            before = self.compression
            self._prune(rows, [p for p, _ in pairs], wanted)
        self._decisions += 1
        self._done = self.compression >= self.target
        return {
            "step": self._steps + 1,
            "compression_before": before,
            "compression": self.compression,
            "done": self._done,
            "layers": rows,
        }

    def _one_instead(self, pairs, measured):
        """What :meth:`_measure` gives at k = 1 of the layers that may lose one bit and not two; their k stays."""
        again = [(p, w) for p, w in pairs if measured[p][0] == 2 and not measured[p][1] < self.threshold]
        if not again:
            return {}
        bits = [int(p.bits) for p, _ in again]
        for (p, _), n in zip(again, bits):
            p.set_precision(n, 1)
        found = self._measure(again)
        for (p, _), n in zip(again, bits):
            p.set_precision(n, 2)
        return {p: v for p, v in found.items() if v[1] < self.threshold}

    def _limit(self, k, bits):
        return max(0, min(k, bits - self.min_bits))

    def _prune(self, rows, quantizers, wanted):
        order = sorted(range(len(rows)), key=lambda i: rows[i]["beta" if rows[i]["omega"] is None else "omega"])
        left = {p: n for (_, _, p), n in zip(self._all, self._bits())}  # read once: on a GPU each read waits
        for i in order:
            row = rows[i]
            if compression(self._sizes(), left.values()) >= self.target:
                break
            if row["k"] and row["beta"] < self.threshold:
                row.update(pruned=row["k"], bits_after=row["bits"] - row["k"])
                quantizers[i].set_precision(row["bits_after"], self._limit(wanted[i], row["bits_after"]))
                left[quantizers[i]] = row["bits_after"]

    def _traces(self, loss_fn):
        weights = [owner.original for _, owner, _ in self._layers]
        values = processes.mean(
            lambda: self._own_traces(loss_fn).tolist(), len(weights), self.process_group, weights[0].device
        )
        for (name, _, _), v in zip(self._layers, values):
            if not math.isfinite(v):
                raise ValueError(f"loss_fn: the Hessian trace of {name or 'model'} is {v}; is the loss finite?")
        return values

    def _own_traces(self, loss_fn):
        seed = (self.seed * 1_000_003 + self._decisions) % 2**63
        whole = fsdp_modules(self._model)
        for module in whole:
            module.reshard()  # a forward without a backward pass may have left weights whole
        weights = [owner.original for _, owner, _ in self._layers]
        for name, owner, _ in self._layers:
            if not owner.original.requires_grad:
                raise ValueError(
                    f"{name or 'model'}: expected a weight that requires grad, got one that was frozen after the "
                    "controller was made; a trace needs its gradient, MSQController(hessian=False) does not"
                )
        names = [name or "model" for name, _, _ in self._layers]
        with torch.enable_grad(), processes.unsynchronized(self._model), _naming(names):
            if whole or self.hessian == "differences":
                with holding_q(self._layers) as inside:
                    return trace_by_differences(
                        loss_fn, weights, self.samples, model=self._model, inside=inside, seed=seed
                    )
            # Around the products too: what is checkpointed is computed again there.
            with sdpa_kernel(SDPBackend.MATH), constant_scales(self._all):
                return hessian_trace(loss_fn(), weights, self.samples, seed=seed)

    def state_dict(self) -> dict[str, Any]:
        """Steps, decisions, log and seed: plain Python values. Bits and k are in the model's own state dict."""
        return {
            "version": 2,
            **self._own(),
            "steps": self._steps,
            "decisions": self._decisions,
            "done": self._done,
            "seed": self.seed,
            "log": copy.deepcopy(self.log),
        }

    def belongs_to(self, model: torch.nn.Module) -> bool:
        """Whether ``model`` has the layers that the controller was made for."""
        return {p for _, _, p in self._all} <= {p for _, _, p in quantized(model)}

    def plot(self, path: Path) -> None:
        """Bits and beta of each layer, and the compression, over the training steps of :attr:`log`, as a picture.

        ``path``: a file, whose ending is its format (.png, .pdf, .svg). Needs matplotlib, of quantops[demo]. Raises
        ValueError before the first decision.
        """
        from quantops.plots import plot_decisions

        plot_decisions(self.log, path)

    def _own(self):
        return {
            "names": [name for name, _, _ in self._layers],
            "sizes": [owner.original.numel() for _, owner, _ in self._layers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up :meth:`state_dict`; load the model's state dict too.

        Raises TypeError for what is not a dict, and ValueError where a value is none that state_dict() gives or the
        names or sizes of the layers differ from this model's, naming it, with the controller untouched.
        """
        if not isinstance(state, dict):
            raise TypeError(f"state: expected what MSQController.state_dict() gives, got {type(state).__name__}")
        version, own = state.get("version"), self._own()
        if version == 1:  # has no sizes
            del own["sizes"]
        missing = {*own, "steps", "decisions", "done", "seed", "log"} - set(state)
        if missing or version not in (1, 2) or isinstance(version, bool):
            raise ValueError(
                f"state: expected version 2 of MSQController.state_dict(), got version {version!r}, "
                f"missing {sorted(missing)}"
            )
        for key, expected in own.items():
            if not isinstance(state[key], (list, tuple)) or list(state[key]) != expected:
                told = "the layers" if key == "names" else "layers of so many weights:"
                raise ValueError(f"state: expected {told} {expected}, got {state[key]!r}")
        steps = check_int("state: steps", state["steps"], 0, 2**62)
        check_int("state: decisions", state["decisions"], 0, steps)
        check_int("state: seed", state["seed"], 0, 2**32)
        check_choice("state: done", state["done"], (True, False))
        names = [name or "model" for name in own["names"]]
        if not isinstance(state["log"], list) or not all(_is_decision(entry, names) for entry in state["log"]):
            raise ValueError(
                f"state: expected log, a list with a dict per decision, of the layers {names}, got {state['log']!r}"
            )
        log = copy.deepcopy(state["log"])
        self._steps, self._decisions, self._done = steps, state["decisions"], state["done"]
        self.seed, self.log = state["seed"], log


@contextmanager
def _naming(names):
    """The names of layers in errors that have their places in the list alone."""
    try:
        yield
    except ValueError as error:
        found = _PARAMS.match(str(error))
        if found is None:
            raise
        layers = ", ".join(names[int(i)] for i in found[1].split(","))
        raise ValueError(f"loss_fn: {layers}{str(error)[found.end() :]}") from error


def _is_decision(entry, names):
    """Whether it is an entry of a log, of layers of these names, with what :meth:`MSQController.plot` reads."""
    if not isinstance(entry, dict) or not isinstance(rows := entry.get("layers"), list):
        return False
    numbers = [entry.get(key) for key in ("step", "compression_before", "compression")]
    if not all(isinstance(row, dict) for row in rows) or [row.get("name") for row in rows] != names:
        return False
    numbers += [row.get(key) for row in rows for key in ("bits", "beta", "bits_after")]
    return all(isinstance(v, (int, float)) for v in numbers)


def _number(name, value, low, high):
    """``value`` where it is a finite number above ``low`` (strength: from ``low`` on) and up to ``high``."""
    inside = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not inside or value > high or value < low or (value == low and name != "strength"):
        raise ValueError(f"{name}: expected a finite number above {low}, up to {high}, got {value!r}")
    return float(value)
