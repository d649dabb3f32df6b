"""Family ``categorical``: the quantizer of CPQ, and what it is measured against.

Two kinds of peers: "all classes" is the paper's form, which builds the probabilities of all 2^b classes; the others are
the closed form without that tensor in plain PyTorch, which is the one to beat.
"""

import dataclasses
import functools

import torch

from bench.peers import op_peers, step, step_peer
from bench.registry import Absent, Case, Peer
from bench.uniform import Inputs, equal
from quantops import foreach, reference
from quantops.reference import paper

MOST_CLASSES = 1 << 29  # bytes of one tensor with all classes of all weights: the eager chain holds several,
MOST_STEP_CLASSES = 1 << 28  # and with what it keeps for its backward pass forty
PIECE = 1 << 20  # elements that the reference takes at a time: it holds a kilobyte for each
MOST_OF_REFERENCE = 4 * PIECE  # elements of a peer that is the reference itself


class ClassInputs(Inputs):
    """Weights with a step alpha that spans max|w|, and the width that CPQ begins with, 0.15 alpha."""

    n = 3

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
    return paper.categorical(w.float(), alpha, sigma, bits, **x.options(i)).to(w.dtype)


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


def _reference(x, i, bits):
    pieces = [reference.categorical(w, x.alpha[i], x.sigma[i], bits, **x.options(i))
              for w in x.w[i].flatten().split(PIECE)]
    return torch.cat(pieces).view_as(x.w[i])


def _reference_gradients(x, i):
    """Of the weights, alpha and sigma."""
    pieces = [reference.categorical_backward(g, w, x.alpha[i], x.sigma[i], x.n)
              for g, w in zip(x.grad[i].flatten().split(PIECE), x.w[i].flatten().split(PIECE))]
    of_w, of_alpha, of_sigma, _ = zip(*pieces)
    return torch.cat(of_w).view_as(x.w[i]), sum(of_alpha), sum(of_sigma)


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


def _step_peer(function, **options):
    """A peer of the step from ``function(x, i, leaves, bits)``, the q of weight i."""
    def prepare(x):
        n, leaves = len(x.w), [*x.leaves, *x.widths]
        function(x, 0, leaves[::n], x.n)  # raises Absent
        return leaves, lambda bits: [function(x, i, leaves[i::n], bits) for i in range(n)]

    return step_peer(prepare, **options)


def _compiled_step(x):
    call = torch.compile(lambda leaves, n, bits: [_winner(*leaves[i::n], bits) for i in range(n)])
    leaves = [*x.leaves, *x.widths]
    return leaves, lambda bits: call(leaves, len(x.w), bits)


def _forward(x, mode="hard"):
    return foreach.categorical(x.w, x.alpha, x.sigma, x.bits, gates=x.gates, mode=mode)


def _learned(x):
    n = len(x.w)
    return foreach.categorical(x.leaves, x.widths[:n], x.widths[n:], x.bits)


def _hard_check(got, x):
    return equal(got, (_reference(x, i, x.n) for i in range(len(x.w))))


def _soft_check(got, x):
    """To the rounding of q, and of the sum over classes."""
    def same(q, i):
        room = 1e-5 * float(x.alpha[i])
        return torch.allclose(q.float(), _reference(x, i, x.n).float(), rtol=2 * torch.finfo(q.dtype).eps, atol=room)

    return all(same(q, i) for i, q in enumerate(got))


def _step_check(got, x):
    """Against the reference; sums to within the rounding of their terms, which are of both signs."""
    def same(i, grad_w, grad_alpha, grad_sigma):
        want = _reference_gradients(x, i)
        close = torch.allclose(grad_w.float(), want[0].float(), rtol=2 * torch.finfo(grad_w.dtype).eps, atol=1e-4)
        return close and all(torch.allclose(a, b, rtol=1e-4, atol=1e-4 * x.w[i].numel() ** 0.5)
                             for a, b in ((grad_alpha, want[1]), (grad_sigma, want[2])))

    n = len(x.w)
    return all(same(i, *got[i::n]) for i in range(n))


CASES = [
    Case("categorical hard", ClassInputs, lambda s: s, lambda s: s, _forward, _hard_check,
         _peers(lambda x, i, bits: (x.alpha[i] * _nearest(x.w[i], x.alpha[i], bits)).to(x.w[i].dtype)),
         cuda="items_kernel<Nearest<T, T>, 32>"),
    Case("categorical hard, 8 gates", GatedInputs, lambda s: s, lambda s: s, _forward, _hard_check,
         {name: _small(peer) for name, peer in _peers(_reference).items()},
         cuda="items_kernel<Bounded<T, T, 7>, 32>"),
    Case("categorical soft, 4 bits", SoftInputs, lambda s: s, lambda s: s, lambda x: _forward(x, "soft"), _soft_check,
         {name: _small(peer) for name, peer in _peers(_reference).items()}),
    # q, then the gradients of weights, alpha and sigma.
    Case("categorical step", ClassInputs, lambda s: 3 * s, lambda s: 2 * s,
         lambda x: step(x, [*x.leaves, *x.widths], _learned(x)), _step_check,
         {"all classes": _step_peer(lambda x, i, leaves, bits: _all_classes(x, i, bits, leaves), lists=False),
          "eager": _step_peer(lambda x, i, leaves, bits: _winner(*leaves, bits), graph=True),
          "compiled list": step_peer(_compiled_step, compiles=True, whole_list=True, graph=True)},
         forward=lambda x: (lambda: _learned(x), [*x.leaves, *x.widths])),
]
