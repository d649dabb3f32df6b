"""Family ``truncate``: the four widths of TruncQuant from one weight, and what they are measured against."""

import functools

import torch

from bench.ops.peers import op_peers, step, step_peer
from bench.ops.registry import Case
from bench.ops.uniform import Inputs, equal, normal
from quantops import foreach, reference
from quantops.library import ops
from quantops.reference import paper

WIDTHS = (8, 4, 2, 1)
FLOOR = reference.uniform.RULES.index("floor")


class WidthInputs(Inputs):
    """Weights that are cut to all WIDTHS: as many results and gradients, width by width."""

    def __init__(self, shapes, dtype, device):
        super().__init__(shapes, dtype, device)
        self.source = self.w * len(WIDTHS)

    @functools.cached_property
    def target(self):
        return [torch.empty_like(t) for _ in WIDTHS for t in self.w]

    @functools.cached_property
    def widths(self):
        return torch.stack([torch.full_like(self.bits, n) for n in WIDTHS])

    @functools.cached_property
    def grad(self):
        return [normal(t.shape, t.dtype, t.device) for _ in WIDTHS for t in self.w]


def _widths(bits):
    """The widths with another widest: what a change of bits is for the compiled peers."""
    return (bits, *WIDTHS[1:])


def _truncate(w, scale, bits):
    return [q for lists in foreach.truncate(w, scale, _widths(bits)) for q in lists]


def _chain(w, bits):
    return [paper.truncate(t, n, bits) for n in _widths(bits) for t in w]


def _compiled(x):
    call = torch.compile(_chain)
    return x.leaves, lambda bits: call(x.leaves, bits)


def _backward(x):
    """The gradients of all widths, of weights that are inside their scale, into one."""
    return ops.truncate_backward(x.grad, x.w, x.scale, [], x.widths, x.bits, FLOOR, False, True, False)[0]


def _forward_check(got, x):
    return equal(got, (reference.truncate(t, s, n) for n in WIDTHS for t, s in zip(x.w, x.scale)))


def _step_check(got, x):
    return equal(
        got,
        (
            reference.truncate_backward(x.grad[i :: len(x.w)], t, s, WIDTHS, covered=True)[0]
            for i, (t, s) in enumerate(zip(x.w, x.scale))
        ),
    )


CASES = [
    Case(
        "truncate 8-4-2-1",
        WidthInputs,
        lambda s: s,
        lambda s: len(WIDTHS) * s,
        lambda x: _truncate(x.w, x.scale, x.n),
        _forward_check,
        op_peers(lambda x, i, bits: [reference.truncate(x.w[i], x.scale[i], n, base_bits=bits) for n in _widths(bits)]),
        cuda="truncate_kernel<T, T, CutTable<36, 156> >",
        longest=False,  # the longest has tanh and other rules
    ),
    Case(
        "truncate backward",
        WidthInputs,
        lambda s: len(WIDTHS) * s,
        lambda s: s,
        _backward,
        _step_check,
        op_peers(lambda x, i, bits: functools.reduce(torch.add, x.grad[i :: len(x.w)])),
    ),
    Case(
        "truncate step",
        WidthInputs,
        lambda s: (1 + len(WIDTHS)) * s,
        lambda s: (1 + len(WIDTHS)) * s,
        lambda x: step(x, x.leaves, _truncate(x.leaves, None, x.n)),
        _step_check,
        {
            "eager": step_peer(lambda x: (x.leaves, lambda bits: _chain(x.leaves, bits)), graph=True),
            "compiled list": step_peer(_compiled, compiles=True, whole_list=True, graph=True),
        },
        forward=lambda x: (lambda: _truncate(x.leaves, None, x.n), x.leaves),
    ),
]
