"""Family ``activation``: activations by the uniform rules, with LSQ's and PACT's gradients, and what they are measured
against: the papers' chains of tensor ops, and torch's own learnable fake quantizer."""

import functools

import torch
import torch.nn.functional as F

from bench.ops.peers import imported, op_peers, step, step_peer
from bench.ops.registry import Case
from bench.ops.uniform import Inputs
from quantops import quantize_activation, reference
from quantops.layout import in_memory
from quantops.library import ops
from quantops.reference.activation import FRONTS

BITS, TOP, MOST = 4, 15, 7  # the last level of unsigned and of signed codes
GELU = FRONTS.index("gelu")
PIECE = 1 << 20  # elements that the reference takes at a time


class ActivationInputs(Inputs):
    """Tensors with the scale that LSQ starts with, of unsigned codes."""

    n = BITS

    def __init__(self, shapes, dtype, device):
        super().__init__(shapes, dtype, device)
        self.bits = torch.full((1,), BITS, dtype=torch.int32, device=device)

    @functools.cached_property
    def ends(self):
        return [2 * t.float().abs().mean().reshape(1) * (TOP + 1) / TOP**0.5 for t in self.w]

    @functools.cached_property
    def end_leaves(self):
        return [s.clone().requires_grad_() for s in self.ends]

    @functools.cached_property
    def inside(self):
        """What the forward pass keeps, a bit for each element."""
        return [kept for _, kept in _forward(self)]


class GeluInputs(ActivationInputs):
    """The same behind a GELU, of signed codes."""

    @functools.cached_property
    def ends(self):
        return [2 * F.gelu(t.float()).abs().mean().reshape(1) * (MOST + 1) / MOST**0.5 for t in self.w]

    @functools.cached_property
    def nothing(self):
        return torch.empty(0, dtype=torch.uint8, device=self.w[0].device)


def _forward(x):
    return [ops.activation(t, s, None, x.bits, 0, False, 0, 1, 0, t.dtype) for t, s in zip(x.w, x.ends)]


def _quantized(x, learn):
    return [quantize_activation(t, s, x.bits, learn=learn) for t, s in zip(x.leaves, x.end_leaves)]


def _pieces(x, i):
    return zip(in_memory(x.w[i]).split(PIECE), in_memory(x.grad[i]).split(PIECE))


def _forward_check(got, x):
    return all(
        torch.equal(in_memory(q), torch.cat([reference.activation(t, s, BITS)[0] for t, _ in _pieces(x, i)]))
        for i, ((q, _), s) in enumerate(zip(got, x.ends))
    )


def _backward_check(got, x):
    return all(
        torch.equal(
            in_memory(v),
            torch.cat([reference.activation_backward(g, t, None, None, s, BITS)[0] for t, g in _pieces(x, i)]),
        )
        for i, ((v, _), s) in enumerate(zip(got, x.ends))
    )


def _step_check(learn):
    """dL/dx bit for bit; the sum for the scale against the exact one, to the rounding of what is kept of its terms."""

    def check(got, x):
        for i, s in enumerate(x.ends):
            parts = [reference.activation_backward(g, t, None, None, s, BITS, learn="clip") for t, g in _pieces(x, i)]
            want = sum(v[1].double() for v in parts)
            if learn == "step":
                pairs = [(t, g, reference.activation(t, s, BITS)[0]) for t, g in _pieces(x, i)]
                inside = sum((g.double() * ((q - t).double() / s) * ((t >= 0) & (t <= s))).sum() for t, g, q in pairs)
                want = (want + inside) / (TOP * max(1, x.w[i].numel())) ** 0.5
            room = 2e-2 * max(1, x.w[i].numel()) ** (0.5 if learn == "clip" else 0)
            same = torch.equal(in_memory(got[i]), torch.cat([v[0] for v in parts]))
            if not same or not torch.allclose(got[len(x.w) + i].double(), want, rtol=1e-2, atol=room):
                return False
        return True

    return check


