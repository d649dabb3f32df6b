"""Whole training steps: forward, loss, backward and optimizer, unquantized and quantized in every way there is.

Two groups: MSQ, and TruncQuant's step that trains several widths at once.

All variants of a network train one and the same set of Parameters with one optimizer, so that they differ in the
quantizer alone and large networks fit. A step is timed to its end on the device.
"""

import copy
import dataclasses
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import quantops
from bench import measure, models, store
from bench.state import Wrong
from quantops.demo.resnet20 import ResNet20
from quantops.reference import paper

BITS, K, STRENGTH = 8, 1, 1e-4
WIDTHS = (8, 4, 2, 1)
BASE, JOINT_BASE = "unquantized", f"{len(WIDTHS)} unquantized passes"


@dataclasses.dataclass(frozen=True)
class Network:
    """A model and its batch. ``sizes``: (batch, *rest of the input) on a GPU and on CPU, where 2 cores take seconds."""

    build: Callable
    cuda: tuple
    cpu: tuple
    images: bool = True


NETWORKS = {
    "resnet20": Network(ResNet20, (256, 3, 32, 32), (32, 3, 32, 32)),
    "resnet50": Network(models.ResNet50, (128, 3, 224, 224), (2, 3, 160, 160)),
    "deit_small": Network(models.DeiTSmall, (128, 3, 224, 224), (2, 3, 224, 224)),
    "transformer_1b": Network(models.Blocks, (4, 1024, 2048), (1, 128, 2048), images=False),
    "transformer_small": Network(lambda: models.Blocks(512, 4, 2048), (4, 1024, 512), (1, 256, 512), images=False),
}
CPU_NETWORKS = ("resnet20", "resnet50", "deit_small", "transformer_small")
CUDA_NETWORKS = ("resnet20", "resnet50", "deit_small", "transformer_1b")
CUDA_COMPILED_MODELS = ("resnet50", "deit_small")  # a minute or more for each way to train


def sharing(model):
    """Another module of the same structure with the very same Parameters, and buffers of its own."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def quantized_layers(model):
    """{name: module} of what quantize_ quantizes by default."""
    return {name: m for name, m in model.named_modules() if quantops.is_linear_or_conv(name, m)}


class _PaperMSQ(nn.Module):
    """The papers' chain as a parametrization; the penalty stays in ``penalty`` until it is taken."""

    def forward(self, w):
        q, self.penalty, _, _ = paper.msq(w, BITS, K)
        return q


class Variant:
    """One way to train: the loss is differentiated, then ``after()`` runs, then the optimizer.

    compiles: its first step takes long. holds: what its loss keeps is what a step keeps.
    """

    compiles, holds = False, True

    def __init__(self, model):
        self.model = sharing(model)

    def penalty(self):
        return None

    def outputs(self, x):
        return self.model(x)

    def loss(self, training):
        return training.task_loss(self.outputs(training.x))

    def backward(self, training):
        training.loss(self).backward()

    def after(self):
        pass


class Unquantized(Variant):
    """Float weights."""


class Fused(Variant):
    """quantops, the penalty a term of the loss."""

    mode = "loss"

    def __init__(self, model):
        super().__init__(model)
        quantops.quantize_(self.model, quantops.MSQConfig(bits=BITS, k=K, scale="absmax", penalty=self.mode))

    def penalty(self):
        return quantops.penalty(self.model)


class Decoupled(Fused):
    """quantops, the penalty's gradient added after the backward pass."""

    mode = "decoupled"

    def penalty(self):
        return None

    def after(self):
        quantops.add_penalty_grad_(self.model, STRENGTH)


class Eager(Variant):
    """The papers' chain of eager ops, layer by layer."""

    def __init__(self, model):
        super().__init__(model)
        self.chains = []
        for layer in quantized_layers(self.model).values():
            parametrize.register_parametrization(layer, "weight", _PaperMSQ(), unsafe=True)
            self.chains.append(layer.parametrizations.weight[0])

    def penalty(self):
        return sum(c.penalty for c in self.chains)


class CompiledList(Variant):
    """The papers' chain for the whole list of weights in one graph of torch.compile, the network itself eager."""

    compiles = True

    def __init__(self, model):
        super().__init__(model)
        self.weights = {f"{name}.weight": m.weight for name, m in quantized_layers(self.model).items()}
        self.call = torch.compile(lambda w: [paper.msq(t, BITS, K)[:2] for t in w])

    def outputs(self, x):
        results = self.call(list(self.weights.values()))
        self.sum = torch.stack([r[1] for r in results]).sum()
        return torch.func.functional_call(self.model, dict(zip(self.weights, (r[0] for r in results))), (x,))

    def penalty(self):
        return self.sum


