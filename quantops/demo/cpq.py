"""CPQ at 2, 3 and 4 bits against the plain straight-through estimator, DropBits, and bits that are learned."""

import copy
import json
import statistics

import torch
from torch import nn
from torch.nn.utils import parametrize

import quantops
from quantops.demo.digits import BATCH, Digits, Net, train
from quantops.demo.onnx_check import export_and_check
from quantops.positive import grid_step, positive

WIDTHS = (2, 3, 4)
EPOCHS = 10
DRAWN = 0.6  # DropBits draws in this part of the epochs; then the bits that stay are trained without gates
STRENGTH, GATE_RATE = 0.1, 2e-2  # of the regularizer; Adam's learning rate for log_a
STE, STEP = "plain STE, max|w|", "plain STE, learned step"
SOFT, WINNER, DROPPED, ACTS = "CPQ", "CPQ, literal gradient", "CPQ and DropBits", "CPQ, 4-bit activations too"
SAMPLED = "CPQ, sampled, sigma alpha/10"
METHODS = (STE, STEP, SOFT, WINNER, DROPPED, ACTS)
PICTURED = 3  # bits of the figure
OPTIONS = {WINNER: {"grad": "winner", "sigma": 1.0}, ACTS: {"act_bits": 4}, SAMPLED: {"mode": "sample", "sigma": 0.1}}


class LearnedStep(nn.Module):
    """The grid of CPQ with the plain straight-through estimator: dq/dw = 1 inside, and a step that learns."""

    def __init__(self, w, bits):
        super().__init__()
        self.bits, self.start = bits, grid_step(w.detach(), bits, per_row=False)
        self.log = nn.Parameter(torch.zeros(1))

    @property
    def alpha(self):
        """The step."""
        return positive(self.start, self.log)

    def forward(self, w):
        """q of w."""
        return quantops.round_clamp(w, self.alpha * 2 ** (self.bits - 1), self.bits)


def quantized(model, method, bits):
    """The model trained by ``method``."""
    if method == STE:
        return quantops.quantize_(model, quantops.MSQConfig(bits=bits, k=0, scale="absmax"))
    if method == STEP:
        for layer in (model.conv1, model.conv2, model.conv3, model.fc):
            parametrize.register_parametrization(layer, "weight", LearnedStep(layer.weight, bits))
        return model
    options = {"dropbits": "fixed", "min_bits": min(bits - 1, 2)} if method == DROPPED else OPTIONS.get(method, {})
    return quantops.quantize_(model, quantops.CPQConfig(bits=bits, **options))


@torch.no_grad()
def state(model):
    """Of the evaluated weights: sum of (q - w)^2 over sum of w^2, and the fraction of q that is 0."""
    model.eval()
    layers = [m for m in model.modules() if parametrize.is_parametrized(m, "weight")]
    w = torch.cat([m.parametrizations.weight.original.flatten() for m in layers])
    q = torch.cat([m.weight.flatten() for m in layers])
    model.train()
    return {"error": ((q - w).square().sum() / w.square().sum()).item(), "zeros": (q == 0).float().mean().item()}


def spread(v, bits):
    """12 times the mean square of v - rint(v) of the v = w/alpha inside the grid: 1 if they lie anywhere, 0 on it."""
    inside = v[(v > -(2 ** (bits - 1)) - 0.5) & (v < 2 ** (bits - 1) - 0.5)]
    return 12 * (inside - inside.round()).square().mean().item()


@torch.no_grad()
def on_grid(layer):
    """w/alpha of a layer, flat."""
    p, w = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    return (w / (p.alpha if isinstance(p, LearnedStep) else positive(p.alpha_start, p.log_alpha))).flatten()


