"""What the kernels must cost on an H100, counted from their machine code on any machine: the time that their bytes
need, and the time that their instructions need, whichever is longer.

Counted is the main path: for CUDA the main loop (what a thread does besides is ``setup``), for Triton the program as a
whole, which takes its elements all at once. Bits that are kept of elements, a fraction of a byte for each, move in
narrow accesses beside the wide ones. Second stages of sums are left out. Assumed: full use of memory and issue
slots, which no kernel reaches; roundings and conversions at 16 lanes a clock, the rate of MUFU.
"""

import importlib
import json
import math
import tempfile
from pathlib import Path

import torch

from bench import machine, measure, state
from bench.machine_code import sass
from bench.ops.registry import cases
from quantops.library import OPS

ARCH = 90
BANDWIDTH = 3.35e12  # bytes a second of an H100 SXM
LANES = 132 * 1.755e9  # multiprocessors times clock: what follows are lanes a clock of one
RATES = {"issue": 128 * LANES, "alu": 64 * LANES, "fp64": 64 * LANES, "conversions": 16 * LANES}
WIDE = 16  # bytes
WARPS, REGISTERS, SHARED, BLOCKS = 64, 65536, 227 * 1024, 32  # of a multiprocessor

FMA = {"FADD", "FMUL", "FFMA", "IMAD", "HFMA2", "HADD2", "HMUL2", "HMNMX2"}
FP64 = {"DADD", "DMUL", "DFMA", "DSETP"}
CONVERSIONS = {"MUFU", "F2I", "I2F", "FRND", "F2F"}
ELSEWHERE = {
    "LDG",
    "STG",
    "LDS",
    "STS",
    "LDC",
    "LDL",
    "STL",
    "BRA",
    "BSSY",
    "BSYNC",
    "EXIT",
    "NOP",
    "BAR",
    "SHFL",
    "CALL",
    "RET",
    "S2R",
    "CS2R",
    "WARPSYNC",
}
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


def cost(kernel, way, trips, moved, elements, setup, threads):
    """A row of the table. ``way``: [(address, instruction)] for ``elements`` elements of one lane, ``moved`` bytes;
    ``trips``: {(first, last): how often that loop turns}."""

    def times(at):
        return math.prod(n for (first, last), n in trips.items() if first <= at <= last)

    counts = dict.fromkeys(RATES, 0)
    for at, text in way:
        counts["issue"] += times(at)
        if unit(text):
            counts[unit(text)] += times(at)
    seconds = {
        "memory": moved / elements / BANDWIDTH,
        **{name: counts[name] / elements / rate for name, rate in RATES.items()},
    }
    binds = max(seconds, key=seconds.get)
    return {
        "registers": kernel.registers,
        "spills": kernel.spills,
        "stack": kernel.stack,
        "shared": kernel.shared,
        "occupancy": occupancy(kernel, threads),
        "elements": elements,
        "setup": setup,
        "bytes": moved / elements,
        "instructions": {name: n / elements for name, n in counts.items()},
        "picoseconds": {name: 1e12 * s for name, s in seconds.items()},
        "binds": binds,
        "share_of_copy": seconds["memory"] / seconds[binds],
    }


def accesses(kernel, op, code):
    """{bytes: addresses} of the loads or stores in ``code``; guarded ones, those of odd ends, only where wide."""
    found = {}
    for at, text in code:
        if sass.opcode(text) == op and (sass.width(text) == WIDE or not text.startswith("@")):
            found.setdefault(sass.width(text), []).append(at)
    return found


