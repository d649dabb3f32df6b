"""Measures the cases of the registry: a row per case, workload and dtype."""

import fcntl
import gc
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

import quantops
from bench import machine, measure, store
from bench.ops.calls import call_overhead
from bench.ops.registry import COPY, OURS, Absent, cases, copier
from bench.ops.room import Room, is_large
from bench.ops.shapes import CALL, LISTS, SIZES, shapes_of
from bench.state import Wrong
from quantops import foreach

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NETWORKS = ("resnet20", "resnet50", "mobilenet_v3_large", "deit_small", "transformer_1b")
WORKLOADS = {"cpu": (CALL, "64K", "1M", "16M", "256M", *NETWORKS), "cuda": ("64K", "1M", "16M", "256M", *NETWORKS)}
BUDGET = {"cpu": 0.4, "cuda": 0.25}  # seconds of timing for a row

# torch.compile takes seconds per graph, and a minute or more for a list as one graph: not everything is compiled unless
# asked for. The result says what was left out.
COMPILED = ("16M",)
SOFT = "categorical step, soft gradient, 4 bits"  # with all classes, for which memory ends before 16M
COMPILED_STEPS = {
    "cpu": {(SOFT, "1M", "float32"), *(("msq step", w, "float32") for w in ("64K", "1M", "resnet20", "resnet50"))},
    "cuda": {
        (step, w, "float32")
        for step in ("msq step", "truncate step")
        for w in ("64K", "1M", "256M", "resnet20", "resnet50", "deit_small", "transformer_1b")
    },
}
LARGEST_GRAPH = 1 << 26  # elements; a CUDA graph holds memory of its own, and of larger ones launches are no part


class Plan:
    """What is measured of each row."""

    def __init__(self, args):
        self.device, self.kind = args.device, torch.device(args.device).type
        self.cuda, self.compile_all, self.peers = self.kind == "cuda", args.compile_all, not args.no_peers
        self.budget, self.compile_seconds = args.budget or BUDGET[self.kind], args.compile_seconds
        self.keep_caches = args.keep_caches

    def counts_launches(self, workload, dtype):
        """On a GPU that takes the profiler a second, and the answer is the same for most rows."""
        return not self.cuda or (self.peers and dtype == "float32" and workload in ("16M", *LISTS))

    def left_out(self, peer, case, workload, dtype, tensors):
        """Why a peer is not run, or None."""
        if workload == CALL:
            return "the time of a call alone"
        if tensors > 1 and not peer.lists:
            return "measured on single weights, and in the training steps of lists"
        if tensors == 1 and peer.whole_list and "compiled" in case.peers:
            return "one weight: the same as compiled"
        if peer.compiles and not self.compile_all:
            if workload not in COMPILED and (case.name, workload, dtype) not in COMPILED_STEPS[self.kind]:
                return "not compiled by default, for the time it takes: --compile-all"
        return None


def _peers(case, x, workload, dtype, plan, room):
    """({name: (peer, function)}, {name: why it is not there}, {name: seconds of its first calls})."""
    found, absent, compiled = {}, {}, {}
    for name, peer in case.peers.items() if plan.peers else ():
        why = plan.left_out(peer, case, workload, dtype, x.tensors)
        if why:
            absent[name] = why
            continue
        try:
            if room:
                room.take(peer)
            if peer.compiles:
                function, compiled[name] = _first_calls(peer, x, plan)
            else:
                function = peer.make(x)
                function()
            found[name] = peer, function
        except Absent as error:
            absent[name] = str(error)
        except torch.OutOfMemoryError:
            absent[name] = "out of memory"
    return found, absent, compiled


def _first_calls(peer, x, plan):
    """A compiling peer, and the seconds of its first call; in training also of those after two changes of the bits."""
    measure.warm_compiler(plan.device)
    torch._dynamo.reset()
    try:
        with measure.time_box(plan.compile_seconds), measure.empty_compile_cache(plan.keep_caches):
            function = peer.make(x)
            seconds = {"first_call": measure.seconds_of(function, plan.device)}
            if peer.forward:
                seconds["change_of_bits"] = measure.seconds_of(lambda: function(x.n - 1), plan.device)
                seconds["second_change"] = measure.seconds_of(lambda: function(x.n - 2), plan.device)
    except measure.TookTooLong:
        torch._dynamo.reset()
        raise Absent(f"first call and a change of bits took more than {plan.compile_seconds} s") from None
    return function, seconds


