"""The CUDA kernels of family ``categorical`` equal the C++ ones, which test_categorical.py checks: classes and draws
bit for bit; soft values, gradients and sums to the bound of quantops/reference/categorical.py. See emulation.py for
the how. The two stand side by side in one process: the emulated ones under a dispatch key that no CPU tensor has.
"""

import itertools

import torch

import cases
from categorical_cases import KINDS, RATIOS, interval, make_gates
from emulation import DTYPES, Program, exact, laid_out_like, raises
from quantops import reference
from quantops.reference.categorical import GRADS, MODES

HARD, SOFT, SAMPLE = range(3)
WINNER, OF_SOFT = range(2)
# (mode, grad_of) of every kind of backward kernel: the last takes the draws of one and the sums of the other.
BACKWARD = ((HARD, WINNER), (SAMPLE, WINNER), (SOFT, WINNER), (SAMPLE, OF_SOFT))

program = Program(__file__, "categorical", beside_cpp=True)
emulated = program.emulated


def _lists(dtype, per_row, most_bits, kind, seed=0):
    """(x, alpha, sigma, bits, gates or []) of many shapes, the last with NaN and infinities."""
    x = [
        t if t.numel() < 3000 else t[3:1500] if t.dim() == 1 else t[:2, :1200]
        for t in cases.weights(getattr(torch, dtype))
    ]
    generator = torch.Generator().manual_seed(seed)
    acc = torch.float64 if dtype == "float64" else torch.float32
    rows = [t.shape[0] if per_row and t.dim() else 1 for t in x]
    alpha = [(torch.rand(r, generator=generator) + 0.05).to(acc) for r in rows]
    # alpha/sigma from 0.03 to 100
    sigma = [a * (10 ** (3.5 * torch.rand(1, generator=generator) - 2)).to(acc) for a in alpha]
    bits = torch.randint(0, most_bits + 1, (len(x),), generator=generator, dtype=torch.int32)
    gates = [] if kind == "none" else [make_gates(kind, int(n), acc, generator) for n in bits]
    return x, alpha, sigma, bits, gates


def _unit(t):
    """Four units of rounding."""
    return 4 * torch.finfo(t.dtype).eps


