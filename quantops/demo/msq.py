"""Trains a small CNN on scikit-learn's digits: in float, with MSQ from 8 bits down, and at fixed bits."""

import copy
import json
import statistics

import torch
import torch.nn.functional as F

import quantops
from quantops.demo.digits import BATCH, Digits, Net, kept_for_backward, step_costs, train
from quantops.demo.onnx_check import export_and_check
from quantops.reference import paper

EPOCHS = 60
INTERVAL = 42  # steps between decisions: two epochs
PLAIN_EPOCHS = 10  # of the runs at 4 bits
W4, W4A4 = "W4", "W4A4"  # activations in float, and in the place of each ReLU a quantizer of 4 bits


def train_msq(model, data, args, seed, bar):
    """(accuracy, controller, measured): MSQ from 8 bits to the target, then finetuning with lambda = 0."""
    quantops.quantize_(model, quantops.MSQConfig(bits=8))
    controller = quantops.MSQController(
        model, args.target, interval=INTERVAL, threshold=0.3, strength=args.strength, samples=4, seed=seed
    )

    def penalty():
        return controller.strength * quantops.penalty(model)

    def after_step(x, y):
        controller.step(lambda: F.cross_entropy(model(x), y))

    return train(model, data, args.epochs or EPOCHS, seed, bar, after_step, penalty), controller


def fixed_bits(report, model, data, epochs, seed, bar):
    """Accuracy of plain training with the same rule at the same average bits: two widths, the wider one first."""
    low, total = int(report.average_bits), sum(r.numel for r in report.rows)
    extra, overrides = (report.average_bits - low) * total, {}
    for row in report.rows:
        wider = extra >= row.numel / 2
        extra -= row.numel * wider
        overrides[row.name] = {"bits": low + wider, "k": 0}
    quantops.quantize_(model, quantops.MSQConfig(bits=low, k=0, overrides=overrides))
    accuracy = train(model, data, epochs, seed, bar)
    return accuracy, quantops.bit_report(model).average_bits


def at_four_bits(untouched, data, epochs, seed, bar):
    """{W4, W4A4: (accuracy, bytes that a step keeps for backward)}"""
    found = {}
    for name, act_bits in ((W4, None), (W4A4, 4)):
        model = quantops.quantize_(copy.deepcopy(untouched), quantops.MSQConfig(bits=4, k=0, act_bits=act_bits))
        accuracy = train(model, data, epochs, seed, bar)

        def step():
            F.cross_entropy(model(data.x[:BATCH]), data.y[:BATCH]).backward()

        found[name] = accuracy, kept_for_backward(model, step)
    return found


