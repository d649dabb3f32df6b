"""What moved between two results of one kind."""

from pathlib import Path

from bench.ops.registry import OURS
from bench.store import read_json


def figures(result):
    """{what: figure} that two days can be compared by: more is slower. Relative to the copy, or to the unquantized
    step, of the same run, since machines differ from day to day."""
    found = {}
    for row in result["rows"]:
        if "network" in row:
            for label, value in row["ratio"].items():
                if label.startswith(OURS):
                    found[f"{row['network']}, {label}"] = value
        else:
            key = f"{row['case']}, {row['workload']} {row['dtype']}"
            found[key] = 1 / row["share_of_copy"][row["headline"]]
    return found


def compare(args):
    """Prints what moved between two results; exits 1 where anything became slower by more than --ratio."""
    results = [read_json(path) for path in (args.old, args.new)]
    old, new = map(figures, results)
    both = [key for key in old if key in new]
    if not both:
        raise SystemExit(f"bench: {args.old} and {args.new} have no row in common")
    for path, result in zip((args.old, args.new), results):
        head = result["machine"]
        print(f"{path}: {head['device']}, {head['implementation']}, commit {head['commit']}, {head['date']}")
    changes = {key: new[key] / old[key] for key in both}
    for key, change in sorted(changes.items(), key=lambda item: -item[1]):
        if abs(change - 1) > args.show:
            word, unit = "slower" if change > 1 else "faster", "times the copy or the unquantized step"
            print(f"{word} {change:5.2f}x   {key}   ({old[key]:.2f} -> {new[key]:.2f} {unit})")
    slower = [key for key in both if changes[key] > args.ratio]
    print(
        f"{len(both)} rows in both, {len(old) - len(both)} only in the old, {len(new) - len(both)} only in the new; "
        f"the largest slowdown is {max(changes.values()):.2f}x; {len(slower)} slower than {args.ratio}x"
    )
    return int(bool(slower))


def add_arguments(parser):
    """Options of ``python -m bench compare``."""
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--ratio", type=float, default=1.2, help="the slowdown to fail at (default 1.2)")
    parser.add_argument("--show", type=float, default=0.05, help="the change to print (default 0.05)")
    parser.set_defaults(call=compare)
