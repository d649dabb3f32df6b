"""The registry under pytest-benchmark: ``pytest bench --benchmark-only``; options in conftest.py."""

import pytest
import torch

from bench import machine, measure
from bench.ops.registry import COPY, OURS, Absent, copier
from bench.ops.room import is_large
from bench.ops.run import DTYPES
from bench.ops.shapes import shapes_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.benchmark(max_time=0.2, min_rounds=5, warmup=False)
def test_case(benchmark, case, workload, dtype, function):
    machine.serving(DEVICE)
    machine.keep_memory()
    x = case.inputs(shapes_of(workload), DTYPES[dtype], DEVICE)
    if x.tensors > 1 and function in case.peers and not case.peers[function].lists:
        pytest.skip("measured on single weights")
    moved = case.bytes(DTYPES[dtype].itemsize)
    if function == OURS:
        assert case.check(case.run(x), x), "differs from the reference: not timed"
        measure.check_served(lambda: case.run(x), DEVICE)
        call = lambda: case.run(x)  # noqa: E731
    elif function == COPY:
        call, factor = copier(x, moved, scaled=is_large(shapes_of(workload)))
        benchmark.extra_info["bytes_of_the_op / bytes_copied"] = factor
    else:
        try:
            call = case.peers[function].make(x)
        except Absent as error:
            pytest.skip(str(error))
    benchmark.group = f"{case.name}, {workload} {dtype}"
    benchmark.extra_info.update(numel=x.numel, bytes=moved * x.numel, **machine.describe(DEVICE))
    benchmark(lambda: measure.seconds_of(call, DEVICE))
