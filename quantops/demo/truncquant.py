"""One network at 8, 4, 2 and 1 bits: ordinary 8-bit training truncated, TruncQuant truncated, one network per width."""

import copy
import json
import statistics

import torch
import torch.nn.functional as F

import quantops
from quantops.demo.digits import BATCH, Digits, Net, step_costs, train
from quantops.demo.onnx_check import export_and_check

WIDTHS = (8, 4, 2, 1)
EPOCHS = 12
ORDINARY, DOREFA = "8-bit QAT, truncated", "8-bit DoReFa, truncated"
JOINT, SEPARATE = "TruncQuant", "a network per width"
NORMS = "8-bit QAT, truncated, norms re-estimated"


def accuracies(model, data):
    """{width: accuracy, %} of a network by dropping bits."""
    found = {}
    for m in WIDTHS:
        quantops.set_bits(model, m)
        found[m] = data.accuracy(model)
    return found


def ordinary(untouched, data, epochs, seed, bar, companding):
    """A network trained at 8 bits alone with the usual codes. What its truncations share are its batch norms."""
    model = quantops.quantize_(
        copy.deepcopy(untouched),
        quantops.TruncQuantConfig(
            bits=WIDTHS, rule="nearest", scale="absmax", companding=companding, slope="ste", batch_norm=False
        ),
    )
    train(model, data, epochs, seed, bar)
    return model


def with_norms_of_each_width(model, data):
    """The accuracies after an epoch of forward passes alone: what the batch norms can repair."""
    found = {}
    for m in WIDTHS:
        twin = copy.deepcopy(model)
        quantops.set_bits(twin, m)
        with torch.no_grad():
            for x, _ in data.batches(torch.Generator().manual_seed(0)):
                twin(x)
        found[m] = data.accuracy(twin)
    return found


def joint(untouched, data, epochs, seed, bar):
    """TruncQuant: every step trains all widths."""
    model = quantops.quantize_(copy.deepcopy(untouched), quantops.TruncQuantConfig(bits=WIDTHS))

    def backward(x, y):
        quantops.joint_step(model, lambda out: F.cross_entropy(out, y), x)

    train(model, data, epochs, seed, bar, backward=backward)
    return model


def separate(untouched, data, epochs, seed, bar):
    """{width: accuracy} of networks of their own, with the codes of TruncQuant."""
    found = {}
    for m in WIDTHS:
        model = quantops.quantize_(copy.deepcopy(untouched), quantops.TruncQuantConfig(bits=(m,)))
        found[m] = train(model, data, epochs, seed, bar)
    return found


def costs(data):
    """{name: (milliseconds, bytes kept)} of a step that trains all widths of one network."""
    x, y = data.x[:BATCH], data.y[:BATCH]

    def loss_fn(out):
        return F.cross_entropy(out, y)

    def make(quantized):
        torch.manual_seed(0)
        config = quantops.TruncQuantConfig(bits=WIDTHS, scale="absmax", batch_norm=False)
        return quantops.quantize_(Net(), config) if quantized else Net()

    def floats(model):
        sum(loss_fn(model(x)) for _ in WIDTHS).backward()

    def eager(model):
        weights, loss = {n: p for n, p in model.named_parameters() if p.dim() > 1}, 0.0
        for m in WIDTHS:
            q = {n: paper_truncate(w, m) for n, w in weights.items()}
            loss = loss + loss_fn(torch.func.functional_call(model, q, x))
        loss.backward()

    def loss(model):
        quantops.joint_loss(model, loss_fn, x).loss.backward()

    def step(model):
        quantops.joint_step(model, loss_fn, x)

    runs = {
        "float, four times": (make(False), floats),
        "eager chain": (make(False), eager),
        "quantops.joint_loss": (make(True), loss),
        "quantops.joint_step": (make(True), step),
    }
    return step_costs({name: (model, lambda m=model, f=f: f(m)) for name, (model, f) in runs.items()}, 40)


def paper_truncate(w, bits):
    """The truncated weight as training code has it: eager ops and a straight-through estimator."""
    scale = w.detach().abs().max()
    code = torch.clamp(torch.floor(256 * torch.clamp(w / (2 * scale) + 0.5, 0, 1)), max=255)
    code = torch.floor(code / 2 ** (8 - bits))
    return w + ((2 * code / (2**bits - 1) - 1) * scale - w).detach()


def draw(path, table):
    """PNG: accuracy over the width, the mean of the seeds and their spread."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    places = range(len(WIDTHS))
    for name, rows in table.items():
        mean = [statistics.mean(r[m] for r in rows) for m in WIDTHS]
        (line,) = axis.plot(places, mean, marker="o", label=name)
        axis.fill_between(
            places,
            [min(r[m] for r in rows) for m in WIDTHS],
            [max(r[m] for r in rows) for m in WIDTHS],
            color=line.get_color(),
            alpha=0.15,
        )
    axis.set(
        xticks=places, xticklabels=WIDTHS, xlabel="bits", ylabel="accuracy, %", title="dropping bits of one network"
    )
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(args):
    """The whole demo; prints tables, writes truncquant.png and truncquant.json to ``args.out``."""
    from tqdm import tqdm

    data, epochs = Digits(), args.epochs or EPOCHS
    table = {name: [] for name in (ORDINARY, NORMS, DOREFA, JOINT, SEPARATE)}
    with tqdm(total=(3 + len(WIDTHS)) * args.seeds * epochs, desc="TruncQuant", unit="epoch") as bar:
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            untouched = Net()
            plain = ordinary(untouched, data, epochs, seed, bar, None)
            table[ORDINARY].append(accuracies(plain, data))
            table[NORMS].append(with_norms_of_each_width(plain, data))
            table[DOREFA].append(accuracies(ordinary(untouched, data, epochs, seed, bar, "tanh"), data))
            model = joint(untouched, data, epochs, seed, bar)
            table[JOINT].append(accuracies(model, data))
            table[SEPARATE].append(separate(untouched, data, epochs, seed, bar))
    draw(args.out / "truncquant.png", table)

    print(f"\nAccuracy on {len(data.y_test)} held-out digits, %: mean of {args.seeds} seeds (lowest)")
    print(f"  {'':40}" + "".join(f"{f'{m} bits':>16}" for m in WIDTHS))
    means = {}
    for name, rows in table.items():
        means[name] = {m: statistics.mean(r[m] for r in rows) for m in WIDTHS}
        cells = (f"{means[name][m]:.2f} ({min(r[m] for r in rows):.2f})" for m in WIDTHS)
        print(f"  {name:40}" + "".join(f"{cell:>16}" for cell in cells))

    measured = costs(data)
    print(f"\nA step that trains all widths of this network, batch {BATCH}, {torch.get_num_threads()} threads:")
    for name, (milliseconds, kept) in measured.items():
        print(
            f"  {name:24} {milliseconds:7.2f} ms  {milliseconds / measured['float, four times'][0]:5.2f}x float   "
            f"{kept / 1e6:6.2f} MB kept for backward at a time"
        )
    (args.out / "truncquant.json").write_text(json.dumps({"accuracy": table, "costs": measured}))
    print(f"\nFigure: {args.out / 'truncquant.png'}")
    quantops.set_bits(model)
    same = export_and_check(model, data, args.out / "truncquant.onnx")
    worst = min(means[JOINT][m] - means[SEPARATE][m] for m in WIDTHS)
    if worst < -2:
        print(f"Expected TruncQuant within 2 points of a network per width, got {worst:+.2f} points")
        return 1
    return 0 if same else 1
