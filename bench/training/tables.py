"""The tables of training, from the JSON of ``bench costs`` and ``bench train``; nothing in them is typed by hand."""

import statistics
from pathlib import Path

from bench.ops.report import IMPLEMENTATIONS, insert, markdown
from bench.state import RESULTS
from bench.store import gather, read_json, read_runs
from bench.training.costs import BASE, state_bytes
from bench.training.recipes import EVERYWHERE, RECIPES, SEPARATE, WIDTHS

BEGIN, END = "<!-- train: begin -->", "<!-- train: end -->"
OURS = "quantops MSQ"
RE_ESTIMATED = ", norms re-estimated"


class Folder:
    """The results of a device: ``costs``, [(implementation, result)], and ``runs``, {label: results of its seeds}."""

    def __init__(self, path):
        self.costs = [
            (name, read_json(file)) for name in IMPLEMENTATIONS if (file := path / f"costs-{name}.json").exists()
        ]
        self.runs = {}
        found = read_runs(path / "train")
        for name in RECIPES:
            for result in found.values():
                if result["configuration"]["method"] == name:
                    self.runs.setdefault(result["label"], []).append(result)

    @property
    def machine(self):
        return (self.costs[0][1] if self.costs else next(iter(self.runs.values()))[0])["machine"]


def folders(paths=None):
    """The folders that have such results."""
    found = [Folder(Path(p)) for p in paths or sorted(p for p in RESULTS.iterdir() if p.is_dir())]
    return [f for f in found if f.costs or f.runs]


def _mega(count):
    return f"{count / 1e6:.2f} MB"


def costs_table(folder):
    """Time and bytes of a step by each method."""
    body = []
    for name, result in folder.costs:
        for row in result["rows"]:
            for way, times in row["times"].items():
                held = row["held"][way]
                body.append(
                    [
                        way,
                        row["arithmetic"],
                        IMPLEMENTATIONS[name],
                        f"{1e3 * times['median']:.1f} ms",
                        f"{row['ratio'][way]:.3f}x",
                        f"{held['trainable_parameters']:,}",
                        _mega(state_bytes(held)),
                        f"{state_bytes(held) / state_bytes(row['held'][OURS]):.1f}x",
                        _mega(row["peak_bytes"][way]),
                        str(row["launches"][way]) if "launches" in row else "",
                    ]
                )
    return markdown(
        [
            "way",
            "arithmetic",
            "by",
            "step",
            f"{BASE} = 1",
            "trainable parameters",
            "parameters, gradients, momentum",
            f"{OURS} = 1",
            "peak of a step",
            "launches",
        ],
        body,
    )


def _mean(results, key):
    """Mean of a figure, with its range where there are several seeds."""
    values = [key(r) for r in results]
    if any(v is None for v in values):
        return ""
    spread = f" ({min(values):.2f}..{max(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _budget(result):
    c = result["configuration"]
    amp = ", bfloat16" if c["amp"] else ""
    return f"{c['epochs']} x {result['images']['train']:,}{amp}"


def _images_seen(results):
    return results[0]["configuration"]["epochs"] * results[0]["images"]["train"]


def _is_float(result):
    return result["configuration"]["method"] in ("float", "vit-float")


def _trained_alike(result):
    """What networks have to have in common for one to be beside the other: the network and the steps."""
    recipe = RECIPES.get(result["configuration"]["method"])
    return "resnet20" if recipe is None else recipe.network, _budget(result)


def runs_table(folder):
    """What each method has come to, the longest runs first, and how far below float training for as long."""
    networks = [item for item in folder.runs.items() if not _is_detail(item[1])]
    body, ordered = [], sorted(networks, key=lambda item: -_images_seen(item[1]))
    unquantized = {
        _trained_alike(runs[0]): statistics.mean(r["accuracy"]["final"] for r in runs)
        for _, runs in ordered
        if _is_float(runs[0])
    }
    for label, results in ordered:
        first, reached = results[0], statistics.mean(r["accuracy"]["final"] for r in results)
        without = None if _is_float(first) else unquantized.get(_trained_alike(first))
        state = first["parameter_bytes"] + first["gradient_bytes"] + first["optimizer_bytes"]
        body.append(
            [
                label,
                _budget(first),
                str(len(results)),
                _mean(results, lambda r: r["accuracy_at_the_start"]),
                _mean(results, lambda r: r["accuracy"]["final"]),
                "" if without is None else f"{without - reached:.2f}",
                _mean(results, lambda r: r["compression"]),
                _mean(results, lambda r: r["average_bits"]),
                f"{first['trainable_parameters']:,}",
                _mega(state),
                _mega(first["peak_bytes"]) if first["peak_bytes"] else "",
                f"{1e3 * statistics.mean(r['step_seconds'] for r in results):.0f} ms" if first["step_seconds"] else "",
                f"{statistics.mean(r['seconds_to_the_final_network'] for r in results):.0f} s",
            ]
        )
    return (
        markdown(
            [
                "method",
                "epochs x images",
                "seeds",
                "accuracy at the start, %",
                "at the end, %",
                "below float",
                "compression",
                "average bits",
                "trainable parameters",
                "parameters, gradients, momentum",
                "peak",
                "step",
                "to the final network",
            ],
            body,
        )
        if body
        else ""
    )


