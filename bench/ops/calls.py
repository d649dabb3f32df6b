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
    """What torch alone costs for the graph of a list: as many results and gradients as msq has, and no arithmetic."""

    @staticmethod
    def forward(ctx, *w):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*w)
        return *[torch.empty_like(t) for t in w], w[0].new_empty(len(w))

    @staticmethod
    def backward(ctx, *grads):
        return grads[:-1]


def _list_calls(count, device):
    """Forward and backward of msq over a list, with gradients of all q, and of the penalty alone; and of nothing."""
    leaves = Inputs([(8, 8)] * count, torch.float32, device).leaves
    grads = [*map(torch.ones_like, leaves), torch.ones(count, device=device)]

    def quantized():
        q, penalty, _, _ = foreach.msq(leaves, None, 4)
        return *q, penalty

    def both(forward, results):
        torch.autograd.grad(forward()[results], leaves, grads[results])

    every, last = slice(None), slice(-1, None)
    return {
        f"foreach.msq + backward, {count}": lambda: both(quantized, every),
        f"foreach.msq + backward of the penalty, {count}": lambda: both(quantized, last),
        f"an empty autograd.Function + backward, {count}": lambda: both(lambda: _Nothing.apply(*leaves), every),
    }


def call_overhead(device):
    """Microseconds of an eager call on weights of 64 elements, on the host: what does not depend on their size. One
    weight, or a list of as many as the name says."""
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
    for count in LENGTHS:
        calls |= _list_calls(count, device)

    def many(fn):
        start = time.perf_counter()
        for _ in range(5):
            fn()
        return (time.perf_counter() - start) / 5

    times = measure.interleave({name: (lambda fn=fn: many(fn)) for name, fn in calls.items()}, 3.0, most=400)
    return {name: 1e6 * measure.summary(t)["median"] for name, t in times.items()}


if __name__ == "__main__":
    for name, microseconds in call_overhead("cpu").items():
        print(f"{name:55} {microseconds:9.1f} us")
