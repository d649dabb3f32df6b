"""What a training step of ResNet-20 costs by each method: time, and the bytes that training holds. No accuracy.

Every way to train has a network and an optimizer of its own, since bit-level training has other parameters; all start
from the same weights and see the same batch.
"""

import torch
import torch.nn.functional as F

import quantops
from bench import measure, store
from bench.ops import steps
from bench.training.recipes import RECIPES
from bench.training.train import Forward, training_bytes
from quantops.demo.resnet20 import ResNet20

BASE, BATCH = "float", 128
FOREVER = 10**9  # steps of a run that is never at its end: neither precisions nor temperatures change while it is timed


class _Variant:
    """A way of bench/ops/steps.py, with the interface of bench/training/methods.py."""

    def __init__(self, kind, model):
        self.variant = kind(model)
        self.model = self.variant.model

    def backward(self, forward, x, y):
        with forward.autocast():
            loss = F.cross_entropy(self.variant.outputs(x).float(), y)
        penalty = self.variant.penalty()
        (loss if penalty is None else loss + steps.STRENGTH * penalty).backward()
        self.variant.after()
        return loss.detach()

    def after_step(self, step, x, y):
        pass


def _bit_level(name):
    recipe = RECIPES[name]
    return lambda model: recipe.method(model, FOREVER, **recipe.settings)


WAYS = {
    BASE: lambda model: _Variant(steps.Unquantized, model),
    "eager MSQ": lambda model: _Variant(steps.Eager, model),
    "compiled MSQ": lambda model: _Variant(steps.CompiledList, model),
    "quantops MSQ": lambda model: _Variant(steps.Fused, model),
    "quantops MSQ, decoupled": lambda model: _Variant(steps.Decoupled, model),
    "BSQ": _bit_level("bsq"),
    "CSQ": _bit_level("csq"),
}


class Training:
    """One way, its network and optimizer, and the batch of all."""

    def __init__(self, make, device, batch, amp):
        torch.manual_seed(0)
        model = ResNet20()
        self.x, self.y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
        self.x = self.x.to(device, memory_format=torch.channels_last)
        self.y = self.y.to(device)
        self.method = make(model.to(device, memory_format=torch.channels_last))
        self.model = self.method.model
        self.forward = Forward(self.model, device, amp, False)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, fused=True)

    def step(self):
        """One step of training."""
        self.optimizer.zero_grad()
        loss = self.method.backward(self.forward, self.x, self.y)
        self.optimizer.step()
        self.method.after_step(1, self.x, self.y)
        return loss


def measure_costs(device, batch, amp, compile_seconds, budget):
    """A row of the result."""
    trainings, losses, absent = {}, {}, {}
    for name, make in WAYS.items():
        try:
            if name.startswith("compiled"):
                measure.warm_compiler(device)
            with measure.time_box(compile_seconds):
                trainings[name] = Training(make, device, batch, amp)
                losses[name] = float(trainings[name].step())
        except measure.TookTooLong:
            trainings.pop(name, None)
            absent[name] = f"its first step took more than {compile_seconds:.0f} s"
    for name, loss in losses.items():  # 8 bits change little; a way that computes something else is not timed
        if not abs(loss - losses[BASE]) <= 0.05 * losses[BASE]:
            raise SystemExit(f"bench: the loss is {loss} by {name}, {losses[BASE]} in float; the steps are not timed")
    calls = {name: (lambda t=t: measure.seconds_of(t.step, device)) for name, t in trainings.items()}
    times = measure.interleave(calls, budget, least=9, most=100)
    held = {name: training_bytes(t.model, t.optimizer) for name, t in trainings.items()}
    peaks = {name: measure.peak_bytes(t.step, device) for name, t in trainings.items()}
    row = {
        "network": "resnet20",
        "batch": batch,
        "arithmetic": "bfloat16 autocast" if amp else "float32",
        "base": BASE,
        "times": {name: measure.summary(t) for name, t in times.items()},
        "ratio": {name: measure.ratio(t, times[BASE]) for name, t in times.items()},
        "held": held,
        "peak_bytes": peaks,
        "absent": absent,
    }
    if torch.device(device).type == "cuda":
        row["launches"] = {name: measure.launches(t.step, device) for name, t in trainings.items()}
    return row


def state_bytes(held):
    """Parameters, gradients and optimizer state."""
    return sum(held[f"{part}_bytes"] for part in ("parameter", "gradient", "optimizer"))


def costs(args):
    """Measures a training step of each method and writes costs-<implementation>.json in the folder of the device."""
    store.prepare(args)
    result = store.Result("costs", args)
    head = result.data["machine"]
    print(quantops.info(), f"\n{head['device']}, commit {head['commit']}")
    cuda = torch.device(args.device).type == "cuda"
    done = {(r["batch"], r["arithmetic"]) for r in result.rows}
    for amp in (False, True) if cuda or args.amp else (False,):
        if (args.batch, "bfloat16 autocast" if amp else "float32") in done:
            continue
        if result.time_is_up():
            return store.UNFINISHED
        row = measure_costs(args.device, args.batch, amp, args.compile_seconds, args.budget)
        result.add(row)
        for name, t in row["times"].items():
            held, peak = state_bytes(row["held"][name]) / 1e6, row["peak_bytes"][name] / 1e6
            print(
                f"{row['arithmetic']:18} {name:24} {1e3 * t['median']:8.2f} ms  {row['ratio'][name]:6.3f}x   "
                f"state {held:6.2f} MB   peak {peak:7.1f} MB"
            )
        for name, why in row["absent"].items():
            print(f"{name}: {why}")
    print(f"wrote {result.path}")
    return 0


def add_arguments(parser):
    """Options of ``python -m bench costs``."""
    store.add_arguments(parser)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--amp", action="store_true", help="in bfloat16 too; always so on a GPU")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of timing for each arithmetic")
    parser.set_defaults(call=costs)
