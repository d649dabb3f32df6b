"""The CUDA kernels of family ``uniform`` equal the reference, bit for bit: the very source file, run on the CPU. See
emulation.py for the how.
"""

import itertools

import torch

import cases
from emulation import DTYPES, Program, close, exact, laid_out_like, raises, weights
from quantops import reference

program = Program(__file__, "uniform")
GRIDS = ("dyadic", "full", "sign")


def _bits(count, shift, grid="full"):
    """(bits, k) that take all values in turn: every width with every k."""
    pairs = [(n, k) for n in range(16 if grid == "sign" else 17) for k in ([0] if n < 2 else range(1, n))]
    chosen = [pairs[(shift * 7 + i * 11) % len(pairs)] for i in range(count)]
    return [torch.tensor(v, dtype=torch.int32) for v in zip(*chosen)]


@program.check
def test_reductions():
    for dtype, per_row in itertools.product(DTYPES, (False, True)):
        w = weights(dtype)
        if per_row:
            w = [t for t in w if t.dim()] + [torch.zeros(0, 4, dtype=w[0].dtype), torch.zeros(4, 0, dtype=w[0].dtype)]
        size = [t.shape[0] if per_row else 1 for t in w]
        for name, same in (("absmax", exact), ("absmean", close)):
            got = getattr(torch.ops.quantops, name)(w, per_row).split(size)
            for i, (g, t) in enumerate(zip(got, w)):
                want = getattr(reference, name)(t, per_row=per_row).reshape(-1)
                same(g, want, f"{name} {dtype} per_row={per_row} w[{i}]")
    for dtype, size in itertools.product(DTYPES, (7, 20000)):  # sums past the largest number
        top = torch.finfo(getattr(torch, dtype)).max
        w = torch.full((4, size), top, dtype=getattr(torch, dtype))
        w[1] /= 2
        w[2, 1::2], w[3, -1] = 1, torch.inf
        for got, want in (
            (torch.ops.quantops.absmean([w], True), reference.absmean(w, per_row=True)),
            (torch.ops.quantops.absmean([w[:3]], False), reference.absmean(w[:3]).reshape(1)),
        ):
            close(got, want, f"absmean near the top {dtype} {size}")


@program.check
def test_round_clamp():
    for case, (dtype, per_row, grid, signed) in enumerate(
        itertools.product(DTYPES, (False, True), GRIDS, (False, True))
    ):
        if grid == "sign" and not signed:
            continue
        w = weights(dtype)
        s = cases.scales(w, per_row)
        bits, _ = _bits(len(w), case, grid)
        for out in DTYPES:
            out = getattr(torch, out)
            q = torch.ops.quantops.round_clamp(w, s, bits, GRIDS.index(grid), signed, False, out)
            for i, t in enumerate(w):
                want = reference.round_clamp(t, s[i], bits[i], signed=signed, grid=grid, out_dtype=out)
                exact(q[i], want, f"{dtype} to {out} {grid} signed={signed} bits={bits[i]} w[{i}]")
                laid_out_like(q[i], t)


@program.check
def test_msq_and_its_sums():
    ops = torch.ops.quantops
    for case, (dtype, per_row, grid) in enumerate(itertools.product(DTYPES, (False, True), GRIDS)):
        w = weights(dtype)
        s = cases.scales(w, per_row)
        bits, k = _bits(len(w), case, grid)
        want = [reference.msq(*a, grid=grid) for a in zip(w, s, bits, k)]
        for out in DTYPES:
            out = getattr(torch, out)
            q, *sums = ops.msq(w, s, bits, k, GRIDS.index(grid), False, out)
            for i, t in enumerate(w):
                what = f"{dtype} to {out} {grid} bits={bits[i]} k={k[i]} w[{i}]"
                value = (
                    want[i][0] if out == t.dtype else reference.round_clamp(t, s[i], bits[i], grid=grid, out_dtype=out)
                )
                exact(q[i], value, what)
                laid_out_like(q[i], t)
                close(sums[0][i], want[i][1], f"penalty {what}")
                exact(sums[1][i], want[i][2], f"nonzero {what}")
                close(sums[2][i], want[i][3], f"sq_error {what}")
        for again, first in zip(ops.lsb_stats(w, s, bits, k, GRIDS.index(grid), False), sums):
            close(again, first, "lsb_stats")


