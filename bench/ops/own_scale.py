"""Family ``own_scale``: what a scale through which gradients flow costs in the backward pass, beside a constant one."""

import torch

from bench.ops.peers import op_peers
from bench.ops.registry import Case
from bench.ops.uniform import Inputs, equal
from quantops import reference
from quantops.library import ops


class ScaleInputs(Inputs):
    """With a gradient of every scale."""

    def __init__(self, shapes, dtype, device):
        super().__init__(shapes, dtype, device)
        self.grad_scale = [torch.full_like(s, 0.1) for s in self.scale]


def _backward(mean):
    return dict(
        run=lambda x: ops.own_scale_backward(x.w, x.scale, x.grad_scale, mean),
        check=lambda got, x: equal(
            got, (reference.own_scale_backward(*each, mean=mean) for each in zip(x.w, x.scale, x.grad_scale))
        ),
        peers=op_peers(lambda x, i, bits: reference.own_scale_backward(x.w[i], x.scale[i], x.grad_scale[i], mean=mean)),
        cuda="items_kernel<OwnScale<T>, 60>",
    )


CASES = [
    Case(
        "own_scale",
        Inputs,
        lambda s: s,
        lambda s: 0,
        lambda x: ops.own_scale(x.w, False, False),
        lambda got, x: torch.equal(got, torch.stack([reference.absmax(t) for t in x.w])),
        op_peers(lambda x, i, bits: x.w[i].abs().max()),
        cuda="items_kernel<AbsMax<T>, 60>",
    ),
    Case("own_scale backward, mean", ScaleInputs, lambda s: s, lambda s: s, **_backward(True)),
    Case("own_scale backward, max", ScaleInputs, lambda s: s, lambda s: s, **_backward(False)),
]
