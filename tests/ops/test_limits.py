"""What only large, long or odd inputs and CUDA graphs reach: on a GPU as large as it takes, elsewhere in small.

Each test runs on the CPU, whatever serves it (C++, the Triton kernels interpreted), and on a GPU where there is one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quantops as Q
from cases import EXHAUSTIVE
from graphs import captured
from quantops.checks import integral

ROOT = Path(__file__).resolve().parents[2]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
BACKENDS = ("cuda", "triton")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request):
    return request.param


def _equal(got, want):
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want)):
        assert torch.equal(a.cpu(), b.cpu()), i


# CUDA graphs.


def test_lists_of_bits_in_a_graph(device, monkeypatch):
    """Two lists in one graph: the temporary of a copy of the first one would be that of the second at a replay."""
    w = [torch.randn(50, 7, device=device), torch.randn(33, device=device), torch.randn(9, device=device)]
    first, second, base = [8, 2, 2], [3, 3, 5], [8, 9, 7]

    def call():
        a, b = (Q.foreach.round_clamp(w, None, n) for n in (first, second))
        return [*a, *b, *Q.foreach.truncate(w, None, 4, base_bits=base)]

    graph, results = captured(call, w, monkeypatch)
    for _ in range(2):
        for t in w:
            t.normal_()
        graph.replay()
        _equal(results, call())


def test_a_copy_from_the_host_in_a_graph_is_seen(monkeypatch):
    """That the emulation would find it."""
    w = [torch.randn(33), torch.randn(9)]

    def call():
        monkeypatch.setattr(integral, "capturing", lambda device: False)
        return Q.foreach.round_clamp(w, None, [8, 2])

    graph, results = captured(call, w, monkeypatch)
    want = call()
    graph.replay()
    assert not torch.equal(results[0], want[0])


@pytest.mark.skipif(not EXHAUSTIVE, reason="Triton's host side without its interpreter")
def test_a_first_call_of_triton_inside_a_capture_is_refused(monkeypatch):
    """Before anything is allocated or loaded, which would spoil the capture; and so is a kernel's first call."""
    table = pytest.importorskip("quantops.kernels.table", reason="Triton is not installed: pip install triton")
    from quantops.kernels.launch import launch

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(table, "_arenas", [])
    with pytest.raises(RuntimeError, match="call the same ops once before the capture"):
        table.on_device(torch.zeros(3).numpy(), torch.device("cuda"))

    class Kernel:
        __name__ = "flat"

        def __getitem__(self, grid):
            def run(*args, **options):
                raise RuntimeError(args[0])

            return run

    with pytest.raises(RuntimeError, match="flat: .*call the same ops once before the capture"):
        launch(Kernel(), 1, "Triton Error [CUDA]: operation not permitted when stream is capturing")
    with pytest.raises(RuntimeError, match="^out of memory$"):
        launch(Kernel(), 1, "out of memory")


