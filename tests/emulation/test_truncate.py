"""The CUDA kernels of family ``truncate`` equal the reference, bit for bit: the very source file, run on the CPU. See
emulation.py for the how.
"""

import itertools

import torch

import cases
from emulation import DTYPES, Program, exact, laid_out_like, raises, weights
from quantops import reference
from quantops.default.truncate import used_gradients

program = Program(__file__, "truncate")


def _widths(count, widths, seed):
    """(bits, base_bits) of `count` weights: distinct widths of base widths of every kind."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(widths, 17, (count,), generator=generator, dtype=torch.int32)
    bits = torch.stack([1 + torch.randperm(int(n), generator=generator)[:widths] for n in base], 1)
    return bits.to(torch.int32), base


def _check_truncate(w, s, out, bits, base, rule, dtype, what, tanh=False):
    q = torch.ops.quantops.truncate(w, s, out, bits, base, rule, tanh, False, False, dtype)
    for j, i in itertools.product(range(len(bits)), range(len(w))):
        want = reference.truncate(
            w[i],
            s[i],
            bits[j, i],
            base_bits=base[i],
            rule=reference.uniform.RULES[rule],
            companding="tanh" if tanh else None,
            out_scale=out[i] if out else None,
            out_dtype=dtype,
        )
        exact(q[j * len(w) + i], want, f"{what} bits={bits[j, i]} of {base[i]} w[{i}]")
        laid_out_like(q[j * len(w) + i], w[i])


def _check_truncate_backward(grads, w, s, out, bits, base, rule, what, tanh=False):
    for scale_grad in (False, True):
        got = torch.ops.quantops.truncate_backward(grads, w, s, out, bits, base, rule, tanh, False, scale_grad)
        assert [len(v) for v in got] == [len(w), len(w) * scale_grad, len(out) * scale_grad]
        for i, t in enumerate(w):
            used = used_gradients(grads[i :: len(w)], t)
            options = {
                "base_bits": base[i],
                "rule": reference.uniform.RULES[rule],
                "out_scale": out[i] if out else None,
                "companding": "tanh" if tanh else None,
            }
            want = reference.truncate_backward(used, t, s[i], bits[:, i], **options)
            where = f"{what} bits={bits[:, i]} of {base[i]} w[{i}]"
            exact(got[0][i], want[0], f"grad_w {where}")
            laid_out_like(got[0][i], t)
            room = sum(
                float((abs(a) + abs(b)).double().mul(abs(g)).nan_to_num(0, 0, 0).sum())
                for g, n in zip(used, bits[:, i])
                if g is not None
                for a, b in [reference.truncate_scale_terms(t, s[i], n, **options)]
            )
            for have, value in zip(got[1:], want[1:]):
                if have:  # a lane adds up a vector in float32
                    assert have[i].shape == s[i].shape and have[i].dtype == s[i].dtype
                    torch.testing.assert_close(
                        have[i],
                        value,
                        rtol=1e-6,
                        equal_nan=True,
                        atol=room * (1e-15 if value.dtype == torch.float64 else 1e-7) + 1e-30,
                        msg=lambda m: f"{where}: {m}",
                    )


@program.check
def test_every_dtype():
    for case, (dtype, per_row, rule) in enumerate(itertools.product(DTYPES, (False, True), range(3))):
        w = weights(dtype)
        s = cases.scales(w, per_row)
        bits, base = _widths(len(w), 1 + case % 4, case)
        for out_dtype in DTYPES:
            what = f"{dtype} to {out_dtype} per_row={per_row} rule={rule}"
            _check_truncate(
                w,
                s,
                cases.scales(w, per_row, seed=7) if case % 2 else [],
                bits,
                base,
                rule,
                getattr(torch, out_dtype),
                what,
                tanh=case % 5 > 2,
            )


@program.check
def test_to_every_width():
    for base in range(1, 17):
        edges = torch.arange(-512, 513).div(512)
        w = [torch.cat([edges, torch.randn(41) * 0.4])]
        bits, base = torch.arange(1, base + 1, dtype=torch.int32).unsqueeze(1), torch.tensor([base], dtype=torch.int32)
        for rule in range(3):
            _check_truncate(w, [torch.tensor(1.0)], [], bits, base, rule, torch.float32, f"rule={rule}")


@program.check
def test_backward():
    for case, (dtype, per_row, grad_dtype) in enumerate(itertools.product(DTYPES, (False, True), DTYPES)):
        w = weights(dtype)
        s = cases.scales(w, per_row)
        widths = 1 + case % 3
        bits, base = _widths(len(w), widths, case)
        grads = [torch.randn(t.shape).to(getattr(torch, grad_dtype)) for _ in range(widths) for t in w]
        grads[0] = torch.randn(()).to(grads[0].dtype).expand(w[0].shape)  # the gradient of a sum
        for i in (5, 1 + len(w), *range(12, len(grads), len(w))):
            if i < len(grads):
                grads[i] = grads[i].new_empty(0)
        grads[-1].view(-1)[::5] = torch.tensor(float("nan"))
        grads[6].view(-1)[::2] = -0.0
        out = cases.scales(w, per_row, seed=7) if case % 2 else []
        _check_truncate_backward(
            grads,
            w,
            s,
            out,
            bits,
            base,
            case % 3,
            f"{dtype} grad {grad_dtype} per_row={per_row}",
            tanh=case // 4 % 2 == 1,
        )
        s = [t.reshape(()) for t in torch.ops.quantops.absmax(w[:-1], False).unbind()]
        some = [g for i, g in enumerate(grads) if i % len(w) != len(w) - 1]
        got = torch.ops.quantops.truncate_backward(some, w[:-1], s, [], bits[:, :-1], base[:-1], 1, False, True, False)
        for i, t in enumerate(w[:-1]):
            total = None
            for g in some[i :: len(w) - 1]:
                if g.numel() or not t.numel():
                    total = g.to(s[0].dtype) if total is None else total + g.to(s[0].dtype)
            exact(got[0][i], (torch.zeros(t.shape) if total is None else total).to(t.dtype), f"covered w[{i}]")


@program.check
def test_rows_of_every_length_and_alignment():
    for dtype in (torch.float32, torch.bfloat16):
        w = [
            torch.randn(rows, inner).to(dtype)
            for rows, inner in itertools.product((1, 2, 37), (1, 3, 8, 27, 32, 147, 1023, 1024, 1025, 3000))
        ]
        w += [torch.randn(1000)[at : at + 700].to(dtype) for at in range(5)]
        w += [torch.randn(1000).to(dtype)[at : at + 700] for at in range(5)]
        s = [t.float().abs().amax(1) * 0.8 if t.dim() == 2 else torch.ones(1) for t in w]
        bits, base = _widths(len(w), 3, 1)
        _check_truncate(w, s, [], bits, base, 1, dtype, "rows")
        grads = [
            torch.randn(t.numel() + 3).to(dtype)[i % 4 : i % 4 + t.numel()].view_as(t) for i, t in enumerate(w * 3)
        ]
        _check_truncate_backward(grads, w, s, [], bits, base, 1, "rows")


@program.check
def test_long_lists():
    """More tensors than the tables of one launch hold, empty ones among them, and up to 16 widths of each."""
    for count, widths in ((37, 1), (301, 1), (350, 4), (90, 16)):
        w = [torch.randn((i * 37) % 90 if i % 7 else 0) for i in range(count)]
        s = [t.abs().amax() if t.numel() else torch.tensor(1.0) for t in w]
        bits, base = _widths(count, widths, 2)
        _check_truncate(w, s, [], bits, base, 1, torch.float32, f"{count} x {widths}")
        grads = [torch.randn(t.shape) for _ in range(widths) for t in w]
        _check_truncate_backward(grads, w, s, s, bits, base, 1, f"{count} x {widths}")


@program.check
def test_values_out_of_range():
    nan, inf = float("nan"), float("inf")
    bad = [
        (n, base, 1.0, 1.0)
        for n, base in ((0, 8), (9, 8), (-1, 8), (2**31 - 1, 8), (4, 17), (4, 0), (4, -1), (4, 2**31 - 1), (4, 8))
    ]
    bad += [(4, 8, v, 1.0) for v in (-1.0, nan, inf)] + [(4, 8, 1.0, v) for v in (-1.0, nan, inf)]
    for shape in ((6, 50), (0,)):
        w = [torch.randn(shape) for _ in bad]
        s, out = ([torch.ones(shape[0]) for _ in bad] for _ in range(2))
        for t, o, b in zip(s, out, bad):
            t[-1:], o[-1:] = b[2], b[3]
        base = torch.tensor([b[1] for b in bad], dtype=torch.int32)
        bits = torch.tensor([[b[0] for b in bad], [3] * len(bad)], dtype=torch.int32)
        for tanh in (False, True):
            _check_truncate(w, s, out, bits, base, 1, torch.float32, "out of range", tanh)
        for unused in ((), range(len(w)), range(len(w), 2 * len(w))):  # what is not used does no harm
            grads = [torch.empty(0) if i in unused else torch.randn(shape) for i in range(2 * len(w))]
            for tanh in (False, True):
                _check_truncate_backward(grads, w, s, out, bits, base, 1, f"out of range, unused {unused}", tanh)


@program.check
def test_errors():
    ops = torch.ops.quantops
    w, s, n = [torch.randn(4, 6)], [torch.ones(())], torch.tensor([[4]], dtype=torch.int32)

    def forward(scale=s, out=(), bits=n, base=n[0], rule=1, dtype=torch.float32):
        return ops.truncate(w, scale, list(out), bits, base, rule, False, False, False, dtype)

    def backward(grads):
        return ops.truncate_backward(grads, w, s, [], n, n[0], 1, False, False, True)

    raises(
        {
            "scale: expected dtype float32, got float64": lambda: forward(scale=[s[0].double()]),
            "out_scale: expected dtype float32, got float64": lambda: forward(out=[s[0].double()]),
            "out_scale: expected as many elements as its scale has (1)": lambda: forward(out=[torch.ones(4)]),
            "bits: expected dtype int32, got int64": lambda: forward(bits=n.long()),
            "bits: expected shape (widths, weights) = (1..16, 1), got (17, 1)": lambda: forward(bits=n.repeat(17, 1)),
            "base_bits: expected 1 element, got shape (2,)": lambda: forward(base=n[0].repeat(2)),
            "rule: expected 0..2, got 3": lambda: forward(rule=3),
            "dtype: expected float32": lambda: forward(dtype=torch.int32),
            "grads: expected a list with one entry per width and weight (1 x 1), got 2": lambda: backward(w * 2),
            "grads[0]: expected the weight's shape (4, 6), or no elements, got (6, 4)": lambda: backward([w[0].t()]),
        }
    )