def run_one(model, data, epochs, seed, bar, strength=0.0, watch=None):
    """The accuracy after training; DropBits, if any, ends at DRAWN. ``watch(step)`` follows every step."""
    drawn, step = DRAWN * epochs * (len(data.x) // BATCH), 0
    gates = [p for name, p in model.named_parameters() if name.endswith("log_a")]
    rest = [p for name, p in model.named_parameters() if not name.endswith("log_a")]
    dropping = any(name.endswith("log_a") for name in model.state_dict())

    def after_step(x, y):
        nonlocal step
        step += 1
        if dropping and step - 1 < drawn <= step:
            quantops.finish_dropbits(model)
        if watch:
            watch(step)

    penalty = (lambda: strength * quantops.penalty(model)) if strength else None
    groups = [{"params": rest}] + ([{"params": gates, "lr": GATE_RATE}] if gates else [])
    return train(model, data, epochs, seed, bar, after_step, penalty, parameters=groups)


def learned_bits(untouched, data, epochs, seed, bar):
    """4 bits at first, of which each layer keeps what it needs; and the same number of bits by hand."""
    model = quantops.quantize_(copy.deepcopy(untouched), quantops.CPQConfig(bits=4, dropbits="learned"))
    accuracy = run_one(model, data, epochs, seed, bar, STRENGTH)
    report = quantops.bit_report(model)
    low, total, overrides = int(report.average_bits), sum(r.numel for r in report.rows), {}
    extra = (report.average_bits - low) * total
    for row in report.rows:  # two widths, the wider one first
        wider = extra >= row.numel / 2
        extra -= row.numel * wider
        overrides[row.name] = {"bits": low + wider}
    by_hand = quantops.quantize_(copy.deepcopy(untouched), quantops.CPQConfig(bits=low, overrides=overrides))
    fixed = run_one(by_hand, data, epochs, seed, bar)
    return {
        "seed": seed,
        "learned": accuracy,
        "bits": [r.bits for r in report.rows],
        "average": report.average_bits,
        "fixed": fixed,
        "fixed_average": quantops.bit_report(by_hand).average_bits,
    }


def pictured(untouched, data, epochs, seed, bar):
    """{method: {part of the training: w/alpha of conv2 then}}"""
    taken, every = {}, epochs * (len(data.x) // BATCH)
    for method in (STEP, SOFT, SAMPLED):
        torch.manual_seed(seed)
        model = quantized(copy.deepcopy(untouched), method, PICTURED)
        kept = taken[method] = {0: on_grid(model.conv2)}

        def watch(step):
            if step in (every // 4, every // 2, every):
                kept[step / every] = on_grid(model.conv2)

        run_one(model, data, epochs, seed, bar, watch=watch)
    return taken


def draw(path, taken):
    """PNG: where the weights of conv2 are between the grid points, over the training; a row per method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    low, high = -(2 ** (PICTURED - 1)), 2 ** (PICTURED - 1) - 1
    figure, axes = plt.subplots(len(taken), 4, figsize=(13, 2.4 * len(taken)), constrained_layout=True, sharex=True)
    for row, (method, kept) in zip(axes, taken.items()):
        for axis, (part, v) in zip(row, sorted(kept.items())):
            axis.hist(v.numpy(), bins=160, range=(low - 1, high + 1), color="0.5")
            for i in range(low, high + 1):
                axis.axvline(i, color="tab:red", lw=0.8)
            axis.set(xlim=(low - 1, high + 1), yticks=[])
            axis.set_title(f"{method}, {part:.0%}: spread {spread(v, PICTURED):.2f}", fontsize=8)
    for axis in axes[-1]:
        axis.set(xlabel=f"w / alpha, {PICTURED} bits")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(args):
    """The whole demo; prints tables, writes cpq.png and cpq.json to ``args.out``."""
    from tqdm import tqdm

    data, epochs = Digits(), args.epochs or EPOCHS
    table = {f"{bits} {method}": [] for bits in WIDTHS for method in METHODS}
    learned, floats = [], []
    with tqdm(total=((3 + len(table)) * args.seeds + 3) * epochs, desc="CPQ", unit="epoch") as bar:
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            untouched = Net()
            floats.append(train(copy.deepcopy(untouched), data, epochs, seed, bar))
            for bits in WIDTHS:
                for method in METHODS:
                    torch.manual_seed(seed)
                    model = quantized(copy.deepcopy(untouched), method, bits)
                    before = state(model)["error"]
                    accuracy = run_one(model, data, epochs, seed, bar)
                    table[f"{bits} {method}"].append({"accuracy": accuracy, "before": before, **state(model)})
                    if method == SOFT:
                        exported = model
            learned.append(learned_bits(untouched, data, epochs, seed, bar))
            if seed == 0:
                taken = pictured(untouched, data, epochs, seed, bar)
    draw(args.out / "cpq.png", taken)

    print(
        f"\nAccuracy on {len(data.y_test)} held-out digits, %: mean of {args.seeds} seeds (lowest); float "
        f"{statistics.mean(floats):.2f} ({min(floats):.2f}). error: sum (q - w)^2 / sum w^2, untrained -> trained"
    )
    print(f"  {'':28}" + "".join(f"{f'{bits} bits':>15}  {'error':>14} {'zeros':>5}" for bits in WIDTHS))
    means = {}
    for method in METHODS:
        cells = ""
        for bits in WIDTHS:
            rows = table[f"{bits} {method}"]
            m = means[method, bits] = {key: statistics.mean(r[key] for r in rows) for key in rows[0]}
            lowest = min(r["accuracy"] for r in rows)
            cells += f"{m['accuracy']:>7.2f} ({lowest:.2f})  {m['before']:.3f} -> {m['error']:.3f} {m['zeros']:>5.2f}"
        print(f"  {method:28}{cells}")

    print("\nBits that stay of 4, learned with the regularizer, against as many chosen by hand:")
    print(f"  {'seed':>4} {'layers':>12} {'bits':>6} {'accuracy':>9} {'by hand':>8} {'bits':>6}")
    for r in learned:
        print(
            f"  {r['seed']:>4} {'-'.join(map(str, r['bits'])):>12} {r['average']:>6.2f} {r['learned']:>9.2f} "
            f"{r['fixed']:>8.2f} {r['fixed_average']:>6.2f}"
        )
    spreads = {method: {part: spread(v, PICTURED) for part, v in kept.items()} for method, kept in taken.items()}
    print(
        f"\nSpread of conv2 at {PICTURED} bits, 12 times the mean square distance of w/alpha from the grid, over the "
        "training:"
    )
    for method, values in spreads.items():
        print(f"  {method:28}" + "".join(f"{part:>7.0%}: {v:.2f}" for part, v in values.items()))
    (args.out / "cpq.json").write_text(
        json.dumps({"float": floats, "table": table, "learned": learned, "spread": spreads})
    )
    print(f"\nFigure: {args.out / 'cpq.png'}")
    same = export_and_check(exported, data, args.out / "cpq.onnx")
    worst = min(means[SOFT, bits]["accuracy"] - statistics.mean(floats) for bits in WIDTHS)
    ratio = max(means[SOFT, bits]["error"] / means[STEP, bits]["error"] for bits in WIDTHS)
    if worst < -1 or ratio >= 1:
        print(
            "Expected CPQ within 1 point of float and its quantization error below that of plain STE with a learned "
            f"step, got {worst:+.2f} points and {ratio:.2f} times the error"
        )
        return 1
    return 0 if same else 1
