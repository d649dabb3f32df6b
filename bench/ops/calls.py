"""What eager calls cost on the host: ``python -m bench.ops.calls``, and a line of every ``bench run``."""

import time

import torch

import quantops
from bench import measure
from bench.ops.uniform import Inputs
from quantops import foreach
from quantops.library import ops

LENGTHS = (1, 54, 162)  # weights, of 64 elements: what a call costs by itself, and for each weight of a network's list


class _Nothing(torch.autograd.Function):
    """What torch alone costs for a list in a graph: as many results and gradients as msq has, and no arithmetic."""

    @staticmethod
    def forward(ctx, *w):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*w)
        return *[torch.empty_like(t) for t in w], w[0].new_empty(len(w))

    @staticmethod
    def backward(ctx, *grads):
        return grads[:-1]


def _trainings(count, device):
    """{name: forward and backward of a list}, the first without a quantizer. Gradients of all entries come as a network
    gives them: each contiguous, and from a node of its own."""
    leaves = Inputs([(8, 8)] * count, torch.float32, device).leaves
    towards, strength = torch.randn(64 * count, device=device), torch.ones(count, device=device)

    def step(quantized):
        q, penalty = quantized()
        loss = torch.cat([t.view(-1) for t in q]) @ towards
        torch.autograd.grad(loss if penalty is None else loss + penalty @ strength, leaves)

    def nothing():
        *q, penalty = _Nothing.apply(*leaves)
        return q, penalty

    return {
        "": lambda: step(lambda: (leaves, None)),
        "an empty autograd.Function": lambda: step(lambda: (nothing()[0], None)),
        "foreach.msq": lambda: step(lambda: (foreach.msq(leaves, None, 4).q, None)),
        "an empty autograd.Function, penalty too": lambda: step(nothing),
        "foreach.msq, penalty too": lambda: step(lambda: foreach.msq(leaves, None, 4)[:2]),
    }


def _timed(calls, seconds=3.0):
    """{name: seconds of a call, one per round}."""

    def many(fn):
        start = time.perf_counter()
        for _ in range(5):
            fn()
        return (time.perf_counter() - start) / 5

    return measure.interleave({name: (lambda fn=fn: many(fn)) for name, fn in calls.items()}, seconds, most=400)


def call_overhead(device):
    """Microseconds of an eager call on weights of 64 elements, on the host: what does not depend on their size. Of one
    weight; or, of a list of as many as the name says, what it adds to forward and backward of a graph."""
    x = Inputs([(8, 8)], torch.float32, device)
    w, leaf, scale = x.w[0], x.leaves[0], x.scale[0]
    calls = {
        "torch.clone": lambda: w.clone(),
        "ops.absmax": lambda: ops.absmax(x.w, False),
        "ops.round_clamp_out": lambda: ops.round_clamp_out(x.w, x.scale, x.bits, False, True, x.target),
        "ops.encode": lambda: ops.encode(x.w, x.scale, x.bits, 0, 0, True),
        "quantops.round_clamp": lambda: quantops.round_clamp(w, scale, x.bits),
        "quantops.msq": lambda: quantops.msq(w, scale, x.bits, x.k),
        "quantops.msq, w requires grad": lambda: quantops.msq(leaf, scale, x.bits, x.k),
    }
    found = {name: measure.summary(t)["median"] for name, t in _timed(calls).items()}
    for count in LENGTHS:
        times = {name: measure.summary(t)["median"] for name, t in _timed(_trainings(count, device), 1.0).items()}
        base = times.pop("")
        found |= {f"added by {name}, {count} weights": t - base for name, t in times.items()}
    return {name: 1e6 * t for name, t in found.items()}


if __name__ == "__main__":
    for name, microseconds in call_overhead("cpu").items():
        print(f"{name:60} {microseconds:9.1f} us")