def bits(code, op, elements, each):
    """Addresses of the first accesses of one width that move the fraction in ``each`` bytes of an element, if any."""
    needed, found = (each - math.floor(each)) * elements, {}
    for at, text in code:
        if sass.opcode(text) == op:
            found.setdefault(sass.width(text), []).append(at)
    for width, places in found.items() if needed else ():
        if needed % width == 0 and needed // width <= len(places):
            return places[: int(needed // width)]
    if needed:
        raise NoMainPath(f"{op} of {needed:g} bytes a thread expected for bits")
    return []


def choose(kernel, op, code, needed):
    """(addresses, trips) of the widest accesses that move ``needed`` bytes; those of a loop may turn several times."""
    found = accesses(kernel, op, code)
    for width, places in sorted(found.items(), reverse=True):
        count, rest = divmod(needed, width)
        if not count or rest:
            continue
        count = int(count)
        if count <= len(places):
            # The table of the list is read before, sums are written after.
            return (places[-count:] if op == "LDG" else places[:count]), {}
        loops = {s for s in kernel.spans() for at in places if s[0] <= at <= s[1]}
        if width == WIDE and len(loops) == 1 and count % len(places) == 0:
            return places, {loops.pop(): count // len(places)}
    counts = {width: len(places) for width, places in found.items()}
    raise NoMainPath(f"{op} of {needed:g} bytes a thread expected, found {{bytes: count}} {counts}")


class NoMainPath(Exception):
    """The machine code has no path that moves the case's bytes in one width; says what there is."""


def cuda_cost(kernel, reads, writes, longest=True, table=0, optional=0):
    """The main loop of a kernel of csrc/cuda: of those with the most wide loads the smallest, or where its ways part
    before the last of these, the next one. ``longest``: on the longest way, with all that optional arguments ask for.
    ``table``, ``optional``: see Case. Setup is the shortest way around the loop."""
    loads = {span: accesses(kernel, "LDG", _inside(kernel, span)).get(WIDE, []) for span in kernel.spans(nested=True)}
    found = sorted((s for s in loads if loads[s]), key=lambda s: (-len(loads[s]), s[1] - s[0]))
    if not found:
        raise NoMainPath("no loop with wide loads")
    for span in found:
        elements = WIDE * len(loads[span]) / (math.floor(reads) + optional)
        try:
            way, trips = _loop(kernel, span, loads[span], elements, reads, writes, longest, table)
            break
        except (NoMainPath, ValueError):
            if span == found[-1]:
                raise
    return cost(kernel, way, trips, elements * (reads + writes), elements, len(kernel.shortest([])), 256)


def _inside(kernel, span):
    return [(at, text) for at, text in kernel.code if span[0] <= at <= span[1]]


def _loop(kernel, span, through, elements, reads, writes, longest, table):
    """(way, trips) once through a loop with the wide loads ``through``."""
    code, trips = _inside(kernel, span), {}
    if writes:
        stores, trips = choose(kernel, "STG", code, elements * math.floor(writes))
        through = sorted([*through, *stores])
    through = sorted([*through, *bits(code, "LDG", elements, reads), *bits(code, "STG", elements, writes)])
    if table:
        rows, turns = table_rows(kernel, code, int(elements), table)
        through, trips = sorted([*through, *rows]), {**trips, **turns}
    return kernel.around(*span, [at for at in through if span[0] < at < span[1]], longest), trips


def table_rows(kernel, code, elements, table):
    """(addresses, trips) of the wide loads from shared memory, ``table`` for each element, which has code of its own or
    a turn of a loop."""
    rows = [at for at, text in code if sass.opcode(text) == "LDS" and sass.width(text) == WIDE]
    if len(rows) == elements * table:
        return rows, {}
    loops = {s for s in kernel.spans(nested=True) if code[0][0] < s[0] and all(s[0] <= at <= s[1] for at in rows)}
    if len(rows) != table or not loops:
        raise NoMainPath(f"{table} wide LDS for each of {elements} elements expected, found {len(rows)}")
    return rows, {min(loops, key=lambda s: s[1] - s[0]): elements}


def triton_cost(kernel, constants, reads, writes):
    """The wide path of a Triton kernel, from its start to its end: a program takes its elements all at once."""
    threads = 32 * constants["num_warps"]
    elements, through, trips = constants["BLOCK"] // threads, [], {}
    for op, each in (("STG", writes), ("LDG", reads)):
        if each:  # of the loads those before the first store: the path of the last elements may be as wide
            code = [(at, text) for at, text in kernel.code if not through or at < through[0]]
            places, turns = choose(kernel, op, code, elements * math.floor(each))
            through = sorted([*places, *bits(code, op, elements, each)]) + through
            trips.update(turns)
    way = kernel.shortest(sorted(through))
    return cost(kernel, way, trips, elements * (reads + writes), elements, 0, threads)


def _triton_launch(case, dtype):
    """The first launch of the Triton kernels in blocks of what the case calls: the one over the elements."""
    x = case.inputs(SHAPES, dtype, "cpu")
    family = {name: family for family, names in OPS.items() for name in names}
    case.run(x)
    for op, args in measure.dispatched(lambda: case.run(x)):
        name = op.name().removeprefix("quantops::").partition(".")[0]
        if op.namespace == "quantops":
            function = getattr(importlib.import_module(f"quantops.kernels.{family[name]}"), name)
            launches = [v for v in sass.triton_launches(lambda: function(*args)) if "BLOCK" in v.constants]
            if not launches:
                raise NoMainPath(f"{name} has no kernel of its own")
            return launches[0]
    raise NoMainPath("calls no op of quantops")


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
                if by == "CUDA" and not kernels:
                    continue
                row = {"case": case.name, "dtype": str(dtype).removeprefix("torch."), "by": by}
                try:
                    if not (case.cuda and (case.table or not case.turns) if by == "CUDA" else not case.turns):
                        raise NoMainPath("not counted: its loops turn as often as there are bits, classes or widths")
                    row.update(function(case, dtype, kernels))
                except (NoMainPath, ValueError) as error:
                    row["absent"] = str(error)
                found.append(row)
    return found


def _cuda_row(case, dtype, kernels):
    name, size = case.cuda.replace("T,", TYPES[dtype] + ",").replace("T>", TYPES[dtype] + ">"), dtype.itemsize
    if (str(ARCH), name) not in kernels:
        raise NoMainPath(f"no kernel {name}")
    return {
        "kernel": name,
        **cuda_cost(
            kernels[str(ARCH), name], case.reads(size), case.writes(size), case.longest, case.table, case.optional(size)
        ),
    }


def _triton_row(case, dtype, kernels):
    launch = _triton_launch(case, dtype)
    kernel = sass.triton_kernel(sass.triton_binary(launch, ARCH))
    size = dtype.itemsize
    return {
        "kernel": launch.kernel.__name__,
        **triton_cost(kernel, launch.constants, case.reads(size), case.writes(size)),
    }


PATH = state.RESULTS / "static" / "h100.json"


def load():
    """The table as it was written last, or None."""
    return json.loads(PATH.read_text()) if PATH.exists() else None


def table(result, measured=None):
    """Markdown. ``measured``: {(case, dtype, by): share of a copy}, where an H100 was at hand."""
    head = [
        "op",
        "weights",
        "by",
        "bytes",
        "instructions",
        "setup",
        "registers",
        "spills",
        "occupancy",
        "binds",
        "instructions' time / bytes' time",
        "share of a copy, at most",
        *["measured"] * bool(measured),
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for r in result["rows"]:
        if "absent" in r:
            cells = [r["case"], r["dtype"], r["by"], r["absent"]]
        else:
            cells = [
                r["case"],
                r["dtype"],
                r["by"],
                f"{r['bytes']:.2f}",
                f"{r['instructions']['issue']:.1f}",
                str(r["setup"]),
                str(r["registers"]),
                str(r["spills"]),
                f"{r['occupancy']:.2f}",
                r["binds"],
                f"{r['picoseconds']['issue'] / r['picoseconds']['memory']:.2f}",
                f"{r['share_of_copy']:.2f}",
            ]
            if measured:
                share = measured.get((r["case"], r["dtype"], r["by"]))
                cells.append("" if share is None else f"{share:.2f}")
        lines.append("| " + " | ".join(cells + [""] * (len(head) - len(cells))) + " |")
    return "\n".join(lines)


def heading(result):
    """What was counted, with what."""
    m = result["machine"]
    return (
        f"**Counted, not measured: the machine code for an H100 (sm_{ARCH}), nvcc {m['nvcc']}, triton "
        f"{m['triton']}; commit {m['commit']} of {m['date']}.** Per element: bytes, and instructions of one lane "
        f'on the main path. "Share of a copy, at most": the bytes at {BANDWIDTH / 1e12:.2f} TB/s as a fraction '
        "of the longest time that bytes or instructions need."
    )


def page(result, measured=None):
    """The table and what it is, as Markdown beside the JSON."""
    return f"{heading(result)}\n\n{table(result, measured)}\n"


def summary(result):
    """What binds which kernels, one paragraph."""
    rows = [r for r in result["rows"] if "absent" not in r]
    bound = [
        f"{r['case']} {r['dtype']} ({r['by']}, {r['share_of_copy']:.2f} of a copy at most)"
        for r in rows
        if r["binds"] != "memory"
    ]
    spilled = [f"{r['case']} {r['dtype']} ({r['by']})" for r in rows if r["spills"] or r["stack"]]
    return (
        f"Of {len(rows)} kernels, {len(rows) - len(bound)} are bound by memory"
        + (f"; by instructions: {', '.join(bound)}" if bound else "")
        + (f". Registers are spilled by {', '.join(spilled)}." if spilled else ". None spills registers.")
    )


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
    state.write(path, result)
    path.with_suffix(".md").write_text(page(result))
    print(f"{page(result)}\nwrote {path}")
    return 0


def add_arguments(parser):
    """Options of ``python -m bench static``."""
    parser.add_argument("--out", type=Path, help="the JSON to write")
    parser.set_defaults(call=static)
