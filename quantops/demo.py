"""Trains a small CNN on scikit-learn's digits: in float, with MSQ from 8 bits down, and at fixed bits."""

import copy
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

TARGET = 12.8  # compression: 2.5 bits a weight
BATCH = 64
INTERVAL = 42  # steps between decisions: two epochs


def add_arguments(parser):
    """Options of ``python -m quantops demo``."""
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    parser.add_argument("--epochs", type=int, default=60, help="epochs of every training run (default 60)")
    parser.add_argument("--strength", type=float, default=1e-3, help="lambda of the LSB penalty (default 1e-3)")
    parser.add_argument("--target", type=float, default=TARGET, help=f"compression to stop at (default {TARGET})")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder of the figure and the JSON")


class Net(nn.Module):
    """Three convolutions and a linear layer, 56,224 weights, for 8 x 8 images."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.conv3, self.bn3 = nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        """(batch, 1, 8, 8) images to (batch, 10) logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.relu(self.bn3(self.conv3(x)))
        return self.fc(x.mean((2, 3)))


class Digits:
    """1,797 real scans of handwritten digits, a fixed quarter of them held out."""

    def __init__(self):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        split = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
        self.x, self.x_test = (torch.tensor(v, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1 for v in split[:2])
        self.y, self.y_test = (torch.tensor(v) for v in split[2:])

    def batches(self, generator):
        """One epoch of shuffled training batches."""
        for i in torch.randperm(len(self.x), generator=generator).split(BATCH):
            if len(i) == BATCH:
                yield self.x[i], self.y[i]

    def accuracy(self, model):
        """Fraction of the held-out images that the model gets right, in percent."""
        model.eval()
        with torch.no_grad():
            right = (model(self.x_test).argmax(1) == self.y_test).float().mean()
        model.train()
        return 100 * right.item()


def train(model, data, epochs, seed, bar, after_step=None, penalty=None):
    """Adam with a cosine schedule; ``penalty()`` is added to the loss, ``after_step(x, y)`` follows every step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(data.x) // BATCH))
    for _ in range(epochs):
        for x, y in data.batches(generator):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            (loss if penalty is None else loss + penalty()).backward()
            optimizer.step()
            schedule.step()
            if after_step:
                after_step(x, y)
        bar.update()
    return data.accuracy(model)


def train_msq(model, data, args, seed, bar):
    """(accuracy, controller, measured): MSQ from 8 bits to the target, then finetuning with lambda = 0."""
    import quantops

    quantops.quantize_(model, quantops.MSQConfig(bits=8))
    controller = quantops.MSQController(model, args.target, interval=INTERVAL, threshold=0.3, strength=args.strength,
                                        samples=4, seed=seed)

    def penalty():
        return controller.strength * quantops.penalty(model)

    def after_step(x, y):
        controller.step(lambda: F.cross_entropy(model(x), y))

    return train(model, data, args.epochs, seed, bar, after_step, penalty), controller


def fixed_bits(report, model, data, epochs, seed, bar):
    """Accuracy of plain training with the same rule at the same average bits: two widths, the wider one first."""
    import quantops

    low, total = int(report.average_bits), sum(r.numel for r in report.rows)
    extra, overrides = (report.average_bits - low) * total, {}
    for row in report.rows:
        wider = extra >= row.numel / 2
        extra -= row.numel * wider
        overrides[row.name] = {"bits": low + wider, "k": 0}
    quantops.quantize_(model, quantops.MSQConfig(bits=low, k=0, overrides=overrides))
    accuracy = train(model, data, epochs, seed, bar)
    return accuracy, quantops.bit_report(model).average_bits


def costs(data):
    """{name: (milliseconds a step, bytes saved for backward by quantization)} of one and the same network."""
    import quantops
    from quantops.reference import paper

    x, y = data.x[:BATCH], data.y[:BATCH]

    def float_step(model, opt):
        return F.cross_entropy(model(x), y)

    def fused_step(model, opt):
        return F.cross_entropy(model(x), y) + 1e-3 * quantops.penalty(model)

    def eager_step(model, opt):
        weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
        made = {n: paper.msq(w, 8, 1) for n, w in weights.items()}
        logits = torch.func.functional_call(model, {n: r[0] for n, r in made.items()}, x)
        return F.cross_entropy(logits, y) + 1e-3 * sum(r[1] for r in made.values())

    runs = {}
    for name, step in (("float", float_step), ("paper-style eager chain", eager_step), ("quantops", fused_step)):
        torch.manual_seed(0)
        model = Net()
        if name == "quantops":
            quantops.quantize_(model, quantops.MSQConfig(bits=8))
        runs[name] = (model, torch.optim.SGD(model.parameters(), lr=1e-3), step)

    def once(name):
        model, opt, step = runs[name]
        start = time.perf_counter()
        opt.zero_grad()
        step(model, opt).backward()
        opt.step()
        return time.perf_counter() - start

    times = {name: [] for name in runs}
    for i in range(120):  # in turn, so that what disturbs the machine disturbs all of them
        for name in runs:
            seconds = once(name)
            if i >= 20:
                times[name].append(seconds)
    saved = {}
    for name, (model, opt, step) in runs.items():
        seen, parameters = {}, {p.data_ptr() for p in model.parameters()}

        def pack(t):
            storage = t.untyped_storage()
            if storage.data_ptr() not in parameters:
                seen[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = step(model, opt)
        saved[name] = sum(seen.values())
        del loss
    return {name: (1e3 * statistics.median(t), saved[name] - saved["float"]) for name, t in times.items()}


def draw(path, log, start, end):
    """PNG: bits and beta of each layer over the decisions; the weights before and after, on their grid."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    steps = [e["step"] for e in log]
    for i, name in enumerate(layer["name"] for layer in log[0]["layers"]):
        rows = [e["layers"][i] for e in log]
        axes[0, 0].step([0, *steps], [rows[0]["bits"], *(r["bits_after"] for r in rows)], where="post", label=name)
        axes[0, 1].plot(steps, [r["beta"] for r in rows], marker=".", label=name)
    axes[0, 0].set(title="bits", xlabel="step", ylabel="n")
    axes[0, 1].set(title="weights with nonzero LSBs", xlabel="step", ylabel="beta", ylim=(0, 1))
    axes[0, 0].legend()
    for axis, (weights, q, title) in zip(axes[1], (start, end)):
        axis.hist(weights.flatten().numpy(), bins=201, color="0.6")
        levels = q.unique().tolist()
        for v in levels if len(levels) <= 32 else []:  # more would hide the weights
            axis.axvline(v, color="tab:red", lw=1)
        axis.set(title=title, xlabel="weight", ylabel="weights")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(args):
    """The whole demo; prints tables, writes demo.png and demo.json to ``args.out``."""
    import quantops

    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise SystemExit(f"the demo needs {error.name}: pip install 'quantops[demo]', or make demo") from None
    print(quantops.info())
    if args.seeds < 1 or args.epochs < 4:
        raise SystemExit(f"--seeds, --epochs: expected at least 1 and 4, got {args.seeds} and {args.epochs}")
    data, results = Digits(), []
    with tqdm(total=3 * args.seeds * args.epochs, desc="training", unit="epoch") as bar:
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            model = Net()
            untouched = copy.deepcopy(model)
            plain = copy.deepcopy(model)
            baseline = train(model, data, args.epochs, seed, bar)
            model = copy.deepcopy(untouched)
            accuracy, controller = train_msq(model, data, args, seed, bar)
            report = quantops.bit_report(model)
            fixed, fixed_average = fixed_bits(report, plain, data, args.epochs, seed, bar)
            results.append({"seed": seed, "float": baseline, "msq": accuracy, "compression": report.compression,
                            "average_bits": report.average_bits, "fixed": fixed, "fixed_bits": fixed_average,
                            "done": controller.done, "steps_to_target": controller.log[-1]["step"]})
            if seed == 0:
                first = untouched, model, controller, report
    untouched, model, controller, report = first

    args.out.mkdir(parents=True, exist_ok=True)
    w = untouched.conv2.weight.detach()
    draw(args.out / "demo.png", controller.log,
         (w, quantops.round_clamp(w, None, 8), "conv2 at the start, 8 bits"),
         (model.conv2.parametrizations.weight.original.detach(), model.conv2.weight.detach(),
          f"conv2 at the end, {report.rows[1].bits} bits"))

    print("\nSeed 0, layer by layer:")
    print(f"  {'step':>5} {'compression':>11}   bits (beta, Omega) of {', '.join(r.name for r in report.rows)}")
    for e in controller.log:
        cells = "  ".join(f"{r['bits_after']} ({r['beta']:.2f}, {r['omega']:.1e})" for r in e["layers"])
        print(f"  {e['step']:>5} {e['compression']:>10.1f}x   {cells}")
    print(f"\n{report}")

    print(f"\nAccuracy on {len(data.y_test)} held-out digits, %:")
    print(f"  {'seed':>4} {'float':>7} {'MSQ':>7} {'bits':>6} {'compression':>12} {'fixed bits':>11} {'bits':>6}")
    for r in results:
        print(f"  {r['seed']:>4} {r['float']:>7.2f} {r['msq']:>7.2f} {r['average_bits']:>6.2f} "
              f"{r['compression']:>11.1f}x {r['fixed']:>11.2f} {r['fixed_bits']:>6.2f}")
    mean = {key: statistics.mean(r[key] for r in results) for key in ("float", "msq", "compression", "fixed")}
    print(f"  mean {mean['float']:>7.2f} {mean['msq']:>7.2f} {'':>6} {mean['compression']:>11.1f}x {mean['fixed']:>11.2f}")

    measured = costs(data)
    print(f"\nA training step of this network, batch {BATCH}, {torch.get_num_threads()} threads, 8 bits:")
    for name, (milliseconds, saved) in measured.items():
        ratio = milliseconds / measured["float"][0]
        print(f"  {name:24} {milliseconds:7.2f} ms  {ratio:5.2f}x float   {saved / 1e6:6.2f} MB kept for backward by "
              "quantization")
    (args.out / "demo.json").write_text(json.dumps({"results": results, "log": controller.log, "costs": measured}))
    print(f"\nFigure: {args.out / 'demo.png'}")
    missed = [r for r in results if not r["done"] or r["compression"] < 10]
    if missed or mean["msq"] < mean["float"] - 1:
        print(f"Expected >= 10x compression within 1 point of float, got {mean['compression']:.1f}x and "
              f"{mean['msq'] - mean['float']:+.2f} points")
        return 1
    return 0
