"""Family ``categorical``: the quantizer of CPQ, and what it is measured against.

Two kinds of peers: "all classes" is the paper's form, which builds the probabilities of all 2^b classes; the others are
the closed form without that tensor in plain PyTorch, which is the one to beat.
"""

import dataclasses
import functools
import math

import torch

from bench.ops.peers import op_peers, step, step_peer
from bench.ops.registry import Absent, Case, Peer
from bench.ops.uniform import Inputs
from quantops import foreach, reference
from quantops.library import ops
from quantops.reference import paper

MOST_CLASSES = 1 << 29  # bytes of one tensor with all classes of all weights: the eager chain holds several,
MOST_STEP_CLASSES = 1 << 28  # and with what it keeps for its backward pass forty
PIECE = 1 << 20  # elements that the reference takes at a time: it holds a kilobyte for each,
MOST_CHECKED = 1 << 24  # and takes half a second for a million: of larger lists every so many-th piece is checked
MOST_OF_REFERENCE = 4 * PIECE  # elements of a peer that is the reference itself


class ClassInputs(Inputs):
    """Weights with a step alpha that spans max|w|, and the width that CPQ begins with, 0.15 alpha.

    grad_of: "winner", the paper's gradients, or "soft", those that CPQConfig takes unless told otherwise.
    """

    n, grad_of = 3, "winner"

    def __init__(self, shapes, dtype, device):
        super().__init__(shapes, dtype, device)
        self.bits = torch.full_like(self.bits, self.n)

    @functools.cached_property
    def alpha(self):
        return [s.reshape(1) * 2.0 ** (1 - self.n) for s in self.scale]

    @functools.cached_property
    def sigma(self):
        return [a * 0.15 for a in self.alpha]

    @functools.cached_property
    def gates(self):
        return None

    @functools.cached_property
    def widths(self):
        """Leaves: alpha of each weight, then sigma."""
        return [t.clone().requires_grad_() for t in (*self.alpha, *self.sigma)]

    def options(self, i):
        """Of the reference, for weight i."""
        return {"gates": self.gates[i] if self.gates else None}


class SoftInputs(ClassInputs):
    n = 4

    def options(self, i):
        return {**super().options(i), "mode": "soft"}


class SoftGradientInputs(ClassInputs):
    n, grad_of = 4, "soft"


class GatedInputs(ClassInputs):
    n = 8

    @functools.cached_property
    def gates(self):
        return [torch.linspace(1, 0.5, self.n, device=t.device) for t in self.w]


def _all_classes(x, i, bits, leaves=None):
    """The paper's form of weight i; ``leaves``: x, alpha and sigma instead of its own."""
    size = 4 * x.numel * 2**bits
    if size > (MOST_STEP_CLASSES if leaves else MOST_CLASSES):
        raise Absent(f"{size / 2**20:.0f} MiB for each tensor of all classes")
    w, alpha, sigma = leaves or (x.w[i], x.alpha[i], x.sigma[i])
    return paper.categorical(w.float(), alpha, sigma, bits, grad=x.grad_of, **x.options(i)).to(w.dtype)


def _with_all_classes(x):
    call = lambda bits=x.n: [_all_classes(x, i, bits) for i in range(len(x.w))]  # noqa: E731
    _all_classes(x, 0, x.n)  # raises Absent
    return call


def _peers(closed):
    """Peers of a forward pass; ``closed(x, i, bits)`` is its closed form."""
    return {"all classes": Peer(_with_all_classes, lists=False), **op_peers(closed)}


def _small(peer):
    """The peer on small weights alone."""

    def make(x):
        if x.numel > MOST_OF_REFERENCE:
            raise Absent("the reference's tensor ops take a kilobyte for each weight, and half a second for a million")
        return peer.make(x)

    return dataclasses.replace(peer, make=make)


