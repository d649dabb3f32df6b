"""What the kernels must cost on an H100, counted from their machine code on any machine: the time that their bytes
need, and the time that their instructions need, whichever is longer.

Counted is the main path: for CUDA the main loop (what a thread does besides is ``setup``), for Triton the program as a
whole, which takes its elements all at once. Second stages of sums are left out. Assumed: full use of memory and issue
slots, which no kernel reaches; roundings and conversions at 16 lanes a clock, the rate of MUFU.
"""

import importlib
import json
import math
import tempfile
from pathlib import Path

import torch

from bench import machine, measure, sass, state
from bench.registry import cases
from quantops.library import OPS

ARCH = 90
BANDWIDTH = 3.35e12  # bytes a second of an H100 SXM
LANES = 132 * 1.755e9  # multiprocessors times clock: what follows are lanes a clock of one
RATES = {"issue": 128 * LANES, "alu": 64 * LANES, "fp64": 64 * LANES, "conversions": 16 * LANES}
WARPS, REGISTERS, SHARED, BLOCKS = 64, 65536, 227 * 1024, 32  # of a multiprocessor

FMA = {"FADD", "FMUL", "FFMA", "IMAD", "HFMA2", "HADD2", "HMUL2", "HMNMX2"}
FP64 = {"DADD", "DMUL", "DFMA", "DSETP"}
CONVERSIONS = {"MUFU", "F2I", "I2F", "FRND", "F2F"}
ELSEWHERE = {"LDG", "STG", "LDS", "STS", "LDC", "LDL", "STL", "BRA", "BSSY", "BSYNC", "EXIT", "NOP", "BAR", "SHFL",
             "CALL", "RET", "S2R", "CS2R", "WARPSYNC"}
TYPES = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16"}
SHAPES = [(2, 16384), (64, 9)]  # long rows, for the main path, and short ones


def unit(text):
    """The pipe of an instruction, or None for those that share none of RATES but issue."""
    name = sass.opcode(text)
    if name in FP64:
        return "fp64"
    if name in CONVERSIONS:
        return "conversions"
    return None if name in FMA or name in ELSEWHERE or name.startswith("U") else "alu"


