"""Joint steps of TruncQuant (arXiv 2506.11431): all widths of one set of weights are trained in one step."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from quantops import processes
from quantops.autocast import of_layers
from quantops.convert import check_choice
from quantops.methods.truncquant import network_of
from quantops.nn import as_weights, batches, rows_of, trackable
from quantops.owners import check_module


class Joint(NamedTuple):
    """What a joint step gives: the loss, and the losses it is the weighted sum of, {width: detached}."""

    loss: torch.Tensor
    losses: dict[int, torch.Tensor]


def joint_loss(
    model: torch.nn.Module,
    loss_fn: Callable[[Any], torch.Tensor] | None,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    distill: float = 0.0,
    temperature: float = 1.0,
    distill_from: str = "widest",
    teacher: Any = None,
    distill_fn: Callable[[Any, Any], torch.Tensor] | None = None,
) -> Joint:
    """The sum over widths m of weights[m] * loss_m, for one backward pass: :class:`Joint`.

        widest    loss = loss_fn(model(*inputs, **kwargs))
        others    loss = (1 - distill) * loss_fn(out) + distill * T^2 * KL(softmax(out_widest / T) || softmax(out / T))

    where out_widest is detached. With distill_from="wider" every width learns from the next wider one, in its place;
    with a ``teacher``, whose logits stand before all widths, the widest has such a loss too. The forward runs once per
    width, the widest first, with the batch norms of that width; the q of all widths of all weights come from one list
    call, and all their gradients go into one. The activations of all widths are alive until the backward pass;
    :func:`joint_step` keeps those of one.

    Args:
        loss_fn: output -> scalar. None: the model computes it, as ``out.loss`` or ``out["loss"]``.
        kwargs: keyword arguments of the model: ``joint_loss(model, None, kwargs=batch)`` with models of transformers.
        weights: a number >= 0 per width, widest first; default 1 each.
        distill: in 0..1. Needs logits (..., classes): an output that is one tensor, or has ``logits``.
        temperature: T > 0.
        distill_from: "widest" or "wider".
        teacher: logits for these inputs, of a float network, say; None: the widest learns from its loss alone.
        distill_fn: (output, output of the teacher) -> scalar, in the place of T^2 KL, for outputs of any kind; it gets
            those of its teacher detached. ``teacher`` is then such an output.

    The selected width is what it was, afterwards. Works inside a function that is compiled, and with a compiled model,
    which runs one graph for all widths; with DDP and FSDP2. Checkpointed parts cannot be recomputed: RuntimeError, use
    joint_step.

    Raises ValueError for a model without TruncQuant weights and settings out of range.
    """
    network, weights = _checked(model, loss_fn, kwargs, weights)
    distillation = _distillation(distill, temperature, distill_from, teacher, distill_fn)
    loss: Any = 0.0
    losses = {}
    scope = _Scope(network)
    try:
        scope.open(detached=False)
        for place, part in _each_width(scope, model, loss_fn, inputs, kwargs or {}, distillation):
            loss = loss + weights[place] * part
            losses[network.widths[place]] = part.detach()
    finally:
        scope.close()
    if not torch.compiler.is_compiling():
        network.note_joint_graph(True)
    return Joint(loss, losses)


def joint_step(
    model: torch.nn.Module,
    loss_fn: Callable[[Any], torch.Tensor] | None,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    distill: float = 0.0,
    temperature: float = 1.0,
    distill_from: str = "widest",
    teacher: Any = None,
    distill_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    backward: Callable[[torch.Tensor], Any] = torch.Tensor.backward,
) -> Joint:
    """As :func:`joint_loss`, with the backward passes: adds to ``.grad`` and returns :class:`Joint`, detached.

    Each width's backward pass follows its forward pass, so that the activations of one width are alive at a time, and
    torch.utils.checkpoint works. The weights wait until all gradients of their q are there: one list call for all.

    ``backward``: called with each width's weighted loss; e.g. ``lambda loss: scaler.scale(loss).backward()``.

    With DDP the gradients of all widths are summed over the processes once, after the last backward pass, without its
    communication hooks; within ``no_sync()`` not at all, as DDP has it.
    """
    network, weights = _checked(model, loss_fn, kwargs, weights)
    distillation = _distillation(distill, temperature, distill_from, teacher, distill_fn)
    loss: Any = 0.0
    losses = {}
    scope = _Scope(network)
    ddp = model if isinstance(model, DistributedDataParallel) and model.require_backward_grad_sync else None
    try:
        network.note_joint_graph(False)
        scope.open(detached=True)
        with ddp.no_sync() if ddp else nullcontext():
            for place, part in _each_width(scope, model, loss_fn, inputs, kwargs or {}, distillation):
                weighted = weights[place] * part
                backward(weighted)
                loss = loss + weighted.detach()
                losses[network.widths[place]] = part.detach()
                del part, weighted
            scope.backward()
    finally:
        scope.close()
    if ddp:
        processes.average_gradients(ddp.parameters(), ddp.process_group)
    return Joint(loss, losses)


TEACHERS = ("widest", "wider")


class _Distillation(NamedTuple):
    """What widths learn from each other: ``part`` of their loss; ``wider``: each from the next wider one, not from the
    widest; ``teacher``: what stands before all widths, or None."""

    part: float
    temperature: float
    wider: bool
    teacher: Any
    fn: Callable | None

    def known(self, out):
        """What is kept of an output to learn from."""
        if self.fn is not None:
            return tree_map(lambda v: v.detach() if isinstance(v, torch.Tensor) else v, out)
        return F.log_softmax(_logits(out).detach() / self.temperature, -1).flatten(0, -2)

    def loss(self, out, known):
        if self.fn is not None:
            return self.fn(out, known)
        logits = _logits(out)
        if known.shape[-1] != logits.shape[-1]:
            raise ValueError(f"teacher: expected logits of {logits.shape[-1]} classes, got {known.shape[-1]}")
        own = F.log_softmax(logits / self.temperature, -1).flatten(0, -2)
        return self.temperature**2 * F.kl_div(own, known, reduction="batchmean", log_target=True)


def _distillation(distill, temperature, distill_from, teacher, distill_fn):
    if not _is_number(distill) or not 0 <= distill <= 1:
        raise ValueError(f"distill: expected a number 0..1, got {distill!r}")
    if not _is_number(temperature) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a number > 0, got {temperature!r}")
    if distill_fn is not None:
        if not callable(distill_fn):
            raise TypeError(f"distill_fn: expected a function of two outputs, got {type(distill_fn).__name__}")
        if not distill:
            raise ValueError("distill_fn: expected distill > 0, the part of the loss that it gives")
    wider = check_choice("distill_from", distill_from, TEACHERS) == "wider"
    if teacher is not None:
        logits = _entry(teacher, "logits") if distill_fn is None else None
        if distill_fn is None and (
            not isinstance(logits, torch.Tensor) or not logits.is_floating_point() or logits.dim() < 2
        ):
            raise TypeError(f"teacher: expected a tensor of logits (..., classes), got {type(teacher).__name__}")
        if not distill:
            raise ValueError("teacher: expected distill > 0, for which there are teachers")
    return _Distillation(distill, temperature, wider, teacher, distill_fn)


def _entry(out, name):
    """A part of an output that has parts by name, or the output itself."""
    return out.get(name) if isinstance(out, Mapping) else getattr(out, name, out)


def _logits(out):
    logits = _entry(out, "logits")
    if not isinstance(logits, torch.Tensor) or logits.dim() < 2:
        raise TypeError(
            "distill: expected a model whose output is one tensor (..., classes) or has one as logits, got "
            f"{type(out).__name__}; distill_fn takes others"
        )
    return logits


def _own_loss(out):
    """The loss that a model computes by itself."""
    loss = _entry(out, "loss")
    if loss is out or not isinstance(loss, torch.Tensor):
        raise TypeError(
            f"loss_fn: expected a function of the output, since that of the model, {type(out).__name__}, has no loss"
        )
    return loss


class _Scope:
    """While it is open, the layers of this thread have been given q of all widths; ``select`` says which they use."""

    def __init__(self, network):
        self.network, self.given, self.roots = network, [], []
        devices = {part.index.device for part in (*network.norms, *network.acts)}
        self.index = {
            device: [torch.full((), place, device=device) for place in range(len(network.widths))] for device in devices
        }

    def open(self, detached):
        for group in {id(p.group): p.group for _, p in self.network.layers}.values():
            group.free()  # what earlier forwards left
        # Sharded weights (FSDP2) are computed by their layers, once they are whole: one width at a time.
        for quantizers, w in batches(
            (p, owner.original)
            for owner, p in self.network.layers
            if torch.compiler.is_compiling() or trackable(owner.original)
        ):
            with of_layers(quantizers, w):
                result = quantizers[0].launch_all(quantizers, rows_of(quantizers, w))
            q = given = as_weights(quantizers, w, result).q
            if detached:
                given = [t.detach().requires_grad_(t.requires_grad) for t in q]
                self.roots += [(t, leaf) for t, leaf in zip(q, given) if t.requires_grad]
            for i, p in enumerate(quantizers):
                self.given.append((p, given[i :: len(w)]))

    def select(self, place):
        for _, p in self.network.layers:
            p.joint_place.set(place)
        for p, q in self.given:
            p.given.set(q[place if len(q) > 1 else 0])
        for part in (*self.network.norms, *self.network.acts):
            part.given.set(self.index[part.index.device][place])

    def backward(self):
        """From the gradients of q, which the widths have left in the leaves, to the weights."""
        used = [(q, leaf.grad) for q, leaf in self.roots if leaf.grad is not None]
        if used:
            torch.autograd.backward([q for q, _ in used], [grad for _, grad in used])

    def close(self):
        for _, p in self.network.layers:
            p.joint_place.set(None)
            p.given.set(None)
        for part in (*self.network.norms, *self.network.acts):
            part.given.set(None)


def _each_width(scope, model, loss_fn, inputs, kwargs, distillation):
    """(place, loss) of each width, the widest first."""
    part, teacher = distillation.part, distillation.teacher
    loss_fn = loss_fn or _own_loss
    known = None if teacher is None else distillation.known(teacher)
    for place in range(len(scope.network.widths)):
        scope.select(place)
        out = model(*inputs, **kwargs)
        before = known
        if part and (place == 0 or distillation.wider):
            known = distillation.known(out)
        if before is None:
            yield place, loss_fn(out)
            continue
        learned = part * distillation.loss(out, before)
        yield place, learned if part == 1 else learned + (1 - part) * loss_fn(out)


def _checked(model, loss_fn, kwargs, weights):
    check_module(model)
    network = network_of(model)
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn: expected a function of the output, got {type(loss_fn).__name__}")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"kwargs: expected a dict of the model's keyword arguments, got {type(kwargs).__name__}")
    weights = [1.0] * len(network.widths) if weights is None else weights
    good = (
        isinstance(weights, (list, tuple))
        and len(weights) == len(network.widths)
        and all(_is_number(v) and 0 <= v < math.inf for v in weights)
    )
    if not good:
        raise ValueError(
            f"weights: expected {len(network.widths)} numbers >= 0, one for each of the widths "
            f"{network.widths}, got {weights!r}"
        )
    return network, weights


def _is_number(v):
    return isinstance(v, (int, float)) and not isinstance(v, bool)