def _nearest(w, alpha, bits):
    """The hard class without gates."""
    return torch.clamp(torch.round(w.float() * (1 / alpha)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _reference(x, i, bits, part=slice(None)):
    w = x.w[i].flatten()[part]
    pieces = [reference.categorical(v, x.alpha[i], x.sigma[i], bits, **x.options(i)) for v in w.split(PIECE)]
    return torch.cat(pieces).view_as(x.w[i] if part == slice(None) else w)


def _checked(x):
    """{weight: the pieces of it that are checked}, and whether these are all there are."""
    every, found = math.ceil(x.numel / MOST_CHECKED), {}
    places = [(i, slice(at, at + PIECE)) for i, w in enumerate(x.w) for at in range(0, w.numel(), PIECE)]
    for i, part in places[::every]:
        found.setdefault(i, []).append(part)
    return found, every == 1


def _winner(w, alpha, sigma, bits):
    """q without gates, and by autograd the winner's gradients, from r of that class alone."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    j = _nearest(w.detach(), alpha.detach(), bits)

    def mass(first, last):  # no digits are left of it far outside the grid, where no weight is
        top, bottom = ((alpha * edge - w.float()) / sigma for edge in (last + 0.5, first - 0.5))
        return torch.sigmoid(top) * torch.sigmoid(-bottom)

    beta = alpha / sigma
    r = mass(j, j) / mass(low, high) * (torch.expm1(-beta) / torch.expm1(-beta * (high - low + 1)))
    return (alpha * j + (r - r.detach()) * (alpha * j).detach()).to(w.dtype)


def _learned_all_classes(x, i, leaves, bits):
    return _all_classes(x, i, bits, leaves)


def _learned_winner(x, i, leaves, bits):
    return _winner(*leaves, bits)


def _step_peer(function, **options):
    """A peer of the step from ``function(x, i, leaves, bits)``, the q of weight i."""

    def prepare(x):
        n, leaves = len(x.w), [*x.leaves, *x.widths]
        function(x, 0, leaves[::n], x.n)  # raises Absent
        return leaves, lambda bits: [function(x, i, leaves[i::n], bits) for i in range(n)]

    return step_peer(prepare, **options)


def _compiled_step_peer(function):
    """The same, the list compiled as one graph."""

    def prepare(x):
        n, leaves = len(x.w), [*x.leaves, *x.widths]
        function(x, 0, leaves[::n], x.n)  # raises Absent
        call = torch.compile(lambda leaves, bits: [function(x, i, leaves[i::n], bits) for i in range(n)])
        return leaves, lambda bits: call(leaves, bits)

    return step_peer(prepare, compiles=True, whole_list=True, graph=True)


def _forward(x, mode="hard"):
    return foreach.categorical(x.w, x.alpha, x.sigma, x.bits, gates=x.gates, mode=mode)


def _learned(x):
    n = len(x.w)
    return foreach.categorical(x.leaves, x.widths[:n], x.widths[n:], x.bits, grad=x.grad_of)


def _hard_check(got, x):
    return all(
        torch.equal(got[i].flatten()[part], _reference(x, i, x.n, part))
        for i, parts in _checked(x)[0].items()
        for part in parts
    )


def _soft_check(got, x):
    """To the rounding of q, and of the sum over classes."""

    def same(q, i, part):
        room = 1e-5 * float(x.alpha[i])
        want = _reference(x, i, x.n, part).float()
        return torch.allclose(q.flatten()[part].float(), want, rtol=2 * torch.finfo(q.dtype).eps, atol=room)

    return all(same(got[i], i, part) for i, parts in _checked(x)[0].items() for part in parts)


def _backward(x):
    """Gradients of the winner for the weights, alpha and sigma."""
    of_w, of_alpha, of_sigma, _ = ops.categorical_backward(
        x.grad, x.w, x.alpha, x.sigma, x.bits, [], None, 0, 0, True, True, False
    )
    return [*of_w, *of_alpha, *of_sigma]


def _backward_check(got, x):
    """Against the reference; sums, where all of their terms are checked, to within the rounding of these, which are of
    both signs."""
    parts_of, everything = _checked(x)

    def same(i, grad_w, grad_alpha, grad_sigma):
        sums, room = [], 2 * torch.finfo(grad_w.dtype).eps
        for part in parts_of[i]:
            grad, w = x.grad[i].flatten()[part], x.w[i].flatten()[part]
            want, *of_scales, _ = reference.categorical_backward(
                grad, w, x.alpha[i], x.sigma[i], x.n, grad_of=x.grad_of
            )
            if not torch.allclose(grad_w.flatten()[part].float(), want.float(), rtol=room, atol=1e-4):
                return False
            sums.append(of_scales)
        return not everything or all(
            torch.allclose(a, sum(b), rtol=1e-4, atol=1e-4 * x.w[i].numel() ** 0.5)
            for a, b in zip((grad_alpha, grad_sigma), zip(*sums))
        )

    return all(same(i, *got[i :: len(x.w)]) for i in parts_of)


def _step_case(name, inputs, peers):
    """q, then the gradients of weights, alpha and sigma."""
    return Case(
        name,
        inputs,
        lambda s: 3 * s,
        lambda s: 2 * s,
        lambda x: step(x, [*x.leaves, *x.widths], _learned(x)),
        _backward_check,
        {"all classes": _step_peer(_learned_all_classes, lists=False), **peers},
        forward=lambda x: (lambda: _learned(x), [*x.leaves, *x.widths]),
    )


CASES = [
    Case(
        "categorical hard",
        ClassInputs,
        lambda s: s,
        lambda s: s,
        _forward,
        _hard_check,
        _peers(lambda x, i, bits: (x.alpha[i] * _nearest(x.w[i], x.alpha[i], bits)).to(x.w[i].dtype)),
        cuda="items_kernel<Nearest<T, T>, 32>",
    ),
    Case(
        "categorical hard, 8 gates",
        GatedInputs,
        lambda s: s,
        lambda s: s,
        _forward,
        _hard_check,
        {name: _small(peer) for name, peer in _peers(_reference).items()},
        cuda="items_kernel<Bounded<T, T, 7>, 32>",
    ),
    Case(
        "categorical soft, 4 bits",
        SoftInputs,
        lambda s: s,
        lambda s: s,
        lambda x: _forward(x, "soft"),
        _soft_check,
        {name: _small(peer) for name, peer in _peers(_reference).items()},
        turns=True,
        cuda="items_kernel<SoftValue<T, T>, 32>",
        longest=False,
        table=2,
    ),
    # What it is measured against is in the step.
    Case(
        "categorical backward",
        ClassInputs,
        lambda s: 2 * s,
        lambda s: s,
        _backward,
        _backward_check,
        cuda="items_kernel<WinnerOne<T, T, true>, 32>",
        longest=False,
        table=1,
    ),
    _step_case(
        "categorical step",
        ClassInputs,
        {"eager": _step_peer(_learned_winner, graph=True), "compiled list": _compiled_step_peer(_learned_winner)},
    ),
    # As CPQConfig trains unless told otherwise. No peer has these gradients without all classes.
    _step_case(
        "categorical step, soft gradient, 4 bits",
        SoftGradientInputs,
        {"compiled list": _compiled_step_peer(_learned_all_classes)},
    ),
]