def measure_one(case, workload, dtype, plan):
    """One row of the result: times, bytes and ratios of a case on a workload. Refuses to time a wrong result; Absent
    where the memory of a CPU machine does not hold it."""
    device, shapes = plan.device, shapes_of(workload)
    room = Room(case, shapes, DTYPES[dtype]) if not plan.cuda and is_large(shapes) else None
    if plan.cuda:
        gc.collect()
        torch.cuda.empty_cache()
    x = case.inputs(shapes, DTYPES[dtype], device)
    with measure.empty_compile_cache(plan.keep_caches):  # Triton's kernels compile at their first call
        first = measure.seconds_of(lambda: case.run(x), device)
    del x  # as large as what follows
    x = case.inputs(shapes, DTYPES[dtype], device)
    if not case.check(case.run(x), x):
        raise Wrong(f"bench: {case.name} on {workload} {dtype} differs from the reference; it is not timed")
    measure.check_served(lambda: case.run(x), device)
    peers, absent, compiled = _peers(case, x, workload, dtype, plan, room)

    moved = case.bytes(DTYPES[dtype].itemsize)
    copy, factor = copier(x, moved, scaled=is_large(shapes))
    functions = {OURS: lambda: case.run(x), COPY: copy, **{name: function for name, (_, function) in peers.items()}}
    captured = [OURS, COPY]
    if plan.cuda:
        graphs = [*captured, *(name for name, (peer, _) in peers.items() if peer.graph)]
        captured = graphs if x.numel <= LARGEST_GRAPH else []
    times = measure.timings(functions, device, moved * x.numel, plan.budget, captured)
    times = {r: of for r, of in times.items() if OURS in of and COPY in of}  # without those that no CUDA graph held
    headline = next(r for r in measure.HEADLINE[torch.device(device).type] if r in times)

    row = {
        "case": case.name,
        "family": case.family,
        "workload": workload,
        "dtype": dtype,
        "numel": x.numel,
        "tensors": x.tensors,
        "trains": case.forward is not None,
        "keeps": case.keeps(DTYPES[dtype].itemsize),
        "bytes_per_weight": moved,
        "headline": headline,
        "copy_factor": factor,
        "times": {regime: {name: measure.summary(t) for name, t in of.items()} for regime, of in times.items()},
        "share_of_copy": {r: factor * measure.ratio(of[COPY], of[OURS]) for r, of in times.items()},
        "ratio": {name: _ratio(times, headline, name) for name in peers},
        "gigabytes_per_second": {
            r: moved * x.numel / measure.summary(of[OURS])["median"] / 1e9 for r, of in times.items()
        },
        "peak_bytes": {name: measure.peak_bytes(f, device) for name, f in functions.items() if name != COPY},
        "launches": {
            name: measure.launches(f, device)
            for name, f in functions.items()
            if plan.counts_launches(workload, dtype) and (plan.cuda or name not in compiled)
        },
        "first_calls": {OURS: {"first_call": first}, **compiled},
        "absent": absent,
        "notes": {name: peer.note for name, (peer, _) in peers.items() if peer.note},
    }
    if case.forward:
        forwards = {
            OURS: case.forward,
            **{name: peer.forward for name, (peer, _) in peers.items() if peer.forward and not peer.compiles},
        }
        row["saved_bytes"] = {name: measure.saved_bytes(*forward(x)) for name, forward in forwards.items()}
    return row


def _ratio(times, headline, name):
    """A peer's time over ours, in the headline's regime or, where no CUDA graph holds it, of eager calls."""
    regime = headline if name in times[headline] else "cold"
    return measure.ratio(times[regime][name], times[regime][OURS])


def gain_of_threads():
    """How many times as fast as one thread all of them are where memory has no part: threads that share a core share
    its arithmetic. By lsb_stats of weights that lie in each core's caches."""
    from bench.ops.uniform import Inputs

    threads, shapes = torch.get_num_threads(), [(256, 256)] * 4
    one, every = (Inputs(shapes * n, torch.bfloat16, "cpu") for n in (1, threads))

    def seconds(x, n):
        torch.set_num_threads(n)
        foreach.lsb_stats(x.w, x.scale, x.bits, x.k)
        start = time.perf_counter()
        for _ in range(10):
            foreach.lsb_stats(x.w, x.scale, x.bits, x.k)
        return time.perf_counter() - start

    try:
        times = measure.interleave({1: lambda: seconds(one, 1), "all": lambda: seconds(every, threads)}, 1.0)
    finally:
        torch.set_num_threads(threads)
    return threads * measure.ratio(times[1], times["all"])


def line(row):
    """A row as text: time, share of a copy, and each peer as a multiple of our time."""
    headline = row["headline"]
    others = "".join(f"   {name} {v:.1f}x" for name, v in row["ratio"].items())
    saved = row.get("saved_bytes")
    kept = f"   keeps {saved[OURS] / row['numel']:.2f} B/weight" if saved else ""
    ours = 1e3 * row["times"][headline][OURS]["median"]
    return (
        f"{row['case']:26} {row['workload']:19} {row['dtype']:9} {ours:9.3f} ms  "
        f"{row['gigabytes_per_second'][headline]:7.1f} GB/s  {row['share_of_copy'][headline]:5.2f} of a copy"
        f"{others}{kept}"
    )


def noisy(rows):
    """Rows whose slowest tenth took twice the fastest tenth, or more: something else was running."""
    return [r for r in rows if r["times"][r["headline"]][OURS]["p90"] > 2 * r["times"][r["headline"]][OURS]["p10"]]