FIRST_CALL = """
import torch, quantops
w = [torch.randn(1000, 7, device="cuda"), torch.randn(33, device="cuda")]
bits = torch.tensor([8, 3], dtype=torch.int32, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    q = quantops.foreach.msq(w, None, bits, 1).q
w[0].normal_()
graph.replay()
want = quantops.foreach.msq([t.cpu() for t in w], None, bits.cpu(), 1).q
assert all(torch.equal(a.cpu(), b) for a, b in zip(q, want)), "differs"
"""


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_call_of_a_process_inside_a_capture(backend):
    """The CUDA kernels need no preparation; Triton's say what they need."""
    run = subprocess.run(
        [sys.executable, "-c", FIRST_CALL],
        env={**os.environ, "QUANTOPS_BACKEND": backend},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if backend == "cuda":
        assert run.returncode == 0, run.stderr[-3000:]
    else:
        assert run.returncode and "call the same ops once before the capture" in run.stderr, run.stderr[-3000:]


# Addresses and lengths.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_views_at_any_address(device, dtype):
    """Views that begin and end anywhere, read and written; what lies beside them stays as it was."""
    size = 6000 if EXHAUSTIVE else 1100
    for at, at_q in ((0, 1), (1, 0), (3, 3), (5, 2)):
        memory = [torch.randn(size + 16).to(device, dtype) for _ in range(3)]
        w, g, q = (m[a : a + size] for m, a in zip(memory, (at, at_q, at_q)))
        beside = memory[2].clone()
        scale = Q.absmax(w)
        Q.foreach.round_clamp([w], [scale], 5, out=[q])
        want = Q.reference.round_clamp(w.cpu(), scale.cpu(), 5)
        _equal([q, scale], [want, Q.reference.absmax(w.cpu())])
        _equal([memory[2][:at_q], memory[2][at_q + size :]], [beside[:at_q], beside[at_q + size :]])
        beside = memory[1].clone()
        want = Q.reference.add_lsb_grad(g.cpu(), torch.tensor(0.5, dtype=scale.dtype), w.cpu(), scale.cpu(), 5, 2)
        Q.foreach.add_lsb_grad_([g], [w], [scale], 5, 2, 0.5)
        _equal([g], [want])
        _equal([memory[1][:at_q], memory[1][at_q + size :]], [beside[:at_q], beside[at_q + size :]])
        codes = Q.encode(w, scale, 5)
        for layout in ("planes", "dense"):
            _equal([Q.unpack(Q.pack(codes[at:], 5, layout=layout))], [codes[at:]])
        _equal(
            [Q.categorical(w, scale.reshape(1) / 4, scale.reshape(1) / 9, 3)],
            [Q.reference.categorical(w.cpu(), scale.cpu() / 4, scale.cpu() / 9, 3)],
        )


@pytest.mark.parametrize(
    "count",
    [70, pytest.param(1203, marks=pytest.mark.skipif(not EXHAUSTIVE, reason="minutes in Triton's interpreter"))],
)
def test_lists_longer_than_a_table(device, count):
    """More tensors than one launch's table holds (60, and 500), empty ones among them, first and last too."""
    w = [torch.randn((i * 37) % 90 if 0 < i < count - 1 and i % 7 else 0) for i in range(count)]
    s = [t.abs().amax() if t.numel() else torch.tensor(1.0) for t in w]
    on = [[t.to(device) for t in v] for v in (w, s)]
    n = torch.arange(count, dtype=torch.int32) % 16 + 1
    bits = n.to(device)
    q, penalty, nonzero, _ = Q.foreach.msq(*on, bits, bits * 0)
    _equal(Q.foreach.absmax(on[0]), [Q.reference.absmax(t) for t in w])
    _equal(q, [Q.reference.round_clamp(t, *rest) for t, *rest in zip(w, s, n)])
    assert not penalty.any() and not nonzero.any()  # no LSBs are looked at
    codes = Q.foreach.encode(*on, bits)
    _equal(codes, [Q.reference.encode(t, *rest) for t, *rest in zip(w, s, n)])
    _equal(Q.foreach.unpack(Q.foreach.pack(codes, n.tolist())), codes)
    _equal(
        Q.foreach.truncate(*on, 1, base_bits=bits),
        [Q.reference.truncate(t, a, 1, base_bits=int(b)) for t, a, b in zip(w, s, n)],
    )


ROWS, LONG = 5, (1 << 29) + 24  # more than 2^31 elements, in rows of fewer
NEEDS = 48 << 30  # bytes of free memory


@needs_gpu
def test_more_elements_than_int32_counts():
    """A tensor of 2^31 elements and more is as its rows are, each in a call of its own, and its last elements as on the
    CPU: whatever counts or addresses elements by 32 bits is wrong in the last row."""
    if torch.cuda.mem_get_info()[0] < NEEDS:
        pytest.skip(f"needs {NEEDS >> 30} GiB of free GPU memory")
    w = torch.empty(ROWS, LONG, dtype=torch.bfloat16, device="cuda").normal_()
    rows = [w[i].view(1, LONG) for i in range(ROWS)]
    assert w.numel() > 2**31
    for per_row in (True, False):
        s = Q.absmax(w, per_row=per_row)
        largest = torch.stack([t.abs().amax().float() for t in rows])
        assert torch.equal(s.reshape(-1), largest if per_row else largest.amax().view(1))
        scale = list(s.split(1)) if per_row else [s] * ROWS
        q, penalty, nonzero, sq_error = Q.msq(w, s, 4, 1)
        parts = [Q.msq(t, v, 4, 1) for t, v in zip(rows, scale)]
        assert all(torch.equal(q[i : i + 1], part.q) for i, part in enumerate(parts))
        assert nonzero == sum(part.nonzero for part in parts) > 0
        for got, name in ((penalty, "penalty"), (sq_error, "sq_error")):
            want = sum(getattr(part, name).double() for part in parts)
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
        assert torch.equal(q[-1, -99:].cpu(), Q.reference.round_clamp(w[-1, -99:].cpu(), scale[-1].cpu(), 4))
        del parts
        grad, r = torch.empty_like(w).normal_(), torch.full((1,), 0.5, device="cuda")
        n, k = (torch.full((1,), v, dtype=torch.int32, device="cuda") for v in (4, 1))
        backward = torch.ops.quantops.uniform_backward
        (grad_w,) = backward([grad], r, [w], [s], n, k, 0, True, False)[0]
        for i, t in enumerate(rows):
            (want,) = backward([grad[i : i + 1]], r, [t], [scale[i]], n, k, 0, True, False)[0]
            assert torch.equal(grad_w[i : i + 1], want), i
        del grad, grad_w, want
        for at_m, width in zip(Q.truncate(w, s, (4, 1)), (4, 1)):
            assert all(torch.equal(at_m[i : i + 1], Q.truncate(t, scale[i], width)) for i, t in enumerate(rows)), width
        del at_m
        codes = Q.encode(w, s, 4)
        assert all(torch.equal(codes[i : i + 1], Q.encode(t, scale[i], 4)) for i, t in enumerate(rows))
        assert torch.equal(Q.decode(codes, s, 4).to(w.dtype), q)
        del q
        for layout in ("planes", "dense"):
            packed = Q.pack(codes, 4, layout=layout)
            assert packed.data.numel() > 2**30 and torch.equal(Q.unpack(packed), codes), layout
        del codes, packed
    alpha, sigma = s.reshape(1) / 4, s.reshape(1) / 20
    for mode, share in (("hard", 1.0), ("sample", 0.995)):  # a draw within the rounding of exp may be the neighbour
        q = Q.categorical(w, alpha, sigma, 3, mode=mode, seed=5 if mode == "sample" else None)
        last = w.numel() - 4000
        want = Q.reference.categorical(
            w.view(-1)[last:].cpu(), alpha.cpu(), sigma.cpu(), 3, mode=mode, seed=5, offset=last
        )
        assert (q.view(-1)[last:].cpu() == want).float().mean() >= share, mode
        q = None


FAILED_ALLOCATIONS = """
import re, resource, torch
import quantops as Q
w = torch.zeros(1).expand(2**36)  # no memory, which each op would have to give its result
packed = Q.pack(torch.zeros(2**24, dtype=torch.int32), 1)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**25, -1))
calls = {
    "absmax": lambda: Q.absmax(w), "round_clamp": lambda: Q.round_clamp(w, 1.0, 4), "msq": lambda: Q.msq(w, 1.0, 4),
    "truncate": lambda: Q.truncate(w, 1.0, (8, 4)), "encode": lambda: Q.encode(w, 1.0, 4),
    "categorical": lambda: Q.categorical(w, 1.0, 0.1, 4), "unpack": lambda: Q.unpack(packed),
}
for name, call in calls.items():
    try:
        call()
    except RuntimeError as error:
        assert re.search(f"memory: .*allocate {2**26 if name == 'unpack' else 2**38} bytes", str(error)), (name, error)
    else:
        raise AssertionError(name)
"""


@pytest.mark.skipif(Q.info()["devices"]["cpu"]["implementation"] != "cpp", reason="torch says what it allocates")
def test_failed_allocations_say_how_many_bytes_they_asked_for():
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", FAILED_ALLOCATIONS], env=env, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
