"""The same calls on every device at hand: a GPU gives what the CPU gives, bit for bit, with each of its backends."""

import os
import subprocess
import sys

import pytest
import torch

import devices
import quantops as Q
from cases import EXHAUSTIVE
from devices import DTYPES, EXACT, FAMILIES, SUMS, compare, results
from quantops.reference.uniform import INVALID

BACKENDS = ("cuda", "triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def test_the_comparison_itself():
    got, want = (results("cpu", "msq", torch.float32) for _ in range(2))
    compare(got, want)
    next(t for t in got[EXACT, "q torch.float32 per_row=False dyadic"] if t.numel()).view(-1)[0] += 1
    with pytest.raises(AssertionError):
        compare(got, want)


@pytest.mark.skipif(not EXHAUSTIVE, reason="minutes in Triton's interpreter")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_calls_twice_give_the_same(family):
    """All that the tests of a GPU call, on the CPU: that they run, and that their results are deterministic."""
    got, want = (results("cpu", family, torch.bfloat16) for _ in range(2))
    assert len(got) > 4 and {kind for kind, _ in got} <= {EXACT, SUMS}
    compare(got, want)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gpu_equals_cpu(backend, family, dtype):
    run = subprocess.run(
        [sys.executable, devices.__file__, "cuda", family, str(dtype).removeprefix("torch.")],
        capture_output=True,
        text=True,
        env={**os.environ, "QUANTOPS_BACKEND": backend},
    )
    assert run.returncode == 0, run.stderr[-3000:]


@needs_gpu
def test_values_out_of_range_give_nan_on_a_gpu():
    w = torch.randn(5, 3, device="cuda")
    bits, k, good = (torch.tensor(v, device="cuda") for v in (17, 4, 1.0))
    for q, penalty, nonzero, sq_error in (Q.msq(w, good, bits, 0), Q.msq(w, -good, 4), Q.msq(w, good, k, k)):
        assert q.isnan().all() and penalty.isnan() and sq_error.isnan() and nonzero == -1
    assert (Q.encode(w, good, bits) == INVALID).all()


@needs_gpu
def test_widths_out_of_range_give_nan_for_that_output_on_a_gpu():
    w = torch.randn(5, 3, device="cuda")
    good, bad = Q.truncate(w, 2.0, torch.tensor([4, 9], device="cuda"))
    assert torch.equal(good, Q.truncate(w, 2.0, 4)) and bad.isnan().all()
    assert Q.truncate(w, 2.0, 4, base_bits=torch.tensor(17, device="cuda")).isnan().all()
    assert Q.truncate(w, 2.0, 4, out_scale=torch.tensor(-1.0, device="cuda")).isnan().all()


@needs_gpu
def test_categorical_values_out_of_range_give_nan_on_a_gpu():
    x, one = torch.randn(5, 3, device="cuda"), torch.ones(1, device="cuda")
    for alpha, sigma, bits, gates in (
        (-one, one, 3, None),
        (one, one * 0, 3, None),
        (one, one * torch.nan, 3, None),
        (one, one, torch.tensor(17, device="cuda"), None),
        (one, one, 2, torch.tensor([1.0, 1.5], device="cuda")),
    ):
        for mode in ("hard", "soft", "sample"):
            q = Q.categorical(x, alpha, sigma, bits, gates=gates, mode=mode, seed=1)
            assert q.isnan().all(), (alpha, sigma, bits, gates, mode)
    assert Q.categorical(x, one, one, torch.tensor(9, device="cuda"), mode="soft").isnan().all()


@needs_gpu
def test_activations_out_of_range_give_nan_and_are_captured():
    x, (one, bits) = torch.randn(1000, 7, device="cuda"), (torch.tensor(v, device="cuda") for v in ([1.0], [3]))
    bits = bits.to(torch.int32)
    forward, backward = torch.ops.quantops.categorical_activation, torch.ops.quantops.categorical_activation_backward

    def call(alpha, sigma, n):
        q, quarters = forward(x, alpha, sigma, n, 1, x.dtype)
        grad_x, sums = backward(x, q, quarters, alpha, sigma, n, 1, True, x.dtype)
        return q, grad_x, *sums

    for bad in ((-one, one, bits), (one, one * 0, bits), (one, one * torch.nan, bits), (one, one, bits + 6)):
        assert all(t.isnan().all() for t in call(*bad))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(one, one, bits)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(one, one, bits)
    for n in (3, 8, 1):
        bits.fill_(n)  # precision is data: the graph stays
        x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, call(one, one, bits)))


@needs_gpu
def test_categorical_is_captured():
    x, seed = torch.randn(1000, 7, device="cuda"), torch.tensor([1], device="cuda")
    alpha, sigma, gates = (torch.tensor(v, device="cuda") for v in ([0.5], [0.2], [1.0, 0.8, 0.9]))

    def call(mode):
        return Q.categorical(x, alpha, sigma, 3, gates=gates, mode=mode, seed=seed if mode == "sample" else None)

    for mode in ("hard", "soft", "sample"):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call(mode)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(mode)
        for _ in range(2):
            x.normal_()
            seed.add_(1)  # draws change with the data that the seed is
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(captured, call(mode))


@needs_gpu
def test_truncation_to_fixed_widths_is_captured():
    w = [torch.randn(1000, 7, device="cuda"), torch.randn(33, device="cuda")]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            Q.foreach.truncate(w, None, (8, 4, 1))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = Q.foreach.truncate(w, None, (8, 4, 1))
    for _ in range(2):
        w[0].normal_()
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(captured, Q.foreach.truncate([t.cpu() for t in w], None, (8, 4, 1))):
            assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want))


@needs_gpu
def test_packing_what_is_out_of_range_on_a_gpu():
    codes = torch.tensor([-1, 16, 5, INVALID], dtype=torch.int32, device="cuda")
    for layout in ("planes", "dense"):
        packed = Q.pack(codes, 4, layout=layout)
        assert Q.unpack(packed).tolist() == [15, 0, 5, 0]  # the low bits
        too_many = torch.tensor(5, device="cuda")
        assert (Q.unpack(packed, too_many) == INVALID).all() and Q.decode(packed, 1.0, too_many).isnan().all()
    with pytest.raises(ValueError, match=r"codes: .*2\^4 - 1, got -2147483648\.\.16"):
        Q.IntWeight.from_codes(codes, torch.ones((), device="cuda"), 4)


@needs_gpu
def test_graph_capture_and_streams():
    w = [torch.randn(1000, 7, device="cuda"), torch.randn(33, device="cuda")]
    bits = torch.tensor([8, 8], dtype=torch.int32, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            Q.foreach.msq(w, None, bits, 1)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = Q.foreach.msq(w, None, bits, 1)
    for n in (8, 3):
        bits.fill_(n)  # precision is data: the graph stays
        w[0].normal_()
        graph.replay()
        torch.cuda.synchronize()
        fresh = Q.foreach.msq([t.cpu() for t in w], None, bits.cpu(), 1)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(captured.q, fresh.q))
        assert torch.equal(captured.nonzero.cpu(), fresh.nonzero)