def _compiled(base):
    """The whole forward pass, penalty and all, under torch.compile."""

    class Compiled(base):
        compiles = True

        def __init__(self, model):
            super().__init__(model)
            self.forward = torch.compile(lambda x: (base.outputs(self, x), base.penalty(self)))

        def outputs(self, x):
            out, self.sum = self.forward(x)
            return out

        def penalty(self):
            return self.sum

    return Compiled


class Passes(Variant):
    """Float weights, a forward pass for each width."""

    def loss(self, training):
        return sum(training.task_loss(self.model(training.x)) for _ in WIDTHS)


class JointLoss(Variant):
    """quantops.joint_loss: one backward pass for all widths."""

    def __init__(self, model):
        super().__init__(model)
        quantops.quantize_(self.model, quantops.TruncQuantConfig(bits=WIDTHS, scale="absmax", batch_norm=False))

    def loss(self, training):
        return quantops.joint_loss(self.model, training.task_loss, training.x).loss


class JointStep(JointLoss):
    """quantops.joint_step: a backward pass after each forward pass, and the weights' once."""

    holds = False

    def backward(self, training):
        with training.autocast():
            quantops.joint_step(self.model, training.task_loss, training.x)


class EagerWidths(Variant):
    """The chain of eager ops, width by width and layer by layer."""

    def __init__(self, model):
        super().__init__(model)
        self.weights = {f"{name}.weight": m.weight for name, m in quantized_layers(self.model).items()}

    def each_width(self):
        return ([paper.truncate(w, m) for w in self.weights.values()] for m in WIDTHS)

    def loss(self, training):
        return sum(
            training.task_loss(torch.func.functional_call(self.model, dict(zip(self.weights, q)), (training.x,)))
            for q in self.each_width()
        )


class CompiledWidths(EagerWidths):
    """The same chain for the whole list of weights and all widths as one graph of torch.compile; an eager network."""

    compiles = True

    def __init__(self, model):
        super().__init__(model)
        self.call = torch.compile(lambda w: [[paper.truncate(t, m) for t in w] for m in WIDTHS])

    def each_width(self):
        return self.call(list(self.weights.values()))


VARIANTS = {
    BASE: Unquantized,
    "quantops": Fused,
    "quantops decoupled": Decoupled,
    "eager chain": Eager,
    "compiled chain": CompiledList,
}
COMPILED_MODELS = {
    f"{BASE}, compiled model": _compiled(Unquantized),
    "quantops, compiled model": _compiled(Fused),
    "eager chain, compiled model": _compiled(Eager),
}

JOINT = {
    JOINT_BASE: Passes,
    "quantops joint_step": JointStep,
    "quantops joint_loss": JointLoss,
    "eager chain": EagerWidths,
    "compiled chain": CompiledWidths,
}


class Training:
    """A network's Parameters, batch and optimizer, and the steps of its variants."""

    def __init__(self, name, device):
        network, self.device = NETWORKS[name], torch.device(device)
        self.cuda = self.device.type == "cuda"
        torch.manual_seed(0)
        with self.device:
            self.model = network.build()
            self.size = network.cuda if self.cuda else network.cpu
            self.x = torch.randn(self.size)
            self.y = torch.randint(10, self.size[:1]) if network.images else torch.randn(self.size)
        self.images = network.images
        if self.cuda and network.images:
            self.model.to(memory_format=torch.channels_last)
            self.x = self.x.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-5, momentum=0.9)

    def autocast(self):
        """The arithmetic of the networks: bfloat16 on a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda)

    def task_loss(self, out):
        """The loss without a penalty."""
        return F.cross_entropy(out.float(), self.y) if self.images else F.mse_loss(out.float(), self.y)

    def loss(self, variant):
        """The task's loss and, where it is a term of it, the penalty."""
        with self.autocast():
            loss = variant.loss(self)
        penalty = variant.penalty()
        return loss if penalty is None else loss + STRENGTH * penalty

    def step(self, variant):
        """One step of training."""
        self.optimizer.zero_grad()
        variant.backward(self)
        variant.after()
        self.optimizer.step()


def check(training, fused, eager):
    """The quantized variants compute the same loss, or it is no comparison. Both are in training mode, so that batch
    norm does the same in both."""
    with torch.no_grad():
        a, b = (float(training.loss(v)) for v in (fused, eager))
    if not abs(a - b) <= 2e-2 * abs(b):
        raise Wrong(f"bench: quantops' loss is {a}, the eager chain's {b}; the steps are not timed")


def saved_bytes(training, variant):
    """Bytes kept for backward, activations and quantized weights among them."""
    saved = measure.saved_bytes(lambda: training.loss(variant), training.model.parameters())
    with torch.no_grad():
        training.loss(variant)  # a penalty that the variant holds would hold that graph
    return saved


