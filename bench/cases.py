"""The registry: an op is one entry, with its inputs, the bytes it must move, its check and its peers."""

import dataclasses
import itertools
from collections.abc import Callable

import torch

import quantops
from bench import peers
from quantops import foreach, reference
from quantops.library import ops

BITS, K = 8, 1


class Inputs:
    """Weights of a workload with what the ops need beside them."""

    def __init__(self, shapes, dtype, device):
        torch.manual_seed(0)
        self.w = [torch.randn(s, device=device).mul_(0.05).to(dtype) for s in shapes]
        self.leaves = [t.clone().requires_grad_() for t in self.w]
        self.grad = [torch.randn(s, device=device).to(dtype) for s in shapes]
        self.scale = foreach.absmax(self.w)
        self.bits = torch.full((len(shapes),), BITS, dtype=torch.int32, device=device)
        self.k = torch.full_like(self.bits, K)
        self.r = torch.full((len(shapes),), 1e-3, dtype=self.scale[0].dtype, device=device)
        self.total = [t.clone() for t in self.grad]
        self.strengths = itertools.cycle([self.r[0], -self.r[0]])
        self.q = [torch.empty_like(t) for t in self.w]
        self.codes = foreach.encode(self.w, self.scale, self.bits)
        self.codes4 = foreach.encode(self.w, self.scale, 4)
        self.packed4 = foreach.pack(self.codes4, 4)
        self.numel = sum(t.numel() for t in self.w)


def step_of(quantize):
    """Forward and backward of a quantizer of lists, (w, bits, k) -> (q, penalties)."""

    def step(x):
        q, penalty = quantize(x.leaves, BITS, K)
        if penalty is None:
            return torch.autograd.grad(q, x.leaves, x.grad)
        penalty = penalty.sum() if isinstance(penalty, torch.Tensor) else sum(penalty)
        return torch.autograd.grad([*q, penalty], x.leaves, [*x.grad, x.r[0].to(penalty.dtype)])

    return step


def _quantops_msq(w, bits, k):
    return foreach.msq(w, None, bits, k)[:2]


def _equal(got, want):
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def _msq(got, x):
    """q, the number of nonzero LSBs, and both sums to within the rounding of float32."""
    want = [reference.msq(t, v, BITS, K) for t, v in zip(x.w, x.scale)]
    penalty, nonzero, sq_error = (torch.stack([r[i] for r in want]) for i in (1, 2, 3))
    return (_equal(got.q, [r[0] for r in want]) and torch.equal(got.nonzero, nonzero)
            and torch.allclose(got.penalty, penalty, rtol=4e-6) and torch.allclose(got.sq_error, sq_error, rtol=4e-6))


def _reference_step(x):
    r = x.r[0]
    return [reference.uniform_backward(g, r, t, reference.absmax(t), BITS, K)[0] for g, t in zip(x.grad, x.w)]


@dataclasses.dataclass(frozen=True)
class Case:
    """One op: ``run(x)`` is timed after ``check(run(x), x)`` held. ``bytes``: moved per weight of ``size`` bytes."""

    name: str
    bytes: Callable[[int], float]
    run: Callable
    check: Callable
    peers: dict[str, Callable] = dataclasses.field(default_factory=dict)  # name -> () -> function of Inputs
    forward: Callable | None = None  # where autograd keeps something: the forward pass alone
    peer_forward: Callable | None = None


