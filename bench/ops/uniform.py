"""Family ``uniform``: the ops of MSQ and what they are measured against."""

import functools
import itertools
import math

import torch

from bench.ops import peers
from bench.ops.peers import chain_peers, op_peers, step, step_peer
from bench.ops.registry import Case
from quantops import foreach, reference
from quantops.library import ops
from quantops.reference import paper

BITS, K = 8, 1
MOST_DRAWN = 1 << 24  # random numbers in one tensor


def normal(shape, dtype, device, deviation=1.0):
    """Normal numbers; those of large tensors repeat, since drawing them takes longer than all that is measured."""
    count = math.prod(shape)
    values = torch.randn(min(count, MOST_DRAWN), device=device).mul_(deviation).to(dtype)
    return values.repeat(math.ceil(count / MOST_DRAWN))[:count].view(shape)


class Inputs:
    """Weights of a workload with what the ops need beside them, made when it is asked for."""

    n = BITS

    def __init__(self, shapes, dtype, device):
        torch.manual_seed(0)
        self.w = [normal(s, dtype, device, 0.05) for s in shapes]
        self.numel, self.tensors = sum(t.numel() for t in self.w), len(self.w)
        self.source = self.w
        self.bits = torch.full((len(shapes),), BITS, dtype=torch.int32, device=device)
        self.k, self.no_k = torch.full_like(self.bits, K), torch.zeros_like(self.bits)
        self.r = torch.full((len(shapes),), 1e-3, device=device)
        self.strengths = itertools.cycle([self.r[0], -self.r[0]])

    @functools.cached_property
    def target(self):
        """Results, for ops that write to given memory and for the copy."""
        return [torch.empty_like(t) for t in self.w]

    @functools.cached_property
    def leaves(self):
        return [t.detach().requires_grad_() for t in self.w]

    @functools.cached_property
    def grad(self):
        return [normal(t.shape, t.dtype, t.device) for t in self.w]

    @functools.cached_property
    def total(self):
        return [t.clone() for t in self.grad]

    @functools.cached_property
    def scale(self):
        return foreach.absmax(self.w)

    @functools.cached_property
    def row_scale(self):
        return foreach.absmax(self.w, per_row=True)

    @functools.cached_property
    def scale_leaves(self):
        return [s.clone().requires_grad_() for s in self.scale]

    @functools.cached_property
    def row_scale_leaves(self):
        return [s.clone().requires_grad_() for s in self.row_scale]

    @functools.cached_property
    def codes(self):
        return foreach.encode(self.w, self.scale, self.bits)


class CodeInputs(Inputs):
    """The same, read from codes and written to weights."""

    def __init__(self, shapes, dtype, device):
        super().__init__(shapes, dtype, device)
        self.source = self.codes


class ToCodeInputs(Inputs):
    """The same, written to integers."""

    @functools.cached_property
    def target(self):
        return [torch.empty_like(t, dtype=torch.int32) for t in self.w]


# Checks. Values are equal bit for bit; sums to within the rounding of float32.


def equal(got, want):
    """Whether the lists of tensors are equal; ``want`` may be a generator, so that one weight is held at a time."""
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def close(got, want):
    """Whether sums are equal to within the rounding of float32."""
    return torch.allclose(got.float(), want.float(), rtol=4e-6)


def _each(x, function, scale=None):
    return (function(t, s) for t, s in zip(x.w, scale or x.scale))


def _sums(got, x):
    want = [reference.msq(t, s, BITS, K)[1:] for t, s in zip(x.w, x.scale)]
    penalty, nonzero, sq_error = (torch.stack(v) for v in zip(*want))
    return torch.equal(got[1], nonzero) and close(got[0], penalty) and close(got[2], sq_error)


def _msq(got, x):
    return _sums(got[1:], x) and equal(got.q, _each(x, lambda t, s: reference.msq(t, s, BITS, K)[0]))


def _penalty_backward(got, x):
    return equal(
        got, (reference.uniform_backward(g, x.r[0], t, s, BITS, K)[0] for g, t, s in zip(x.grad, x.w, x.scale))
    )


def _scale_backward(grad_w, grad_scale, x, scale):
    """Against the reference; a sum of terms of both signs to within the rounding of their absolute sum."""

    def same(gw, gs, g, t, s):
        want_w, want_s = reference.uniform_backward(g, None, t, s, BITS)
        return torch.equal(gw, want_w) and torch.allclose(gs, want_s, rtol=1e-5, atol=1e-6 * t.numel() ** 0.5)

    return all(itertools.starmap(same, zip(grad_w, grad_scale, x.grad, x.w, scale, strict=True)))


# What is run, beside single calls.


def _msq_list(x):
    return lambda: foreach.msq(x.leaves, None, x.bits, x.k)[:2]


def _round_clamp_list(x):
    return lambda: foreach.round_clamp(x.leaves, None, x.bits)


def _round_clamp_rows(x):
    """As MSQConfig(per_row=True) calls it: every weight is inside its scale."""

    def forward():
        scale = foreach.absmax(x.leaves, per_row=True)
        return ops.round_clamp(x.leaves, scale, x.bits, 0, True, True, x.w[0].dtype)

    return forward


