"""Scales of the quantizers of activations in a model: taken from a few batches, and told for integer arithmetic."""

from collections.abc import Iterable
from typing import Any

import torch

from quantops.activation import UniformActivation, finite
from quantops.categorical_activation import CategoricalActivation
from quantops.convert import check_int
from quantops.owners import check_module
from quantops.positive import positive


def activations(model):
    """[(name, module)] of the uniform and categorical quantizers of activations in a model."""
    check_module(model)
    return [(n, m) for n, m in model.named_modules() if isinstance(m, (UniformActivation, CategoricalActivation))]


@torch.no_grad()
def calibrate(
    model: torch.nn.Module, batches: Iterable[Any], *, steps: int | None = None, progress: bool = False
) -> Any:
    """Takes the scales of a model's :class:`UniformActivation` modules from a few batches, and returns {name: scale}.

    The model runs in evaluation mode, without gradients, its activations float: each module sees what comes in, and
    then starts as if all batches had been its first one. What has been learned before is set anew. Modules that no
    batch reaches are left as they are, and are not in the result.

    Args:
        batches: inputs (a tensor is a stack of them): tensors; tuples or lists, of which the first entry goes in (as a
            DataLoader gives x and y); or dicts, as keyword arguments.
        steps: so many batches at most, all where None. progress: show a bar (needs tqdm).

    Raises ValueError for a model without such modules, for no batches at all, and for NaN or infinities that come to a
    module, naming it; TypeError for batches that are no iterable of inputs.
    """
    found = [(n, m) for n, m in activations(model) if isinstance(m, UniformActivation)]
    if not found:
        raise ValueError(f"model: expected modules of UniformActivation, {type(model).__name__} has none")
    if not isinstance(batches, Iterable) or isinstance(batches, dict):
        raise TypeError(f"batches: expected an iterable of inputs, such as [x], got {type(batches).__name__}")
    if steps is not None:
        check_int("steps", steps, 1, 2**62)
    training, count = {m: m.training for m in model.modules()}, 0
    if progress:
        from tqdm import tqdm

        batches = tqdm(batches, desc="calibrate", unit="batch", total=steps)
    model.eval()
    try:
        for _, m in found:
            m.seen.set([])
        for batch in batches:
            if steps is not None and count >= steps:
                break
            if isinstance(batch, dict):
                model(**batch)
            elif batch is None or isinstance(batch, (list, tuple)) and not batch:
                raise TypeError(f"batches: expected inputs, got {batch!r} as batch {count}")
            else:
                model(batch[0] if isinstance(batch, (list, tuple)) else batch)
            count += 1
        statistics = [m.seen.get() for _, m in found]
    finally:
        for _, m in found:
            m.seen.set(None)
        for module, mode in training.items():
            module.training = mode
    if not count:
        raise ValueError("batches: expected at least one batch, got none")
    for (name, _), seen in zip(found, statistics):
        if not finite(seen):
            raise ValueError(f"batches: expected finite values to take a scale from, got NaN or infinity at {name}")
    scales: dict[str, Any] = {}
    for (name, m), seen in zip(found, statistics):
        if not seen:
            continue
        before = m.widths.index(int(m.bits)) if len(m.start) > 1 else 0
        for row in range(len(m.start)):
            if len(m.start) > 1:
                m.select(row)
            if isinstance(m.scale, str):
                m.start[m.place].zero_()
            if m.asks_sign:
                m.signed = None
            m._begin(seen)
        if len(m.start) > 1:
            m.select(before)
        scales[name] = m.values()[0].detach().clone()
    return scales


def activation_scales(model: torch.nn.Module) -> dict[str, Any]:
    """{name: dict} of what integer arithmetic needs of each quantizer of activations that has started: scale, offset,
    bits, rule, signed, front. With these, ``encode`` gives the codes of front(x) (less the offset) and ``decode``, with
    grid="full" for the floor and nearest rules, what the module gives; those of :class:`quantops.CategoricalActivation`
    are the unsigned codes of round_clamp. Values of one per channel (dim 1) are those per row of
    ``x.transpose(0, 1)``."""
    found = {}
    for name, m in activations(model):
        if isinstance(m, UniformActivation) and m.started[m.place]:
            scale, offset = (None if v is None else v.detach().clone() for v in m.values())
            bits, rule, signed, front = int(m.bits), m.rule, bool(m.signed), m.front
        elif isinstance(m, CategoricalActivation) and m.started:
            bits, rule, signed, front, offset = int(m.bits), "round_clamp", False, None, None
            scale = positive(m.alpha_start, m.log_alpha).detach() * 2**bits
        else:
            continue
        about = {"bits": bits, "rule": rule, "signed": signed, "front": front}
        found[name] = {"scale": scale, "offset": offset, **about}
    return found
