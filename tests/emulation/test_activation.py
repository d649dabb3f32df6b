"""The CUDA kernels of family ``activation`` equal the C++ ones, which test_activation.py checks: bit for bit, and for
sums, which are taken in another order, to their rounding. As in test_cuda_emulated_categorical.py.
"""

import itertools

import torch

import cases
from emulation import DTYPES, Program, exact, laid_out_like, raises

program = Program(__file__, "activation", beside_cpp=True)
emulated = program.emulated


WAYS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 2))  # keep, learn


def _check(x, g, scale, offset, bits, settings, out, what):
    forward, backward = torch.ops.quantops.activation, torch.ops.quantops.activation_backward
    keep, learn = settings[-2:]
    args = scale, offset, torch.tensor([bits], dtype=torch.int32), *settings
    q, kept = emulated("activation", x, *args, out)
    for got, want in zip((q, kept), forward(x, *args, out)):
        exact(got, want, what)
    laid_out_like(q, x)
    g, x = (torch.empty_strided(q.shape, q.stride(), dtype=t.dtype).copy_(t) for t in (g, x))
    given = g, x if keep == 0 else None, q if keep == 1 and learn else None, kept, *args, x.dtype
    grad_x, sums = emulated("activation_backward", *given)
    want_x, want_sums = backward(*given)
    exact(grad_x, want_x, what)
    assert grad_x.stride() == want_x.stride() and len(sums) == len(want_sums) == 2 * bool(learn)
    room = 4 * torch.finfo(scale.dtype).eps * float(g.double().nan_to_num().abs().sum())
    for a, b in zip(sums, want_sums):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=room, equal_nan=True, msg=lambda m: f"{what}: {m}")