def _eager(learn):
    """The papers' chains, on a step (LSQ) or a clip (PACT)."""

    def lsq(t, s):
        factor = (TOP * t.numel()) ** -0.5
        step_ = (s * factor + (s - s * factor).detach()) / (TOP + 1)
        v = (t / step_).clamp(0, TOP)
        return ((v.round() - v).detach() + v) * step_

    def pact(t, s):
        v = torch.minimum(t.clamp(min=0), s)
        return v + ((v * (TOP / s)).round() * (s / TOP) - v).detach()

    return _chain_peers(lsq if learn == "step" else pact)


def _chain_peers(chain):
    """A chain of x and a scale, as it is and compiled."""

    def prepare(x):
        return [*x.leaves, *x.end_leaves], lambda bits: [
            chain(t, s.to(t.dtype)) for t, s in zip(x.leaves, x.end_leaves)
        ]

    def compiled(x):
        call = torch.compile(chain)
        return [*x.leaves, *x.end_leaves], lambda bits: [call(t, s.to(t.dtype)) for t, s in zip(x.leaves, x.end_leaves)]

    return {"eager": step_peer(prepare), "compiled": step_peer(compiled, compiles=True)}


def _torch_learnable(x):
    steps = [(s / (TOP + 1)).requires_grad_() for s in x.ends]
    zero = torch.zeros(1, device=x.w[0].device)
    return [*x.leaves, *steps], lambda bits: [
        torch._fake_quantize_learnable_per_tensor_affine(t, s, zero, 0, TOP, (TOP * max(1, t.numel())) ** -0.5)
        for t, s in zip(x.leaves, steps)
    ]


def _brevitas(x):
    """Its default quantizer of activations: signed, a scale from running statistics, and learned after 300 steps."""
    nn = imported("brevitas.nn")
    layers = [nn.QuantIdentity(bit_width=BITS, return_quant_tensor=False).to(t.device, t.dtype) for t in x.w]
    return x.leaves, lambda bits: [layer(t) for layer, t in zip(layers, x.leaves)]


def _torchao(x):
    """A range for each row of the batch, from its values."""
    qat = imported("torchao.quantization.qat")
    quantizer = qat.IntxFakeQuantizer(qat.IntxFakeQuantizeConfig(torch.int4, "per_token", is_symmetric=False))
    return x.leaves, lambda bits: [quantizer(t.flatten(1)).view_as(t) for t in x.leaves]


def _case(name, learn, reads, writes, keeps, peers):
    return Case(
        name,
        ActivationInputs,
        reads,
        writes,
        lambda x: step(x, [*x.leaves, *x.end_leaves], _quantized(x, learn)),
        _step_check(learn),
        peers,
        forward=lambda x: (lambda: _quantized(x, learn), [*x.leaves, *x.end_leaves]),
        keeps=keeps,
    )


# Behind a GELU: x is kept, nothing else.


def _of_gelu(x):
    return [
        quantize_activation(t, s, x.bits, signed=True, front="gelu", learn="step")
        for t, s in zip(x.leaves, x.end_leaves)
    ]


def _gelu_chain(t, s):
    factor = (MOST * t.numel()) ** -0.5
    step_ = (s * factor + (s - s * factor).detach()) / (MOST + 1)
    v = (F.gelu(t) / step_).clamp(-MOST - 1, MOST)
    return ((v.round() - v).detach() + v) * step_


def _gelu_backward_chain(x, i, bits):
    t, s = x.w[i], x.ends[i].to(x.w[i].dtype)
    return torch.where(F.gelu(t).abs() <= s, torch.ops.aten.gelu_backward(x.grad[i], t), 0)


def _gelu_forward_check(got, x):
    options = {"signed": True, "front": "gelu", "keep": "input"}
    return all(
        torch.equal(in_memory(q), torch.cat([reference.activation(t, s, BITS, **options)[0] for t, _ in _pieces(x, i)]))
        for i, ((q, _), s) in enumerate(zip(got, x.ends))
    )


def _gelu_gradients(x, i, learn=None):
    """Of the pieces of a tensor."""
    options = {"signed": True, "front": "gelu", "learn": learn}
    return [reference.activation_backward(g, t, None, None, x.ends[i], BITS, **options) for t, g in _pieces(x, i)]


