"""Tables and plots from the results; nothing in them is typed by hand."""

import os
from pathlib import Path

from bench.machine_code import static
from bench.ops import steps, targets
from bench.ops.registry import OURS
from bench.ops.run import noisy
from bench.ops.shapes import CALL
from bench.state import RESULTS, ROOT
from bench.store import read_json

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
STEP = "msq step"  # the row that stands for training
LSQ = "LSQ activation step"
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
HOPPER = ("H100", "H200")
IMPLEMENTATIONS = {"cpp": "C++", "cuda": "CUDA", "triton": "Triton"}


class Device:
    """All results of a folder: ``ops`` and ``steps``, {implementation: result}."""

    def __init__(self, folder):
        self.folder = folder
        self.ops, self.steps = (
            {name: read_json(path) for name in IMPLEMENTATIONS if (path := folder / f"{kind}-{name}.json").exists()}
            for kind in ("ops", "steps")
        )

    @property
    def all(self):
        return [*self.ops.values(), *self.steps.values()]

    @property
    def machine(self):
        return self.all[0]["machine"]

    @property
    def peers(self):
        """The result that has the peers' times: the first."""
        return next(iter(self.ops.values()))

    def heading(self):
        """Device, software and state of the code, one sentence."""
        m = self.machine
        states = {f"{r['machine']['commit']} of {r['machine']['date']}" for r in self.all}
        states = sorted(states | {row["commit"] for r in self.all for row in r["rows"] if "commit" in row})
        allocator = f", allocator: {m['allocator']['name']}" if "allocator" in m else ""
        cuda = f", CUDA {m['cuda']}" if "cuda" in m else ""
        return (
            f"{m['device']}, {m['driver']}{cuda}, torch {m['torch']}, triton {m['triton']}{allocator}; commit "
            f"{', '.join(states)}."
        )


def devices(folders=None):
    """The folders that have results, the latest first; of one day, that with most rows."""
    found = [Device(Path(f)) for f in folders or sorted(p for p in RESULTS.iterdir() if p.is_dir())]
    return sorted(
        (d for d in found if d.all),
        reverse=True,
        key=lambda d: (max(r["machine"]["date"] for r in d.all), sum(len(r["rows"]) for r in d.all)),
    )


def _time(seconds):
    return f"{1e3 * seconds:.3f} ms" if seconds < 1 else f"{seconds:.1f} s"