@program.check
def test_every_dtype_and_layout():
    for case, (dtype, out, grad) in enumerate(itertools.product(DTYPES, DTYPES, DTYPES)):
        acc = torch.float64 if dtype == "float64" else torch.float32
        for i, x in enumerate(cases.weights(getattr(torch, dtype))):
            if (i + case) % 3:
                continue
            x = x if x.numel() < 3000 else x[3:1500] if x.dim() == 1 else x[:2, :700]
            rule, (keep, learn) = (case + i) % 3, WAYS[(case + i) % 7]
            channels = x.dim() > 1 and 1 < x.shape[1] < 60 and i % 2 == 0
            signed, has_offset, count = case % 2 == 0, i % 4 == 1, x.shape[1] if channels else 1
            scale, offset = (torch.rand(count) + 0.1).to(acc), (torch.randn(count) / 4).to(acc) if has_offset else None
            front = int(not signed and not has_offset and case % 4 == 1)
            if keep == 0:
                front = (2, 3, 4, front)[(case + i // 3) % 4]
            settings = rule, signed, front, keep, learn
            g = torch.randn(x.shape).to(getattr(torch, grad))
            _check(
                x,
                g,
                scale,
                offset,
                (0, 1, 4, 8, 16)[i % 5],
                settings,
                getattr(torch, out),
                f"{dtype} to {out}, grad {grad}, x[{i}], {settings}, {count} channels",
            )


@program.check
def test_lengths_and_alignments():
    lengths = *range(1, 11), 255, 256, 257, 1023, 1030
    for dtype, n, at in itertools.product(("float32", "bfloat16"), lengths, (0, 1, 8)):
        x, g = (torch.randn(2, n + 8).to(getattr(torch, dtype)))[:, at : at + n].unbind()
        keep, learn = WAYS[n % 7]
        _check(x, g, torch.ones(1), None, 4, (n % 3, True, 0, keep, learn), x.dtype, f"{dtype}, {n} from {at}")


@program.check
def test_long_tensors():
    """Many items, whose sums another kernel adds up; the same bits every time."""
    for dtype, (keep, learn) in itertools.product(("float32", "bfloat16"), ((1, 1), (2, 2))):
        x, g = torch.randn(2, 60_001).to(getattr(torch, dtype)).unbind()
        scale, n = torch.ones(1), torch.tensor([4], dtype=torch.int32)
        _check(x, g, scale, None, 4, (0, True, 0, keep, learn), x.dtype, dtype)
        q, kept = emulated("activation", x, scale, None, n, 0, True, 0, keep, learn, x.dtype)
        given = g, None, q, kept, scale, None, n, 0, True, 0, keep, learn, x.dtype
        first, again = (emulated("activation_backward", *given)[1] for _ in range(2))
        for a, b in zip(first, again):
            exact(a, b, "the same sums again")


@program.check
def test_values_out_of_range():
    nan, inf = float("nan"), float("inf")
    bad = [(v, 0.0, 3) for v in (0.0, -1.0, nan, inf, 1e-31)] + [(1.0, v, 3) for v in (nan, inf)]
    bad += [(1.0, 0.0, n) for n in (-1, 17, 2**31 - 1, -(2**31))]
    x, g = torch.randn(2, 70).unbind()
    for (scale, offset, bits), rule in itertools.product(bad, range(3)):
        values = torch.tensor([scale]), torch.tensor([offset]), torch.tensor([bits], dtype=torch.int32)
        q, kept = emulated("activation", x, *values, rule, True, 0, 2, 2, x.dtype)
        grad_x, sums = emulated("activation_backward", g, None, None, kept, *values, rule, True, 0, 2, 2, x.dtype)
        assert all(t.isnan().all() for t in (q, grad_x, *sums)), (scale, offset, bits, rule)


@program.check
def test_errors():
    x, scale, bits, none = torch.rand(4), torch.ones(1), torch.tensor([4], dtype=torch.int32), torch.zeros(0).byte()

    def forward(
        x=x, scale=scale, offset=None, bits=bits, rule=0, signed=False, front=0, keep=1, learn=1, dtype=torch.float32
    ):
        return emulated("activation", x, scale, offset, bits, rule, signed, front, keep, learn, dtype)

    def backward(grad=x, x=None, q=x, kept=None, keep=1, learn=1):
        kept = none.new_zeros(1) if kept is None else kept
        return emulated(
            "activation_backward", grad, x, q, kept, scale, None, bits, 0, False, 0, keep, learn, torch.float32
        )

    forward(), backward()
    raises(
        {
            "x: expected dtype float32": lambda: forward(x=x.int()),
            "scale: expected dtype float32, got float64": lambda: forward(scale=scale.double()),
            "scale: expected one element or one per channel (1, dim 1)": lambda: forward(scale=torch.ones(2)),
            "offset: expected 1 element": lambda: forward(offset=torch.ones(2)),
            "bits: expected dtype int32, got int64": lambda: forward(bits=bits.long()),
            "rule: expected 0..2, got 3": lambda: forward(rule=3),
            "front: expected 0..4, got 5": lambda: forward(front=5),
            "keep: expected 0 with front 3": lambda: forward(front=3),
            "front: expected unsigned codes": lambda: forward(front=1, signed=True),
            "keep: expected 0..2, got 3": lambda: forward(keep=3),
            "keep: expected 0 or 2 for learn 2, got 1": lambda: forward(learn=2),
            "dtype: expected float32": lambda: forward(dtype=torch.int32),
            "grad: expected a dense tensor": lambda: backward(grad=torch.ones(4, 2)[:, 0]),
            "q: expected a tensor, got none": lambda: backward(q=None),
            "q: expected the weight's shape (4,), got (5,)": lambda: backward(q=torch.ones(5)),
            "x: expected a tensor, got none": lambda: backward(keep=0, kept=none),
            "kept: expected 1 element": lambda: backward(kept=none.new_zeros(2)),
            "kept: expected dtype uint8": lambda: backward(kept=torch.zeros(1)),
        }
    )
