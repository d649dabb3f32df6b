"""Family ``packing``: whatever kernels serve the CPU here against the reference, bit for bit, and the bytes themselves.

Run as it is, the compiled C++ kernels are tested; under QUANTOPS_BACKEND=triton TRITON_INTERPRET=1, the Triton ones.
"""

import ctypes
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.testing

import quantops as Q
from cases import EXHAUSTIVE, free_gigabytes, same
from quantops import reference as ref
from quantops.packed import Packed

LAYOUTS = ("planes", "dense")
LENGTHS = (0, 1, 7, 8, 9, 63, 64, 65, 127, 129, 1009, *((1024, 33_000, 70_001) if EXHAUSTIVE else (4097,)))
SERVING = Q.info()["devices"]["cpu"]["implementation"]
WIDTHS = range(17) if EXHAUSTIVE else (0, 1, 3, 8, 11, 16)


def random_codes(bits, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.int32)
    if codes.numel() > 1:
        codes.view(-1)[:2] = torch.tensor([2**bits - 1, 0])
    return codes


def equal(a, b):
    return all(same(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_equals_reference_and_truncates(bits, layout):
    codes = [random_codes(bits, (count,), seed=count) for count in LENGTHS]
    packed = Q.foreach.pack(codes, bits, layout=layout)
    for c, p in zip(codes, packed):
        assert same(p.data, ref.pack(c, bits, layout=layout)), len(c)
        assert (p.shape, p.bits, p.layout, p.numel()) == (c.shape, bits, layout, len(c))
    for m in range(bits + 1) if EXHAUSTIVE else {0, 1, bits // 2, bits} & set(range(bits + 1)):
        want = [c >> (bits - m) for c in codes]
        assert equal(Q.foreach.unpack(packed, m), want), m
        assert equal([ref.unpack(p.data, c.shape, bits, m, layout=layout) for p, c in zip(packed, codes)], want)
        if m in (0, 1, bits - 1, bits):
            cut = [p.truncate(m) for p in packed]
            assert all(p.bits == m and p.layout == layout for p in cut)
            assert equal([p.data for p in cut], [p.data for p in Q.foreach.pack(want, m, layout=layout)])
    assert equal(Q.foreach.unpack(packed), codes)


@pytest.mark.parametrize("bits", [b for b in WIDTHS if b])
def test_the_bytes_are_those_of_the_documentation(bits):
    """numpy.packbits states them too."""
    for count in (0, 1, 13, 128, 1001):
        codes = random_codes(bits, (count,))
        each = (codes.numpy()[:, None] >> np.arange(bits) & 1).astype(np.uint8)
        data = Q.pack(codes, bits).data.numpy()
        used = -(-count // 8)
        assert data.shape == (bits, -(-used // 16) * 16) and not data[:, used:].any()
        for row in range(bits):
            assert np.array_equal(data[row, :used], np.packbits(each[:, bits - 1 - row], bitorder="little"))
        assert np.array_equal(Q.pack(codes, bits, layout="dense").data.numpy(), np.packbits(each, bitorder="little"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_strides_and_dtypes(layout):
    shapes = [(), (1,), (3, 5), (2, 3, 4), (4, 3, 5, 5), (0, 3), (2, 0, 3, 1)]
    codes = [random_codes(5, s) for s in shapes]
    codes += [
        random_codes(5, (6, 10)).t(),
        random_codes(5, (20, 30))[::2, ::3],
        random_codes(5, (1, 9)).expand(4, 9),
        random_codes(5, (300,))[7:],
        random_codes(5, (4, 8, 3, 3)).to(memory_format=torch.channels_last),
    ]
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        packed = Q.foreach.pack([c.to(dtype) for c in codes], 5, layout=layout)
        back = Q.foreach.unpack(packed)
        for c, p, b in zip(codes, packed, back):
            assert same(p.data, ref.pack(c.contiguous(), 5, layout=layout))  # in the order of a contiguous tensor
            assert same(b, c) and b.is_contiguous() and p.shape == c.shape
    top = torch.tensor([65535, 0], dtype=torch.int64)
    assert torch.equal(Q.unpack(Q.pack(top, 16, layout=layout)), top.int())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lists_of_many_widths_with_empties(layout):
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(0, 17, (40 if EXHAUSTIVE else 9,), generator=generator).tolist()
    codes = [random_codes(n, (37 * i % 1300 if i % 4 else 0,), seed=i) for i, n in enumerate(bits)]
    packed = Q.foreach.pack(codes, bits, layout=layout)
    read = [(5 * i) % (n + 1) for i, n in enumerate(bits)]
    want = [c >> (n - m) for c, n, m in zip(codes, bits, read)]
    for m in (read, torch.tensor(read), torch.tensor(read, dtype=torch.int16)):
        assert equal(Q.foreach.unpack(packed, m), want)
    assert equal(Q.foreach.unpack(packed), codes)


@pytest.mark.skipif(not EXHAUSTIVE, reason="too large for the interpreter")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [3, 8, 13])
def test_results_larger_than_the_caches_go_past_them(bits, layout):
    codes = [random_codes(bits, (n,)) for n in (4_300_001, 7, 333_333)]
    packed = Q.foreach.pack(codes, bits, layout=layout)
    assert equal(Q.foreach.unpack(packed), codes)
    assert equal(Q.foreach.unpack(packed, 2), [c >> (bits - 2) for c in codes])


def rows_of(shape, per_row):
    return shape[0] if per_row and shape else 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [0, 1, 2, 5, 8, 9, 16] if EXHAUSTIVE else [0, 3, 16])
def test_decode_is_decode_of_unpack(bits, layout):
    """At every width, for every output dtype, with one scale or one per row, also of rows that end within a byte."""
    shapes = [(), (9,), (0,), (5, 27), (3, 1), (64, 3, 3, 3), (2, 1200)]
    shapes += [(3, 0), (100, 30, 11), (70, 1000)] if EXHAUSTIVE else []
    generator = torch.Generator().manual_seed(bits)
    codes = [random_codes(bits, s) for s in shapes]
    packed = Q.foreach.pack(codes, bits, layout=layout)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for m, per_row, grid, signed, (dtype, acc) in itertools.product(
        sorted({0, min(1, bits), bits // 2, bits}),
        (False, True),
        ref.uniform.GRIDS,
        (True, False),
        [(d, torch.float32) for d in (dtypes if EXHAUSTIVE else dtypes[1:2])] + [(torch.float64, torch.float64)],
    ):
        if (not EXHAUSTIVE and signed == (grid == "dyadic")) or (grid == "sign" and not signed):
            continue
        read, m = m, m - (grid == "sign" and m > 0)  # a sign is the first of the bits that are read
        if read == 1 and grid == "sign":
            continue  # a sign alone is no weight
        scale = [torch.rand(rows_of(s, per_row), generator=generator, dtype=acc) for s in shapes]
        got = Q.foreach.decode(packed, scale, m, grid=grid, signed=signed, out_dtype=dtype)
        for c, s, q in zip(codes, scale, got):
            wide = acc if dtype != torch.float64 else torch.float64
            want = ref.decode(c >> (bits - read), s.to(wide), m, grid=grid, signed=signed, dtype=dtype)
            assert same(q, want), (m, per_row, grid, signed, dtype, tuple(c.shape))
    assert equal(Q.foreach.decode(packed, [0.7] * len(codes)), Q.foreach.decode(codes, [0.7] * len(codes), bits))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_floor_codes_decode_to_the_narrower_floor_codes(layout):
    """TruncQuant: c_m = c_n >> (n - m), so the packed weight of n bits is also the weight of m bits."""
    w, scale = torch.randn(37, 53, generator=torch.Generator().manual_seed(0)), torch.tensor(2.5)
    packed = Q.pack(Q.encode(w, scale, 8, rule="floor"), 8, layout=layout)
    for m in range(1, 9):
        want = ref.decode(ref.encode(w, scale, 8, rule="floor") >> (8 - m), scale, m, grid="full")
        assert same(want, ref.decode(ref.encode(w, scale, m, rule="floor"), scale, m, grid="full"))
        assert same(Q.decode(packed, scale, m, grid="full"), want)
        assert same(Q.decode(Q.unpack(packed, m), scale, m, grid="full"), want)
        assert same(Q.decode(packed.truncate(m), scale, grid="full"), want)


@pytest.mark.parametrize("rule", ref.uniform.RULES)
def test_decode_at_every_width_is_truncate(rule):
    """The training forward of TruncQuant, and what is served from the packed weight, bit for bit."""
    w = torch.randn(37, 53, generator=torch.Generator().manual_seed(0))
    for base, scale in ((8, torch.tensor(2.5)), (5, torch.rand(37)), (16, torch.tensor(1.0))):
        codes = Q.encode(w, scale, base, rule=rule)
        widths = range(1, base + 1) if EXHAUSTIVE else (1, 3, base)
        want = Q.truncate(w, scale, tuple(widths), base_bits=base, rule=rule)
        for layout in LAYOUTS:
            packed = Q.pack(codes, base, layout=layout)
            for m, q in zip(widths, want):
                assert same(Q.decode(packed, scale, m, grid="full"), q), (base, m)
                assert same(Q.decode(Q.unpack(packed, m), scale, m, grid="full"), q), (base, m)


def test_msq_codes_keep_their_values_where_the_dropped_bits_are_zero():
    w, scale = torch.randn(5000, generator=torch.Generator().manual_seed(0)), torch.tensor(3.0)
    codes = Q.encode(w, scale, 8)
    packed = Q.pack(codes, 8)
    for m in range(1, 8):
        zero = codes % 2 ** (8 - m) == 0
        q, less = Q.decode(packed, scale), Q.decode(packed, scale, m)
        assert 0 < zero.sum() and torch.equal(less[zero], q[zero])
        assert (less <= q).all()  # two's complement: cutting bits off rounds down


@pytest.mark.parametrize("bits", range(1, 16) if EXHAUSTIVE else (1, 4, 15))
def test_fewer_planes_cut_the_magnitude_of_sign_magnitude_codes(bits):
    """The first plane has the signs; with it and m more, q is that of the magnitude's first m bits."""
    w, scale = torch.randn(37, 53, generator=torch.Generator().manual_seed(bits)), torch.tensor(2.5)
    codes, q = Q.encode(w, scale, bits, grid="sign"), Q.round_clamp(w, scale, bits, grid="sign")
    for layout in LAYOUTS:
        packed = Q.pack(codes, bits + 1, layout=layout)
        assert same(Q.decode(packed, scale, grid="sign"), q) and torch.equal(Q.unpack(packed), codes)
        for m in range(bits + 1):
            cut = (q.abs() / (scale * 2.0**-m)).floor() * (scale * 2.0**-m) * q.sign()  # towards zero; exact
            assert torch.equal(Q.decode(packed, scale, m, grid="sign"), cut)
            if m:
                assert torch.equal(Q.decode(packed.truncate(m + 1), scale, grid="sign"), cut)
    planes = Q.pack(codes, bits + 1).data
    assert torch.equal(Q.unpack(Packed(planes[:1].contiguous(), w.shape, 1)).bool(), q < 0)
    with pytest.raises(ValueError, match=f"bits: expected 0..{bits}, "):
        Q.decode(Q.pack(codes, bits + 1), scale, bits + 1, grid="sign")


def test_truncating_planes_copies_nothing():
    packed = Q.pack(random_codes(8, (1000,)), 8)
    cut = packed.truncate(3)
    assert cut.data.data_ptr() == packed.data.data_ptr() and cut.data.is_contiguous() and cut.data.shape[0] == 3
    assert torch.equal(Q.unpack(cut, 2), Q.unpack(packed, 2))


def test_data_at_odd_addresses():
    for layout, bits in itertools.product(LAYOUTS, (3, 12)):
        codes = random_codes(bits, (3001,))[1:]  # not at 16 bytes
        packed = Q.pack(codes, bits, layout=layout)
        moved = torch.empty(packed.data.numel() + 3, dtype=torch.uint8)[3:].view(packed.data.shape).copy_(packed.data)
        assert moved.data_ptr() % 16
        assert torch.equal(Q.unpack(Packed(moved, codes.shape, bits, layout), 2), codes >> (bits - 2))


@pytest.mark.skipif(not EXHAUSTIVE or SERVING == "reference", reason="billions of elements take compiled kernels")
@pytest.mark.skipif(free_gigabytes() < 8, reason="needs 8 GB of free memory")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_two_to_the_31_codes(layout):
    few = Q.pack(torch.tensor([0] * 6 + [3, 1, 2]), 2, layout=layout).data
    data = torch.zeros(ref.packing.data_shape(2**31 + 9, 2, layout), dtype=torch.uint8)
    data[..., 2**31 * (1 if layout == "planes" else 2) // 8 :] = few
    q = Q.decode(Packed(data, (2**31 + 9,), 2, layout), 2.0, signed=False, out_dtype=torch.bfloat16)
    assert q[-4:].tolist() == [0.0, 1.5, 0.5, 1.0]


MEMORY = """
import ctypes, mmap, torch, quantops as Q
numel, bits, page = 8 * mmap.PAGESIZE, 4, mmap.PAGESIZE  # a plane is a page
codes = torch.randint(0, 16, (numel,), dtype=torch.int32)
memory = mmap.mmap(-1, bits * page)
data = torch.frombuffer(memory, dtype=torch.uint8).view(bits, page)
data.copy_(Q.pack(codes, bits).data)
packed = Q.Packed(data, codes.shape, bits)
scale = torch.tensor(1.5)
want = [(codes >> (bits - m), Q.decode(codes >> (bits - m), scale, m)) for m in range(bits + 1)]
libc = ctypes.CDLL(None)
for m in range(bits, -1, -1):
    assert torch.equal(Q.unpack(packed, m), want[m][0]) and torch.equal(Q.decode(packed, scale, m), want[m][1])
    print("read", m, flush=True)
    if m:  # whoever reads this plane from now on is killed
        assert libc.mprotect(ctypes.c_void_p(data.data_ptr() + (m - 1) * page), page, 0) == 0  # 0: PROT_NONE
Q.unpack(packed, 1)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")
@pytest.mark.skipif(SERVING == "reference", reason="the reference reads all planes")
def test_reading_m_planes_touches_no_other():
    run = subprocess.run(
        [sys.executable, "-c", MEMORY],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.stdout.split("\n")[:5] == [f"read {m}" for m in (4, 3, 2, 1, 0)], run.stderr
    assert run.returncode < 0  # the guard is one: reading a plane behind it did kill


# Every instruction set has loops of its own; the ones that this machine does not choose are tested too.

LOOPS = r"""
#include "cpu/packing_loops.h"
using namespace quantops;
extern "C" {
#define LOOPS(set)                                                                                             \
  int64_t pack_##set(const int32_t* c, int64_t count, int n, uint8_t* d, int64_t s, uint32_t* seen) {          \
    return detail::pack_planes_##set(c, count, n, d, s, *seen);                                                \
  }                                                                                                            \
  int64_t unpack_##set(const uint8_t* d, int64_t s, int64_t count, int m, int32_t* c) {                        \
    return detail::unpack_planes_##set(d, s, count, m, c, false);                                              \
  }
LOOPS(avx512)
LOOPS(avx2)
}
"""


@pytest.fixture(scope="module")
def loops(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if platform.machine() != "x86_64" or compiler is None:
        pytest.skip("needs x86-64 and a C++ compiler: install g++, or set CXX")
    from torch.utils.cpp_extension import include_paths

    folder = tmp_path_factory.mktemp("loops")
    (folder / "loops.cpp").write_text(LOOPS)
    subprocess.run(
        [
            compiler,
            "-std=c++17",
            "-O2",
            "-w",
            "-shared",
            "-fPIC",
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            f"-I{Path(__file__).parents[2] / 'csrc'}",
            *(f"-I{p}" for p in include_paths()),
            str(folder / "loops.cpp"),
            "-o",
            str(folder / "loops.so"),
        ],
        check=True,
    )
    return ctypes.CDLL(str(folder / "loops.so"))


@pytest.mark.skipif(not EXHAUSTIVE, reason="no kernels of Triton's")
@pytest.mark.parametrize("instructions, step, flags", [("avx512", 64, {"avx512f", "avx512bw"}), ("avx2", 32, {"avx2"})])
def test_loops_of_each_instruction_set(loops, instructions, step, flags):
    if not flags <= set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text())):
        pytest.skip(f"this CPU has no {instructions}")
    pack, unpack = (getattr(loops, f"{name}_{instructions}") for name in ("pack", "unpack"))
    pack.restype = unpack.restype = ctypes.c_int64
    where = lambda t: ctypes.c_void_p(t.data_ptr())  # noqa: E731
    for n in range(17):
        codes = random_codes(n, (5 * step + 17,))
        want, stride = ref.pack(codes, n), ref.packing.plane_bytes(len(codes))
        data, seen, out = torch.zeros_like(want), ctypes.c_uint32(0), torch.full_like(codes, -7)
        done = pack(
            where(codes), ctypes.c_int64(len(codes)), n, where(data), ctypes.c_int64(stride), ctypes.byref(seen)
        )
        assert done == 5 * step and seen.value == 2**n - 1
        assert torch.equal(data[:, : done // 8], want[:, : done // 8]) and not data[:, done // 8 :].any()
        for m in range(n + 1):
            assert unpack(where(want), ctypes.c_int64(stride), ctypes.c_int64(len(codes)), m, where(out)) == done
            assert torch.equal(out[:done], codes[:done] >> (n - m)) and (out[done:] == -7).all()


# Citizens of torch.


def test_compile_is_one_graph_while_the_bits_that_are_read_change():
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    packed = [Q.pack(random_codes(8, (30, 7)), 8), Q.pack(random_codes(4, (100,)), 4)]
    scale = [torch.rand(30), torch.tensor(2.0)]

    def serve(packed, scale, m):
        return [q * 2 for q in Q.foreach.decode(packed, scale, m)], Q.foreach.unpack(packed, m)

    compiled = torch.compile(serve, fullgraph=True, backend=frames)
    for m in ([8, 4], [3, 1], [0, 2]):
        m = torch.tensor(m, dtype=torch.int32)
        got, want = compiled(packed, scale, m), serve(packed, scale, m)
        assert equal(got[0], want[0]) and equal(got[1], want[1])
    assert frames.frame_count == 1


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_of_pack(dynamic):
    torch._dynamo.reset()

    def f(w):
        packed = Q.pack(Q.encode(w, 2.0, 5), 5)
        return packed, Q.unpack(packed.truncate(2)), Q.decode(Q.pack(Q.encode(w, 2.0, 3), 3, layout="dense"), 2.0)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (5, 9, 200):
        w = torch.randn(rows, 7)
        got, want = compiled(w), f(w)
        assert torch.equal(got[0].data, want[0].data) and got[0].shape == w.shape and equal(got[1:], want[1:])


def test_packed_has_no_gradient_and_moves():
    codes = random_codes(3, (20,))
    scale = torch.tensor(1.0, requires_grad=True)
    assert not Q.decode(Q.pack(codes, 3), scale).requires_grad
    meta = Q.pack(codes, 3).to("meta")
    assert (
        meta.device.type == "meta"
        and Q.unpack(meta).shape == (20,)
        and Q.decode(meta, torch.ones((), device="meta"), out_dtype=torch.float16).dtype == torch.float16
    )


# Bad input.

C = torch.arange(16, dtype=torch.int32)
P, D, FOUR = Q.pack(C, 4), Q.pack(C, 4, layout="dense"), torch.tensor([4], dtype=torch.int32)
BAD = {
    "code above": (lambda: Q.pack(C + 1, 4), ValueError, r"codes.*0\.\.2\^4 - 1, got"),
    "code below": (lambda: Q.pack(C - 1, 4, layout="dense"), ValueError, r"codes.*0\.\.2\^4 - 1, got"),
    "code in a tail": (lambda: Q.pack(torch.tensor([0] * 66 + [4]), 2), ValueError, r"codes.*0\.\.2\^2 - 1"),
    "code in a list": (lambda: Q.foreach.pack([C, C], [4, 3]), ValueError, r"codes\[1\]: .*2\^3"),
    "code of no bits": (lambda: Q.pack(C, 0), ValueError, r"codes.*0\.\.2\^0"),
    "code 2^32 + 3": (lambda: Q.pack(torch.tensor([2**32 + 3]), 4), ValueError, r"codes"),
    "code -2^31": (lambda: Q.pack(torch.tensor([-(2**31)], dtype=torch.int32), 16), ValueError, r"codes"),
    "codes float": (lambda: Q.pack(C.float(), 4), TypeError, r"codes: .*float32"),
    "codes no tensor": (lambda: Q.pack([1, 2], 4), TypeError, r"codes: expected a tensor"),
    "empty list": (lambda: Q.foreach.pack([], 4), TypeError, r"codes: expected a non-empty list"),
    "17 bits": (lambda: Q.pack(C, 17), ValueError, r"bits: expected 0\.\.16, got 17"),
    "-1 bits": (lambda: Q.pack(C, -1), ValueError, r"bits: .*got -1"),
    "bits tensor": (lambda: Q.pack(C, torch.tensor(4)), TypeError, r"bits: expected an integer, since .*tensor"),
    "bits float": (lambda: Q.pack(C, 4.0), TypeError, r"bits: .*float"),
    "bits bool": (lambda: Q.pack(C, True), TypeError, r"bits: .*bool"),
    "bits count": (lambda: Q.foreach.pack([C, C], [4]), ValueError, r"bits: .*\(2\), got 1"),
    "layout": (lambda: Q.pack(C, 4, layout="rows"), ValueError, r"layout: expected one of 'planes', .* got 'rows'"),
    "more than stored": (lambda: Q.unpack(P, 5), ValueError, r"bits: expected 0\.\.4, the bits that are stored, got 5"),
    "more than stored, tensor": (lambda: Q.unpack(P, torch.tensor(5)), ValueError, r"bits.*0\.\.4, .*stored, got 5"),
    "more than stored, dense": (lambda: Q.unpack(D, 5), ValueError, r"bits: expected 0\.\.4, .*stored, got 5"),
    "more than stored, list": (lambda: Q.foreach.unpack([P, P.truncate(2)], 3), ValueError, r"bits: .*0\.\.2.*got 3"),
    "more than stored, values": (lambda: Q.decode(P, 1.0, 5), ValueError, r"bits: expected 0\.\.4, .*stored, got 5"),
    "more than stored, cut": (lambda: P.truncate(5), ValueError, r"bits: expected 0\.\.4, .*stored, got 5"),
    "more than stored, dense cut": (lambda: D.truncate(5), ValueError, r"bits: expected 0\.\.4, .*stored, got 5"),
    "cut to a tensor": (lambda: P.truncate(torch.tensor(2)), TypeError, r"bits: expected an integer"),
    "less than none": (lambda: Q.unpack(P, -1), ValueError, r"bits: .*got -1"),
    "less than none, tensor": (lambda: Q.unpack(P, torch.tensor(-1)), ValueError, r"bits.*got -1"),
    "codes, not packed": (lambda: Q.unpack(C), TypeError, r"packed: expected a Packed, got torch.int32"),
    "packed in no list": (lambda: Q.foreach.unpack(P), TypeError, r"packed: expected a non-empty list"),
    "too short": (lambda: Q.unpack(Packed(P.data, (200,), 4)), ValueError, r"data: .*\(4, 32\) for .*\(4, 16\)"),
    "too long": (lambda: Q.unpack(Packed(P.data, (0,), 4)), ValueError, r"data: .*\(4, 0\)"),
    "too short, dense": (
        lambda: Q.unpack(Packed(D.data[1:], D.shape, 4, "dense")),
        ValueError,
        r"data: .*\(8,\).*\(7,\)",
    ),
    "too few planes": (
        lambda: Q.decode(Packed(P.data[1:], P.shape, 4), 1.0),
        ValueError,
        r"data: .*\(4, 16\).*\(3, 16\)",
    ),
    "wrong layout": (lambda: Q.unpack(Packed(P.data, P.shape, 4, "dense")), ValueError, r"data: .*'dense'"),
    "unknown layout": (lambda: Q.unpack(Packed(P.data, P.shape, 4, "bits")), ValueError, r"layout: .*'bits'"),
    "two layouts": (lambda: Q.foreach.unpack([P, D]), ValueError, r"packed: expected one layout"),
    "strided data": (lambda: Q.unpack(Packed(P.data.t().contiguous().t(), P.shape, 4)), ValueError, r"data: .*contig"),
    "int8 data": (
        lambda: Q.unpack(Packed(P.data.to(torch.int8), P.shape, 4)),
        (TypeError, ValueError),
        r"data: expected .*uint8",
    ),
    "codes without bits": (lambda: Q.decode(C, 1.0), TypeError, r"bits: expected an integer.*NoneType"),
    "scale per element": (
        lambda: Q.decode(Q.pack(C.view(4, 4), 4), torch.ones(4, 4)),
        ValueError,
        r"scale: .*\(4, 4\)",
    ),
    "scale negative": (lambda: Q.decode(P, -1.0), ValueError, r"scale: .*got -1"),
    "scale NaN": (lambda: Q.decode(P, torch.tensor(torch.nan)), ValueError, r"scale.*nan"),
    "scale device": (lambda: Q.decode(P, torch.ones((), device="meta")), ValueError, r"scale: expected device cpu"),
}


@pytest.mark.parametrize("name", BAD)
def test_error(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    "op, args",
    [
        ("pack", ([C.long()], [4], 0)),
        ("pack", ([C], [17], 0)),
        ("pack", ([C], [4, 4], 0)),
        ("pack", ([C], [4], 2)),
        ("unpack", ([P.data[:2]], [16], [1], [4], FOUR, 0)),
        ("unpack", ([P.data], [1600], [1], [4], FOUR, 0)),
        ("unpack", ([P.data], [16], [1], [4], FOUR.long(), 0)),
        ("unpack", ([P.data], [16], [1], [4], FOUR + 1, 0)),
        ("unpack", ([D.data], [17], [1], [4], FOUR, 1)),
        ("unpack", ([P.data], [-16], [1], [4], FOUR, 0)),
        ("unpack", ([P.data], [16], [2], [4], FOUR, 0)),
        ("unpack", ([P.data], [16], [], [4], FOUR, 0)),
        ("unpack", ([P.data.to(torch.int8)], [16], [1], [4], FOUR, 0)),
        ("decode_packed", ([P.data], [16], [1], [4], [torch.ones(3)], FOUR, 0, False, True, torch.float32)),
        ("decode_packed", ([P.data], [16], [1], [4], [], FOUR, 0, False, True, torch.float32)),
    ],
)
def test_the_ops_themselves_read_nothing_out_of_bounds(op, args):
    """Called past the Python checks, the ops check shapes and dtypes on their own."""
    if SERVING == "reference":
        pytest.skip("the reference indexes with tensors, which check")
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        getattr(torch.ops.quantops, op)(*args)
        raise AssertionError("the op took arguments that do not fit")