@program.check
def test_every_width_and_k():
    ops, one = torch.ops.quantops, torch.tensor(1.0)
    edges = torch.arange(-512, 513).div(512)  # every bin edge of every narrow width
    for index, grid in enumerate(GRIDS):
        pairs = [(n, k) for n in range(reference.uniform.most_bits(grid) + 1) for k in range(max(n, 1))]
        bits, k = (torch.tensor(v, dtype=torch.int32) for v in zip(*pairs))
        w = [torch.cat([edges, torch.randn(41) * 0.4, torch.tensor([0.0, -0.0, torch.nan])]) for _ in pairs]
        b = ops.lsb(w, [one] * len(w), bits, k, index)
        q, *sums = ops.msq(w, [one] * len(w), bits, k, index, False, torch.float32)
        for i, pair in enumerate(pairs):
            exact(b[i], reference.lsb(w[i], one, *pair, grid=grid), f"lsb {grid} {pair}")
            want = reference.msq(w[i], one, *pair, grid=grid)
            exact(q[i], want[0], f"q {grid} {pair}")
            exact(sums[1][i], want[2], f"nonzero {grid} {pair}")
            for got, value in zip(sums[::2], want[1::2]):
                close(got[i], value, f"sums {grid} {pair}")


@program.check
def test_lsb():
    for case, (dtype, per_row, grid) in enumerate(itertools.product(DTYPES, (False, True), ("dyadic", "sign"))):
        w = weights(dtype)
        s = cases.scales(w, per_row)
        bits, k = _bits(len(w), case, grid)
        for i, b in enumerate(torch.ops.quantops.lsb(w, s, bits, k, GRIDS.index(grid))):
            want = reference.lsb(w[i], s[i], bits[i], k[i], grid=grid)
            exact(b, want, f"{dtype} {grid} bits={bits[i]} k={k[i]} w[{i}]")
            laid_out_like(b, w[i])


