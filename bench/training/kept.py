"""What a training step keeps for its backward pass where activations are quantized, by us and by others.

Whole steps of ResNet-50 and of a ViT, weights in float, with a quantizer of 4 bits in front of every layer, or in the
place of every ReLU, whose output nobody keeps then. A ReLU in front keeps x by itself: there keep="input" costs
nothing, nor does what torch's quantizer keeps. Bytes are counted by torch's hooks on saved tensors, each storage
once, parameters apart: the most that is alive at a time. Beside them the peak of a step, forward and backward: the most
that the allocator had given out at once beyond what was there before. Neither depends on load or clock.
"""

import functools
import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import quantops
from bench.measure import peak_bytes
from bench.ops.report import insert
from bench.ops.steps import NETWORKS
from bench.store import Result
from bench.store import add_arguments as add_common
from quantops.activation import replace_fronts
from quantops.demo.digits import kept_for_backward

BEGIN, END = "<!-- kept: begin -->", "<!-- kept: end -->"
BITS = 4
CHOSEN = ("resnet50", "deit_small")


class LSQ(nn.Module):
    """LSQ as the paper's public code has it, a chain of tensor ops on a learned step that starts at the first batch."""

    def __init__(self):
        super().__init__()
        self.step, self.low, self.high, self.started = nn.Parameter(torch.ones(1)), 0, 2**BITS - 1, False
        self.register_buffer("zero", torch.zeros(1))

    @torch.no_grad()
    def start(self, x):
        """Signed or not by the values of the first batch, and the step."""
        if not self.started and x.min() < 0:
            self.low, self.high = -(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1
        if not self.started:
            self.step.copy_(2 * x.abs().mean() / self.high**0.5)
        self.started = True

    def forward(self, x):
        self.start(x)
        factor = (self.high * x.numel()) ** -0.5
        step = self.step * factor + (self.step - self.step * factor).detach()
        v = (x / step).clamp(self.low, self.high)
        return ((v.round() - v).detach() + v) * step


class TorchLearnable(LSQ):
    """torch's own learnable fake quantizer."""

    def forward(self, x):
        self.start(x)
        return torch._fake_quantize_learnable_per_tensor_affine(
            x, self.step, self.zero, self.low, self.high, (self.high * x.numel()) ** -0.5
        )


def _brevitas():
    from brevitas.nn import QuantIdentity

    return QuantIdentity(bit_width=BITS, return_quant_tensor=False)


def _torchao():
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    return IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int4, "per_token", is_symmetric=False))


def _in_front(make, model):
    """``make()`` in front of every layer that quantize_ takes."""
    for name, layer in list(model.named_modules()):
        if quantops.is_linear_or_conv(name, layer):
            layer.add_module("quantizer", make())
            layer.register_forward_pre_hook(lambda layer, args: (layer.quantizer(args[0]), *args[1:]))


def _ours(model, **settings):
    _in_front(functools.partial(quantops.UniformActivation, BITS, **settings), model)


def _ours_for_relus(model, **settings):
    replace_fronts(model, lambda like, front: quantops.UniformActivation(BITS, front=front, **settings))


WAYS = {
    "float": lambda model: None,
    "quantops, LSQ": lambda model: _ours(model, scale="step"),
    "quantops, LSQ, keep='input'": lambda model: _ours(model, scale="step", keep="input"),
    "quantops, PACT": lambda model: _ours(model, scale="clip"),
    "quantops, tracked": lambda model: _ours(model, scale="tracked"),
    "quantops, LSQ for each ReLU": lambda model: _ours_for_relus(model, scale="step"),
    "quantops, PACT for each ReLU": lambda model: _ours_for_relus(model, scale="clip"),
    "eager LSQ": functools.partial(_in_front, LSQ),
    "torch._fake_quantize_learnable": functools.partial(_in_front, TorchLearnable),
    "Brevitas": functools.partial(_in_front, _brevitas),
    "torchao, per token": functools.partial(_in_front, _torchao),
}
NEEDS = {"Brevitas": "brevitas", "torchao, per token": "torchao"}


def measured(network, way, device):
    """A row of the result."""
    torch.manual_seed(0)
    on, sizes = NETWORKS[network], NETWORKS[network].cuda if device.type == "cuda" else NETWORKS[network].cpu
    model, x = on.build(), torch.randn(*sizes)
    WAYS[way](model)
    model.to(device)
    x, y = x.to(device), torch.zeros(sizes[0], dtype=torch.int64, device=device)

    def step():
        F.cross_entropy(model(x), y).backward()

    step()  # scales start with the first batch
    model.zero_grad()
    row = {"network": network, "way": way, "sizes": list(sizes), "kept": kept_for_backward(model, step)}
    model.zero_grad()
    row["peak"] = peak_bytes(step, device)
    return row


def markdown(data):
    """The table of a result."""
    lines = [
        "| network, batch | way | kept for backward, MB | beside float | peak of a step, MB | beside float |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in data["rows"]:
        base = next(r for r in data["rows"] if r["network"] == row["network"] and r["way"] == "float")
        told = " | ".join(f"{row[n] / 1e6:.1f} | {row[n] / base[n]:.2f}x" for n in ("kept", "peak"))
        lines.append(f"| {row['network']}, {row['sizes'][0]} | {row['way']} | {told} |")
    return "\n".join(lines)


def kept(args):
    """Bytes that training steps keep for their backward pass, with quantized activations."""
    result, device = Result("kept", args), torch.device(args.device)
    for network in args.networks.split(","):
        if network not in NETWORKS:
            raise SystemExit(f"bench: networks: expected some of {', '.join(NETWORKS)}, got {network!r}")
        for way in WAYS:
            if way in NEEDS and importlib.util.find_spec(NEEDS[way]) is None:
                print(f"{way}: {NEEDS[way]} is not installed")
                continue
            if "ReLU" in way and not any(isinstance(m, nn.ReLU) for m in NETWORKS[network].build().modules()):
                continue
            if any(row["network"] == network and row["way"] == way for row in result.rows):
                continue
            result.add(measured(network, way, device))
            print(f"{network}, {way}: {result.rows[-1]['kept'] / 1e6:.1f} MB", flush=True)
    text = markdown(result.data)
    print(text)
    if args.into:
        insert(args.into, text, BEGIN, END)
    return 0


def add_arguments(parser):
    """Options of ``python -m bench kept``."""
    parser.add_argument("--into", type=Path, help=f"a Markdown file with the markers {BEGIN} and {END}")
    parser.add_argument("--networks", default=",".join(CHOSEN), help=f"some of {', '.join(NETWORKS)}")
    add_common(parser)
    parser.set_defaults(call=kept)
