"""Times functions against each other: interleaved, so that what disturbs the machine disturbs all of them alike."""

import statistics
import time

import torch


class Clock:
    """Seconds of one call: wall time on CPU, events on a GPU, there after the L2 cache has been overwritten."""

    def __init__(self, device):
        self.cuda = torch.device(device).type == "cuda"
        if self.cuda:
            self.flush = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8,
                                     device=device)

    def __call__(self, fn):
        if not self.cuda:
            start = time.perf_counter()
            fn()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def compare(functions, device, budget=1.5, least=9, most=400):
    """{name: times}: each function is called in turn until ``budget`` seconds are spent on the fastest of them."""
    clock = Clock(device)
    for fn in functions.values():  # warm: caches, allocator, compilation
        fn()
        fn()
    fastest = min(clock(fn) for fn in functions.values())
    rounds = max(least, min(most, int(budget / max(fastest, 1e-6) / len(functions))))
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, fn in functions.items():
            times[name].append(clock(fn))
    return times


def summary(times):
    """Median and the 10th and 90th percentile, in seconds."""
    times = sorted(times)
    return {"median": statistics.median(times), "p10": times[len(times) // 10], "p90": times[-1 - len(times) // 10],
            "calls": len(times)}


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