def measure_network(name, device, kinds, compile_seconds, budget, keep_caches=False):
    """Rows of the result: the variants ``kinds`` of a network, timed in turn. ``keep_caches``: first steps take what
    was compiled before."""
    training = Training(name, device)
    variants, absent, compiled = {}, {}, {}
    for label, kind in kinds.items():
        try:
            if kind.compiles:
                measure.warm_compiler(device)
                torch._dynamo.reset()
            with measure.time_box(compile_seconds), measure.empty_compile_cache(keep_caches):
                variant = kind(training.model)
                seconds = measure.seconds_of(lambda: training.step(variant), device)
        except measure.TookTooLong:
            torch._dynamo.reset()
            absent[label] = f"its first step took more than {compile_seconds:.0f} s"
            continue
        except torch.OutOfMemoryError:
            absent[label] = "out of memory"
            continue
        variants[label] = variant
        compiled[label] = {"first_step": seconds}
    ours = [label for label in variants if label.startswith("quantops") and variants[label].holds]
    if ours and "eager chain" in variants:
        check(training, variants[ours[0]], variants["eager chain"])
    first = next(iter(kinds))
    calls = {label: (lambda v=v: measure.seconds_of(lambda: training.step(v), device)) for label, v in variants.items()}
    times = measure.interleave(calls, budget, least=7, most=60)
    peaks = {label: measure.peak_bytes(lambda v=v: training.step(v), device) for label, v in variants.items()}
    saved = {label: saved_bytes(training, v) for label, v in variants.items() if v.holds and not v.compiles}
    weights = [m.weight for m in quantized_layers(training.model).values()]
    row = {
        "network": name,
        "input": list(training.size),
        "dtype": "bfloat16 autocast" if training.cuda else "float32",
        "weights": sum(w.numel() for w in weights),
        "tensors": len(weights),
        "base": first,
        "times": {label: measure.summary(t) for label, t in times.items()},
        "ratio": {label: measure.ratio(t, times[first]) for label, t in times.items() if first in times},
        "saved_bytes": saved,
        "peak_bytes": peaks,
        "first_calls": compiled,
        "absent": absent,
    }
    if training.cuda:
        row["launches"] = {
            label: measure.launches(lambda v=v: training.step(v), device) for label, v in variants.items()
        }
    return row


def line(row):
    """A row as text."""
    parts = [f"{label} {1e3 * t['median']:.1f} ms ({row['ratio'][label]:.3f}x)" for label, t in row["times"].items()]
    parts += [f"{label}: {why}" for label, why in row["absent"].items()]
    return f"{row['network']:18} {'x'.join(map(str, row['input'])):16} " + "   ".join(parts)


def steps(args):
    """Measures whole training steps and writes steps-<implementation>.json in the folder of the device."""
    store.prepare(args)
    cuda, result = torch.device(args.device).type == "cuda", store.Result("steps", args)
    head = result.data["machine"]
    print(quantops.info(), f"\n{head['device']}, commit {head['commit']}")
    done = {(r["network"], r["base"]) for r in result.rows}
    for name in args.networks.split(",") if args.networks else CUDA_NETWORKS if cuda else CPU_NETWORKS:
        if name not in NETWORKS:
            raise SystemExit(f"bench: expected networks of {', '.join(NETWORKS)}, got {name!r}")
        whole = args.compiled_models or (cuda and name in CUDA_COMPILED_MODELS)
        groups = (VARIANTS, JOINT, COMPILED_MODELS) if whole else (VARIANTS, JOINT)
        for kinds in [_chosen(args.variants)] if args.variants else groups:
            if (name, next(iter(kinds))) in done:
                continue
            if result.time_is_up():
                return store.UNFINISHED
            result.add(measure_network(name, args.device, kinds, args.compile_seconds, args.budget, args.keep_caches))
            print(line(result.rows[-1]), flush=True)
    print(f"wrote {result.path}")
    return 0


def _chosen(names):
    """The variants of these names, with commas."""
    every = VARIANTS | COMPILED_MODELS
    wanted = re.split(",(?! )", names)
    if unknown := set(wanted) - every.keys():
        raise SystemExit(f"bench: expected variants of {'; '.join(every)}, got {'; '.join(sorted(unknown))}")
    return {name: every[name] for name in wanted}


def add_arguments(parser):
    """Options of ``python -m bench steps``."""
    store.add_arguments(parser)
    parser.add_argument("--networks", help=f"of {', '.join(NETWORKS)}; default: by device")
    parser.add_argument("--budget", type=float, default=6.0, help="seconds of timing for a network")
    parser.add_argument("--compiled-models", action="store_true", help="all networks under torch.compile too, whole")
    parser.add_argument("--variants", help="these of MSQ alone, with commas; the first is the base")
    parser.set_defaults(call=steps)
