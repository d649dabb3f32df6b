"""NVIDIA's counters of five kernels: python -m bench.gpu.counters --out ncu.json runs itself under ncu, on a GPU.

Timed results say how far a kernel is from a copy, these say why: the bytes that reached memory, the issue slots that
were used, and what warps waited for.
"""

import argparse
import csv
import io
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import state

MEASURED = (
    ("msq forward", "float32"),
    ("msq forward", "bfloat16"),
    ("msq backward", "float32"),
    ("truncate 8-4-2-1", "float32"),
    ("categorical backward", "float32"),
)
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats", "Occupancy", "LaunchStats")
# Sections and not metrics are asked for: a metric that ncu of another version does not know ends it.
KEPT = {
    "seconds": "gpu__time_duration.sum",
    "bytes per second": "dram__bytes.sum.per_second",
    "share of memory's peak": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "share of issue slots": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "share of issue slots, by scheduler": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "resident warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
STALL, PER_ISSUE = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
MOST_STALLS = 5


def calls(device):
    """Runs each case once to load its kernels, and once between profiler marks."""
    import torch

    from bench.ops.registry import cases
    from bench.ops.run import DTYPES
    from bench.ops.shapes import shapes_of

    cuda, every = torch.device(device).type == "cuda", {case.name: case for case in cases()}
    for name, dtype in MEASURED:
        x = every[name].inputs(shapes_of("16M" if cuda else "tiny"), DTYPES[dtype], device)
        every[name].run(x)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        every[name].run(x)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        print(f"called {name} {dtype}", flush=True)


def rows(text):
    """What is kept of ncu's page "raw" as CSV: a dict for each kernel that ran."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    table = list(csv.DictReader(io.StringIO("\n".join(line for line in lines[start:] if line.startswith('"')))))
    units, found = table[0] if table else {}, []
    for row in table[1:]:
        kept = {"kernel": row["Kernel Name"]}
        for name, column in KEPT.items():
            if row.get(column):
                kept[name] = f"{row[column]} {units[column]}".strip()
        stalls = {
            column.removeprefix(STALL).removesuffix(PER_ISSUE): float(v.replace(",", ""))
            for column, v in row.items()
            if v and column.startswith(STALL) and column.endswith(PER_ISSUE)
        }
        kept["warps waiting per issue"] = dict(sorted(stalls.items(), key=lambda item: -item[1])[:MOST_STALLS])
        found.append(kept)
    return found


def main(argv=None):
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.counters", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="the JSON to write; without it the calls are made, for ncu to watch")
    args = parser.parse_args(argv)
    if not args.out or args.device == "cpu":
        calls(args.device)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        sections = [word for name in SECTIONS for word in ("--section", name)]
        status = subprocess.run(
            [
                "ncu",
                "--csv",
                "--page",
                "raw",
                "--profile-from-start",
                "off",
                "--clock-control",
                "none",
                "--log-file",
                str(log),
                *sections,
                sys.executable,
                "-m",
                "bench.gpu.counters",
                "--device",
                args.device,
            ]
        ).returncode
        text = log.read_text(errors="replace") if log.exists() else ""
    found = rows(text)
    if not found:  # such as: no permission to read counters
        print("\n".join(text.splitlines()[-20:]))
        return status or 1
    state.write(args.out, {"commit": state.commit(), "cases": MEASURED, "kernels": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