def markdown(head, rows):
    """A table."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _peers_of(rows):
    return list(dict.fromkeys(name for r in rows for name in [*r["ratio"], *r["absent"]]))


def step_table(device, case=STEP):
    """A training op against its peers: times as multiples of ours, what is kept, what compiling costs."""
    rows = [r for r in device.peers["rows"] if r["case"] == case and r["workload"] != CALL]
    if not rows:
        return ""
    peers = [p for p in _peers_of(rows) if any(p in r["ratio"] for r in rows)]
    others = [name for name in device.ops if device.ops[name] is not device.peers]
    first = next(iter(device.ops))
    head = [
        "weights",
        f"quantops, {IMPLEMENTATIONS[first]}",
        *(IMPLEMENTATIONS[o] for o in others),
        *peers,
        "kept, B/weight",
        "eager keeps",
        "peak, B/weight",
        "eager's peak",
    ]
    body = []
    for r in rows:
        ours = r["times"][r["headline"]][OURS]["median"]
        again = [
            next(
                (
                    q
                    for q in device.ops[o]["rows"]
                    if (q["case"], q["workload"], q["dtype"]) == (case, r["workload"], r["dtype"])
                ),
                None,
            )
            for o in others
        ]
        body.append(
            [
                f"{r['workload']} {SHORT[r['dtype']]}",
                _time(ours),
                *("" if q is None else _time(q["times"][q["headline"]][OURS]["median"]) for q in again),
                *(f"{r['ratio'][p]:.1f}x" if p in r["ratio"] else "" for p in peers),
                f"{targets.kept(r):.2f}",
                f"{targets.kept(r, 'eager'):.0f}" if "eager" in r["saved_bytes"] else "",
                f"{r['peak_bytes'][OURS] / r['numel']:.0f}",
                f"{r['peak_bytes']['eager'] / r['numel']:.0f}" if "eager" in r["peak_bytes"] else "",
            ]
        )
    notes = {name: note for r in rows for name, note in r["notes"].items()}
    text = "; ".join(f"{name}: {note}" for name, note in notes.items())
    return markdown(head, body) + (f"\n\nOther work than the op's: {text}." if text else "")


def compile_table(device, case=STEP):
    """Seconds until a compiling peer has run once, and once again after a change of the bits. For quantops precision is
    data: only its first call may compile, where Triton serves it."""
    body = []
    for name, result in device.ops.items():
        for r in (r for r in result["rows"] if r["case"] == case and r["workload"] != CALL):
            ours = [r["first_calls"][OURS]["first_call"]]
            for label, values in (
                (f"quantops, {IMPLEMENTATIONS[name]}", ours),
                *(
                    (peer, [seconds[k] for k in ("first_call", "change_of_bits", "second_change")])
                    for peer, seconds in r["first_calls"].items()
                    if peer != OURS
                ),
            ):
                cells = [f"{v:.2f} s" for v in values] + ["-"] * (3 - len(values))
                body.append([f"{r['workload']} {r['dtype']}", label, *cells])
    return markdown(["weights", "by", "first call", "first change of bits", "second"], body) if body else ""


def share_table(device, promised=False):
    """Share of a copy of each op on each workload, or on those that have a target alone; a cell has one figure per
    implementation, those that miss a target are bold."""
    rows = {
        (name, r["case"], r["workload"], r["dtype"]): r
        for name, result in device.ops.items()
        for r in result["rows"]
        if (r["workload"] in targets.LARGE + targets.LISTS if promised else r["workload"] != CALL)
    }
    if not rows:
        return ""
    cases = list(dict.fromkeys(key[1] for key in rows))
    kinds = list(dict.fromkeys(key[2:] for key in rows))

    def cell(case, workload, dtype):
        figures = []
        for name in device.ops:
            r = rows.get((name, case, workload, dtype))
            if r is not None:
                v, least = targets.share(r), targets.limit(r, device.machine["kind"])
                figures.append(f"**{v:.2f}**" if least is not None and v < least else f"{v:.2f}")
        return " / ".join(figures)

    return markdown(
        ["op", *(f"{w} {SHORT[d]}" for w, d in kinds)],
        [[case, *(cell(case, *kind) for kind in kinds)] for case in cases],
    )


def reason_table(device):
    """Of the ops that miss their share of a copy: how fast they are where memory has no part in it."""
    body = []
    for result in device.ops.values():
        for why in targets.reasons(result):
            body.append(
                [
                    why.row["case"],
                    f"{why.row['workload']} {SHORT[why.row['dtype']]}",
                    f"{why.share:.2f}",
                    f"{why.limit:.2f}",
                    f"{1e12 * why.seconds:.0f}",
                    f"{1e12 * why.copy:.0f}",
                    f"{why.most:.2f}",
                    "arithmetic" if why.arithmetic else "not by arithmetic alone",
                ]
            )
    head = [
        "op",
        "weights",
        "share of a copy",
        "target",
        "ps per weight from cache",
        "copy from memory, ps",
        "share at most",
        "bound by",
    ]
    return markdown(head, body) if body else ""


def _gains(device):
    return " / ".join(f"{r['gain_of_threads']:.2f}" for r in device.ops.values() if "gain_of_threads" in r)


def row_table(device):
    """Every row of every result: all regimes, and what the ratio leaves out."""
    body = []
    for name, result in device.ops.items():
        for r in result["rows"]:
            spread = r["times"][r["headline"]][OURS]
            body.append(
                [
                    IMPLEMENTATIONS[name],
                    r["case"],
                    f"{r['workload']} {r['dtype']}",
                    _time(spread["median"]),
                    f"{_time(spread['p10'])} .. {_time(spread['p90'])}",
                    f"{r['gigabytes_per_second'][r['headline']]:.1f}",
                    ", ".join(f"{regime} {v:.2f}" for regime, v in r["share_of_copy"].items()),
                    ", ".join(f"{p} {v:.1f}x" for p, v in r["ratio"].items()),
                    ", ".join(f"{p} {v}" for p, v in r["launches"].items()),
                    ", ".join(f"{p} {v / r['numel']:.1f}" for p, v in r["peak_bytes"].items()),
                ]
            )
    return markdown(
        [
            "by",
            "op",
            "weights",
            "time",
            "10th..90th percentile",
            "GB/s",
            "share of a copy",
            "peers",
            "launches (CPU: dispatches)",
            "peak, B/weight",
        ],
        body,
    )


def call_line(device):
    """Microseconds of eager calls, and of what lists add to a graph."""
    return "\n\n".join(
        "Microseconds of an eager call on 64 elements, or of what it adds to forward and backward of a graph of such "
        f"weights, {IMPLEMENTATIONS[name]}: "
        + ", ".join(f"`{call}` {v:.1f}" for call, v in result["call_microseconds"].items())
        + "."
        for name, result in device.ops.items()
        if "call_microseconds" in result
    )


def steps_tables(device):
    """Training steps, as multiples of the unquantized one of their group: MSQ's, then TruncQuant's of all widths."""
    return "\n\n".join(
        filter(
            None,
            (_steps_table(device, steps.BASE, steps.VARIANTS), _steps_table(device, steps.JOINT_BASE, steps.JOINT)),
        )
    )


def _steps_table(device, group, variants):
    rows = [
        (name, r)
        for name, result in device.steps.items()
        for r in result["rows"]
        if r["base"].partition(",")[0] == group
    ]
    if not rows:
        return ""
    labels = [v for v in variants if v != group]
    body = []
    for name, r in rows:
        shorter = {label.partition(",")[0]: v for label, v in r["ratio"].items()}
        compiled = ", compiled model" if "," in r["base"] else ""
        base = r["times"].get(r["base"])
        body.append(
            [
                f"{r['network']}{compiled}",
                "x".join(map(str, r["input"])),
                r["dtype"],
                IMPLEMENTATIONS[name],
                _time(base["median"]) if base else "",
                *(f"{shorter[v]:.3f}x" if v in shorter else "" for v in labels),
            ]
        )
    return markdown(["network", "input", "arithmetic", "by", group, *labels], body)


def absences(device):
    """What could not be measured, and why."""
    found = {}
    for result in device.all:
        for r in result["rows"]:
            for name, why in r["absent"].items():
                found.setdefault((name, why), []).append(r.get("workload") or r["network"])
        for r in result.get("left_out", ()):
            found.setdefault((f"{r['case']}, {r['dtype']}", r["why"]), []).append(r["workload"])
    return "\n".join(f"- {name}: {why} ({', '.join(dict.fromkeys(where))})" for (name, why), where in found.items())


def verdicts(device):
    """All targets against all results of a device."""
    found = []
    for name, result in device.ops.items():
        found += [v._replace(target=f"{IMPLEMENTATIONS[name]}: {v.target}") for v in targets.of_ops(result)]
    for name, result in device.steps.items():
        found += [v._replace(target=f"{IMPLEMENTATIONS[name]}: {v.target}") for v in targets.of_steps(result)]
    return found


def brief(device):
    """What was measured, and the targets: the part in bench/README.md of other devices."""
    return f"**{device.heading()}**\n\n{targets.table(verdicts(device))}"


def summary(device):
    """The part of the first device of a kind in bench/README.md."""
    parts = [brief(device)]
    if device.ops:
        parts += [
            "The MSQ step (scales, quantized weights, sums, gradient); peers as multiples of quantops' time:",
            step_table(device),
        ]
        if activations := step_table(device, LSQ):
            parts += [
                "LSQ's step on activations of 4 bits (q, gradients of x and of the step), on tensors of these shapes:",
                activations,
            ]
        parts += [
            "Share of a copy's speed (1.00: as fast as torch copies the bytes that the op must move"
            + (f"; {' / '.join(IMPLEMENTATIONS[n] for n in device.ops)}" if len(device.ops) > 1 else "")
            + "; bold: misses the target):",
            share_table(device, promised=True),
        ]
        if reason_table(device):
            parts += [
                "What misses its target, and the measured reason: the op's time per weight on a tensor in one "
                f"core's caches ({targets.CACHED} weights, 10th percentile, less the time of a call, over "
                f"{_gains(device)}, as many times as fast as one thread all are there), the time in which all "
                "threads copy the bytes of a weight from memory, and the share of the copy's speed that the "
                "first leaves, however well memory is used (not told of ops that were faster from memory than "
                "from caches, in a disturbed run):",
                reason_table(device),
            ]
        parts.append(call_line(device))
    if device.steps:
        parts += ["Whole training steps, as multiples of the unquantized step of the same run:", steps_tables(device)]
    rows = [r for result in device.ops.values() for r in result["rows"]]
    if noisy(rows):
        parts.append(f"{len(noisy(rows))} of {len(rows)} rows are noisy: their slowest tenth took twice the fastest.")
    return "\n\n".join(p for p in parts if p)


def page(device):
    """Everything there is, as Markdown beside the JSON."""
    parts = [f"# Benchmarks: {device.machine['device']}", summary(device)]
    parts += [f"![{name}]({name}.png)" for name in plots(device) if (device.folder / f"{name}.png").exists()]
    if device.ops:
        for title, text in (
            ("Share of a copy, all weights", share_table(device)),
            ("What the first calls cost, for the MSQ step", compile_table(device)),
            ("Every row", row_table(device)),
        ):
            parts += [f"## {title}", text] if text else []
    if absences(device):
        parts += ["## Left out, and why", absences(device)]
    return "\n\n".join(parts) + "\n"


def _measured(found):
    """{(case, dtype, by): share of a copy} on a GPU of Hopper, at the largest size, beside what was counted."""
    shares = {}
    for device in found:
        if any(name in device.machine["device"] for name in HOPPER):
            for name, result in device.ops.items():
                for r in result["rows"]:
                    if r["workload"] == _largest(device, r["dtype"]):
                        shares[r["case"], r["dtype"], IMPLEMENTATIONS[name]] = targets.share(r)
    return shares


# Plots.


def plots(device):
    """{name: function that draws it into a figure}."""
    found = {}
    if device.ops:
        found["roofline"] = _draw_roofline
        if any("saved_bytes" in r for r in device.peers["rows"]):
            found["memory"] = _draw_memory
    if device.steps:
        found["steps"] = _draw_steps
    return found


def _largest(device, dtype):
    """The largest single weight that was measured."""
    sizes = [n for n in targets.LARGE if any(r["workload"] == n and r["dtype"] == dtype for r in device.peers["rows"])]
    every = [r["workload"] for r in device.peers["rows"]]
    return sizes[-1] if sizes else every[-1]


def _bars(axis, groups, series, form="%.2f"):
    """Horizontal bars: ``series`` {label: [a value or None per group]}."""
    height = 0.8 / len(series)
    for i, (label, values) in enumerate(series.items()):
        there = [(g + (i - (len(series) - 1) / 2) * height, v) for g, v in enumerate(values) if v is not None]
        bars = axis.barh([place for place, _ in there], [v for _, v in there], height, label=label)
        axis.bar_label(bars, fmt=form, fontsize=6, padding=2)
    axis.set_yticks(range(len(groups)), groups)
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.legend(fontsize=7)


def _draw_roofline(device, figure):
    axis, series = figure.subplots(), {}
    cases = list(dict.fromkeys(r["case"] for r in device.peers["rows"] if not r["trains"]))
    for name, result in device.ops.items():
        for dtype in dict.fromkeys(r["dtype"] for r in result["rows"]):
            workload = _largest(device, dtype)
            rows = {
                r["case"]: targets.share(r) for r in result["rows"] if r["workload"] == workload and r["dtype"] == dtype
            }
            series[f"{IMPLEMENTATIONS[name]}, {workload} {dtype}"] = [rows.get(c) for c in cases]
    _bars(axis, cases, series)
    axis.axvline(1, color="0.3", lw=1)
    axis.axvline(targets.SHARE[device.machine["kind"]], color="0.3", lw=1, ls="--")
    title = f"share of a copy's speed (dashed: the target)\n{device.machine['device']}"
    axis.set(title=title, xlabel="share of a copy")


def _draw_memory(device, figure):
    rows = [r for r in device.peers["rows"] if "saved_bytes" in r]
    # The largest, for the least of what is per call, of those on which most peers ran.
    most = max(rows, key=lambda r: (len(r["saved_bytes"]), r["numel"]))
    workload, dtype = most["workload"], most["dtype"]
    rows = [r for r in rows if r["workload"] == workload and r["dtype"] == dtype]
    names, axes = [OURS, *_peers_of(rows)], figure.subplots(1, 2, sharey=True)
    for axis, key, title in zip(
        axes,
        ("saved_bytes", "peak_bytes"),
        ("kept for the backward pass, beyond the parameters", "most allocated at once, results among it"),
    ):
        _bars(
            axis,
            [r["case"] for r in rows],
            {
                n: [r[key][n] / r["numel"] if n in r[key] else None for r in rows]
                for n in names
                if any(n in r[key] for r in rows)
            },
            "%.0f",
        )
        axis.set(title=title, xlabel=f"bytes per weight, {workload} {dtype}")


def _draw_steps(device, figure):
    axis = figure.subplots()
    rows = [r for result in device.steps.values() for r in result["rows"]]
    labels = list(dict.fromkeys(label for r in rows for label in r["ratio"]))
    _bars(
        axis,
        [
            f"{r['network']}{', compiled' * (',' in r['base'])}{', all widths' * (r['base'] == steps.JOINT_BASE)}"
            for r in rows
        ],
        {label: [r["ratio"].get(label) for r in rows] for label in labels},
    )
    axis.axvline(1, color="0.3", lw=1)
    axis.set(title=f"time of a training step, unquantized = 1\n{device.machine['device']}", xlabel="multiple")


def draw(device):
    """PNG files beside the JSON; says so where matplotlib is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print(f"no plots in {device.folder}: matplotlib is missing (pip install matplotlib, then the same again)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for name, function in plots(device).items():
        figure = plt.figure(figsize=(10, 7), constrained_layout=True)
        function(device, figure)
        figure.savefig(device.folder / f"{name}.png", dpi=110, metadata={"Software": None})
        plt.close(figure)


def insert(path, text, begin=BEGIN, end=END):
    """Writes ``text`` between the markers of a Markdown file."""
    old = path.read_text()
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise SystemExit(f"{path}: expected one {begin} and, after it, one {end}")
    path.write_text(f"{old[: old.index(begin)]}{begin}\n{text}\n{old[old.index(end) :]}")


def _link(path, page):
    """A link to ``path`` on ``page``, which None means to be printed."""
    path = path.resolve()
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return f"[{name}]({os.path.relpath(path, page.resolve().parent) if page else name})"


def report(args):
    """Draws the plots and writes report.md beside the results; prints the summary of the first CPU and the first GPU
    and the targets of the others, and writes that --into a page."""
    found = devices(args.folders)
    if not found:
        raise SystemExit(f"bench: no results in {', '.join(map(str, args.folders)) or RESULTS}")
    texts = []
    for device in found:
        draw(device)
        (device.folder / "report.md").write_text(page(device))
        first = next(d for d in found if d.machine["kind"] == device.machine["kind"])
        text = summary(device) if device is first else brief(device)
        texts.append(f"{text}\n\nEvery figure, and plots: {_link(device.folder / 'report.md', args.into)}.")
    costs = static.load()
    if costs:
        path = static.PATH.with_suffix(".md")
        if not args.folders:  # of some of them alone it would lose what the others have measured
            path.write_text(static.page(costs, _measured(found)))
        texts.append(f"{static.heading(costs)} {static.summary(costs)} The table: {_link(path, args.into)}.")
    text = "\n\n".join(texts)
    print(text)
    if args.into:
        insert(args.into, text)
    return 0


def add_arguments(parser):
    """Options of ``python -m bench report``."""
    parser.add_argument("folders", type=Path, nargs="*", help="default: all of bench/results that have results")
    parser.add_argument("--into", type=Path, help=f"a Markdown file with the markers {BEGIN} and {END}")
    parser.set_defaults(call=report)
