"""The CUDA kernels of family ``packing`` equal the reference, bit for bit: see emulation.py for the how."""

import ctypes
import itertools
import mmap

import torch

from emulation import Program, exact, raises
from quantops import reference

LAYOUTS = ("planes", "dense")
GRIDS = ("dyadic", "full", "sign")
LENGTHS = (0, 1, 7, 8, 9, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025, 2047, 3000, 70_007)
ROWS = [1, 1, 7, 4, 3, 7, 16, 5, 127, 2, 43, 33, 8, 205, 23, 1000, 511]  # of these lengths, which they divide

program = Program(__file__, "packing")


def _codes(n, lengths=LENGTHS):
    return [torch.randint(0, 2**n, (count,), dtype=torch.int32) for count in lengths]


def _int32(values):
    return torch.tensor(values, dtype=torch.int32)


@program.check
def test_every_width_and_length():
    ops = torch.ops.quantops
    for n, (which, layout) in itertools.product(range(17), enumerate(LAYOUTS)):
        codes = _codes(n)
        data = ops.pack(codes, [n] * len(codes), which)
        for c, d in zip(codes, data):
            exact(d, reference.pack(c, n, layout=layout), f"pack {layout} n={n} length {len(c)}")
        shared = data, [len(c) for c in codes], [1] * len(codes), [n] * len(codes)
        for m in range(n + 1):
            got = ops.unpack(*shared, _int32([m] * len(codes)), which)
            for c, u in zip(codes, got):
                exact(u, c >> (n - m), f"unpack {layout} n={n} m={m} length {len(c)}")


@program.check
def test_values_of_every_dtype_and_scale():
    for case, (n, (which, layout), per_row, (grid, signed)) in enumerate(
        itertools.product(
            (0, 1, 3, 4, 8, 11, 16),
            enumerate(LAYOUTS),
            (False, True),
            (("dyadic", False), ("dyadic", True), ("full", False), ("full", True), ("sign", True)),
        )
    ):
        sign = grid == "sign" and n > 0  # the first bit of a code
        codes = _codes(n)
        rows = [r if per_row and len(c) else 1 for c, r in zip(codes, ROWS)]
        codes = [c.view(r, -1) for c, r in zip(codes, rows)]
        data = torch.ops.quantops.pack(codes, [n] * len(codes), which)
        sizes = [size for c in codes for size in c.shape]
        m = [n - sign if i % 3 == 0 else (i * 5 + case) % (n + 1 - sign) for i in range(len(codes))]
        acc = torch.float64 if case % 4 == 3 else torch.float32
        scale = [torch.rand(r, dtype=acc) * 2 for r in rows]
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            q = torch.ops.quantops.decode_packed(
                data,
                sizes,
                [2] * len(codes),
                [n] * len(codes),
                scale,
                _int32(m),
                which,
                GRIDS.index(grid),
                signed,
                dtype,
            )
            for i, c in enumerate(codes):
                read = reference.uniform.code_bits(m[i], grid)
                want = reference.decode(c >> (n - read), scale[i], m[i], grid=grid, signed=signed, dtype=dtype)
                exact(q[i], want, f"{layout} n={n} m={m[i]} {dtype} {grid} signed={signed} codes[{i}]")


@program.check
def test_unaligned_and_many():
    """Codes and data that do not begin at 16 bytes go element by element; a list of more than one table."""
    ops = torch.ops.quantops
    for n, (which, layout) in itertools.product((3, 8, 13), enumerate(LAYOUTS)):
        codes = [c[1:] for c in _codes(n, (5, 130, 1025, 2600))]
        data = ops.pack(codes, [n] * 4, which)
        shifted = [torch.cat([torch.zeros(3, dtype=torch.uint8), d.view(-1)])[3:].view(d.shape) for d in data]
        m = _int32([n, n - 1, n, 2])
        for i, u in enumerate(ops.unpack(shifted, [len(c) for c in codes], [1] * 4, [n] * 4, m, which)):
            exact(data[i], reference.pack(codes[i], n, layout=layout), "packed from odd addresses")
            exact(u, codes[i] >> (n - int(m[i])), "unpacked from odd addresses")
    for count in (68, 69, 571, 575):
        codes = _codes(5, [(i * 7) % 40 for i in range(count)])
        bits = [5 + i % 12 for i in range(count)]
        data = ops.pack(codes, bits, 0)
        got = ops.unpack(data, [len(c) for c in codes], [1] * count, bits, _int32(bits), 0)
        for i, c in enumerate(codes):
            exact(data[i], reference.pack(c, bits[i]), f"pack {i} of {count}")
            exact(got[i], c, f"unpack {i} of {count}")


