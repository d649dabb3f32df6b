"""The README's short table and its two plots, drawn from the committed results; nothing in them is typed by hand.

A figure that the results do not hold is left out. The table tells of the CPU of the latest op benchmark, and of a GPU
where there are results of one; the networks were trained where bench/results says.
"""

import statistics
from pathlib import Path

from bench.ops import report, targets
from bench.ops.registry import OURS
from bench.state import RESULTS
from bench.training import tables

BEGIN, END = "<!-- headline: begin -->", "<!-- headline: end -->"
MOST_ROWS = 12
GPU_CASES = ("msq forward", "msq backward", "truncate 8-4-2-1", "categorical hard")
PEERS = ("eager", "compiled", "torch fake_quantize", "torchao", "Brevitas")
LONG = ("msq-nearest-long", "float-long")  # the runs that the plot of bits shows


def _step_rows(device):
    return (
        [
            r
            for r in device.peers["rows"]
            if r["case"] == report.STEP and r["workload"] in targets.LARGE and r["dtype"] == "float32"
        ]
        if device.ops
        else []
    )


def _op_lines(device):
    """What the ops do, beside their peers."""
    lines, rows = [], _step_rows(device)
    if rows:
        row = max(rows, key=lambda r: len(r["ratio"]))
        where = f"{row['workload']} weights, fp32"
        lines.append(
            (
                "MSQ step (scale, q, penalty, gradient), faster than",
                where,
                "; ".join(
                    f"{peer}{' *' * (peer in row['notes'])} {row['ratio'][peer]:.1f}x"
                    for peer in PEERS
                    if peer in row["ratio"]
                ),
            )
        )
        lines.append(
            (
                "bytes per weight kept for backward",
                where,
                "; ".join(
                    f"{name} {row['saved_bytes'][name] / row['numel']:.0f}"
                    for name in (OURS, *PEERS)
                    if name in row["saved_bytes"]
                ),
            )
        )
        for case in ("msq forward", "categorical hard"):
            same = [
                r
                for r in device.peers["rows"]
                if (r["case"], r["workload"], r["dtype"]) == (case, row["workload"], "float32")
            ]
            lines += [(f"{case}, speed beside a copy of its bytes", where, f"{targets.share(r):.2f}x") for r in same]
    return lines


def _gpu_lines(device):
    """What a GPU gave: shares of a copy, and whole steps."""
    shares = {
        r["case"]: targets.share(r)
        for r in device.peers["rows"]
        if r["workload"] in targets.LARGE and r["dtype"] == "float32" and r["case"] in GPU_CASES
    }
    name, lines = device.machine["device"], []
    if shares:
        told = "; ".join(f"{case} {shares[case]:.2f}x" for case in GPU_CASES if case in shares)
        lines.append((f"speed beside a copy of its bytes, {name}", "16M weights, fp32", told))
    steps = [  # a row with a commit of its own is of older code than the others
        r
        for result in device.steps.values()
        for r in result["rows"]
        if r["base"] == "unquantized" and "commit" not in r
    ]
    if steps:
        told = "; ".join(
            f"{r['network']} {r['ratio'][OURS]:.2f}, decoupled {r['ratio'][f'{OURS} decoupled']:.2f}" for r in steps
        )
        lines.append((f"training step, unquantized = 1, {name}", "eager, bf16 autocast", told))
    return lines


def _cost_lines(folders, device):
    """What a whole training step costs, and the parameters of bit-level training."""
    for folder in folders:
        for _, result in folder.costs:
            if result["machine"]["device"] == device:
                row, where = result["rows"][0], "ResNet-20, batch 128"
                return [
                    (
                        "training step, unquantized = 1",
                        where,
                        "; ".join(
                            f"{name} {row['ratio'][way]:.2f}"
                            for name, way in (
                                ("quantops", tables.OURS),
                                ("eager", "eager MSQ"),
                                ("BSQ", "BSQ"),
                                ("CSQ", "CSQ"),
                            )
                            if way in row["ratio"]
                        ),
                    ),
                    (
                        "bit-level training's parameters, gradients and momentum",
                        where,
                        f"{tables.state_bytes(row['held']['BSQ']) / tables.state_bytes(row['held'][tables.OURS]):.1f}"
                        "x those of MSQ",
                    ),
                ]
    return []


def _final(folders, label):
    """Mean accuracy of the seeds of a label, and its results, of the folder that has most seeds; or None."""
    found = max((f.runs[label] for f in folders if label in f.runs), key=len, default=None)
    return found and (statistics.mean(r["accuracy"]["final"] for r in found), found)


def _accuracy_lines(folders):
    """What the networks come to."""
    lines = []
    for label, base in (("msq-nearest", "float"), ("cpq-4-short", "float-short")):
        ours, unquantized = _final(folders, label), _final(folders, base)
        if ours and unquantized:
            runs = ours[1]
            lines.append(
                (
                    f"accuracy at {statistics.mean(r['compression'] for r in runs):.0f}x compression, {label}",
                    f"ResNet-20, CIFAR-10, {len(runs)} seed{'s' * (len(runs) > 1)}",
                    f"{ours[0]:.1f} %; float {unquantized[0]:.1f} %",
                )
            )
    ours, usual = _final(folders, "truncquant"), _final(folders, "qat")
    if ours and usual:
        two = [statistics.mean(r["accuracy"]["2 bits"] for r in found[1]) for found in (ours, usual)]
        lines.append(
            (
                "8-bit weights cut to 2 bits, TruncQuant",
                "ResNet-20, CIFAR-10",
                f"{two[0]:.1f} %; trained as usual {two[1]:.1f} %",
            )
        )
    return lines