def widths_table(folder):
    """Accuracy by dropping bits, and of networks trained for each width."""
    body = []
    for label, results in folder.runs.items():
        for kind in ("", RE_ESTIMATED):
            if all(f"{m} bits{kind}" in results[0]["accuracy"] for m in WIDTHS):
                body.append(
                    [
                        label + kind,
                        _budget(results[0]),
                        str(len(results)),
                        *(_mean(results, lambda r, m=m: r["accuracy"][f"{m} bits{kind}"]) for m in WIDTHS),
                    ]
                )
    separate = [folder.runs.get(name) for name in SEPARATE]
    if any(separate):
        some = next(runs for runs in separate if runs)
        body.append(
            [
                "separate networks",
                _budget(some[0]),
                str(len(some)),
                *("" if runs is None else _mean(runs, lambda r: r["accuracy"]["final"]) for runs in separate),
            ]
        )
    heads = ["trained by", "epochs x images", "seeds", *(f"{m} bit{'s' * (m > 1)}, %" for m in WIDTHS)]
    return markdown(heads, body) if body else ""


def _is_detail(runs):
    return runs[0]["configuration"]["method"].startswith("details")


def details_table(folder):
    """What the details of a quantizer are worth: constant bits, each detail on its own."""
    body = []
    for results in filter(_is_detail, folder.runs.values()):
        name = results[0]["configuration"]["method"]
        recipe, bits = RECIPES[name], results[0]["average_bits"]
        body.append(
            [
                name,
                f"{bits:.0f}" if bits else "32",
                (f"{recipe.paper}: {recipe.deviations}" if bits else recipe.deviations).replace("|", r"\|"),
                _budget(results[0]),
                str(len(results)),
                _mean(results, lambda r: r["accuracy"]["final"]),
            ]
        )
    return markdown(["recipe", "bits", "what it is", "epochs x images", "seeds", "accuracy, %"], body) if body else ""


def deviations(found):
    """What is not as in the papers, and what the papers have."""
    lines = [f"All methods: {EVERYWHERE}."]
    networks = [runs for f in found for runs in f.runs.values() if not _is_detail(runs)]
    names = dict.fromkeys(r["configuration"]["method"] for runs in networks for r in runs)
    for name in names:
        recipe = RECIPES[name]
        lines.append(
            f"- {name} ({recipe.paper}): {recipe.deviations}."
            + (f" The paper: {recipe.claims}." if recipe.claims else "")
        )
    return "\n".join(lines)


def summary(folder):
    """The part of a device."""
    m = folder.machine
    commits = sorted({r["machine"]["commit"] for r in [c for _, c in folder.costs] + sum(folder.runs.values(), [])})
    parts = [f"**{m['device']}, {m['driver']}, torch {m['torch']}; commit {', '.join(commits)}.**"]
    if folder.costs:
        batch = folder.costs[0][1]["rows"][0]["batch"]
        parts += [
            f"A training step of ResNet-20, batch {batch}, all ways in turn, medians of the rounds:",
            costs_table(folder),
        ]
    if folder.runs:
        parts += ["Networks:", runs_table(folder)]
        if details_table(folder):
            parts += ["Details of a quantizer, at constant bits:", details_table(folder)]
        if widths_table(folder):
            parts += ["Accuracy by dropping bits of one network:", widths_table(folder)]
    return "\n\n".join(parts)


def tables(args):
    """Prints the tables of ``bench costs`` and ``bench train``, and writes them --into a page."""
    if args.gather:
        for path in args.folders or RESULTS.iterdir():
            gather(path / "train")
    found = folders(args.folders)
    if not found:
        raise SystemExit(
            f"bench: no results of bench costs or bench train in {', '.join(map(str, args.folders)) or RESULTS}"
        )
    parts = [summary(f) for f in found]
    if any(f.runs for f in found):
        parts.append(deviations(found))
    text = "\n\n".join(parts)
    print(text)
    if args.into:
        insert(args.into, text, BEGIN, END)
    return 0


def add_arguments(parser):
    """Options of ``python -m bench tables``."""
    parser.add_argument("--gather", action="store_true", help="first move finished runs, train/*.json, into train.json")
    parser.add_argument("folders", type=Path, nargs="*", help="default: all of bench/results that have results")
    parser.add_argument("--into", type=Path, help=f"a Markdown file with the markers {BEGIN} and {END}")
    parser.set_defaults(call=tables)
