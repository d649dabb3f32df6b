"""Trains ResNet-20, or a small ViT, by each method in one loop, and writes accuracy, bits, bytes, time, decisions."""

import ast
import contextlib
import json
import math
import multiprocessing
import re
import statistics
import time
from pathlib import Path

import torch

import quantops
from bench import machine, state
from bench.store import UNFINISHED, read_runs, read_states
from bench.training import data
from bench.training.recipes import COMMON, EVERYWHERE, GROUPS, NETWORKS, RECIPES
from quantops.files import write_whole

COLD = 10  # steps of a process that are not timed
CALIBRATION = 4  # batches that quantizers of activations start from
TEST_BATCH = 1000
METHOD = "{method}"  # in a label
STATES = {  # of a run, after every epoch
    "configuration",
    "model",
    "method",
    "optimizer",
    "epochs",
    "bytes",
    "step_seconds",
    "peak",
    "start_accuracy",
    "random",
    "cuda",
}


class Forward:
    """x -> float32 logits of a model, in the arithmetic of the run; ``model``: what is called, perhaps compiled."""

    def __init__(self, model, device, amp, compiles):
        self.device, self.amp, self.model = torch.device(device), amp, torch.compile(model) if compiles else model

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    def __call__(self, x):
        with self.autocast():
            return self.model(x).float()