def _learned(x, scale):
    return lambda: foreach.round_clamp(x.leaves, scale, x.bits)


def _step(forward):
    return lambda x: step(x, x.leaves, forward(x)())


def _learned_step(name):
    def run(x):
        scale = getattr(x, name)
        return step(x, [*x.leaves, *scale], _learned(x, scale)())

    return run


def _learned_check(name):
    return lambda got, x: _scale_backward(got[: len(x.w)], got[len(x.w) :], x, [s.detach() for s in getattr(x, name)])


def _ste(per_row):
    """Any quantizer as eager code has it: a value in front, a straight-through estimator behind."""

    def chain(w, bits):
        with torch.no_grad():
            q = reference.round_clamp(w, reference.absmax(w, per_row=per_row), bits)
        return w + (q - w).detach()

    return chain


NO_LSB = "no LSBs, no penalty"
NEAREST = "nearest code"
BACKWARD_PEERS = op_peers(
    lambda x, i, bits: reference.uniform_backward(x.grad[i], x.r[0], x.w[i], x.scale[i], bits, K)[0]
)

CASES = [
    Case(
        "absmax",
        Inputs,
        lambda s: s,
        lambda s: 0,
        lambda x: ops.absmax(x.w, False),
        lambda got, x: torch.equal(got, torch.stack([reference.absmax(t) for t in x.w])),
        op_peers(lambda x, i, bits: x.w[i].abs().max()),
        cuda="items_kernel<AbsMax<T>, 60>",
    ),
    Case(
        "absmax per row",
        Inputs,
        lambda s: s,
        lambda s: 0,
        lambda x: ops.absmax(x.w, True),
        lambda got, x: torch.equal(got, torch.cat([reference.absmax(t, per_row=True) for t in x.w])),
        op_peers(lambda x, i, bits: x.w[i].flatten(1).abs().amax(1)),
        cuda="items_kernel<AbsMax<T>, 60>",
    ),
    Case(
        "absmean",
        Inputs,
        lambda s: s,
        lambda s: 0,
        lambda x: ops.absmean(x.w, False),
        lambda got, x: close(got, torch.stack([reference.absmean(t) for t in x.w])),
        op_peers(lambda x, i, bits: x.w[i].abs().mean()),
        cuda="items_kernel<AbsMean<T>, 60>",
        longest=False,
    ),
    Case(
        "round_clamp",
        Inputs,
        lambda s: s,
        lambda s: s,
        lambda x: foreach.round_clamp(x.w, x.scale, x.bits, out=x.target),
        lambda got, x: equal(got, _each(x, lambda t, s: reference.round_clamp(t, s, BITS))),
        op_peers(lambda x, i, bits: reference.round_clamp(x.w[i], x.scale[i], bits)),
        cuda="items_kernel<RoundClamp<T, T>, 60>",
    ),
    Case(
        "round_clamp per row",
        Inputs,
        lambda s: s,
        lambda s: s,
        lambda x: foreach.round_clamp(x.w, x.row_scale, x.bits, out=x.target),
        lambda got, x: equal(got, _each(x, lambda t, s: reference.round_clamp(t, s, BITS), x.row_scale)),
        op_peers(lambda x, i, bits: reference.round_clamp(x.w[i], x.row_scale[i], bits)),
        cuda="items_kernel<RoundClamp<T, T>, 60>",
    ),
    Case(
        "msq forward",
        Inputs,
        lambda s: s,
        lambda s: s,
        lambda x: foreach.msq(x.w, x.scale, x.bits, x.k, out=x.target),
        _msq,
        op_peers(lambda x, i, bits: reference.msq(x.w[i], x.scale[i], bits, K)),
        cuda="items_kernel<Msq<T, T>, 60>",
    ),
    Case(
        "lsb",
        ToCodeInputs,
        lambda s: s,
        lambda s: 4,
        lambda x: foreach.lsb(x.w, x.scale, x.bits, x.k),
        lambda got, x: equal(got, _each(x, lambda t, s: reference.lsb(t, s, BITS, K))),
        op_peers(lambda x, i, bits: reference.lsb(x.w[i], x.scale[i], bits, K)),
        cuda="items_kernel<Lsb<T>, 60>",
    ),
    Case(
        "lsb_stats",
        Inputs,
        lambda s: s,
        lambda s: 0,
        lambda x: foreach.lsb_stats(x.w, x.scale, x.bits, x.k),
        _sums,
        op_peers(lambda x, i, bits: reference.msq(x.w[i], x.scale[i], bits, K)[1:]),
        cuda="items_kernel<Msq<T, None>, 60>",
    ),
    Case(
        "msq backward",
        Inputs,
        lambda s: 2 * s,
        lambda s: s,
        lambda x: ops.uniform_backward(x.grad, x.r, x.w, x.scale, x.bits, x.k, 0, True, False)[0],
        _penalty_backward,
        BACKWARD_PEERS,
        cuda="items_kernel<Backward<T, T, true, false>, 60>",
    ),
    Case(
        "scale backward",
        Inputs,
        lambda s: 2 * s,
        lambda s: s,
        lambda x: ops.uniform_backward(x.grad, None, x.w, x.scale, x.bits, x.no_k, 0, True, True),
        lambda got, x: _scale_backward(*got, x, x.scale),
        op_peers(lambda x, i, bits: reference.uniform_backward(x.grad[i], None, x.w[i], x.scale[i], bits)),
        cuda="items_kernel<Backward<T, T, true, true>, 60>",
    ),
    # In turn with either sign, so that the gradient stays what it is but for rounding.
    Case(
        "add_lsb_grad_",
        Inputs,
        lambda s: 2 * s,
        lambda s: s,
        lambda x: foreach.add_lsb_grad_(x.total, x.w, x.scale, x.bits, x.k, next(x.strengths)),
        lambda got, x: equal(
            got, (reference.add_lsb_grad(g, x.r[0], t, s, BITS, K) for g, t, s in zip(x.grad, x.w, x.scale))
        ),
        op_peers(lambda x, i, bits: reference.add_lsb_grad(x.grad[i], x.r[0], x.w[i], x.scale[i], bits, K)),
        cuda="items_kernel<AddLsbGrad<T>, 60>",
    ),
    Case(
        "encode",
        ToCodeInputs,
        lambda s: s,
        lambda s: 4,
        lambda x: foreach.encode(x.w, x.scale, x.bits),
        lambda got, x: equal(got, _each(x, lambda t, s: reference.encode(t, s, BITS))),
        op_peers(lambda x, i, bits: reference.encode(x.w[i], x.scale[i], bits)),
        cuda="items_kernel<Encode<T>, 60>",
    ),
    Case(
        "decode",
        CodeInputs,
        lambda s: 4,
        lambda s: s,
        lambda x: foreach.decode(x.codes, x.scale, x.bits, out_dtype=x.w[0].dtype),
        lambda got, x: equal(got, (reference.decode(c, s, BITS, dtype=x.w[0].dtype) for c, s in zip(x.codes, x.scale))),
        op_peers(lambda x, i, bits: reference.decode(x.codes[i], x.scale[i], bits, dtype=x.w[0].dtype)),
        cuda="items_kernel<Decode<float, T>, 60>",
    ),
    # What training does in a step. The bytes are those of forward and backward, were the scales known; that they are
    # not costs one more read of the weights, which the ratio to the copy leaves visible.
    Case(
        "round_clamp step",
        Inputs,
        lambda s: s,
        lambda s: s,
        _step(_round_clamp_list),
        lambda got, x: equal(got, x.grad),
        {
            **chain_peers(_ste(False), columns=1, graph=False),
            "torch fake_quantize": step_peer(peers.torch_per_tensor, note=NEAREST),
            "Brevitas": step_peer(lambda x: peers.brevitas(x, False), note=NEAREST),
        },
        forward=lambda x: (_round_clamp_list(x), x.leaves),
    ),
    Case(
        "round_clamp step per row",
        Inputs,
        lambda s: s,
        lambda s: s,
        _step(_round_clamp_rows),
        lambda got, x: equal(got, x.grad),
        {
            **chain_peers(_ste(True), columns=1, graph=False),
            "torch fake_quantize": step_peer(peers.torch_per_channel, note=NEAREST),
            "torchao": step_peer(peers.torchao, note=NEAREST),
            "Brevitas": step_peer(lambda x: peers.brevitas(x, True), note=NEAREST),
        },
        forward=lambda x: (_round_clamp_rows(x), x.leaves),
    ),
    Case(
        "learned scale step",
        Inputs,
        lambda s: 3 * s,
        lambda s: 2 * s,
        _learned_step("scale_leaves"),
        _learned_check("scale_leaves"),
        {"torch learnable": step_peer(lambda x: peers.torch_learnable(x, False), note=NEAREST)},
        forward=lambda x: (_learned(x, x.scale_leaves), [*x.leaves, *x.scale_leaves]),
    ),
    Case(
        "learned scale step per row",
        Inputs,
        lambda s: 3 * s,
        lambda s: 2 * s,
        _learned_step("row_scale_leaves"),
        _learned_check("row_scale_leaves"),
        {"torch learnable": step_peer(lambda x: peers.torch_learnable(x, True), note=NEAREST)},
        forward=lambda x: (_learned(x, x.row_scale_leaves), [*x.leaves, *x.row_scale_leaves]),
    ),
    Case(
        "msq step",
        Inputs,
        lambda s: 3 * s,
        lambda s: 2 * s,
        _step(_msq_list),
        _penalty_backward,
        {
            **chain_peers(lambda w, bits: paper.msq(w, bits, K)),
            "torch fake_quantize": step_peer(peers.torch_per_tensor, note=f"{NEAREST}, {NO_LSB}"),
            "torchao": step_peer(peers.torchao, note=f"{NEAREST}, per row, {NO_LSB}"),
            "Brevitas": step_peer(lambda x: peers.brevitas(x, False), note=f"{NEAREST}, {NO_LSB}"),
        },
        forward=lambda x: (_msq_list(x), x.leaves),
    ),
]