@program.check
def test_reading_m_planes_touches_no_other():
    """The planes behind them cannot be read: this process would be killed."""
    ops, page = torch.ops.quantops, mmap.PAGESIZE
    codes = torch.randint(0, 16, (8 * page,), dtype=torch.int32)
    data = torch.frombuffer(mmap.mmap(-1, 4 * page), dtype=torch.uint8).view(4, page)
    data.copy_(ops.pack([codes], [4], 0)[0])
    for m in (3, 1, 0):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(data.data_ptr() + m * page), (4 - m) * page, 0) == 0
        shared = [data], [8 * page], [1], [4]
        exact(ops.unpack(*shared, _int32([m]), 0)[0], codes >> (4 - m), f"{m} planes")
        ops.decode_packed(*shared, [torch.ones(())], _int32([m]), 0, 1, True, torch.bfloat16)


@program.check
def test_values_out_of_range():
    """Of a code the low bits; bits out of range give INVALID, or NaN, for that tensor and for no other."""
    ops = torch.ops.quantops
    bad = _int32([-1, 16, 2**16, 2**31 - 1, -(2**31), 5])
    for (which, layout), n in itertools.product(enumerate(LAYOUTS), (1, 4, 8, 15, 16)):
        exact(ops.pack([bad], [n], which)[0], reference.pack(bad & (2**n - 1), n, layout=layout), f"{layout} {n}")
        codes = _codes(n, (1100,) * 5)
        data, m = ops.pack(codes, [n] * 5, which), _int32([n, n + 1, -1, 2**31 - 1, 0])
        u = ops.unpack(data, [1100] * 5, [1] * 5, [n] * 5, m, which)
        scale = [torch.ones(())] * 5
        q = ops.decode_packed(data, [1100] * 5, [1] * 5, [n] * 5, scale, m, which, 1, True, torch.float32)
        for i in range(5):
            valid = 0 <= m[i] <= n
            want = codes[i] >> (n - int(m[i])) if valid else torch.full_like(codes[i], reference.uniform.INVALID)
            exact(u[i], want, f"unpack {m[i]} of {n} bits")
            exact(q[i], reference.decode(want, scale[i], m[i].clamp(0, 16), grid="full"), f"decode {m[i]} of {n} bits")
    nan = float("nan")
    for s in (nan, -1.0, float("inf")):
        scale = [torch.tensor([1.0, s])]
        q = ops.decode_packed(
            ops.pack([_int32([1] * 40)], [2], 0), [2, 20], [2], [2], scale, _int32([2]), 0, 0, True, torch.float32
        )[0]
        assert q[1].isnan().all() and not q[0].isnan().any()


@program.check
def test_errors():
    ops, f32 = torch.ops.quantops, torch.float32
    c, m, unpack = [torch.ones(40, dtype=torch.int32)], _int32([3]), ops.unpack
    d = ops.pack(c, [4], 0)

    def decode(d, scale, dtype):
        return ops.decode_packed(d, [40], [1], [4], [scale], m, 0, 0, True, dtype)

    raises(
        {
            "codes: expected dtype int32, got int64": lambda: ops.pack([c[0].long()], [4], 0),
            "bits: expected 0..16, got 17": lambda: ops.pack(c, [17], 0),
            "bits: expected one entry per weight (1), got 2": lambda: ops.pack(c, [4, 4], 0),
            "layout: expected 0 or 1, got 2": lambda: ops.pack(c, [4], 2),
            "data: expected shape (4, 16) for codes of 4 bits and of shape (40,) in 'planes', got (3, 16)": lambda: (
                unpack([d[0][:3]], [40], [1], [4], m, 0)
            ),
            "data: expected shape (4, 32)": lambda: unpack(d, [200], [1], [4], m, 0),
            "data: expected shape (20,)": lambda: unpack(d, [40], [1], [4], m, 1),
            "data: expected a contiguous tensor": lambda: unpack([d[0].t().contiguous().t()], [40], [1], [4], m, 0),
            "sizes: expected those of a tensor, got -40": lambda: unpack(d, [-40], [1], [4], m, 0),
            "sizes: expected those of a tensor": lambda: unpack(d, [2**40, 2**40], [2], [4], m, 0),
            "dims: expected 0..1, got 2": lambda: unpack(d, [40], [2], [4], m, 0),
            "dims: expected one entry per weight (1), got 2": lambda: unpack(d, [40], [1, 0], [4], m, 0),
            "sizes: expected as many as dims says, got 2": lambda: unpack(d * 2, [40, 40], [1, 2], [4, 4], m, 0),
            "stored: expected 0..16, got -1": lambda: unpack(d, [40], [1], [-1], m, 0),
            "bits: expected dtype int32, got int64": lambda: unpack(d, [40], [1], [4], m.long(), 0),
            "bits: expected 1 element": lambda: unpack(d, [40], [1], [4], m.repeat(2), 0),
            "scale: expected one element or one per row (40), got shape (3,)": lambda: decode(d, torch.ones(3), f32),
            "scale: expected dtype float32, float64, got float16": lambda: decode(d, torch.ones(()).half(), f32),
            "dtype: expected float32": lambda: decode(d, torch.ones(()), torch.int8),
        }
    )