def _close(got, want, room, what):
    """To ``room``, and to the rounding of what is stored."""
    torch.testing.assert_close(
        got, want, rtol=2 * torch.finfo(got.dtype).eps, atol=room, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def _check_values(args, mode, signed, dtype, what):
    x, alpha, sigma, bits, gates = args
    options = bits, gates, torch.tensor([7]), mode, WINNER, signed, dtype
    got = emulated("categorical", x, alpha, sigma, *options)
    for i, want in enumerate(torch.ops.quantops.categorical(x, alpha, sigma, *options)):
        if mode == SOFT:
            room = _unit(alpha[i]) * float(alpha[i].sum()) * 2 ** int(bits[i])
            _close(got[i], want, room, f"{what} bits={bits[i]} x[{i}]")
        else:
            exact(got[i], want, f"{what} bits={bits[i]} x[{i}]")
        laid_out_like(got[i], x[i])


def _check_gradients(g, args, mode, grad_of, signed, what, wanted=(True, True)):
    """``wanted``: gradients of alpha and sigma, of gates."""
    x, alpha, sigma, bits, gates = args
    options = bits, gates, torch.tensor([7]), mode, grad_of, signed, *wanted
    got = emulated("categorical_backward", g, x, alpha, sigma, *options)
    expected = torch.ops.quantops.categorical_backward(g, x, alpha, sigma, *options)
    q = torch.ops.quantops.categorical(x, alpha, sigma, *options[:-2], torch.float64)
    assert [len(v) for v in got] == [len(v) for v in expected]
    for i, t in enumerate(x):
        where = f"{what} bits={bits[i]} x[{i}]"
        laid_out_like(got[0][i], t)
        if not t.numel():
            continue
        unit, size = _unit(alpha[i]), g[i].double().nan_to_num().abs()
        j = float((q[i].reshape(len(alpha[i]), -1) / alpha[i].double()[:, None]).nan_to_num().abs().amax().clamp(min=1))
        beta = max(1.0, float((alpha[i] / sigma[i]).amax()))
        # Gates of 1 count as none in the C++ kernels, where no gradient of them is wanted.
        one = mode == HARD and not wanted[1] and bool(gates) and bool((gates[i][1:] == 1).all())
        if mode == SOFT or grad_of == OF_SOFT or one or (mode == HARD and not gates):
            steep = j * beta * (1 + j * beta / 256)  # x - alpha c is exact to 2^-32 of x
            _close(got[0][i], expected[0][i], unit * float(size.amax()) * steep, where)
        else:
            exact(got[0][i] + 0, expected[0][i] + 0, where)  # which zero is left open
        room = unit * float(size.sum()) * j
        for a, b in zip(got[1:3], expected[1:3]):
            if a:
                assert a[i].shape == b[i].shape == alpha[i].shape and a[i].dtype == b[i].dtype
                torch.testing.assert_close(
                    a[i], b[i], rtol=unit, atol=room * j * beta * beta, equal_nan=True, msg=lambda m: f"{where}: {m}"
                )
        if got[3]:
            assert got[3][i].shape == expected[3][i].shape and got[3][i].dtype == expected[3][i].dtype
            for n, (a, b) in enumerate(zip(got[3][i], expected[3][i])):
                least = float(gates[i][n]) or 1.0
                torch.testing.assert_close(
                    a,
                    b,
                    rtol=unit,
                    atol=room * float(alpha[i].amax()) / least,
                    equal_nan=True,
                    msg=lambda m: f"{where} gates[{n}]: {m}",
                )


@program.check
def test_values():
    for case, (dtype, per_row, signed, kind, mode) in enumerate(
        itertools.product(DTYPES, (False, True), (True, False), KINDS, (HARD, SOFT, SAMPLE))
    ):
        args = _lists(dtype, per_row, 8 if mode == SOFT or case % 2 else 16, kind, case)
        for out in DTYPES if mode == HARD and signed else (dtype, DTYPES[case % 4]):
            _check_values(
                args,
                mode,
                signed,
                getattr(torch, out),
                f"{dtype} to {out} per_row={per_row} signed={signed} gates={kind} mode={mode}",
            )


@program.check
def test_gradients():
    for case, (dtype, per_row, kind, (mode, grad_of)) in enumerate(
        itertools.product(DTYPES, (False, True), KINDS, BACKWARD)
    ):
        soft, signed = mode == SOFT or grad_of == OF_SOFT, case // 4 % 3 > 0
        args = _lists(dtype, per_row, 8 if soft or case % 2 else 16, kind, case)
        for grad_dtype in (dtype, DTYPES[(case + case // 4) % 4]):
            g = [torch.randn(t.shape).to(getattr(torch, grad_dtype)) for t in args[0]]
            g[0] = torch.randn(()).to(g[0].dtype).expand(g[0].shape)  # the gradient of a sum
            g[5] = g[5].contiguous(memory_format=torch.channels_last)  # not laid out as its x
            wanted = ((True, True), (False, True), (True, False), (False, False))[case // 2 % 4]
            what = f"{dtype} grad {grad_dtype} per_row={per_row} signed={signed} gates={kind} mode={mode} of={grad_of}"
            _check_gradients(g, args, mode, grad_of, signed, f"{what} wanted={wanted}", wanted)


@program.check
def test_every_width():
    """x on and beside every class of every width, and far outside."""
    generator = torch.Generator().manual_seed(3)
    kinds = list(zip(KINDS * 2, RATIOS + RATIOS[:1], (True, False) * 4))
    for bits, (kind, ratio, signed) in itertools.product(range(1, 17), kinds):
        gates = make_gates(kind, bits, torch.float32, generator)
        low, high = interval(bits, signed, gates)
        v = torch.linspace(low, high, min(high - low + 1, 256)).round()
        v = torch.cat([v, v + 0.5, v + 0.49, torch.tensor([-1e6, 1e6, 3e38])])
        alpha, sigma, n = torch.tensor([0.7]), torch.tensor([0.7 / ratio]), torch.tensor([bits], dtype=torch.int32)
        args = [v * alpha], [alpha], [sigma], n, [] if gates is None else [gates]
        for mode in (HARD, SOFT, SAMPLE) if bits <= 8 else (HARD, SAMPLE):
            what = f"gates={kind} alpha/sigma={ratio} signed={signed} mode={mode}"
            _check_values(args, mode, signed, torch.float32, what)
            _check_gradients([torch.randn(v.shape)], args, mode, WINNER, signed, what)


@program.check
def test_rows_of_every_length_and_alignment():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = [
            torch.randn(rows, inner).to(dtype)
            for rows, inner in itertools.product((1, 2, 37), (1, 3, 8, 27, 32, 147, 1023, 1024, 1025))
        ]
        x += [torch.randn(1100).to(dtype)[at : at + size] for at in range(9) for size in (1, 6, 31, 1030)]
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        alpha = [torch.rand(t.shape[0] if t.dim() == 2 else 1).to(acc) + 0.2 for t in x]
        sigma = [a * 0.4 for a in alpha]
        bits = torch.full((len(x),), 4, dtype=torch.int32)
        g = [torch.randn(t.numel() + 4).to(dtype)[i % 4 : i % 4 + t.numel()].view_as(t) for i, t in enumerate(x)]
        for gates in ([], [torch.tensor([1.0, 0.8, 0.9, 0.7], dtype=acc)] * len(x)):
            args = x, alpha, sigma, bits, gates
            for mode in (HARD, SOFT, SAMPLE):
                _check_values(args, mode, True, dtype, f"{dtype} mode={mode}")
                _check_gradients(g, args, mode, WINNER, True, f"{dtype} mode={mode}")


@program.check
def test_long_lists():
    """More tensors than the tables of one launch hold, empty ones among them; the same bits every time."""
    for count in (32, 33, 270):
        x = [torch.randn((i * 37) % 90 if i % 7 else 0) for i in range(count)]
        alpha, sigma = [torch.rand(1) + 0.1 for _ in x], [torch.rand(1) + 0.1 for _ in x]
        bits = 1 + torch.arange(count, dtype=torch.int32) % 8
        args = x, alpha, sigma, bits, [torch.linspace(1, 0.6, int(n)) for n in bits]
        g = [torch.randn(t.shape) for t in x]
        for mode in (HARD, SOFT, SAMPLE):
            _check_values(args, mode, True, torch.float32, f"{count} tensors, mode={mode}")
            _check_gradients(g, args, mode, WINNER, True, f"{count} tensors, mode={mode}")
            options = *args[3:], torch.tensor([7]), mode, WINNER, True, True, True
            first, again = (emulated("categorical_backward", g, *args[:3], *options) for _ in range(2))
            for a, b in zip(sum(first, []), sum(again, [])):
                exact(a, b, "the same sums again")


@program.check
def test_long_tensors():
    """Many items of one scale, whose sums a second kernel adds up, and a long list of draws."""
    x = [torch.randn(60_001), torch.randn(3, 5000), torch.randn(7)]
    g = [torch.randn(t.shape) for t in x]
    alpha = [torch.tensor([0.3]), torch.rand(3) + 0.3, torch.tensor([0.4])]
    sigma = [torch.full_like(a, 0.2) for a in alpha]
    bits = torch.tensor([4, 3, 8], dtype=torch.int32)
    for gates in ([], [torch.linspace(1, 0.5, int(n)) for n in bits]):
        for mode, grad_of in BACKWARD:
            args = x, alpha, sigma, bits, gates
            _check_values(args, mode, True, torch.bfloat16, f"mode={mode}")
            _check_gradients(g, args, mode, grad_of, True, f"mode={mode} of={grad_of}")


@program.check
def test_values_out_of_range():
    """NaN for that scale, or that tensor, as in the reference, and for no other."""
    nan, inf = float("nan"), float("inf")
    bad = [(v, 1.0, 3, None) for v in (0.0, -1.0, nan, inf, -inf, 1e-39)]
    bad += [(1.0, v, 3, None) for v in (0.0, -0.0, -1.0, nan, inf)]
    bad += [(1.0, 1.0, n, None) for n in (-1, 17, 9, 2**31 - 1, -(2**31), 0, 2)]
    bad += [
        (1.0, 1.0, 3, v)
        for v in (
            (1.0, 0.5, 1.5),
            (1.0, -0.1, 1.0),
            (1.0, nan, 1.0),
            (2.0, 0.5, 0.5),
            (1.0, 0.0, 0.5),
            (1.0, 0.5),
            (1.0,) * 4,
            (),
        )
    ]
    for shape, (mode, grad_of) in itertools.product(((6, 50), (3, 0), (0,)), BACKWARD):
        soft = mode == SOFT or grad_of == OF_SOFT
        for alpha, sigma, n, gates in bad:
            x, g = torch.randn(3, *shape).unbind(), torch.randn(3, *shape).unbind()
            rows = shape[0] if len(shape) > 1 else 1
            a, s = ([torch.ones(rows) for _ in x] for _ in range(2))
            a[1][-1:], s[1][-1:] = alpha, sigma
            bits, seed = torch.tensor([3, n, 3], dtype=torch.int32), torch.tensor([7])
            z = [] if gates is None else [torch.ones(3), torch.tensor(gates), torch.ones(3)]
            what = f"alpha={alpha} sigma={sigma} bits={n} gates={gates} {shape} mode={mode} of={grad_of}"
            q = emulated("categorical", x, a, s, bits, z, seed, mode, grad_of, True, torch.float32)
            back = emulated("categorical_backward", g, x, a, s, bits, z, seed, mode, grad_of, True, True, True)
            for i, t in enumerate(x):
                args = t, a[i], s[i], bits[i]
                options = dict(gates=z[i] if z else None, mode=MODES[mode], seed=seed, offset=i * t.numel())
                # The reference of soft gradients alone refuses more than 8 bits: forward passes of other modes go on.
                if not (soft and bits[i] > 8):
                    want = reference.categorical(*args, **options)
                    assert torch.equal(q[i].isnan(), want.isnan()), what
                    if mode == HARD:
                        exact(q[i] + 0, want + 0, what)  # the reference has -0, too
                want = reference.categorical_backward(g[i], *args, **options, grad_of=GRADS[grad_of])
                for name, have, value in zip(("x", "alpha", "sigma", "gates"), back, want):
                    if not have:
                        continue
                    # Of gates that are out of range all gradients are NaN, in the reference all but the first.
                    known = name != "gates" or i != 1 or (len(gates) == n and all(0 <= v <= 1 for v in gates))
                    expected = value.isnan() if known else torch.ones_like(value, dtype=torch.bool)
                    assert torch.equal(have[i].isnan(), expected), f"{name}: {what}"


@program.check
def test_errors():
    x, s, n = [torch.randn(4, 6)], [torch.ones(1)], torch.tensor([3], dtype=torch.int32)

    def forward(x=x, alpha=s, sigma=s, bits=n, gates=(), seed=None, mode=HARD, grad_of=WINNER, dtype=torch.float32):
        return emulated("categorical", x, alpha, sigma, bits, list(gates), seed, mode, grad_of, True, dtype)

    def backward(grad):
        return emulated("categorical_backward", grad, x, s, s, n, [], None, HARD, WINNER, True, True, True)

    raises(
        {
            "x: expected dtype float32": lambda: forward(x=[x[0].int()]),
            "alpha: expected dtype float32, got float64": lambda: forward(alpha=[s[0].double()]),
            "sigma: expected one element or one per row (4)": lambda: forward(sigma=[torch.ones(6)]),
            "sigma: expected as many elements as alpha (1), got 4": lambda: forward(sigma=[torch.ones(4)]),
            "bits: expected dtype int32, got int64": lambda: forward(bits=n.long()),
            "bits: expected 1 element": lambda: forward(bits=n.repeat(2)),
            "gates: expected a list with one entry per tensor (1), got 2": lambda: forward(gates=[torch.ones(3)] * 2),
            "gates: expected dtype float32, got float64": lambda: forward(gates=[torch.ones(3).double()]),
            "seed: expected an int64 tensor of one element for mode sample, got none": lambda: forward(mode=SAMPLE),
            "seed: expected dtype int64, got int32": lambda: forward(mode=SAMPLE, seed=n),
            "seed: expected 1 element": lambda: forward(mode=SAMPLE, seed=torch.tensor([1, 2])),
            "mode: expected 0, 1 or 2, got 3": lambda: forward(mode=3),
            "grad_of: expected 0 or 1, got 2": lambda: forward(grad_of=2),
            "dtype: expected float32": lambda: forward(dtype=torch.int32),
            "grad: expected the weight's shape (4, 6), got (5,)": lambda: backward([torch.ones(5)]),
            "grad: expected dtype float32": lambda: backward([torch.ones(4, 6, dtype=torch.int32)]),
        }
    )