def _gelu_backward_check(got, x):
    return all(
        torch.equal(in_memory(v), torch.cat([part[0] for part in _gelu_gradients(x, i)]))
        for i, (v, _) in enumerate(got)
    )


def _gelu_step_check(got, x):
    """dL/dx bit for bit, the sum for the scale to the rounding of sums: what pieces divide by is theirs, not all's."""
    for i, t in enumerate(x.w):
        parts, sizes = _gelu_gradients(x, i, "step"), [len(p) for p, _ in _pieces(x, i)]
        want = sum(part[1].double() * size**0.5 for part, size in zip(parts, sizes)) / max(1, t.numel()) ** 0.5
        same = torch.equal(in_memory(got[i]), torch.cat([part[0] for part in parts]))
        if not same or not torch.allclose(got[len(x.w) + i].double(), want, rtol=1e-3, atol=1e-3):
            return False
    return True


CASES = [
    # The longest way of these two is that of residuals, and of x kept.
    Case(
        "activation forward",
        ActivationInputs,
        lambda s: s,
        lambda s: s + 0.125,
        _forward,
        _forward_check,
        cuda="activation_kernel<T, T, false, false>",
        longest=False,
    ),
    Case(
        "activation backward",
        ActivationInputs,
        lambda s: s + 0.125,
        lambda s: s,
        lambda x: [
            ops.activation_backward(g, None, None, kept, s, None, x.bits, 0, False, 0, 1, 0, g.dtype)
            for g, kept, s in zip(x.grad, x.inside, x.ends)
        ],
        _backward_check,
        cuda="gradient_kernel<T, false, false>",
        longest=False,
        optional=lambda s: s,  # q, for the sum of a clip
    ),
    # x to q and 8 bits; then dL/dq and these to dL/dx.
    _case(
        "LSQ activation step",
        "step",
        lambda s: 2 * s + 1,
        lambda s: 2 * s + 1,
        lambda s: 1.0,
        {
            **_eager("step"),
            "torch learnable": step_peer(_torch_learnable),
            "Brevitas": step_peer(_brevitas, note="signed codes, its scale from statistics at first"),
            "torchao": step_peer(_torchao, note="a range per token, not learned"),
        },
    ),
    # x to q and a bit; then dL/dq, q and the bit to dL/dx.
    _case(
        "PACT activation step",
        "clip",
        lambda s: 3 * s + 0.125,
        lambda s: 2 * s + 0.125,
        lambda s: s + 0.125,
        _eager("clip"),
    ),
    Case(
        "activation gelu forward",
        GeluInputs,
        lambda s: s,
        lambda s: s,
        lambda x: [ops.activation(t, s, None, x.bits, 0, True, GELU, 0, 0, t.dtype) for t, s in zip(x.w, x.ends)],
        _gelu_forward_check,
        op_peers(lambda x, i, bits: _gelu_chain(x.w[i], x.ends[i].to(x.w[i].dtype))),
        cuda="activation_kernel<T, T, false, true>",
    ),
    Case(
        "activation gelu backward",
        GeluInputs,
        lambda s: 2 * s,
        lambda s: s,
        lambda x: [
            ops.activation_backward(g, t, None, x.nothing, s, None, x.bits, 0, True, GELU, 0, 0, t.dtype)
            for g, t, s in zip(x.grad, x.w, x.ends)
        ],
        _gelu_backward_check,
        op_peers(_gelu_backward_chain),
        cuda="gradient_kernel<T, false, true>",
    ),
    # x to q; then dL/dq and x to dL/dx.
    Case(
        "LSQ activation gelu step",
        GeluInputs,
        lambda s: 3 * s,
        lambda s: 2 * s,
        lambda x: step(x, [*x.leaves, *x.end_leaves], _of_gelu(x)),
        _gelu_step_check,
        _chain_peers(_gelu_chain),
        forward=lambda x: (lambda: _of_gelu(x), [*x.leaves, *x.end_leaves]),
        keeps=lambda s: s,
    ),
]