def occupancy(kernel, threads):
    """Resident warps as a fraction of the most there can be."""
    warps = threads // 32
    of_registers = REGISTERS // (math.ceil(kernel.registers * 32 / 256) * 256) // warps
    of_shared = SHARED // (kernel.shared + 1024)
    return min(of_registers, of_shared, BLOCKS, WARPS // warps) * warps / WARPS


def cost(kernel, body, moved, elements, setup, threads):
    """A row of the table from the instructions ``body`` that work on ``elements`` elements of one lane and move
    ``moved`` bytes of them."""
    counts = {"issue": len(body), **{name: sum(unit(t) == name for t in body) for name in RATES if name != "issue"}}
    seconds = {"memory": moved / elements / BANDWIDTH,
               **{name: counts[name] / elements / rate for name, rate in RATES.items()}}
    binds = max(seconds, key=seconds.get)
    return {"registers": kernel.registers, "spills": kernel.spills, "stack": kernel.stack, "shared": kernel.shared,
            "occupancy": occupancy(kernel, threads), "elements": elements, "setup": setup, "bytes": moved / elements,
            "instructions": {name: n / elements for name, n in counts.items()},
            "picoseconds": {name: 1e12 * s for name, s in seconds.items()}, "binds": binds,
            "share_of_copy": seconds["memory"] / seconds[binds]}


class NoMainPath(Exception):
    """The machine code has no path that moves the case's bytes in one width; says what there is."""


def cuda_cost(kernel, reads):
    """The main loop of a kernel of csrc/cuda, on its longest way; setup is the shortest way around it."""
    loops = [kernel.longest(*span) for span in kernel.spans()]
    if not loops:
        raise NoMainPath("no loop")
    body = max(loops, key=lambda loop: sum(sass.width(t) for t in loop if sass.opcode(t) == "LDG"))
    loaded, stored = (sum(sass.width(t) for t in body if sass.opcode(t) == op) for op in ("LDG", "STG"))
    return cost(kernel, body, loaded + stored, loaded / reads, len(kernel.shortest([])), 256)


def triton_cost(kernel, constants, reads, writes):
    """The wide path of a Triton kernel, from its start to its end: a program takes its elements all at once."""
    threads = 32 * constants["num_warps"]
    elements = constants["BLOCK"] // threads
    through = []
    for op, each in (("LDG", reads), ("STG", writes)):
        widths = {}
        for at, text in kernel.code:
            if sass.opcode(text) == op and not text.startswith("@"):  # guarded ones are the path of odd ends
                widths.setdefault(sass.width(text), []).append(at)
        wide = [w for w, places in widths.items() if w * len(places) >= elements * each]
        if not wide:
            found = {w: len(places) for w, places in widths.items()}
            raise NoMainPath(f"{op} of {elements * each} bytes a thread expected, found {{width: count}} {found}")
        # The table of the list is read before, sums are written after.
        needed, places = int(elements * each / max(wide)), widths[max(wide)]
        through += places[-needed:] if op == "LDG" else places[:needed]
    way = kernel.shortest(sorted(through))
    texts = dict(kernel.code)
    return cost(kernel, way, sum(sass.width(texts[at]) for at in through), elements, 0, threads)


def _triton_launch(case, dtype):
    """The first launch of the Triton kernels for what the case calls: the one over the elements."""
    x = case.inputs(SHAPES, dtype, "cpu")
    family = {name: family for family, names in OPS.items() for name in names}
    case.run(x)
    for op, args in measure.dispatched(lambda: case.run(x)):
        name = op.name().removeprefix("quantops::").partition(".")[0]
        if op.namespace == "quantops":
            function = getattr(importlib.import_module(f"quantops.kernels.{family[name]}"), name)
            return sass.triton_launches(lambda: function(*args))[0]
    raise NoMainPath("calls no op of quantops")


def _cuda_name(kernels, op, dtype):
    """The kernel of ``op`` for the large table, as it is named in the machine code."""
    name = f"items_kernel<{op.replace('T', TYPES[dtype])}, "
    found = [n for _, n in kernels if n.startswith(name) and n.endswith("60>")]
    if len(found) != 1:
        raise NoMainPath(f"{name}60> expected once, found {found}")
    return found[0]


def rows():
    """Rows of the table: of each op, by CUDA where nvcc is, and by Triton where it is installed."""
    found, kernels = [], {}
    if sass.nvcc():
        with tempfile.TemporaryDirectory() as folder:
            kernels = sass.cuda_kernels([str(ARCH)], folder)
    for case in cases():
        if case.forward:
            continue  # made of several kernels
        for dtype in (d for d in case.dtypes if d in TYPES):
            for by, function in (("CUDA", _cuda_row), ("Triton", _triton_row)):
                if by == "CUDA" and not (kernels and case.cuda):
                    continue
                row = {"case": case.name, "dtype": str(dtype).removeprefix("torch."), "by": by}
                try:
                    row.update(function(case, dtype, kernels))
                except (NoMainPath, ValueError) as error:
                    row["absent"] = str(error)
                found.append(row)
    return found


def _cuda_row(case, dtype, kernels):
    name = _cuda_name(kernels, case.cuda, dtype)
    return {"kernel": name, **cuda_cost(kernels[str(ARCH), name], case.reads(dtype.itemsize))}


def _triton_row(case, dtype, kernels):
    launch = _triton_launch(case, dtype)
    kernel = sass.triton_kernel(sass.triton_binary(launch, ARCH))
    size = dtype.itemsize
    return {"kernel": launch.kernel.__name__,
            **triton_cost(kernel, launch.constants, case.reads(size), case.writes(size))}


PATH = state.RESULTS / "static" / "h100.json"


def load():
    """The table as it was written last, or None."""
    return json.loads(PATH.read_text()) if PATH.exists() else None


def table(result, measured=None):
    """Markdown. ``measured``: {(case, dtype, by): share of a copy}, where an H100 was at hand."""
    head = ["op", "weights", "by", "bytes", "instructions", "setup", "registers", "spills", "occupancy", "binds",
            "instructions' time / bytes' time", "share of a copy, at most", *["measured"] * bool(measured)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for r in result["rows"]:
        if "absent" in r:
            cells = [r["case"], r["dtype"], r["by"], r["absent"]]
        else:
            cells = [r["case"], r["dtype"], r["by"], f"{r['bytes']:.2f}", f"{r['instructions']['issue']:.1f}",
                     str(r["setup"]), str(r["registers"]), str(r["spills"]), f"{r['occupancy']:.2f}", r["binds"],
                     f"{r['picoseconds']['issue'] / r['picoseconds']['memory']:.2f}", f"{r['share_of_copy']:.2f}"]
            if measured:
                share = measured.get((r["case"], r["dtype"], r["by"]))
                cells.append("" if share is None else f"{share:.2f}")
        lines.append("| " + " | ".join(cells + [""] * (len(head) - len(cells))) + " |")
    return "\n".join(lines)


def heading(result):
    """What was counted, with what."""
    m = result["machine"]
    return (f"**Counted, not measured: the machine code for an H100 (sm_{ARCH}), nvcc {m['nvcc']}, triton "
            f"{m['triton']}; commit {m['commit']} of {m['date']}.** Per element: bytes, and instructions of one lane "
            f"on the main path. \"Share of a copy, at most\": the bytes at {BANDWIDTH / 1e12:.2f} TB/s as a fraction of the "
            "longest time that bytes or instructions need.")


def summary(result):
    """What binds which kernels, one paragraph."""
    rows = [r for r in result["rows"] if "absent" not in r]
    bound = [f"{r['case']} {r['dtype']} ({r['by']}, {r['share_of_copy']:.2f} of a copy at most)" for r in rows
             if r["binds"] != "memory"]
    spilled = [f"{r['case']} {r['dtype']} ({r['by']})" for r in rows if r["spills"] or r["stack"]]
    return (f"Of {len(rows)} kernels, {len(rows) - len(bound)} are bound by memory"
            + (f"; by instructions: {', '.join(bound)}" if bound else "")
            + (f". Registers are spilled by {', '.join(spilled)}." if spilled else ". None spills registers."))


def static(args):
    """Counts what the kernels must cost on an H100, from their machine code, and writes results/static/h100.json."""
    versions = machine.versions()
    compiler = sass.nvcc()
    release = sass.run(compiler, "--version").split("release ")[1].split(",")[0] if compiler else "absent"
    if not compiler:
        print("nvcc was not found: put it on PATH or set CUDA_HOME for the CUDA kernels")
    if sass.tool("cuobjdump") is None:
        raise SystemExit("bench: cuobjdump was not found: install the CUDA toolkit's, or triton, which has one")
    result = {"machine": {"device": f"NVIDIA H100, sm_{ARCH}, counted", "nvcc": release, **versions}, "rows": rows()}
    path = args.out or PATH
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{heading(result)}\n\n{table(result)}\n\nwrote {path}")
    return 0


def add_arguments(parser):
    """Options of ``python -m bench static``."""
    parser.add_argument("--out", type=Path, help="the JSON to write")
    parser.set_defaults(call=static)
