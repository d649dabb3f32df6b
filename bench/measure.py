"""How time, memory and launches are measured. Functions are timed against each other, in turn and in random order, so
that what disturbs the machine disturbs all of them alike; ratios are taken round by round.

Regimes. On CPU: "warm", called again right after an untimed call (large tensors do not fit the caches, with or without
it), and "cold", after an array twice the size of the last cache has been written. On a GPU, all after the L2 cache has
been written over: "cold", events around an eager call, and "kernel", events around the replay of a CUDA graph of the
call, which leaves Python and launches out; and not: "kernel warm", graph replays of many calls in a row, and "wall", an
eager call on the host's clock until the device is done.
"""

import contextlib
import functools
import itertools
import random
import signal
import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bench.machine import last_level_cache

HEADLINE = {"cpu": ("warm",), "cuda": ("kernel", "cold")}  # the regime of ratios and tables: the first one there is
GRAPH_CALLS = 20
COMPOSED = {"quantops::own_scale"}  # ops whose default kernel is a call of others, absmax or absmean


def interleave(calls, budget, least=5, most=300, seed=0):
    """{name: seconds, one per round}. ``calls``: {name: function that gives the seconds of one call}."""
    for call in calls.values():
        call()
    order, shuffled = random.Random(seed), list(calls)
    times, begin = {name: [] for name in calls}, time.perf_counter()
    for done in range(most):
        spent = time.perf_counter() - begin
        if (done >= least and spent > budget) or (done >= 3 and spent > 3 * budget):
            break
        order.shuffle(shuffled)
        for name in shuffled:
            times[name].append(calls[name]())
    return times