CASES = [
    Case("absmax", lambda s: s, lambda x: ops.absmax(x.w, False),
         lambda got, x: torch.equal(got, torch.stack([reference.absmax(t) for t in x.w])),
         {"eager": lambda: lambda x: [t.abs().max() for t in x.w]}),
    Case("round_clamp", lambda s: 2 * s, lambda x: foreach.round_clamp(x.w, x.scale, x.bits, out=x.q),
         lambda got, x: _equal(got, [reference.round_clamp(t, v, BITS) for t, v in zip(x.w, x.scale)])),
    Case("msq forward", lambda s: 2 * s, lambda x: foreach.msq(x.w, x.scale, x.bits, x.k, out=x.q), lambda got, x: _msq(got, x)),
    Case("lsb_stats", lambda s: s, lambda x: foreach.lsb_stats(x.w, x.scale, x.bits, x.k)[1],
         lambda got, x: torch.equal(got, torch.stack([reference.msq(t, v, BITS, K)[2] for t, v in zip(x.w, x.scale)]))),
    Case("msq backward", lambda s: 3 * s,
         lambda x: ops.uniform_backward(x.grad, x.r, x.w, x.scale, x.bits, x.k, False, True, False)[0],
         lambda got, x: _equal(got, _reference_step(x))),
    # In turn with either sign, so that the gradient stays what it is but for rounding.
    Case("add_lsb_grad_", lambda s: 3 * s,
         lambda x: foreach.add_lsb_grad_(x.total, x.w, x.scale, x.bits, x.k, next(x.strengths)),
         lambda got, x: _equal(got, [reference.add_lsb_grad(g, x.r[0], t, v, BITS, K)
                                     for g, t, v in zip(x.grad, x.w, x.scale)])),
    Case("encode", lambda s: s + 4, lambda x: foreach.encode(x.w, x.scale, x.bits),
         lambda got, x: _equal(got, [reference.encode(t, v, BITS) for t, v in zip(x.w, x.scale)])),
    Case("decode", lambda s: 4 + s, lambda x: foreach.decode(x.codes, x.scale, x.bits, out_dtype=x.w[0].dtype),
         lambda got, x: _equal(got, [reference.decode(c, v, BITS, dtype=x.w[0].dtype)
                                     for c, v in zip(x.codes, x.scale)])),
    # Packed to 4 bits: 4 + 4/8 bytes per weight, whatever the dtype of w, but for what decode writes.
    Case("pack 4 bits", lambda s: 4.5, lambda x: [p.data for p in foreach.pack(x.codes4, 4)],
         lambda got, x: _equal(got, [reference.pack(c, 4) for c in x.codes4])),
    Case("unpack 4 bits", lambda s: 4.5, lambda x: foreach.unpack(x.packed4), lambda got, x: _equal(got, x.codes4)),
    Case("decode packed 4 bits", lambda s: s + 0.5,
         lambda x: foreach.decode(x.packed4, x.scale, out_dtype=x.w[0].dtype),
         lambda got, x: _equal(got, [reference.decode(c, v, 4, dtype=x.w[0].dtype) for c, v in zip(x.codes4, x.scale)])),
    # What training does per step: scales, q with its sums, and the gradient of both. Moves 8 + 12 bytes per fp32
    # weight, were the scales known; that they are not costs 4 more, which the ratio to the copy leaves visible.
    Case("msq step", lambda s: 5 * s, step_of(_quantops_msq), lambda got, x: _equal(got, _reference_step(x)),
         {"eager": lambda: step_of(peers.eager), "compiled": lambda: step_of(peers.compiled_each()),
          "compiled list": lambda: step_of(peers.compiled_list()), "fake_quantize": lambda: step_of(peers.fake_quantize)},
         forward=lambda x: _quantops_msq(x.leaves, BITS, K), peer_forward=lambda x: list(peers.eager(x.leaves, BITS, K))),
]


# --- truncate: the widths that TruncQuant trains at, from one read; the peer is its chain of tensor ops ----------


WIDTHS = (8, 4, 2, 1)


def _truncated(x, w):
    return [q for v in foreach.truncate(w, x.scale, WIDTHS) for q in v]


def _truncated_eager(x, w):
    return [peers.truncate(t, s, n, max(WIDTHS)) for n in WIDTHS for t, s in zip(w, x.scale)]


def _truncate_gradients(x):
    """Of every width of every weight, made once."""
    if not hasattr(x, "width_gradients"):
        x.width_gradients = [torch.randn_like(g) for _ in WIDTHS for g in x.grad]
    return x.width_gradients


def _truncate_step_of(forward):
    return lambda x: torch.autograd.grad(forward(x, x.leaves), x.leaves, _truncate_gradients(x))


CASES += [
    Case("truncate 8-4-2-1", lambda s: 5 * s, lambda x: _truncated(x, x.w),
         lambda got, x: _equal(got, [reference.truncate(t, s, n) for n in WIDTHS for t, s in zip(x.w, x.scale)]),
         {"eager": lambda: lambda x: _truncated_eager(x, x.w)}),
    Case("truncate step", lambda s: 11 * s, _truncate_step_of(_truncated),
         lambda got, x: _equal(got, [reference.truncate_backward(_truncate_gradients(x)[i::len(x.w)], t, s, WIDTHS)[0]
                                     for i, (t, s) in enumerate(zip(x.w, x.scale))]),
         {"eager": lambda: _truncate_step_of(_truncated_eager)},
         forward=lambda x: _truncated(x, x.leaves), peer_forward=lambda x: _truncated_eager(x, x.leaves)),
]


def serving(device):
    """The implementation that serves ``device``; the reference is not one that may be timed."""
    implementation = quantops.info()["devices"][torch.device(device).type]["implementation"]
    if implementation not in ("cpp", "cuda", "triton"):
        raise SystemExit(f"bench: {device} is served by {implementation}, not by compiled kernels:\n{quantops.info()}")
    return implementation
