"""What a user could run instead of quantops, on lists of weights. The families' files say which op meets which peer."""

import contextlib
import io
import warnings

import torch

from bench.ops.registry import Absent, Peer


def step_peer(prepare, **options):
    """A peer of a training step: forward and backward of ``leaves, quantize = prepare(x)``.

    ``quantize(bits)`` gives a list q, or (list q, list of penalties), of the leaves.
    """

    def make(x):
        leaves, quantize = prepare(x)
        return lambda bits=x.n: step(x, leaves, quantize(bits))

    def forward(x):
        leaves, quantize = prepare(x)
        return lambda: quantize(x.n), leaves

    return Peer(make, forward=forward, **options)


def step(x, leaves, results):
    """Gradients of sum(grad * q) + r * sum(penalties)."""
    q, penalty = results if isinstance(results, tuple) else (results, None)
    if penalty is None:
        return torch.autograd.grad(q, leaves, x.grad)
    penalty = penalty.sum() if isinstance(penalty, torch.Tensor) else torch.stack(list(penalty)).sum()
    return torch.autograd.grad([*q, penalty], leaves, [*x.grad, x.r[0].to(penalty.dtype)])


def op_peers(function):
    """Peers of a plain op ``function(x, i, bits)`` on weight i, which the reference defines: eager, and compiled. On
    single weights: what lists cost is in the training steps."""

    def eager(x):
        return lambda bits=x.n: [function(x, i, bits) for i in range(len(x.w))]

    def compiled(x):
        call = torch.compile(lambda bits: [function(x, i, bits) for i in range(len(x.w))])
        return lambda bits=x.n: call(bits)

    return {"eager": Peer(eager, lists=False), "compiled": Peer(compiled, compiles=True, lists=False, graph=True)}


def chain_peers(chain, columns=2, graph=True):
    """Peers of a step from one differentiable chain of tensor ops ``chain(w, bits) -> (q, penalty)`` or q (one column):
    eager, torch.compile of the chain weight by weight, and of the whole list as one graph. ``graph``: a CUDA graph can
    hold the eager chain (it does not bring numbers from the host)."""

    def split(results):
        return tuple(zip(*(r[:2] for r in results))) if columns == 2 else list(results)

    def eager(x):
        return x.leaves, lambda bits: split([chain(t, bits) for t in x.leaves])

    def each(x):
        call = torch.compile(chain)
        return x.leaves, lambda bits: split([call(t, bits) for t in x.leaves])

    def whole(x):
        call = torch.compile(lambda w, bits: [chain(t, bits) for t in w])
        return x.leaves, lambda bits: split(call(x.leaves, bits))

    return {
        "eager": step_peer(eager, graph=graph),
        "compiled": step_peer(each, compiles=True, graph=True),
        "compiled list": step_peer(whole, compiles=True, whole_list=True, graph=True),
    }


# torch's own fake quantizers: nearest code, symmetric, no LSBs, no penalty.


def _range(bits):
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _zeros(x, size, dtype):
    return torch.zeros(size, dtype=dtype, device=x.w[0].device)


def torch_per_tensor(x):
    """torch.fake_quantize_per_tensor_affine with a scale of max|w|."""
    zero = _zeros(x, 1, torch.int32)

    def quantize(bits):
        low, high = _range(bits)
        return [
            torch.fake_quantize_per_tensor_affine(t, t.detach().abs().max().float() / high, zero, low, high)
            for t in x.leaves
        ]

    return x.leaves, quantize


def torch_per_channel(x):
    """torch.fake_quantize_per_channel_affine with scales of max|w| of each row."""
    zero = {t.shape[0]: _zeros(x, t.shape[0], torch.int32) for t in x.leaves}

    def quantize(bits):
        low, high = _range(bits)
        return [
            torch.fake_quantize_per_channel_affine(
                t, t.detach().flatten(1).abs().amax(1).float() / high, zero[t.shape[0]], 0, low, high
            )
            for t in x.leaves
        ]

    return x.leaves, quantize


def torch_learnable(x, per_row):
    """torch._fake_quantize_learnable_per_{tensor,channel}_affine: LSQ's scale gradients."""
    scales = [(s / _range(x.n)[1]).reshape(-1).requires_grad_() for s in (x.row_scale if per_row else x.scale)]
    zero = {s.numel(): _zeros(x, s.numel(), torch.float32) for s in scales}

    def quantize(bits):
        low, high = _range(bits)
        if per_row:
            return [
                torch._fake_quantize_learnable_per_channel_affine(t, s, zero[s.numel()], 0, low, high, 1.0)
                for t, s in zip(x.leaves, scales)
            ]
        return [
            torch._fake_quantize_learnable_per_tensor_affine(t, s, zero[1], low, high, 1.0)
            for t, s in zip(x.leaves, scales)
        ]

    return [*x.leaves, *scales], quantize


# Other libraries, where they are installed: pip install 'quantops[bench]'.


def imported(name):
    """The module, imported without what it prints."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return __import__(name, fromlist=["x"])
    except Exception as error:  # a build for another torch may fail in any way
        raise Absent(f"{name} cannot be imported: {type(error).__name__}: {str(error)[:200]}") from None


def torchao(x):
    """torchao's IntxFakeQuantizer, int8 symmetric, a scale per row; convolutions as matrices of their rows."""
    qat = imported("torchao.quantization.qat")
    quantizer = qat.IntxFakeQuantizer(qat.IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True))
    return x.leaves, lambda bits: [quantizer(t.flatten(1)).view_as(t) for t in x.leaves]


def brevitas(x, per_row):
    """Brevitas' Int8WeightPer{Tensor,Channel}Float in its QuantLinear; convolutions as matrices of their rows."""
    nn, quant = imported("brevitas.nn"), imported("brevitas.quant")
    kind = quant.Int8WeightPerChannelFloat if per_row else quant.Int8WeightPerTensorFloat
    layers = []
    for t in x.w:
        matrix = t.reshape(t.shape[0], -1)
        layer = nn.QuantLinear(
            matrix.shape[1], matrix.shape[0], bias=False, weight_quant=kind, dtype=t.dtype, device=t.device
        )
        with torch.no_grad():
            layer.weight.copy_(matrix)
        layers.append(layer)
    return [layer.weight for layer in layers], lambda bits: [
        layer.quant_weight().value.view_as(t) for layer, t in zip(layers, x.w)
    ]
