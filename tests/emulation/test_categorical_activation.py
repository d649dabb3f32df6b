"""The CUDA kernels of family ``categorical_activation`` equal the C++ ones, which
test_categorical_activation.py checks: bit for bit, and for sums, which are taken in another order, to their
rounding. As in test_cuda_emulated_categorical.py.
"""

import itertools

import torch

import cases
from emulation import DTYPES, Program, exact, laid_out_like, raises

program = Program(__file__, "categorical_activation", beside_cpp=True)
emulated = program.emulated


def _widths(bits, dtype, alpha=0.37, ratio=2.0):
    a = torch.tensor([alpha], dtype=torch.float64 if dtype == "float64" else torch.float32)
    return a, a / ratio, torch.tensor([bits], dtype=torch.int32)


def _check_gradient(got, want, g, args, grad_of, what):
    """Of soft sums bit for bit; the winner's, whose products and sums are fused in one alone, to their rounding."""
    if grad_of:
        return exact(got, want, what)
    room = 4 * torch.finfo(args[0].dtype).eps * 2 ** int(args[2]) * max(1.0, float(args[0] / args[1]))
    torch.testing.assert_close(
        got,
        want,
        rtol=2 * torch.finfo(got.dtype).eps,
        equal_nan=True,
        atol=room * float(g.double().nan_to_num().abs().amax()) if g.numel() else 0,
        msg=lambda m: f"{what}: {m}",
    )


def _check(x, g, args, grad_of, out, what, scale_grad=True):
    forward, backward = torch.ops.quantops.categorical_activation, torch.ops.quantops.categorical_activation_backward
    q, quarters = emulated("categorical_activation", x, *args, grad_of, out)
    for got, want in zip((q, quarters), forward(x, *args, grad_of, out)):
        exact(got, want, what)
    laid_out_like(q, x)
    options = g, q, quarters, *args, grad_of, scale_grad, x.dtype
    grad_x, sums = emulated("categorical_activation_backward", *options)
    want_x, want_sums = backward(*options)
    _check_gradient(grad_x, want_x, g, args, grad_of, what)
    assert grad_x.stride() == want_x.stride() and len(sums) == len(want_sums) == 2 * scale_grad
    ratio = max(1.0, float(args[0] / args[1]))
    unit, size = torch.finfo(args[0].dtype).eps, float(g.double().nan_to_num().abs().sum())
    room = 4 * unit * 2 ** int(args[2]) * ratio * ratio * size
    for a, b in zip(sums, want_sums):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=4 * unit, atol=room, equal_nan=True, msg=lambda m: f"{what}: {m}")


@program.check
def test_every_dtype_and_layout():
    for case, (dtype, out, grad_dtype) in enumerate(itertools.product(DTYPES, DTYPES, DTYPES)):
        for i, x in enumerate(cases.weights(getattr(torch, dtype))):
            x = x if x.numel() < 3000 else x[3:1500] if x.dim() == 1 else x[:2, :1200]
            g = torch.randn(x.shape).to(getattr(torch, grad_dtype))
            if i % 4 == 1:
                g = torch.randn(()).to(g.dtype).expand(x.shape)
            if x.dim() == 4 and i % 2:
                g = g.contiguous(memory_format=torch.channels_last)
            args = _widths((case + i) % 9, dtype, (0.37, 1e-3)[case % 2], (0.1, 2.0, 10.0)[i % 3])
            _check(x, g, args, i % 2, getattr(torch, out), f"{dtype} to {out}, grad {grad_dtype}, x[{i}]", i % 3 > 0)


@program.check
def test_every_width():
    """x on and beside every edge of every quarter, and far outside."""
    for bits, ratio, grad_of in itertools.product(range(9), (100, 10, 1, 0.1, 0.01), (0, 1)):
        v = torch.arange(-8, 4 * 2**bits + 8) / 4
        x = torch.cat([v, v + 0.01, v - 0.01, torch.tensor([-1e6, 1e6, 3e38, -torch.inf, torch.inf, torch.nan])]) * 0.7
        _check(x, torch.randn(x.shape), _widths(bits, "float32", 0.7, ratio), grad_of, x.dtype, f"{bits} bits, {ratio}")