def costs(data):
    """{name: (milliseconds a step, bytes saved for backward by quantization)} of one and the same network."""
    x, y = data.x[:BATCH], data.y[:BATCH]

    def float_step(model):
        return F.cross_entropy(model(x), y)

    def fused_step(model):
        return F.cross_entropy(model(x), y) + 1e-3 * quantops.penalty(model)

    def eager_step(model):
        weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
        made = {n: paper.msq(w, 8, 1) for n, w in weights.items()}
        logits = torch.func.functional_call(model, {n: r[0] for n, r in made.items()}, x)
        return F.cross_entropy(logits, y) + 1e-3 * sum(r[1] for r in made.values())

    def make(quantized):
        torch.manual_seed(0)
        return quantops.quantize_(Net(), quantops.MSQConfig(bits=8, scale="absmax")) if quantized else Net()

    steps = {
        "float": (make(False), float_step),
        "paper-style eager chain": (make(False), eager_step),
        "quantops": (make(True), fused_step),
    }
    return step_costs(
        {name: (model, lambda m=model, loss=loss: loss(m).backward()) for name, (model, loss) in steps.items()}
    )


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
    from tqdm import tqdm

    data, results, epochs = Digits(), [], args.epochs or EPOCHS
    plain_epochs = min(epochs, PLAIN_EPOCHS)
    with tqdm(total=(3 * epochs + 2 * plain_epochs) * args.seeds, desc="MSQ", unit="epoch") as bar:
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            model = Net()
            untouched = copy.deepcopy(model)
            plain = copy.deepcopy(model)
            baseline = train(model, data, epochs, seed, bar)
            model = copy.deepcopy(untouched)
            accuracy, controller = train_msq(model, data, args, seed, bar)
            report = quantops.bit_report(model)
            fixed, fixed_average = fixed_bits(report, plain, data, epochs, seed, bar)
            results.append(
                {
                    "seed": seed,
                    "float": baseline,
                    "msq": accuracy,
                    "compression": report.compression,
                    "average_bits": report.average_bits,
                    "fixed": fixed,
                    "fixed_bits": fixed_average,
                    "done": controller.done,
                    "steps_to_target": controller.log[-1]["step"],
                    "four_bits": at_four_bits(untouched, data, plain_epochs, seed, bar),
                }
            )
            if seed == 0:
                first = untouched, model, controller, report
    untouched, model, controller, report = first

    w = untouched.conv2.weight.detach()
    draw(
        args.out / "demo.png",
        controller.log,
        (w, quantops.round_clamp(w, None, 8), "conv2 at the start, 8 bits"),
        (
            model.conv2.parametrizations.weight.original.detach(),
            model.conv2.weight.detach(),
            f"conv2 at the end, {report.rows[1].bits} bits",
        ),
    )

    print("\nSeed 0, layer by layer:")
    print(f"  {'step':>5} {'compression':>11}   bits (beta, Omega) of {', '.join(r.name for r in report.rows)}")
    for e in controller.log:
        cells = "  ".join(f"{r['bits_after']} ({r['beta']:.2f}, {r['omega']:.1e})" for r in e["layers"])
        print(f"  {e['step']:>5} {e['compression']:>10.1f}x   {cells}")
    print(f"\n{report}")

    print(f"\nAccuracy on {len(data.y_test)} held-out digits, %:")
    print(f"  {'seed':>4} {'float':>7} {'MSQ':>7} {'bits':>6} {'compression':>12} {'fixed bits':>11} {'bits':>6}")
    for r in results:
        print(
            f"  {r['seed']:>4} {r['float']:>7.2f} {r['msq']:>7.2f} {r['average_bits']:>6.2f} "
            f"{r['compression']:>11.1f}x {r['fixed']:>11.2f} {r['fixed_bits']:>6.2f}"
        )
    mean = {key: statistics.mean(r[key] for r in results) for key in ("float", "msq", "compression", "fixed")}
    print(
        f"  mean {mean['float']:>7.2f} {mean['msq']:>7.2f} {'':>6} {mean['compression']:>11.1f}x {mean['fixed']:>11.2f}"
    )

    print(f"\nAt 4 bits, {plain_epochs} epochs, means of the seeds; kept: by a step of {BATCH} for its backward pass")
    for name in (W4, W4A4):
        accuracy, kept = (statistics.mean(r["four_bits"][name][i] for r in results) for i in (0, 1))
        print(f"  {name:5} {accuracy:>7.2f} %  {kept / 1e6:6.2f} MB")

    measured = costs(data)
    print(f"\nA training step of this network, batch {BATCH}, {torch.get_num_threads()} threads, 8 bits:")
    for name, (milliseconds, saved) in measured.items():
        ratio, extra = milliseconds / measured["float"][0], saved - measured["float"][1]
        print(
            f"  {name:24} {milliseconds:7.2f} ms  {ratio:5.2f}x float   {extra / 1e6:6.2f} MB kept for backward by "
            "quantization"
        )
    (args.out / "demo.json").write_text(json.dumps({"results": results, "log": controller.log, "costs": measured}))
    print(f"\nFigure: {args.out / 'demo.png'}")
    same = export_and_check(model, data, args.out / "msq.onnx")
    missed = [r for r in results if not r["done"] or r["compression"] < 10]
    if missed or mean["msq"] < mean["float"] - 1:
        print(
            f"Expected >= 10x compression within 1 point of float, got {mean['compression']:.1f}x and "
            f"{mean['msq'] - mean['float']:+.2f} points"
        )
        return 1
    return 0 if same else 1