def run(args):
    """Measures every op and writes ops-<implementation>.json in the folder of the device."""
    store.prepare(args)
    cuda = torch.device(args.device).type == "cuda"
    if args.backends is None and cuda and not os.environ.get("QUANTOPS_BACKEND"):
        args.backends = "cuda,triton"
    if args.backends:
        if args.out:
            raise SystemExit("bench: --out is for one backend: set QUANTOPS_BACKEND")
        return _each_backend(args)
    plan, result = Plan(args), store.Result("ops", args)
    head = result.data["machine"]
    print(quantops.info(), f"\n{head['device']}, commit {head['commit']}")
    lock = args.lock and args.lock.open("w")
    if lock:  # held until this returns
        fcntl.flock(lock, fcntl.LOCK_EX)
    if "call_microseconds" not in result.data and not args.no_calls:
        result.data["call_microseconds"] = call_overhead(args.device)
        if not plan.cuda:
            result.data["gain_of_threads"] = gain_of_threads()
    left_out = result.data.setdefault("left_out", [])
    done = {(r["case"], r["workload"], r["dtype"]) for r in [*result.rows, *left_out]}
    workloads = args.workloads.split(",") if args.workloads else WORKLOADS[plan.kind]
    wanted = _wanted(args.cases)
    rows = [
        (case, workload, dtype)
        for workload in workloads
        for dtype in args.dtypes.split(",")
        for case in cases()
        if case.name in wanted and DTYPES[dtype] in case.dtypes and (case.name, workload, dtype) not in done
    ]
    apart = (
        set()
        if plan.cuda or args.allocator_as_is or not machine.has_thread_caches()
        else {w for w in workloads if is_large(shapes_of(w))}
    )
    for case, workload, dtype in rows:
        if workload in apart:
            continue
        if result.time_is_up():
            return store.UNFINISHED
        try:
            result.add(measure_one(case, workload, dtype, plan))
            print(line(result.rows[-1]), flush=True)
        except Absent as why:
            left_out.append({"case": case.name, "workload": workload, "dtype": dtype, "why": str(why)})
            result.write()
            print(f"{case.name:26} {workload:19} {dtype:9} {why}", flush=True)
    result.write()
    for case, workload, dtype in rows:
        if workload in apart:
            status = _apart(args, case.name, workload, dtype, result.end)
            if status:
                return status
    if apart:
        return 0  # each of them has told what follows
    for name, why in sorted({(n, w) for r in result.rows for n, w in r["absent"].items()}):
        print(f"absent: {name}: {why}")
    print(f"wrote {result.path}")
    if noisy(result.rows):
        print(f"{len(noisy(result.rows))} of {len(result.rows)} rows are noisy: something else ran on this machine")
    return 0


def _wanted(names):
    """The names of the cases to run, of a list with commas (a name may have one, with a space after it)."""
    every = [case.name for case in cases()]
    wanted = re.split(",(?! )", names) if names else every
    unknown = sorted(set(wanted) - set(every))
    if unknown:
        raise SystemExit(f"bench: expected cases of {'; '.join(every)}, got {'; '.join(unknown)}")
    return wanted


def _apart(args, case, workload, dtype, end):
    """Goes on with a large row in a process of its own, without thread caches and what peers before it have kept; gives
    its exit status."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "bench",
            *args.argv,
            "--cases",
            case,
            "--workloads",
            workload,
            "--dtypes",
            dtype,
            "--resume",
            "--seconds",
            str(max(end - time.monotonic(), 1)),
        ],
        env={**os.environ, **machine.WITHOUT_THREAD_CACHES},
    ).returncode


def _each_backend(args):
    """A process per backend, since one is chosen at import; the peers are measured beside the first."""
    end, worst = time.monotonic() + args.seconds, 0
    for i, backend in enumerate(args.backends.split(",")):
        command = [
            sys.executable,
            "-m",
            "bench",
            *args.argv,
            "--backends",
            "",
            "--seconds",
            str(max(end - time.monotonic(), 1)),
            *["--no-peers"] * (i > 0),
        ]
        print(f"QUANTOPS_BACKEND={backend}", flush=True)
        status = subprocess.run(command, env={**os.environ, "QUANTOPS_BACKEND": backend}).returncode
        if status == store.UNFINISHED:
            return status
        worst = max(worst, status)
    return worst


def add_arguments(parser):
    """Options of ``python -m bench run``."""
    store.add_arguments(parser)
    parser.add_argument("--workloads", help=f"of {', '.join(SIZES)} and {', '.join(LISTS)}; default: by device")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--cases", help="with commas; default: all")
    parser.add_argument("--budget", type=float, help="seconds of timing for a row; default: by device")
    parser.add_argument("--backends", help="on a GPU: default cuda,triton, one process each")
    parser.add_argument("--no-peers", action="store_true", help="time quantops and the copy alone")
    parser.add_argument("--no-calls", action="store_true", help="do not time what an eager call costs on the host")
    parser.add_argument("--lock", type=Path, help="a file: of processes that name the same, one measures at a time")
    parser.add_argument("--compile-all", action="store_true", help="compile what is left out for its time")
    parser.set_defaults(call=run)