def _cpu_calls(functions, bytes_moved, cold_too):
    flush = torch.zeros(2 * last_level_cache() // 4)
    small = bytes_moved < 2 * last_level_cache()  # else there is nothing to warm

    def seconds(fn):
        start = time.perf_counter()
        fn()
        return time.perf_counter() - start

    def warm(fn):
        if small:
            fn()
        return seconds(fn)

    def cold(fn):
        flush.add_(1)
        return seconds(fn)

    calls = {"warm": {name: (lambda fn=fn: warm(fn)) for name, fn in functions.items()}}
    calls["cold"] = {name: (lambda fn=functions[name]: cold(fn)) for name in cold_too}
    return calls


def _cuda_calls(functions, captured):
    flush = torch.empty(
        max(4 * torch.cuda.get_device_properties(0).L2_cache_size, 1 << 28), dtype=torch.int8, device="cuda"
    )

    def events(fn, clear):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if clear:
            flush.zero_()
        start.record()
        fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def wall(fn):
        torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    calls = {
        "cold": {n: (lambda fn=fn: events(fn, True)) for n, fn in functions.items()},
        "wall": {n: (lambda fn=fn: wall(fn)) for n, fn in functions.items()},
        "kernel": {},
        "kernel warm": {},
    }
    for name in captured:
        try:
            once, many = _graph(functions[name], 1), _graph(functions[name], GRAPH_CALLS)
        except RuntimeError as error:  # what torch.compile made of a peer may read numbers from the host
            print(f"no CUDA graph of {name}: {str(error).splitlines()[0]}")
            torch.cuda.synchronize()
            continue
        calls["kernel"][name] = lambda g=once: events(g.replay, True)
        calls["kernel warm"][name] = lambda g=many: events(g.replay, False) / GRAPH_CALLS
    return {regime: of for regime, of in calls.items() if of}


def _graph(fn, count):
    stream = torch.cuda.Stream()  # what a first call on another stream allocates is not for the graph
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            fn()
    return graph


def timings(functions, device, bytes_moved, budget, captured):
    """{regime: {name: seconds, one per round}}.

    ``captured``: the functions that CUDA graphs can hold; on CPU those that are measured with cold caches too.
    """
    cuda = torch.device(device).type == "cuda"
    regimes = _cuda_calls(functions, captured) if cuda else _cpu_calls(functions, bytes_moved, captured)
    shares = {regime: 1 + 2 * (regime in HEADLINE[torch.device(device).type]) for regime in regimes}
    return {
        regime: interleave(calls, budget * shares[regime] / sum(shares.values())) for regime, calls in regimes.items()
    }


def summary(times):
    """Median and the 10th and 90th percentile, in seconds."""
    times = sorted(times)
    return {
        "median": statistics.median(times),
        "p10": times[len(times) // 10],
        "p90": times[-1 - len(times) // 10],
        "rounds": len(times),
    }


def ratio(numerator, denominator):
    """Median of the ratios of each round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


# Memory and launches.


def saved_bytes(fn, parameters):
    """Bytes that autograd keeps between ``fn`` (a forward pass) and its backward pass, beyond ``parameters``."""
    known, seen = {t.untyped_storage().data_ptr() for t in parameters}, {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = fn()
    total = sum(seen.values())
    del out
    return total


def peak_bytes(fn, device):
    """Most bytes that one call has allocated at once, its results among them."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _, kept, beyond = allocated(fn)
    return kept + beyond


def allocated(fn):
    """(what ``fn`` returns, bytes of CPU memory that it leaves allocated, most that it had allocated beyond these)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = fn()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return result, now, most - now


class _Dispatches(TorchDispatchMode):
    """Calls ``seen(op, arguments)`` for the ops that reach a device's kernels."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen(op, args)
        return op(*args, **(kwargs or {}))


def dispatched(fn):
    """[(op, arguments)] of all calls that ``fn`` makes. (torch.compile runs its function uncompiled under it.)"""
    calls = []
    with _Dispatches(lambda *call: calls.append(call)):
        fn()
    return calls


def launches(fn, device):
    """On a GPU: kernels, copies and fills that one call puts on it. On CPU: dispatches of ops."""
    if torch.device(device).type == "cpu":
        count = itertools.count()
        with _Dispatches(lambda *_: next(count)):  # holds no arguments: all that a chain allocates would stay
            fn()
        return next(count)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        fn()
        torch.cuda.synchronize()
    return sum(e.device_type() == torch.autograd.DeviceType.CUDA for e in profiled.profiler.kineto_results.events())


def check_served(fn, device):
    """SystemExit where an op of quantops that ``fn`` calls has no kernel of its own on ``device``: its default one, the
    reference, would be timed."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[torch.device(device).type]
    ours = {op.name() for op, _ in dispatched(fn) if op.namespace == "quantops"}
    if not ours:
        raise SystemExit("bench: the case calls no op of quantops")
    for name in sorted(ours - COMPOSED):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, key):
            raise SystemExit(f"bench: {name} has no {key} kernel, so that the reference serves it; it is not timed")


# Compilation.


class TookTooLong(BaseException):
    """What runs in a time box did not end in time. No Exception, which a compiler might catch and carry on."""


@contextlib.contextmanager
def time_box(seconds):
    """Interrupts the main thread after ``seconds``."""
    fired = []

    def stop(signum, frame):
        fired.append(signum)
        raise TookTooLong

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except BaseException as error:
        if fired and not isinstance(error, TookTooLong):
            raise TookTooLong from error  # what was interrupted has made another error of it
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextlib.contextmanager
def empty_compile_cache(keep=False):
    """torch.compile and Triton find nothing that was compiled before, unless ``keep``; and a list of many shapes stays
    compiled."""
    cache = contextlib.nullcontext()
    if not keep:
        from torch._inductor import utils  # takes seconds

        cache = utils.fresh_cache()
    with cache, torch._dynamo.config.patch(recompile_limit=256):
        yield


@functools.cache
def warm_compiler(device):
    """What the first compilation of a process costs once (imports, worker processes) is no peer's. Once a process."""
    torch.compile(lambda t: t + 1)(torch.ones(4, device=device))
    torch._dynamo.reset()


def seconds_of(fn, device):
    """Seconds of one call, to its end on the device."""
    start = time.perf_counter()
    fn()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
