"""Joint steps of TruncQuant (arXiv 2506.11431): all widths of one set of weights are trained in one step."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from quantops.convert import check_choice
from quantops.methods.truncquant import network_of
from quantops.nn import batches, check_module, trackable


class Joint(NamedTuple):
    """What a joint step gives: the loss, and the losses it is the weighted sum of, {width: detached}."""

    loss: torch.Tensor
    losses: dict


def joint_loss(
    model, loss_fn, *inputs, weights=None, distill=0.0, temperature=1.0, distill_from="widest", teacher=None
):
    """The sum over widths m of weights[m] * loss_m, for one backward pass: :class:`Joint`.

        widest    loss = loss_fn(model(*inputs))
        others    loss = (1 - distill) * loss_fn(out) + distill * T^2 * KL(softmax(out_widest / T) || softmax(out / T))

    where out_widest is detached. With distill_from="wider" every width learns from the next wider one, in its place;
    with a ``teacher``, whose logits stand before all widths, the widest has such a loss too. The forward runs once per
    width, the widest first, with the batch norms of that width; the q of all widths of all weights come from one list
    call, and all their gradients go into one. The activations of all widths are alive until the backward pass;
    :func:`joint_step` keeps those of one.

    Args:
        loss_fn: output -> scalar.
        weights: a number >= 0 per width, widest first; default 1 each.
        distill: in 0..1. Needs an output that is one tensor (..., classes).
        temperature: T > 0.
        distill_from: "widest" or "wider".
        teacher: logits for these inputs, of a float network, say; None: the widest learns from its loss alone.

    The selected width is what it was, afterwards. Works inside a function that is compiled, and with a compiled model,
    which runs one graph for all widths. Checkpointed parts cannot be recomputed: RuntimeError, use joint_step.

    Raises ValueError for a model without TruncQuant weights and settings out of range.
    """
    network, weights = _checked(model, loss_fn, weights, distill, temperature)
    distillation = _Distillation(
        distill,
        temperature,
        check_choice("distill_from", distill_from, TEACHERS) == "wider",
        _teacher(teacher, distill),
    )
    loss, losses = 0.0, {}
    scope = _Scope(network)
    try:
        scope.open(detached=False)
        for place, part in _each_width(scope, model, loss_fn, inputs, distillation):
            loss = loss + weights[place] * part
            losses[network.widths[place]] = part.detach()
    finally:
        scope.close()
    if not torch.compiler.is_compiling():
        network.note_joint_graph(True)
    return Joint(loss, losses)


def joint_step(
    model,
    loss_fn,
    *inputs,
    weights=None,
    distill=0.0,
    temperature=1.0,
    distill_from="widest",
    teacher=None,
    backward=torch.Tensor.backward,
):
    """As :func:`joint_loss`, with the backward passes: adds to ``.grad`` and returns :class:`Joint`, detached.

    Each width's backward pass follows its forward pass, so that the activations of one width are alive at a time, and
    torch.utils.checkpoint works. The weights wait until all gradients of their q are there: one list call for all.

    ``backward``: called with each width's weighted loss; e.g. ``lambda loss: scaler.scale(loss).backward()``. With DDP,
    whose parameters want one backward pass, use joint_loss.
    """
    network, weights = _checked(model, loss_fn, weights, distill, temperature)
    distillation = _Distillation(
        distill,
        temperature,
        check_choice("distill_from", distill_from, TEACHERS) == "wider",
        _teacher(teacher, distill),
    )
    loss, losses = 0.0, {}
    scope = _Scope(network)
    try:
        network.note_joint_graph(False)
        scope.open(detached=True)
        for place, part in _each_width(scope, model, loss_fn, inputs, distillation):
            weighted = weights[place] * part
            backward(weighted)
            loss = loss + weighted.detach()
            losses[network.widths[place]] = part.detach()
            del part, weighted
        scope.backward()
    finally:
        scope.close()
    return Joint(loss, losses)


TEACHERS = ("widest", "wider")


class _Distillation(NamedTuple):
    """What widths learn from each other: ``part`` of their loss, at a temperature; ``wider``: each from the next wider
    one, not from the widest; ``teacher``: logits that stand before all widths, or None."""

    part: float
    temperature: float
    wider: bool
    teacher: torch.Tensor | None

    def log_probabilities(self, out):
        return F.log_softmax(out / self.temperature, -1).flatten(0, -2)


def _teacher(teacher, distill):
    if teacher is None:
        return None
    if not isinstance(teacher, torch.Tensor) or not teacher.is_floating_point() or teacher.dim() < 2:
        raise TypeError(f"teacher: expected a tensor of logits (..., classes), got {type(teacher).__name__}")
    if not distill:
        raise ValueError("teacher: expected distill > 0, for which there are teachers")
    return teacher.detach()


class _Scope:
    """While it is open, the layers of this thread have been given q of all widths; ``select`` says which they use."""

    def __init__(self, network):
        self.network, self.given, self.roots = network, [], []
        devices = {norm.index.device for norm in network.norms}
        self.index = {
            device: [torch.full((), place, device=device) for place in range(len(network.widths))] for device in devices
        }
        self.acts_before = [act.state() for act in network.acts]  # whose width is that of all threads

    def open(self, detached):
        for group in {id(p.group): p.group for _, p in self.network.layers}.values():
            group.free()  # what earlier forwards left
        # Sharded weights (FSDP2) are computed by their layers, once they are whole: one width at a time.
        for quantizers, w in batches(
            (p, owner.original)
            for owner, p in self.network.layers
            if torch.compiler.is_compiling() or trackable(owner.original)
        ):
            q = given = quantizers[0].launch_all(quantizers, w).q
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
        for norm in self.network.norms:
            norm.given.set(self.index[norm.index.device][place])
        for act in self.network.acts:
            act.select(place)

    def backward(self):
        """From the gradients of q, which the widths have left in the leaves, to the weights."""
        used = [(q, leaf.grad) for q, leaf in self.roots if leaf.grad is not None]
        if used:
            torch.autograd.backward([q for q, _ in used], [grad for _, grad in used])

    def close(self):
        for _, p in self.network.layers:
            p.joint_place.set(None)
            p.given.set(None)
        for norm in self.network.norms:
            norm.given.set(None)
        for act, old in zip(self.network.acts, self.acts_before):
            act.set_state(old)


def _each_width(scope, model, loss_fn, inputs, distillation):
    """(place, loss) of each width, the widest first."""
    part, temperature, wider, teacher = distillation
    known = None if teacher is None else distillation.log_probabilities(teacher)
    for place in range(len(scope.network.widths)):
        scope.select(place)
        out = model(*inputs)
        if not part:
            yield place, loss_fn(out)
            continue
        if not isinstance(out, torch.Tensor) or out.dim() < 2:
            raise TypeError(
                f"distill: expected a model whose output is one tensor (..., classes), got {type(out).__name__}"
            )
        before = known
        if place == 0 or wider:
            known = distillation.log_probabilities(out.detach())
        if before is None:
            yield place, loss_fn(out)
            continue
        if before.shape[-1] != out.shape[-1]:
            raise ValueError(f"teacher: expected logits of {out.shape[-1]} classes, got {before.shape[-1]}")
        learned = (
            part
            * temperature**2
            * F.kl_div(distillation.log_probabilities(out), before, reduction="batchmean", log_target=True)
        )
        yield place, learned if part == 1 else learned + (1 - part) * loss_fn(out)


def _checked(model, loss_fn, weights, distill, temperature):
    check_module(model)
    network = network_of(model)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn: expected a function of the output, got {type(loss_fn).__name__}")
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
    if not _is_number(distill) or not 0 <= distill <= 1:
        raise ValueError(f"distill: expected a number 0..1, got {distill!r}")
    if not _is_number(temperature) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a number > 0, got {temperature!r}")
    return network, weights


def _is_number(v):
    return isinstance(v, (int, float)) and not isinstance(v, bool)
