"""CPQ at 2, 3 and 4 bits against the plain straight-through estimator, with and without DropBits, and with learned bits."""

import copy
import json
import statistics

import torch
from torch import nn
from torch.nn.utils import parametrize

import quantops
from quantops.demo.digits import BATCH, Digits, Net, train
from quantops.positive import grid_step, positive

WIDTHS = (2, 3, 4)
EPOCHS = 12
DRAWN = 0.6  # DropBits draws in this part of the epochs; then the bits that stay are trained without gates
STRENGTH, GATE_RATE = 0.1, 2e-2  # of the regularizer; Adam's learning rate for log_a
STE, STEP = "plain STE, max|w|", "plain STE, learned step"
SOFT, WINNER, DROPPED, ACTS = "CPQ", "CPQ, literal gradient", "CPQ and DropBits", "CPQ, 4-bit activations too"
METHODS = (STE, STEP, SOFT, WINNER, DROPPED, ACTS)


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
        return quantops.quantize_(model, quantops.MSQConfig(bits=bits, k=0))
    if method == STEP:
        for layer in (model.conv1, model.conv2, model.conv3, model.fc):
            parametrize.register_parametrization(layer, "weight", LearnedStep(layer.weight, bits))
        return model
    options = {WINNER: {"grad": "winner"}, ACTS: {"act_bits": 4},
               DROPPED: {"dropbits": "fixed", "min_bits": min(bits - 1, 2)}}
    return quantops.quantize_(model, quantops.CPQConfig(bits=bits, **options.get(method, {})))


def weights(model):
    """[(float weight, q)] of the layers."""
    layers = [m for m in model.modules() if parametrize.is_parametrized(m, "weight")]
    with torch.no_grad():
        return [(m.parametrizations.weight.original.detach(), m.weight.detach()) for m in layers]


def state(model):
    """(sum of (q - w)^2 over sum of w^2, fraction of q that is 0), evaluated."""
    pairs = weights(model.eval())
    model.train()
    error, energy = (sum(f(w, q).item() for w, q in pairs) for f in (lambda w, q: (q - w).square().sum(),
                                                                    lambda w, q: w.square().sum()))
    return error / energy, sum((q == 0).sum().item() for _, q in pairs) / sum(q.numel() for _, q in pairs)


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
    return {"seed": seed, "learned": accuracy, "bits": [r.bits for r in report.rows], "average": report.average_bits,
            "fixed": fixed, "fixed_average": quantops.bit_report(by_hand).average_bits}


def snapshots(model, into, epochs, data):
    """Keeps w/alpha of conv2 at the start, at a quarter, at half and at the end of the training."""
    every = epochs * (len(data.x) // BATCH)

    def watch(step):
        if step * 4 % every < 4 and round(step * 4 / every) in (0, 1, 2, 4):
            p = model.conv2.parametrizations.weight[0]
            alpha = p.alpha if isinstance(p, LearnedStep) else positive(p.alpha_start, p.log_alpha)
            into[step / every] = (model.conv2.parametrizations.weight.original / alpha).detach().flatten().clone()

    watch(0)
    return watch


def draw(path, taken):
    """PNG: where the weights of conv2 are between the grid points, over the training; a row per method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(taken), 4, figsize=(13, 2.6 * len(taken)), constrained_layout=True, sharex=True)
    for row, ((method, bits), kept) in zip(axes, taken.items()):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        for axis, (part, v) in zip(row, sorted(kept.items())):
            error = ((v - v.round().clamp(low, high)).square().sum() / v.square().sum()).item()
            axis.hist(v.clamp(low - 1, high + 1).numpy(), bins=160, range=(low - 1, high + 1), color="0.5")
            for i in range(low, high + 1):
                axis.axvline(i, color="tab:red", lw=0.8)
            axis.set(title=f"{method}, {bits} bits, {part:.0%}: error {error:.3f}", yticks=[])
            axis.title.set_fontsize(8)
        for axis in row:
            axis.set(xlim=(low - 1, high + 1))
    for axis in axes[-1]:
        axis.set(xlabel="w / alpha")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(args):
    """The whole demo; prints tables, writes cpq.png and cpq.json to ``args.out``."""
    from tqdm import tqdm

    data, epochs = Digits(), args.epochs or EPOCHS
    table = {f"{bits} {method}": [] for bits in WIDTHS for method in METHODS}
    learned, floats, taken = [], [], {}
    with tqdm(total=(3 + len(table)) * args.seeds * epochs, desc="CPQ", unit="epoch") as bar:
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            untouched = Net()
            floats.append(train(copy.deepcopy(untouched), data, epochs, seed, bar))
            for bits in WIDTHS:
                for method in METHODS:
                    torch.manual_seed(seed)
                    model, watch = quantized(copy.deepcopy(untouched), method, bits), None
                    if seed == 0 and bits == WIDTHS[0] and method in (STEP, SOFT):
                        watch = snapshots(model, taken.setdefault((method, bits), {}), epochs, data)
                    before = state(model)[0]
                    accuracy = run_one(model, data, epochs, seed, bar, watch=watch)
                    after, zeros = state(model)
                    table[f"{bits} {method}"].append({"accuracy": accuracy, "before": before, "after": after,
                                                      "zeros": zeros})
            learned.append(learned_bits(untouched, data, epochs, seed, bar))
    draw(args.out / "cpq.png", taken)

    print(f"\nAccuracy on {len(data.y_test)} held-out digits, %: mean of {args.seeds} seeds (lowest); float "
          f"{statistics.mean(floats):.2f} ({min(floats):.2f}). error: sum (q - w)^2 / sum w^2, untrained -> trained")
    print(f"  {'':28}" + "".join(f"{f'{bits} bits':>15}  {'error':>14} {'zeros':>5}" for bits in WIDTHS))
    means = {}
    for method in METHODS:
        cells = ""
        for bits in WIDTHS:
            rows = table[f"{bits} {method}"]
            m = means[method, bits] = {key: statistics.mean(r[key] for r in rows) for key in rows[0]}
            lowest = min(r["accuracy"] for r in rows)
            cells += (f"{m['accuracy']:>7.2f} ({lowest:.2f})  {m['before']:.3f} -> {m['after']:.3f} "
                      f"{m['zeros']:>5.2f}")
        print(f"  {method:28}{cells}")

    print("\nBits that stay of 4, learned with the regularizer, against as many chosen by hand:")
    print(f"  {'seed':>4} {'layers':>12} {'bits':>6} {'accuracy':>9} {'by hand':>8} {'bits':>6}")
    for r in learned:
        print(f"  {r['seed']:>4} {'-'.join(map(str, r['bits'])):>12} {r['average']:>6.2f} {r['learned']:>9.2f} "
              f"{r['fixed']:>8.2f} {r['fixed_average']:>6.2f}")
    (args.out / "cpq.json").write_text(json.dumps({"float": floats, "table": table, "learned": learned}))
    print(f"\nFigure: {args.out / 'cpq.png'}")
    worst = min(means[SOFT, bits]["accuracy"] - statistics.mean(floats) for bits in WIDTHS)
    ratio = max(means[SOFT, bits]["after"] / means[STEP, bits]["after"] for bits in WIDTHS)
    if worst < -1 or ratio >= 1:
        print("Expected CPQ within 1 point of float and its quantization error below that of plain STE with a learned "
              f"step, got {worst:+.2f} points and {ratio:.2f} times the error")
        return 1
    return 0
