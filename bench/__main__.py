"""``python -m bench run|report|compare``: measures every op against what a user could run instead; see --help."""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

import quantops
from bench.cases import CASES, Inputs, serving
from bench.measure import compare, saved_bytes, summary
from bench.peers import copier
from bench.shapes import LISTS, SIZES, shapes_of
from quantops.library import ops

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CPU_WORKLOADS = ("64K", "1M", "16M", "resnet20", "resnet50", "mobilenet_v3_large", "deit_small")
COMPILED_LISTS = ("resnet20",)  # the first call of a compiled list takes 17-67 s on 2 cores
# Fresh outputs come from the kernel page by page, unless the allocator keeps what was freed: ten times the op itself.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 28)}


def machine(device):
    """What a result depends on: device, software, settings."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        names = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()) or [platform.processor()]
        name = f"{names[0]}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True,
                            cwd=Path(__file__).parent)
    return {"device": name, "implementation": serving(device), "torch": torch.__version__,
            "python": platform.python_version(), "commit": commit.stdout.strip(), "quantops": quantops.__version__,
            "date": datetime.date.today().isoformat(),
            "allocator": {k: os.environ.get(k) for k in ALLOCATOR}}


def measure_one(case, workload, dtype, device, budget):
    """One row of the result: times, bytes and ratios of a case on a workload."""
    shapes = shapes_of(workload)
    x = Inputs(shapes, DTYPES[dtype], device)
    if not case.check(case.run(x), x):
        raise SystemExit(f"bench: {case.name} on {workload} {dtype} differs from the reference; it is not timed")
    bytes_per_weight = case.bytes(x.w[0].element_size())
    copy, factor = copier(x.w, x.q, bytes_per_weight)
    functions = {"quantops": lambda: case.run(x), "copy": copy}
    for name, make in case.peers.items():
        if name == "compiled list" and workload not in COMPILED_LISTS:
            continue
        if name == "compiled" and len(shapes) > 1:
            continue  # one graph per shape: the list in one graph is the stronger peer
        peer = make()
        functions[name] = lambda peer=peer: peer(x)
    times = {name: summary(t) for name, t in compare(functions, device, budget).items()}
    ceiling = times["copy"]["median"] * factor
    row = {"case": case.name, "workload": workload, "dtype": dtype, "numel": x.numel, "bytes_per_weight": bytes_per_weight,
           "times": times, "copy_seconds": ceiling, "share_of_copy": ceiling / times["quantops"]["median"],
           "gigabytes_per_second": bytes_per_weight * x.numel / times["quantops"]["median"] / 1e9}
    if case.forward:
        row["saved_bytes_per_weight"] = {
            "quantops": saved_bytes(lambda: case.forward(x), x.leaves) / x.numel,
            "eager": saved_bytes(lambda: case.peer_forward(x), x.leaves) / x.numel}
    return row


def call_overhead(device):
    """Microseconds of an eager call on one weight of 64 elements: what does not depend on its size."""
    x = Inputs([(64,)], torch.float32, device)
    w, leaf, scale = x.w[0], x.leaves[0], x.scale[0]
    calls = {
        "torch.clone": lambda: w.clone(),
        "ops.absmax": lambda: ops.absmax(x.w, False),
        "ops.round_clamp_out": lambda: ops.round_clamp_out(x.w, x.scale, x.bits, False, True, x.q),
        "ops.encode": lambda: ops.encode(x.w, x.scale, x.bits, 0, True),
        "quantops.round_clamp": lambda: quantops.round_clamp(w, scale, x.bits),
        "quantops.msq": lambda: quantops.msq(w, scale, x.bits, x.k),
        "quantops.msq, w requires grad": lambda: quantops.msq(leaf, scale, x.bits, x.k),
    }
    times = compare(calls, device, budget=2.0, most=20000)
    return {name: 1e6 * summary(t)["median"] for name, t in times.items()}


def run(args):
    """Measures and writes one JSON."""
    device = args.device
    if torch.device(device).type == "cpu" and not args.allocator_as_is and os.environ.get("MALLOC_MMAP_MAX_") != "0":
        os.execve(sys.executable, [sys.executable, "-m", "bench", *sys.argv[1:]], {**os.environ, **ALLOCATOR})
    result = {"machine": machine(device), "call_microseconds": call_overhead(device), "rows": []}
    print(quantops.info(), f"\n{result['machine']['device']}, commit {result['machine']['commit']}")
    for dtype in args.dtypes.split(","):
        for workload in args.workloads.split(","):
            for case in CASES:
                if args.cases and case.name not in args.cases.split(","):
                    continue
                torch._dynamo.reset()
                row = measure_one(case, workload, dtype, device, args.budget)
                result["rows"].append(row)
                print(line(row), flush=True)
    path = args.out or RESULTS / re.sub(r"\W+", "-", result["machine"]["device"]).strip("-").lower() / "uniform.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}\n\n{table(result)}")
    return 0


def line(row):
    """A row as text: time, share of a copy, and each peer as a multiple of our time."""
    ours = row["times"]["quantops"]["median"]
    others = "".join(f"   {name} {t['median'] / ours:.1f}x" for name, t in row["times"].items()
                     if name not in ("quantops", "copy"))
    saved = row.get("saved_bytes_per_weight")
    kept = f"   keeps {saved['quantops']:.2f} B/weight, eager {saved['eager']:.0f}" if saved else ""
    return (f"{row['case']:14} {row['workload']:19} {row['dtype']:9} {1e3 * ours:9.3f} ms  {row['gigabytes_per_second']:7.1f} "
            f"GB/s  {row['share_of_copy']:5.2f} of a copy{others}{kept}")


def table(result):
    """Markdown: the training step and its peers; then the share of a copy of each op; then the cost of a call."""
    rows, device = result["rows"], result["machine"]["device"]
    cases = list(dict.fromkeys(r["case"] for r in rows))
    kinds = list(dict.fromkeys((r["workload"], r["dtype"]) for r in rows))
    found = {(r["case"], r["workload"], r["dtype"]): r for r in rows}
    lines = [f"{device}. The MSQ step (scales, forward, sums, backward) as a multiple of a copy of 5 elements per weight "
             "(20 bytes in fp32), and what it keeps for backward beyond the parameters:", "",
             "| weights | quantops | torch.compile | eager chain | quantops keeps, B/weight | eager keeps |",
             "|---|---|---|---|---|---|"]
    for r in (r for r in rows if r["case"] == "msq step"):
        times = {name: t["median"] / r["copy_seconds"] for name, t in r["times"].items()}
        compiled = min((times[n] for n in ("compiled", "compiled list") if n in times), default=None)
        saved = r["saved_bytes_per_weight"]
        lines.append(f"| {r['workload']} {r['dtype']} | {times['quantops']:.2f}x | "
                     f"{'' if compiled is None else f'{compiled:.1f}x'} | {times['eager']:.1f}x | "
                     f"{saved['quantops']:.2f} | {saved['eager']:.0f} |")
    lines += ["", "Share of a copy's speed (1.00: as fast as torch copies the bytes that the op must move):", "",
              "| weights | " + " | ".join(cases) + " |", "|---|" + "---|" * len(cases)]
    for workload, dtype in kinds:
        cells = [found.get((c, workload, dtype)) for c in cases]
        lines.append(f"| {workload} {dtype} | " + " | ".join("" if r is None else f"{r['share_of_copy']:.2f}" for r in cells)
                     + " |")
    calls = ", ".join(f"`{name}` {v:.1f}" for name, v in result["call_microseconds"].items())
    lines += ["", f"Microseconds of an eager call on a weight of 64 elements: {calls}."]
    return "\n".join(lines)


def report(args):
    """Prints the tables of a result, and writes them between the markers of a Markdown file."""
    text = table(json.loads(args.result.read_text()))
    print(text)
    if args.into:
        page = args.into.read_text()
        begin, end = "<!-- bench: begin -->", "<!-- bench: end -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise SystemExit(f"{args.into}: expected one {begin} and one {end}")
        head, rest = page.split(begin)
        args.into.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}")
    return 0


def compare_results(args):
    """Prints what moved between two results; 1 where anything became slower by more than ``--ratio``."""
    old, new = ({(r["case"], r["workload"], r["dtype"]): r for r in json.loads(p.read_text())["rows"]}
                for p in (args.old, args.new))
    worst = 0.0
    for key in old.keys() & new.keys():
        # As shares of the copy in the same run: machines differ from day to day.
        change = old[key]["share_of_copy"] / new[key]["share_of_copy"]
        worst = max(worst, change)
        if abs(change - 1) > 0.05:
            print(f"{' '.join(key):45} {old[key]['share_of_copy']:.2f} -> {new[key]['share_of_copy']:.2f} of a copy, "
                  f"time {change:.2f}x")
    print(f"{len(old.keys() & new.keys())} in both; the largest slowdown is {worst:.2f}x")
    return int(worst > args.ratio)


def main():
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run", help=run.__doc__)
    runs.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    runs.add_argument("--workloads", default=",".join(CPU_WORKLOADS), help=f"of {', '.join([*SIZES, *LISTS])}")
    runs.add_argument("--dtypes", default="float32,bfloat16")
    runs.add_argument("--cases", help="default: all")
    runs.add_argument("--budget", type=float, default=1.5, help="seconds for a row")
    runs.add_argument("--allocator-as-is", action="store_true", help="do not set glibc's allocator to keep memory")
    runs.add_argument("--out", type=Path)
    runs.set_defaults(call=run)
    reports = commands.add_parser("report", help=report.__doc__)
    reports.add_argument("result", type=Path)
    reports.add_argument("--into", type=Path, help="a Markdown file with the markers bench: begin and bench: end")
    reports.set_defaults(call=report)
    compares = commands.add_parser("compare", help=compare_results.__doc__)
    compares.add_argument("old", type=Path)
    compares.add_argument("new", type=Path)
    compares.add_argument("--ratio", type=float, default=1.2)
    compares.set_defaults(call=compare_results)
    args = parser.parse_args()
    return args.call(args)


if __name__ == "__main__":
    raise SystemExit(main())