def table(found, folders):
    """At most MOST_ROWS rows, and the device that they were measured on."""
    device, gpu = _fullest(found, "cpu"), _fullest(found, "cuda")
    name = device.machine["device"]
    lines = [*_op_lines(device), *_cost_lines(folders, name), *(_gpu_lines(gpu) if gpu else ())]
    lines += _accuracy_lines(folders)
    assert len(lines) <= MOST_ROWS, lines
    notes = (
        f"{name}, but where another device is named; networks were trained on one core of it. * quantizes to the "
        "nearest code alone: no LSBs, no penalty."
    )
    return report.markdown(["what", "where", "measured"], [list(line) for line in lines]) + f"\n\n{notes}"


def _fullest(found, kind):
    """The first device of a kind that has whole steps too, or else ops; of any where there is none; no GPU: None."""
    of_kind = [d for d in found if (d.machine["kind"] == "cpu") == (kind == "cpu")]
    if not of_kind:
        return found[0] if kind == "cpu" else None
    return max(of_kind, key=lambda d: bool(d.steps))


def _draw_step(device, figure):
    """Time and kept memory of the MSQ step, by peer."""
    rows = _step_rows(device)
    row = max(rows, key=lambda r: len(r["ratio"]))
    names = [OURS, *(p for p in PEERS if p in row["ratio"])]
    ours = row["times"][row["headline"]][OURS]["median"]
    times = [1e3 * ours * row["ratio"].get(n, 1.0) for n in names]
    kept = [(n, row["saved_bytes"][n] / row["numel"]) for n in names if n in row["saved_bytes"]]
    left, right = figure.subplots(1, 2)
    for axis, labels, values, form, title in (
        (left, names, times, "%.1f", "milliseconds per step"),
        (right, [n for n, _ in kept], [v for _, v in kept], "%.1f", "bytes per weight kept for backward"),
    ):
        bars = axis.barh(range(len(labels)), values, color=["#d95f02" if n == OURS else "#9aa5b1" for n in labels])
        axis.bar_label(bars, fmt=form, padding=3, fontsize=8)
        axis.set_yticks(range(len(labels)), labels)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"An MSQ step over {row['workload']} float32 weights, {device.machine['device']}", fontsize=10)


def _draw_bits(folders, figure):
    """Bits fall while accuracy comes back, beside float training of the same length."""
    runs = [_final(folders, label)[1][0]["epochs"] for label in LONG]
    ours, unquantized = runs
    accuracy = figure.subplots()
    epochs = range(1, len(ours) + 1)
    accuracy.plot(epochs, [e["accuracy"] for e in unquantized], color="#9aa5b1", ls="--", label="float")
    accuracy.plot(epochs, [e["accuracy"] for e in ours], color="#1b7837", label="MSQ")
    accuracy.set(xlabel="epoch", ylabel="test accuracy, %")
    bits = accuracy.twinx()
    bits.step([0, *epochs], [8.0, *(e["average_bits"] for e in ours)], where="post", color="#d95f02", label="bits")
    bits.set(ylabel="average bits", ylim=(0, 8.5))
    lines = [*accuracy.get_lines(), *bits.get_lines()]
    accuracy.legend(lines, ["float", "MSQ, accuracy", "MSQ, average bits"], loc="lower right", fontsize=8)
    accuracy.set_title(f"ResNet-20 on CIFAR-10, {LONG[0]}, one seed", fontsize=10)


def headline(args):
    """Writes the short table --into a page, and its two plots beside the results."""
    found, folders = report.devices(args.folders), tables.folders(args.folders)
    if not found:
        raise SystemExit(f"bench: no results of bench run in {', '.join(map(str, args.folders)) or RESULTS}")
    draw = {}
    device = _fullest(found, "cpu")
    if _step_rows(device):
        draw["step"] = lambda figure: _draw_step(device, figure)
    if all(_final(folders, label) for label in LONG):
        draw["bits"] = lambda figure: _draw_bits(folders, figure)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for name, function in draw.items():
        figure = plt.figure(figsize=(8, 3.2), constrained_layout=True)
        function(figure)
        args.plots.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.plots / f"{name}.png", dpi=110, metadata={"Software": None})
        plt.close(figure)
    text = table(found, folders)
    print(text)
    if args.into:
        report.insert(args.into, text, BEGIN, END)
    return 0


def add_arguments(parser):
    """Options of ``python -m bench headline``."""
    parser.add_argument("folders", type=Path, nargs="*", help="default: all of bench/results that have results")
    parser.add_argument("--into", type=Path, help=f"a Markdown file with the markers {BEGIN} and {END}")
    parser.add_argument("--plots", type=Path, default=RESULTS / "plots", help="where step.png and bits.png go")
    parser.set_defaults(call=headline)