class Clock:
    """Seconds between ticks, on the device."""

    def __init__(self, device):
        self.cuda, self.ticks = torch.device(device).type == "cuda", []

    def tick(self):
        if self.cuda:
            self.ticks.append(torch.cuda.Event(enable_timing=True))
            self.ticks[-1].record()
        else:
            self.ticks.append(time.perf_counter())

    def seconds(self):
        pairs = zip(self.ticks, self.ticks[1:])
        if not self.cuda:
            return [b - a for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


def renamed(weights):
    """A state dict of a ResNet with the names of torchvision, under the names of bench/models.py."""

    def name(key):
        key = re.sub(r"^layer(\d)\.(\d)\.", lambda m: f"blocks.{3 * (int(m[1]) - 1) + int(m[2])}.", key)
        return re.sub(r"^(conv|bn)1\.", r"\1.", key).replace(".downsample.", ".down.")

    return {name(key): value for key, value in weights.items()}


def initialised(classes, seed, path, network="resnet20"):
    """A network of NETWORKS, from a state dict where ``path`` is one."""
    torch.manual_seed(seed)
    model = NETWORKS[network](classes)
    if path is not None:
        try:
            model.load_state_dict(renamed(read_states("init", path)))
        except (RuntimeError, AttributeError, TypeError) as error:
            raise ValueError(f"init: {path} is no state dict of this {network}: {error}") from None
    return model


def training_bytes(model, optimizer):
    """{what: bytes} that training holds besides activations."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    kept = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor) and t.dim()]
    return {
        "trainable_parameters": sum(p.numel() for p in parameters),
        "parameter_bytes": sum(p.nbytes for p in parameters),
        "gradient_bytes": sum(p.grad.nbytes for p in parameters if p.grad is not None),
        "optimizer_bytes": sum(t.nbytes for t in kept),
    }


class Run:
    """One method, one seed."""

    def __init__(self, name, seed, args, images):
        recipe = RECIPES[name]
        self.before = torch.cuda.memory_allocated() if torch.device(args.device).type == "cuda" else 0  # the images
        self.name, self.seed, self.args, self.images = name, seed, args, images
        self.machine = machine.describe(args.device)
        self.device, self.common = torch.device(args.device), COMMON | recipe.common
        self.common |= {key: getattr(args, key) for key in self.common if getattr(args, key, None) is not None}
        self.settings = recipe.settings | args.set
        self.per_epoch = len(images.train.y) // self.common["batch"]
        if self.per_epoch < 1:
            raise ValueError(
                f"subset: expected at least one batch of {self.common['batch']} images, got {len(images.train.y)}"
            )
        self.total = self.per_epoch * args.epochs
        self.model = initialised(images.classes, seed, args.init, recipe.network)
        self.model.to(self.device, memory_format=torch.channels_last)
        torch.manual_seed(seed)  # for methods that draw: the same whether weights were drawn before or not
        self.method = recipe.method(self.model, self.total, **self.settings)
        self.forward = Forward(self.model, self.device, args.amp, args.compile)
        self.optimizer = self.new_optimizer()
        self.epochs, self.bytes, self.step_seconds, self.peak = [], {}, [], 0
        self.start_accuracy, self.cold = None, COLD

    def new_optimizer(self):
        """Without momentum yet: when Parameters have been replaced it starts anew, for all of them."""
        groups = {}
        for p in self.model.parameters():
            if p.requires_grad:
                groups.setdefault((self.method.decays(p), self.method.rate(p)), []).append(p)
        groups = [
            {"params": members, "weight_decay": decays * self.common["weight_decay"], "rate": rate}
            for (decays, rate), members in groups.items()
        ]
        if self.common.get("optimizer") == "adamw":
            return torch.optim.AdamW(groups, lr=self.common["lr"], fused=True)
        return torch.optim.SGD(groups, lr=self.common["lr"], momentum=self.common["momentum"], fused=True)

    def batches(self, epoch):
        """The training batches of an epoch: the same however the run came to it."""
        generator = torch.Generator(self.device).manual_seed(1_000_003 * self.seed + epoch)
        return data.batches(self.images.train, self.common["batch"], generator)

    @torch.no_grad()
    def accuracy(self):
        """Of the test images, %."""
        self.model.eval()
        right = 0
        for x, y in zip(self.images.test.x.split(TEST_BATCH), self.images.test.y.split(TEST_BATCH)):
            with self.forward.autocast():
                right += (self.model(data.normalise(x)).argmax(1) == y).sum()
        self.model.train()
        return 100 * int(right) / len(self.images.test.y)

    def epoch(self, bar):
        """Trains one epoch and notes what it gave."""
        clock, total, done = Clock(self.device), 0.0, len(self.epochs)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin, step = time.perf_counter(), done * self.per_epoch
        self.model.train()
        clock.tick()
        for x, y in self.batches(done):
            for group in self.optimizer.param_groups:
                group["lr"] = group["rate"] * self.common["lr"] * (1 + math.cos(math.pi * step / self.total)) / 2
            self.optimizer.zero_grad()
            total = total + self.method.backward(self.forward, x, y)
            self.optimizer.step()
            step += 1
            if not self.bytes:
                self.bytes = training_bytes(self.model, self.optimizer)
            if self.method.after_step(step, x, y):
                self.optimizer = self.new_optimizer()
            clock.tick()
            bar.update()
        loss = float(total) / self.per_epoch
        if not math.isfinite(loss):
            raise SystemExit(f"bench: {self.label()}, epoch {done + 1}: the loss is {loss}")
        seconds = clock.seconds()
        self.step_seconds += seconds[self.cold :]
        self.cold = max(0, self.cold - len(seconds))
        if self.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - self.before)
        if step == self.total:
            self.method.finish()
        self.epochs.append(
            {
                "loss": loss,
                "seconds": time.perf_counter() - begin,
                "accuracy": self.accuracy(),
                "average_bits": self.method.average_bits(),
                "trainable_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            }
        )

    # Results.

    def label(self):
        return self.args.label.replace(METHOD, self.name)

    def path(self):
        folder = self.args.folder or state.folder(self.machine["device"]) / "train"
        return folder / f"{self.label()}-seed{self.seed}.json"

    def configuration(self):
        """What the figures depend on, beyond code and machine; two runs with the same are one run."""
        args = self.args
        return {
            "method": self.name,
            "seed": self.seed,
            "epochs": args.epochs,
            "subset": args.subset,
            "amp": args.amp,
            "compile": args.compile,
            "init": args.init and Path(args.init).name,
            "data": Path(args.data).name,
            **self.common,
            "settings": self.settings,
        }

    def write(self):
        """The JSON of a finished run."""
        recipe = RECIPES[self.name]
        found = self.method.accuracies(self.accuracy, lambda: self.batches(self.args.epochs))
        bits = self.method.average_bits()
        result = {
            "machine": self.machine,
            "label": self.label(),
            "configuration": self.configuration(),
            "paper": recipe.paper,
            "deviations": [EVERYWHERE, recipe.deviations],
            "images": {"train": len(self.images.train.y), "test": len(self.images.test.y)},
            "accuracy_at_the_start": self.start_accuracy,
            "accuracy": found,
            "average_bits": bits,
            "compression": None if not bits else 32 / bits,
            **self.bytes,
            "peak_bytes": self.peak or None,
            "step_seconds": statistics.median(self.step_seconds) if self.step_seconds else None,
            "seconds_to_the_final_network": sum(e["seconds"] for e in self.epochs),
            "epochs": self.epochs,
            "log": self.method.log,
        }
        state.write(self.path(), result)
        return result

    def save(self):
        """After every epoch."""
        states = {
            "configuration": json.dumps(self.configuration()),
            "model": self.model.state_dict(),
            "method": self.method.state(),
            "optimizer": self.optimizer.state_dict(),
            "epochs": self.epochs,
            "bytes": self.bytes,
            "step_seconds": self.step_seconds,
            "peak": self.peak,
            "start_accuracy": self.start_accuracy,
            "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        }
        path = self.path().with_suffix(".pt")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: torch.save(states, file))

    def resume(self):
        """Takes up what was saved, if it was saved by the same run."""
        path = self.path().with_suffix(".pt")
        if not path.exists():
            return
        saved = read_states("resume", path)
        if not isinstance(saved, dict) or not STATES <= saved.keys():
            raise ValueError(f"resume: {path} holds no state of a run: remove it")
        if saved["configuration"] != json.dumps(self.configuration()):
            raise ValueError(f"resume: {path} was written by a run with other options; remove it, or give a --label")
        self.method.load(saved["method"])
        self.model.load_state_dict(saved["model"])
        self.optimizer = self.new_optimizer()
        self.optimizer.load_state_dict(saved["optimizer"])
        self.epochs, self.bytes, self.step_seconds = saved["epochs"], saved["bytes"], saved["step_seconds"]
        self.peak, self.start_accuracy = saved["peak"], saved["start_accuracy"]
        torch.set_rng_state(saved["random"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda"])

    def finished(self):
        """The result on disk, if it is of this very run."""
        found = read_runs(self.path().parent).get(self.path().stem)
        same = found and found.get("configuration") == json.loads(json.dumps(self.configuration()))
        return found if same else None

    def go(self, end, bar):
        """Trains to the end or until ``end`` on the monotonic clock; the result, or None where the time was up."""
        if self.start_accuracy is None:
            if any(isinstance(m, quantops.UniformActivation) for m in self.model.modules()):
                quantops.calibrate(self.model, self.batches(0), steps=CALIBRATION)
            self.start_accuracy = self.accuracy()
        bar.update(len(self.epochs) * self.per_epoch)
        while len(self.epochs) < self.args.epochs:
            expected = 1.2 * self.epochs[-1]["seconds"] if self.epochs else 0.0
            if time.monotonic() + expected > end:
                return None
            self.epoch(bar)
            self.save()
            last = self.epochs[-1]
            bar.write(
                f"{self.label()} seed {self.seed} epoch {len(self.epochs)}/{self.args.epochs}: loss "
                f"{last['loss']:.4f}, accuracy {last['accuracy']:.2f} %"
                + (f", {last['average_bits']:.3f} bits" if last["average_bits"] else "")
                + f", {last['seconds']:.1f} s"
            )
        result = self.write()
        if self.args.save:
            self.args.save.mkdir(parents=True, exist_ok=True)
            torch.save(self.model.state_dict(), self.args.save / self.path().with_suffix(".pt").name)
        self.path().with_suffix(".pt").unlink()
        return result


def _settings(texts, names):
    """{setting: value} of "name=value" texts."""
    found = {}
    for text in texts:
        key, sign, value = text.partition("=")
        for name in names:
            if not sign or key not in RECIPES[name].settings:
                raise ValueError(
                    f"set: expected SETTING=VALUE with a setting of {name}, "
                    f"{', '.join(RECIPES[name].settings) or 'which has none'}, got {text!r}"
                )
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
        found[key] = value
    return found


def _check(args):
    """Completes the options; ValueError for those that make no sense."""
    args.methods = [name for method in args.method.split(",") for name in GROUPS.get(method, (method,))]
    for name in args.methods:
        if name not in RECIPES:
            raise ValueError(f"method: expected some of {', '.join((*RECIPES, *GROUPS))}, got {name!r}")
    try:
        args.seeds = [int(s) for s in args.seed.split(",")]
    except ValueError:
        raise ValueError(f"seed: expected integers, got {args.seed!r}") from None
    if args.epochs < 1:
        raise ValueError(f"epochs: expected at least 1, got {args.epochs}")
    if args.label and len(args.methods) > 1 and METHOD not in args.label:
        raise ValueError(
            f"label: expected {METHOD} in it, which stands for each of several methods, got {args.label!r}"
        )
    if args.processes < 1:
        raise ValueError(f"processes: expected at least 1, got {args.processes}")
    args.set = _settings(args.set, args.methods)


def train(args):
    """Trains networks and writes a JSON file for each to bench/results/<device>/train/."""
    end = time.monotonic() + args.seconds
    try:
        _check(args)
        if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: no CUDA device")
        runs = [(name, seed) for name in args.methods for seed in args.seeds]
        status = _run(args, iter(runs), end) if args.processes == 1 else _beside_each_other(args, runs, end)
    except ValueError as error:
        raise SystemExit(f"bench: {error}") from None
    except KeyboardInterrupt:
        print("\ninterrupted; the same command with --resume goes on after the last whole epoch")
        return 130
    if status == UNFINISHED:
        print("the time is up; the same command with --resume goes on")
    return status


def _run(args, runs, end):
    """Trains [(method, seed)] one after the other; UNFINISHED where the time is up before, else 0."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        raise SystemExit("bench: training needs tqdm: pip install tqdm") from None
    images = data.load(args.data, cache=args.cache)
    if args.subset is not None:
        images = images._replace(train=images.train.subset(args.subset))
    images = images._replace(train=images.train.to(args.device), test=images.test.to(args.device))
    if torch.device(args.device).type == "cpu":
        machine.keep_memory()
    hidden = None if args.processes == 1 else True  # bars of several processes would overwrite each other
    for name, seed in runs:
        run = Run(name, seed, args, images)
        result = run.finished() if args.resume else None
        if result is None:
            if args.resume:
                run.resume()
            with tqdm(total=run.total, desc=f"{run.label()}, seed {seed}", unit="step", disable=hidden) as bar:
                result = run.go(end, bar)
        if result is None:
            return UNFINISHED
        print(
            f"{run.path()}: "
            + ", ".join(f"{k} {v:.2f} %" for k, v in result["accuracy"].items())
            + (f", {result['compression']:.2f}x" if result["compression"] else ""),
            flush=True,
        )
    return 0


def _beside_each_other(args, runs, end):
    """The same by several processes, each taking the next that none has: small networks leave most of a GPU idle."""
    spawn = multiprocessing.get_context("spawn")
    taken = spawn.Value("i", 0)
    workers = [
        spawn.Process(target=_work, args=(args, runs, taken, end)) for _ in range(min(args.processes, len(runs)))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = {worker.exitcode for worker in workers}
    return 1 if found - {0, UNFINISHED} else max(found)


def _work(args, runs, taken, end):
    """One of these processes."""

    def mine():
        while True:
            with taken.get_lock():
                place, taken.value = taken.value, taken.value + 1
            if place >= len(runs):
                return
            yield runs[place]

    try:
        raise SystemExit(_run(args, mine(), end))
    except ValueError as error:
        raise SystemExit(f"bench: {error}") from None


def add_arguments(parser):
    """Options of ``python -m bench train``."""
    parser.add_argument("--method", required=True, help=f"some of {', '.join((*RECIPES, *GROUPS))}, comma-separated")
    parser.add_argument("--data", required=True, help=".npz of JPEGs or folder of class folders, see data.py")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seed", default="0", help="comma-separated (default 0)")
    parser.add_argument("--subset", type=int, help="this many training images, evenly of all classes")
    parser.add_argument("--init", type=Path, help="state dict to start from, with torchvision's names or ours")
    parser.add_argument("--set", action="append", default=[], metavar="SETTING=VALUE", help="of recipes.py")
    for name, kind in (("batch", int), ("lr", float), ("weight-decay", float)):
        parser.add_argument(f"--{name}", type=kind, help=f"default {COMMON[name.replace('-', '_')]}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", action="store_true", help="convolutions in bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    parser.add_argument("--cache", type=Path, help="folder for the decoded images")
    parser.add_argument("--resume", action="store_true", help="go on where the same command stopped; skip what is done")
    parser.add_argument("--seconds", type=float, default=float("inf"), help=f"stop after this time, exit {UNFINISHED}")
    parser.add_argument("--folder", type=Path, help="of the results; default bench/results/<device>/train")
    parser.add_argument("--label", default=METHOD, help=f"name of the result; {METHOD} (default) is the method's")
    parser.add_argument("--processes", type=int, default=1, help="train so many networks at a time, each by a process")
    parser.add_argument("--save", type=Path, help="folder for the state dicts of the finished networks")
    parser.set_defaults(call=train)