@program.check
def test_encode_and_decode():
    kinds = [(signed, rule, None) for signed in (False, True) for rule in range(3)] + [(True, 0, "sign")]
    for case, (dtype, per_row, (signed, rule, sign)) in enumerate(itertools.product(DTYPES, (False, True), kinds)):
        w = weights(dtype)
        s = cases.scales(w, per_row)
        bits, _ = _bits(len(w), case, sign)
        codes = torch.ops.quantops.encode(w, s, bits, rule, GRIDS.index(sign or "full"), signed)
        for i, c in enumerate(codes):
            want = reference.encode(w[i], s[i], bits[i], rule=reference.uniform.RULES[rule], grid=sign, signed=signed)
            exact(c, want, f"encode {dtype} rule={rule} {sign} signed={signed} bits={bits[i]} w[{i}]")
            laid_out_like(c, w[i])
            if c.numel() > 2:
                c.view(-1).select(0, 0).fill_([-1, 2**16, 2**31 - 1, -(2**31)][i % 4]) if c.is_contiguous() else None
        for j, out in enumerate(DTYPES):
            out, grid = getattr(torch, out), sign or GRIDS[(case + case // 2 + j) % 2]
            q = torch.ops.quantops.decode(codes, s, bits, GRIDS.index(grid), signed, out)
            for i, c in enumerate(codes):
                want = reference.decode(c, s[i], bits[i], grid=grid, signed=signed, dtype=out)
                exact(q[i], want, f"decode {dtype} to {out} {grid} signed={signed} bits={bits[i]} codes[{i}]")
                laid_out_like(q[i], c)


@program.check
def test_backward():
    case = 0
    for dtype, per_row in itertools.product(DTYPES, (False, True)):
        w = weights(dtype)
        s = cases.scales(w, per_row)
        r = torch.linspace(-2, 2, len(w), dtype=s[0].dtype)
        for grad_dtype, penalty, scale_grad in (
            *itertools.product(DTYPES, (False, True), (False, True)),
            (None, True, False),
            (None, True, True),
        ):
            case += 1
            grid = GRIDS[case % 3]
            signed = penalty or grid == "sign" or case % 4 > 0  # LSBs are those of signed weights
            bits, k = _bits(len(w), case, grid)
            grad = []
            if grad_dtype:
                grad = [torch.randn(t.shape).to(getattr(torch, grad_dtype)) for t in w]
                grad[0] = torch.randn(()).to(grad[0].dtype).expand(w[0].shape)  # the gradient of a sum
                grad[-1].view(-1)[::5] = torch.tensor(float("nan"))
            gw, gs = torch.ops.quantops.uniform_backward(
                grad, r if penalty else None, w, s, bits, k, GRIDS.index(grid), signed, scale_grad
            )
            assert len(gs) == (len(w) if scale_grad else 0)
            for i, t in enumerate(w):
                what = f"{dtype} grad {grad_dtype} r={penalty} {grid} signed={signed} bits={bits[i]} w[{i}]"
                want_w, _ = reference.uniform_backward(
                    grad[i] if grad else None,
                    r[i] if penalty else None,
                    t,
                    s[i],
                    bits[i],
                    k[i],
                    grid=grid,
                    signed=signed,
                )
                exact(gw[i], want_w, what)
                laid_out_like(gw[i], t)
                if scale_grad:
                    cases.check_scale_grad(gs[i], grad[i] if grad else None, t, s[i], bits[i], grid, signed, what)


@program.check
def test_add_lsb_grad():
    for case, (dtype, per_row, grid) in enumerate(itertools.product(DTYPES, (False, True), ("dyadic", "sign"))):
        w = weights(dtype)
        s = cases.scales(w, per_row)
        w = [t.contiguous() if not t.is_contiguous() and t.dim() == 2 else t for t in w]
        bits, k = _bits(len(w), case, grid)
        for strength in (0.0, 0.37, -1e30, float("inf")):
            strength = torch.linspace(0.5, 1, len(w), dtype=s[0].dtype) * strength
            grad = [torch.empty_like(t).copy_(torch.randn(t.shape)) for t in w]
            want = [reference.add_lsb_grad(g, *a, grid=grid) for g, *a in zip(grad, strength, w, s, bits, k)]
            torch.ops.quantops.add_lsb_grad_(grad, w, s, bits, k, GRIDS.index(grid), strength)
            for i, g in enumerate(grad):
                exact(g, want[i], f"{dtype} {grid} strength={strength[i]} bits={bits[i]} k={k[i]} w[{i}]")


@program.check
def test_unaligned_memory_and_its_neighbours():
    """Every alignment of input and output; what lies beside an output stays as it was."""
    for w_dtype, q_dtype in itertools.product((torch.float32, torch.bfloat16, torch.float64), repeat=2):
        for at_w, at_q, size in itertools.product(range(0, 9), (0, 1, 2, 4, 7), (1, 6, 31, 1030)):
            w = torch.randn(size + 16).to(w_dtype)[at_w : at_w + size]
            memory = torch.full((size + 16,), 7.0, dtype=q_dtype)
            q, s, bits = (
                memory[at_q : at_q + size],
                torch.ones((), dtype=torch.promote_types(w_dtype, torch.float32)),
                5,
            )
            bits = torch.tensor([bits], dtype=torch.int32)
            sums = [torch.empty(1, dtype=t) for t in (s.dtype, torch.int64, s.dtype)]
            for run in (
                lambda: torch.ops.quantops.round_clamp_out([w], [s], bits, 0, True, [q]),
                lambda: torch.ops.quantops.msq_out([w], [s], bits, bits // 2, 0, [q], *sums),
            ):
                q.fill_(float("nan"))
                run()
                what = f"{w_dtype} at {at_w} to {q_dtype} at {at_q}, {size}"
                exact(q, reference.round_clamp(w, s, 5, out_dtype=q_dtype), what)
                assert (memory[:at_q] == 7).all() and (memory[at_q + size :] == 7).all(), f"neighbours of {what}"
            want = reference.msq(w, s, 5, 2)
            for got, value in zip(sums, want[1:]):
                close(got[0], value, f"sums of {w_dtype} at {at_w}, {size}")


@program.check
def test_rows_of_every_length():
    for dtype in (torch.float32, torch.bfloat16):
        w = [
            torch.randn(rows, inner).to(dtype)
            for rows, inner in itertools.product((1, 2, 37), (1, 3, 8, 27, 32, 147, 1023, 1024, 1025, 3000))
        ]
        s = [t.float().abs().amax(1) * 0.8 for t in w]
        bits, k = _bits(len(w), 3)
        q, *sums = torch.ops.quantops.msq(w, s, bits, k, 1, False, dtype)
        grad = [torch.randn(t.shape).to(dtype) for t in w]
        gw, gs = torch.ops.quantops.uniform_backward(grad, None, w, s, bits, k, 1, True, True)
        for i, t in enumerate(w):
            want = reference.msq(t, s[i], bits[i], k[i], grid="full")
            exact(q[i], want[0], f"q {t.shape}")
            close(sums[0][i], want[1], f"penalty {t.shape}")
            exact(sums[1][i], want[2], f"nonzero {t.shape}")
            close(sums[2][i], want[3], f"sq_error {t.shape}")
            want = reference.uniform_backward(grad[i], None, t, s[i], bits[i], k[i], grid="full")
            exact(gw[i], want[0], f"grad_w {t.shape}")
            cases.check_scale_grad(gs[i], grad[i], t, s[i], bits[i], "full", True, f"grad_scale {t.shape}")


@program.check
def test_long_lists():
    """More tensors than the tables of one launch hold, empty ones among them."""
    for count in (61, 1001):
        w = [torch.randn((i * 37) % 90 if i % 7 else 0) for i in range(count)]
        s = [t.abs().amax() if t.numel() else torch.tensor(1.0) for t in w]
        absmax = torch.ops.quantops.absmax(w, False)
        bits, k = _bits(count, 1)
        q, *sums = torch.ops.quantops.msq(w, s, bits, k, 0, False, torch.float32)
        for i, t in enumerate(w):
            exact(absmax[i], reference.absmax(t), f"absmax w[{i}] of {count}")
            want = reference.msq(t, s[i], bits[i], k[i])
            exact(q[i], want[0], f"q[{i}] of {count}")
            close(sums[0][i], want[1], f"penalty[{i}] of {count}")
            exact(sums[1][i], want[2], f"nonzero[{i}] of {count}")
            close(sums[2][i], want[3], f"sq_error[{i}] of {count}")


@program.check
def test_longer_segments():
    """A list of more than 2M elements, which is cut into longer runs; its sums are the same bits every time."""
    w = [torch.randn(size).bfloat16() for size in ((4_500_003,), (3, 70001), (5,))]
    joined = torch.ops.quantops.absmax(w, False)
    s = list(joined.unbind())
    bits, k = (torch.tensor(v, dtype=torch.int32) for v in ([4, 8, 3], [1, 2, 1]))
    q, *sums = torch.ops.quantops.msq(w, s, bits, k, 0, False, torch.bfloat16)
    for i, t in enumerate(w):
        exact(s[i], reference.absmax(t), "absmax")
        want = reference.msq(t, s[i], bits[i], k[i])
        exact(q[i], want[0], f"q[{i}]")
        for got, value in zip(sums, want[1:]):
            close(got[i], value, f"sums of w[{i}]")
    for a, b in zip(sums, torch.ops.quantops.lsb_stats(w, [joined], bits, k, 0, False)):
        exact(a, b, "the same sums again, of scales in one tensor")


@program.check
def test_values_out_of_range():
    """NaN for that tensor (integers: INVALID, a count: -1), as in the reference, and for no other."""
    nan, inf = float("nan"), float("inf")
    bad = [
        (8, 1, 1.0),
        (17, 1, 1.0),
        (-1, 0, 1.0),
        (2**31 - 1, 1, 1.0),
        (4, 4, 1.0),
        (4, -1, 1.0),
        (4, 2**31 - 1, 1.0),
        (0, 1, 1.0),
        (4, 1, nan),
        (4, 1, -1.0),
        (4, 1, inf),
        (4, 1, -inf),
        (3, 1, 2.0),
    ]
    ops = torch.ops.quantops
    for shape in ((6, 50), (3, 0), (0,)):
        bits, k = (torch.tensor([b[i] for b in bad], dtype=torch.int32) for i in (0, 1))
        for per_row in (False, True):
            w = [torch.randn(shape) for _ in bad]
            s = [torch.ones(shape[0] if per_row else 1) for _ in bad]
            for t, b in zip(s, bad):
                t[-1:] = b[2]
            q, *sums = ops.msq(w, s, bits, k, 0, False, torch.float32)
            b, c = ops.lsb(w, s, bits, k, 0), ops.encode(w, s, bits, 0, 0, True)
            d = ops.decode([torch.ones_like(t, dtype=torch.int32) for t in w], s, bits, 0, True, torch.float32)
            grad = [torch.randn(shape) for _ in bad]
            gw, gs = ops.uniform_backward(grad, torch.ones(len(w)), w, s, bits, k, 0, True, True)
            ops.add_lsb_grad_(added := [g.clone() for g in grad], w, s, bits, k, 0, torch.full((len(w),), 0.5))
            for i, (t, what) in enumerate(zip(w, bad)):
                want = reference.msq(t, s[i], bits[i], k[i])
                what = f"{what} {shape} per_row={per_row}"
                exact(q[i], want[0], f"q {what}")
                for got, value in zip(sums, want[1:]) if s[i].numel() else ():
                    close(got[i], value, f"sums {what}")
                exact(b[i], reference.lsb(t, s[i], bits[i], k[i]), f"lsb {what}")
                exact(c[i], reference.encode(t, s[i], bits[i]), f"encode {what}")
                exact(d[i], reference.decode(torch.ones_like(t, dtype=torch.int32), s[i], bits[i]), f"decode {what}")
                want = reference.uniform_backward(grad[i], torch.tensor(1.0), t, s[i], bits[i], k[i])
                exact(gw[i], want[0], f"grad_w {what}")
                if t.numel() and not (k[i] == 0 or 1 <= k[i] < bits[i]):  # k says nothing about q alone: no matter
                    assert gs[i].isnan().all(), f"grad_scale {what}"
                else:
                    torch.testing.assert_close(gs[i], want[1], rtol=1e-6, atol=1e-6, equal_nan=True)
                exact(added[i], reference.add_lsb_grad(grad[i], 0.5, t, s[i], bits[i], k[i]), f"add_lsb_grad {what}")


@program.check
def test_errors():
    ops = torch.ops.quantops
    w, s, n = [torch.randn(4, 6)], [torch.ones(())], torch.tensor([4], dtype=torch.int32)
    f32 = torch.float32

    def out(q, penalty=None):
        penalty = torch.empty(1) if penalty is None else penalty
        return ops.msq_out(w, s, n, n, 0, q, penalty, torch.empty(1, dtype=torch.int64), torch.empty(1))

    raises(
        {
            "w: expected dtype float32": lambda: ops.absmax([w[0].int()], False),
            "w: expected one dtype, got float32 in entry 0 and float64": lambda: ops.absmax(
                [w[0], w[0].double()], False
            ),
            "w: expected at least one dimension": lambda: ops.absmax([torch.tensor(1.0)], True),
            "scale: expected a list with one entry per weight (1), got 2": lambda: ops.lsb(w, s * 2, n, n, 0),
            "scale: expected dtype float32, got float64": lambda: ops.lsb(w, [s[0].double()], n, n, 0),
            "scale: expected one element or one per row (4)": lambda: ops.lsb(w, [torch.ones(6)], n, n, 0),
            "scale: expected a contiguous tensor": lambda: ops.lsb(w, [torch.ones(8)[::2]], n, n, 0),
            "bits: expected dtype int32, got int64": lambda: ops.encode(w, s, n.long(), 0, 0, True),
            "bits: expected 1 element, got shape (2,)": lambda: ops.encode(w, s, n.repeat(2), 0, 0, True),
            "bits: expected device cpu, where the weights are, got meta": lambda: (
                torch.ops.quantops.encode.default.redispatch(
                    torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), w, s, n.to("meta"), 0, 0, True
                )
            ),
            "k: expected 1 element": lambda: ops.lsb(w, s, n, n.repeat(3), 0),
            "rule: expected 0..2, got 3": lambda: ops.encode(w, s, n, 3, 0, True),
            "grid: expected 0..2, got 3": lambda: ops.lsb(w, s, n, n, 3),
            "grid: expected 'dyadic' or 'full' for unsigned values": lambda: ops.round_clamp(
                w, s, n, 2, False, False, f32
            ),
            "rule: expected 'round_clamp' on the sign grid, got 1": lambda: ops.encode(w, s, n, 1, 2, True),
            "dtype: expected float32": lambda: ops.round_clamp(w, s, n, 0, True, False, torch.int32),
            "codes: expected dtype int32, got float32": lambda: ops.decode(w, s, n, 0, True, f32),
            "q: expected a list with one entry per weight (1), got 2": lambda: out(w * 2),
            "q: expected the weight's shape (4, 6), got (6, 4)": lambda: out([torch.empty(6, 4)]),
            "q: expected a dense tensor with strides (6, 1), got (1, 4)": lambda: out([torch.empty(6, 4).t()]),
            "penalty: expected 1 element, got shape (2,)": lambda: out([torch.empty(4, 6)], torch.empty(2)),
            "grad: expected dtype float32, got float64": lambda: ops.add_lsb_grad_(
                [w[0].double()], w, s, n, n, 0, torch.tensor(1.0)
            ),
            "grad: expected a dense tensor with strides (6, 1)": lambda: ops.add_lsb_grad_(
                [torch.empty(6, 4).t()], w, s, n, n, 0, torch.tensor(1.0)
            ),
            "strength: expected 1 element": lambda: ops.add_lsb_grad_([w[0].clone()], w, s, n, n, 0, torch.ones(2)),
            "grad: expected the weight's shape (4, 6), got (5,)": lambda: ops.uniform_backward(
                [torch.ones(5)], None, w, s, n, n, 0, True, False
            ),
            "grad_penalty: expected 1 element": lambda: ops.uniform_backward(
                [], torch.ones(2), w, s, n, n, 0, True, False
            ),
        }
    )