@program.check
def test_lengths_and_alignments():
    lengths = *range(1, 12), 127, 128, 129, 1023, 1030
    for dtype, n, at in itertools.product(("float32", "bfloat16", "float64"), lengths, (0, 1, 3, 8)):
        x, g = (torch.randn(2, n + 8).to(getattr(torch, dtype)))[:, at : at + n].unbind()
        _check(x, g, _widths(4, dtype), 1, x.dtype, f"{dtype}, {n} from {at}")


@program.check
def test_long_tensors():
    """Many items, whose sums another kernel adds up; the same bits every time."""
    for dtype in ("float32", "bfloat16"):
        x, g = torch.randn(2, 60_001).to(getattr(torch, dtype)).unbind()
        args = _widths(3, dtype)
        _check(x, g, args, 1, x.dtype, dtype)
        q, quarters = emulated("categorical_activation", x, *args, 1, x.dtype)
        first, again = (
            emulated("categorical_activation_backward", g, q, quarters, *args, 1, True, x.dtype)[1] for _ in range(2)
        )
        for a, b in zip(first, again):
            exact(a, b, "the same sums again")


@program.check
def test_any_q_and_quarters():
    q = torch.tensor([*cases.SPECIAL, 1e9, -1e9, 0.2, 5.0])
    quarters = torch.randint(0, 256, (5,), dtype=torch.uint8)
    for bits, grad_of in itertools.product((1, 4, 8), (0, 1)):
        options = torch.ones_like(q), q, quarters, *_widths(bits, "float32"), grad_of, True, q.dtype
        want = torch.ops.quantops.categorical_activation_backward(*options)
        got = emulated("categorical_activation_backward", *options)[0]
        _check_gradient(got, want[0], options[0], options[3:6], grad_of, bits)


@program.check
def test_values_out_of_range():
    nan, inf = float("nan"), float("inf")
    bad = [(v, 1.0, 3) for v in (0.0, -1.0, nan, inf, -inf, 1e-39)] + [(1.0, v, 3) for v in (0.0, -1.0, nan, inf)]
    bad += [(1.0, 1.0, n) for n in (-1, 9, 17, 2**31 - 1, -(2**31))]
    x, g = torch.randn(2, 70).unbind()
    for (alpha, sigma, bits), grad_of in itertools.product(bad, (0, 1)):
        args = torch.tensor([alpha]), torch.tensor([sigma]), torch.tensor([bits], dtype=torch.int32)
        q, quarters = emulated("categorical_activation", x, *args, grad_of, x.dtype)
        grad_x, sums = emulated("categorical_activation_backward", g, x, quarters, *args, grad_of, True, x.dtype)
        assert all(t.isnan().all() for t in (q, grad_x, *sums)), (alpha, sigma, bits, grad_of)


@program.check
def test_errors():
    x, (alpha, sigma, bits) = torch.rand(4), _widths(4, "float32")
    quarters = torch.zeros(1, dtype=torch.uint8)

    def forward(x=x, alpha=alpha, sigma=sigma, bits=bits, grad_of=1, dtype=torch.float32):
        return emulated("categorical_activation", x, alpha, sigma, bits, grad_of, dtype)

    def backward(grad=x, q=x, quarters=quarters, dtype=torch.float32):
        return emulated("categorical_activation_backward", grad, q, quarters, alpha, sigma, bits, 1, True, dtype)

    forward(), backward()
    raises(
        {
            "x: expected dtype float32": lambda: forward(x=x.int()),
            "alpha: expected dtype float32, got float64": lambda: forward(alpha=alpha.double()),
            "alpha: expected 1 element": lambda: forward(alpha=torch.ones(2)),
            "sigma: expected dtype float32, got float64": lambda: forward(sigma=sigma.double()),
            "bits: expected dtype int32, got int64": lambda: forward(bits=bits.long()),
            "grad_of: expected 0 or 1, got 2": lambda: forward(grad_of=2),
            "dtype: expected float32": lambda: forward(dtype=torch.int32),
            "q: expected a dense tensor": lambda: backward(q=torch.ones(4, 2)[:, 0]),
            "quarters: expected 1 element": lambda: backward(quarters=torch.zeros(2, dtype=torch.uint8)),
            "quarters: expected dtype uint8": lambda: backward(quarters=torch.zeros(1)),
            "grad: expected the weight's shape (4,), got (5,)": lambda: backward(grad=torch.ones(5)),
            "alpha: expected dtype float64, got float32": lambda: backward(dtype=torch.float64),
        }
    )
