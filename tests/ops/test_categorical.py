"""Family ``categorical``: the reference's closed form against all 2^b classes, then what kernels serve the CPU here.

Run as it is, the compiled C++ kernels are tested; under QUANTOPS_BACKEND=triton TRITON_INTERPRET=1, the Triton ones.
"""

import functools
import itertools
import sys

import pytest
import torch

import quantops as Q
import quantops.reference.categorical
from cases import EXHAUSTIVE, SPECIAL, same, weights
from categorical_cases import KINDS, RATIOS, inputs, make_gates
from quantops.reference import paper

ref = sys.modules["quantops.reference.categorical"]
ops = torch.ops.quantops


def backward(g, x, alpha, sigma, bits, gates=None, signed=True, mode="hard", grad="winner", seed=7):
    """[dL/dx, dL/dalpha, dL/dsigma, dL/dgates or None] of one tensor, from the op."""
    out = ops.categorical_backward(
        [g],
        [x],
        [alpha],
        [sigma],
        torch.tensor([bits], dtype=torch.int32),
        [] if gates is None else [gates],
        torch.tensor(seed),
        ref.MODES.index(mode),
        ref.GRADS.index(grad),
        signed,
        True,
        gates is not None,
    )
    return [v[0] if v else None for v in out]


# --- the reference: two statements of the same ----------------------------------------------------------------------


@pytest.mark.skipif(not EXHAUSTIVE, reason="of the reference alone: run it without QUANTOPS_BACKEND=triton")
@pytest.mark.parametrize("bits", range(1, 9))
def test_closed_form_equals_all_classes(bits):
    """Values and gradients of every mode, where the plain difference of sigmoids has its digits, to 1e-12."""
    generator = torch.Generator().manual_seed(bits)
    for signed, ratio, kind in itertools.product((True, False), RATIOS, KINDS):
        gates = make_gates(kind, bits, torch.float64, generator, least=0.5)  # the plain form needs digits in them, too
        x, alpha, sigma = inputs(60, bits, signed, ratio, gates, generator)
        g = torch.randn(60, generator=generator, dtype=torch.float64)
        u = [v.double() * 2.0**-24 for v in ref.uniforms(x, 7)]
        u[1] = u[1] + 2.0**-25
        for mode, grad in (("hard", "winner"), ("hard", "soft"), ("soft", "winner"), ("sample", "winner")):
            what = f"{bits} bits, signed={signed}, alpha/sigma={ratio}, {kind}, {mode}, {grad}"
            leaves = [t.clone().requires_grad_() for t in (x, alpha, sigma, *([] if gates is None else [gates]))]
            q = paper.categorical(
                *leaves[:3], bits, gates=None if gates is None else leaves[3], signed=signed, mode=mode, grad=grad, u=u
            )
            options = dict(gates=gates, signed=signed, mode=mode, seed=7)
            torch.testing.assert_close(
                ref.categorical(x, alpha, sigma, bits, **options), q.detach(), rtol=1e-12, atol=1e-12, msg=what
            )
            want = torch.autograd.grad((q * g).sum(), leaves)
            got = ref.categorical_backward(g, x, alpha, sigma, bits, **options, grad_of=grad)
            # Sums of 60 terms, each of which autograd has from ones as large as 2^b alpha/sigma.
            room = 1e-13 * 2**bits * max(ratio, 1) * g.abs().sum()
            for a, b in zip(got, want):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=float(room), msg=lambda m: f"{what}: {m}")


def exact(x, alpha, sigma, bits, signed, gates):
    """(soft q, and its derivatives by x, alpha, sigma; r of class j as a function) in 60 digits, by the definition."""
    import mpmath as mp

    mp.mp.dps = 60
    low, high = ref.levels(bits, signed)[-1]
    weight = {}
    for i in range(low, high + 1):
        weight[i] = functools.reduce(lambda a, b: a * b, gates[1 : ref.level_of(i, signed)], mp.mpf(1))

    def logistic(v):
        return 1 / (1 + mp.exp(-v))

    def mass(above, below):  # S(above) - S(below) = S(-below) - S(-above): whichever side has the digits
        return logistic(above) - logistic(below) if above < 0 else logistic(-below) - logistic(-above)

    def r(x, alpha, sigma):
        half = mp.mpf(1) / 2
        pi = {i: weight[i] * mass((alpha * (i + half) - x) / sigma, (alpha * (i - half) - x) / sigma) for i in weight}
        total = sum(pi.values())
        return {i: v / total for i, v in pi.items()}

    def soft(*at):
        return at[1] * sum(i * v for i, v in r(*at).items())

    at = [mp.mpf(v) for v in (x, alpha, sigma)]
    mp.mp.dps = 120
    step = mp.mpf(10) ** -30

    def slopes(f):
        found = []
        for k in range(3):
            up, down = ([v + side * step * at[2] if i == k else v for i, v in enumerate(at)] for side in (1, -1))
            found.append(float((f(*up) - f(*down)) / (2 * step * at[2])))
        return found

    return float(soft(*at)), slopes(soft), lambda j: slopes(lambda *v: r(*v)[j]), max(weight, key=lambda i: r(*at)[i])


@pytest.mark.skipif(not EXHAUSTIVE, reason="of the reference alone: run it without QUANTOPS_BACKEND=triton")
def test_closed_form_far_outside_the_grid():
    """Where the plain form gives 0/0, against the definition in 60 digits."""
    pytest.importorskip("mpmath", reason="needs mpmath, which sympy and so torch brings: pip install mpmath")
    for bits, signed, ratio, kind in itertools.product(
        (1, 3), (True, False), (100, 3, 0.3, 0.01), ("none", "fractions")
    ):
        gates = make_gates(kind, bits, torch.float64, torch.Generator().manual_seed(bits))
        alpha, sigma = 0.75, 0.75 / ratio
        low, high = ref.levels(bits, signed)[-1]
        for x in (high * alpha + 9 * sigma, high * alpha + 45 * sigma, low * alpha - 400 * sigma, 1e4 * alpha):
            weights_of = [1.0] * bits if gates is None else gates.tolist()
            q, slopes, of_class, j = exact(x, alpha, sigma, bits, signed, weights_of)
            args = [torch.tensor([v], dtype=torch.float64) for v in (x, alpha, sigma)]
            options = dict(gates=gates, signed=signed)
            what = f"{bits} bits, signed={signed}, alpha/sigma={ratio}, {kind}, x={x}"
            soft = ref.categorical(*args, bits, mode="soft", **options)
            assert float(soft) == pytest.approx(q, rel=1e-11, abs=1e-11), what
            assert float(ref.categorical(*args, bits, **options)) == alpha * j, what
            one = torch.ones(1, dtype=torch.float64)
            got = ref.categorical_backward(one, *args, bits, mode="soft", **options)[:3]
            assert [float(v) for v in got] == pytest.approx(slopes, rel=1e-9, abs=1e-9), what
            got = ref.categorical_backward(one, *args, bits, **options)[:3]
            want = [alpha * j * v for v in of_class(j)]
            want[1] += j
            assert [float(v) for v in got] == pytest.approx(want, rel=1e-9, abs=1e-9), what


def kinds_of(dtype, special=True):
    """:func:`weights`, in Triton's interpreter without those of many rows or elements but for a few."""
    x = weights(dtype, special=special)
    if EXHAUSTIVE:
        return x
    long = torch.randn(2, 700, generator=torch.Generator().manual_seed(0)).to(dtype)
    few = [t for t in x if t.numel() < 700 and (t.dim() == 0 or t.shape[0] <= 10)]
    return [*few, long, long[:, 3:], long.view(1, -1)[:, 3:]]


# --- hard -------------------------------------------------------------------------------------------------------------


def scales_of(x, per_row, seed=1):
    generator = torch.Generator().manual_seed(seed)
    acc = torch.float64 if x[0].dtype == torch.float64 else torch.float32
    alpha = [(torch.rand(t.shape[0] if per_row and t.dim() else 1, generator=generator) + 0.05).to(acc) for t in x]
    return alpha, [a / (0.5 + 8 * torch.rand(1, generator=generator).to(acc)) for a in alpha]


@pytest.mark.parametrize("per_row", [False, True])
def test_hard_equals_reference(dtype, per_row):
    x = kinds_of(dtype)
    alpha, sigma = scales_of(x, per_row)
    generator = torch.Generator().manual_seed(0)
    all_kinds = itertools.product((True, False), KINDS)
    for signed, kind in all_kinds if EXHAUSTIVE else ((True, KINDS[1]), (False, KINDS[0])):
        n = torch.randint(0, 17, (len(x),), generator=generator, dtype=torch.int32)
        gates = None if kind == "none" else [make_gates(kind, int(b), a.dtype, generator) for b, a in zip(n, alpha)]
        for out_dtype in (dtype, torch.float32) if EXHAUSTIVE else (dtype,):
            q = Q.foreach.categorical(x, alpha, sigma, n, gates=gates, signed=signed, out_dtype=out_dtype)
            for i, t in enumerate(x):
                want = ref.categorical(
                    t, alpha[i], sigma[i], n[i], gates=gates and gates[i], signed=signed, out_dtype=out_dtype
                )
                assert same(q[i], want), (i, n[i], signed, kind)
                assert q[i].stride() == (t.stride() if Q.layout.dense_rows(t) else torch.empty(t.shape).stride())


def test_hard_without_gates_is_rounding():
    x = torch.randn(4000) * 3
    for bits, signed in itertools.product((1, 2, 4, 8, 16), (True, False)):
        low, high = ref.levels(bits, signed)[-1]
        for alpha in (0.3, 1.0, 1e-3):
            inverse = 1 / torch.tensor(alpha)
            j = torch.clamp(torch.round(x * inverse), low, high)
            assert torch.equal(Q.categorical(x, alpha, 0.1, bits, signed=signed), alpha * j)
    halves = torch.arange(-8, 9) / 2
    assert torch.equal(Q.categorical(halves, 1.0, 0.1, 3), torch.clamp(torch.round(halves), -4, 3))
    assert torch.equal(Q.categorical(halves, 1.0, 0.1, 3, gates=torch.ones(3)), torch.clamp(torch.round(halves), -4, 3))


@pytest.mark.parametrize("bits", range(2, 17) if EXHAUSTIVE else (3, 8))
def test_hard_with_gates_over_all_of_the_line(bits):
    """A fine sweep over every boundary between levels, for gates near and far from each other."""
    generator = torch.Generator().manual_seed(bits)
    for ratio, signed in itertools.product(RATIOS, (True, False)) if EXHAUSTIVE else [(3, True), (0.1, False)]:
        gates = torch.rand(bits, generator=generator) ** 2
        gates[torch.rand(bits, generator=generator) < 0.3] = 1
        edges = torch.tensor([2.0**t for t in range(bits + 1)])
        spread = torch.cat(
            [torch.linspace(-3, 3, 401), torch.linspace(-9, 9, 101) / ratio, torch.linspace(-1, 1, 101) * 2**bits]
        )
        v = (edges[:, None] + spread).reshape(-1)
        x = torch.cat([v, -v]) * 0.7 if EXHAUSTIVE else v[::7] * -0.7
        got = Q.categorical(x, 0.7, 0.7 / ratio, bits, gates=gates, signed=signed)
        assert torch.equal(got, ref.categorical(x, 0.7, 0.7 / ratio, bits, gates=gates, signed=signed)), (ratio, gates)


def test_classes_of_closed_gates_are_out():
    x = torch.linspace(-9, 9, 181)
    q = Q.categorical(x, 1.0, 0.4, 4, gates=torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert torch.equal(q, Q.categorical(x, 1.0, 0.4, 2))
    tiny = torch.tensor([0.3, 1.0, 2.0**-40, 2.0**-30])  # the last product is below 2^-64
    assert Q.categorical(torch.tensor([1e9]), 1.0, 0.04, 4, gates=tiny) == 3
    assert Q.categorical(torch.tensor([1e9]), 1.0, 0.04, 4, gates=tiny.sqrt()) == 7
    leaf = torch.tensor([1.0, 1.0, 0.0, 0.5], requires_grad=True)
    for grad in ("winner", "soft"):
        (g,) = torch.autograd.grad(Q.categorical(x, 1.0, 0.4, 4, gates=leaf, grad=grad).sum(), leaf)
        assert g[0] == 0 and g[1] != 0 and (g[2:] == 0).all()


# --- soft, and gradients ----------------------------------------------------------------------------------------------


def error(a, b):
    return (a.double() - b).square().mean().sqrt() if a.numel() else torch.zeros(())


@pytest.mark.parametrize("kind", ("none", "fractions", "mixed"))
def test_error_of_float32(kind):
    """Soft values and all gradients, element by element: at most four times the error of plain PyTorch in float32.

    Error: the root mean square of the difference from float64, plus half a unit in the last place of the largest.
    """
    generator = torch.Generator().manual_seed(3)
    count = 1500 if EXHAUSTIVE else 16
    # That of CPQConfig is 1/0.15.
    for bits, signed, ratio in itertools.product(
        *(((1, 2, 3, 4, 8), (True, False), (*RATIOS, 1 / 0.15)) if EXHAUSTIVE else ((3,), (True,), (3, 0.1)))
    ):
        gates = make_gates(kind, bits, torch.float32, generator)
        wide = None if gates is None else gates.double()
        x, alpha, sigma = inputs(count, bits, signed, ratio, gates, generator, torch.float32, beyond=10)
        # One element per row, so that the sums of alpha and sigma have one term each.
        narrow = x.view(-1, 1), alpha.expand(count).contiguous(), sigma.expand(count).contiguous()
        exact64 = [t.double() for t in narrow]
        one = torch.ones(count, 1)
        for mode in ("soft", "hard"):
            options = dict(signed=signed, mode=mode)
            got = backward(one, *narrow, bits, gates, **options)
            torchs = ref.categorical_backward(one, *narrow, bits, gates=gates, **options)
            want = ref.categorical_backward(one.double(), *exact64, bits, gates=wide, **options)
            rows = slice(None)
            if mode == "soft":
                got[3], torchs, want = Q.categorical(*narrow, bits, gates=gates, **options), list(torchs), list(want)
                torchs[3] = ref.categorical(*narrow, bits, gates=gates, **options)
                want[3] = ref.categorical(*exact64, bits, gates=wide, **options)
            else:
                rows = ref.hard_class(*narrow, bits, gates=gates, signed=signed).double() == ref.hard_class(
                    *exact64, bits, gates=wide, signed=signed
                )
                rows, got, torchs, want = rows.view(-1), got[:3], torchs[:3], want[:3]
            for name, a, b, c in zip(("x", "alpha", "sigma", "q"), got, torchs, want):
                room = 4 * error(b[rows], c[rows]) + c[rows].abs().max() * 2.0**-24
                assert error(a[rows], c[rows]) <= room, (name, mode, bits, signed, ratio, error(a[rows], c[rows]), room)


SPLINED = 1200  # elements of a row whose soft sum is taken by a spline, in float32 without gates


@pytest.mark.parametrize(
    "bits, signed", [(b, s) for b in (1, 2, 4, 8) for s in (True, False)] if EXHAUSTIVE else [(4, True)]
)
def test_error_of_long_rows(bits, signed):
    """Soft values and gradients by the spline, to the bound of :func:`test_error_of_float32`, and their sums."""
    generator = torch.Generator().manual_seed(5)
    ratios = (0.2, 0.3, 0.6, 1.19, 1.21, 2.5, 3.61, 4.8, 1 / 0.15, 9, 12, 20, 31, 40) if EXHAUSTIVE else (1 / 0.15, 0.3)
    for ratio in ratios:
        x, alpha, sigma = inputs(SPLINED, bits, signed, ratio, None, generator, torch.float32, beyond=25)
        x[:4] = torch.tensor([torch.inf, -torch.inf, 3e38, -3e38])
        options = dict(signed=signed, mode="soft")
        one = torch.ones(SPLINED)
        got = [*backward(one, x, alpha, sigma, bits, **options)[:3], Q.categorical(x, alpha, sigma, bits, **options)]
        rows, one = (x.view(-1, 1), alpha.expand(SPLINED), sigma.expand(SPLINED)), one.view(-1, 1)
        torchs = [*ref.categorical_backward(one, *rows, bits, **options)[:3], ref.categorical(*rows, bits, **options)]
        rows = [t.double() for t in rows]
        want = [
            *ref.categorical_backward(one.double(), *rows, bits, **options)[:3],
            ref.categorical(*rows, bits, **options),
        ]
        for name, a, b, c in zip(("x", "alpha", "sigma", "q"), got, torchs, want):
            room = 4 * error(b, c) + c.abs().max() * 2.0**-24
            if a.numel() == 1:
                assert (a.double() - c.sum()).abs() <= SPLINED * room, (name, ratio, a, c.sum(), room)
            else:
                assert error(a.view(-1, 1), c) <= room, (name, ratio, error(a.view(-1, 1), c), room)
                assert (a.view(-1, 1).double() - c).abs().max() <= 20 * room, (name, ratio)


@pytest.mark.parametrize("bits", (1, 2, 3, 4) if EXHAUSTIVE else (3,))
@pytest.mark.parametrize("signed", (True, False))
def test_rows_with_either_soft_sum(bits, signed):
    """The spline and the sums over the classes, which a short row takes: every row as if it were alone, and right."""
    generator = torch.Generator().manual_seed(6)
    ratios = torch.tensor([50, 7.1, 1 / 0.15, 1, 0.05])  # alpha/sigma; the spline serves the inner ones
    ratios = ratios if EXHAUSTIVE else ratios[:3]
    x = 2**bits * torch.rand(len(ratios), SPLINED, generator=generator) - 2.0 ** (bits - 1) * signed
    g = torch.randn(x.shape, generator=generator)
    alpha = torch.ones(len(ratios))
    scales = alpha, alpha / ratios
    q = Q.categorical(x, *scales, bits, signed=signed, mode="soft")
    got = backward(g, x, *scales, bits, None, signed=signed, mode="soft")[:3]
    for i in range(len(ratios)):
        row = slice(i, i + 1)
        alone = x[row], *(s[row] for s in scales)
        assert torch.equal(q[row], Q.categorical(*alone, bits, signed=signed, mode="soft"))
        for all_rows, of_row in zip(got, backward(g[row], *alone, bits, None, signed=signed, mode="soft")):
            torch.testing.assert_close(all_rows[row], of_row, rtol=1e-6, atol=1e-5)
        short = x[row, :100].contiguous(), *alone[1:]
        q_short = Q.categorical(*short, bits, signed=signed, mode="soft")
        g_short = backward(g[row, :100].contiguous(), *short, bits, None, signed=signed, mode="soft")[0]
        for part, want in ((q[row, :100], q_short), (got[0][row, :100], g_short)):
            torch.testing.assert_close(part, want, rtol=0, atol=2e-6 * max(1, float(ratios[i])))
    wide = x.double(), *(s.double() for s in scales)
    torch.testing.assert_close(q.double(), ref.categorical(*wide, bits, signed=signed, mode="soft"), rtol=0, atol=1e-5)
    for a, b in zip(got, ref.categorical_backward(g.double(), *wide, bits, signed=signed, mode="soft")):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * SPLINED**0.5)


@pytest.mark.parametrize("alpha", (1e38, 1e30, 1e-30, 1e-37))
def test_soft_sum_of_extreme_scales(alpha):
    """Grids near the ends of float32: infinities and the largest numbers are far outside, with finite gradients."""
    most = torch.finfo(torch.float32).max
    x = torch.tensor([-torch.inf, -most, -3 * alpha, 0.0, 3 * alpha, most, torch.inf])
    for bits, signed, ratio in itertools.product((1, 2, 4), (True, False), (1 / 0.15, 1)):
        low = -(2 ** (bits - 1)) if signed else 0
        if alpha * 2**bits > most:
            continue
        scales = torch.tensor(alpha), torch.tensor(alpha) / ratio
        q = Q.categorical(x, *scales, bits, signed=signed, mode="soft").double() / float(scales[0])
        want = ref.categorical(x.double(), *(s.double() for s in scales), bits, signed=signed, mode="soft")
        torch.testing.assert_close(q, want / float(scales[0]), rtol=0, atol=1e-5)
        assert (q >= low - 1e-5).all() and (q <= low + 2**bits - 1 + 1e-5).all()
        found = backward(torch.ones_like(x), x, *scales, bits, None, signed=signed, mode="soft")[:3]
        assert all(v.isfinite().all() for v in found)


@pytest.mark.parametrize("mode,grad", [("hard", "winner"), ("hard", "soft"), ("soft", "winner"), ("sample", "winner")])
def test_float64_equals_reference(mode, grad):
    generator = torch.Generator().manual_seed(4)
    for bits, signed, ratio, kind in itertools.product(
        *((range(0, 9), (True, False), (100, 3, 0.3, 0.01), KINDS) if EXHAUSTIVE else ((3,), (True,), (3,), KINDS[:3]))
    ):
        gates = make_gates(kind, bits, torch.float64, generator)
        x, alpha, sigma = inputs(90, max(bits, 1), signed, ratio, gates if bits else None, generator, beyond=60)
        x[:2] = torch.tensor([1e5, -1e5])
        rows = x.view(6, 15), alpha.expand(6).contiguous(), sigma.expand(6) * torch.linspace(0.8, 1.2, 6).double()
        g = torch.randn(6, 15, generator=generator, dtype=torch.float64)
        options = dict(gates=gates, signed=signed, mode=mode, seed=7)
        what = (bits, signed, ratio, kind)
        q = Q.categorical(*rows, bits, grad=grad, **options)
        torch.testing.assert_close(q, ref.categorical(*rows, bits, **options), rtol=1e-11, atol=1e-11, msg=str(what))
        got = backward(g, *rows, bits, gates, signed, mode, grad)
        want = ref.categorical_backward(g, *rows, bits, **options, grad_of=grad)
        room = 1e-13 * 2**bits * max(ratio, 1) * float(g.abs().sum())
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=room, msg=lambda m: f"{what}: {m}")


def test_dtypes_and_layouts(dtype):
    """Storage dtypes, strides, empty tensors: a kernel's arithmetic does not see them."""
    x = kinds_of(dtype, special=False)
    cases = list(itertools.product((False, True), (("hard", "winner"), ("soft", "winner"), ("sample", "soft"))))
    if not EXHAUSTIVE:
        x, cases = [x[2], x[4], x[6], x[-3], x[-1]], [(True, ("hard", "winner")), (False, ("sample", "soft"))]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    for per_row, (mode, grad) in cases:
        alpha, sigma = scales_of(x, per_row)
        gates = [torch.tensor([1.0, 0.5, 0.9], dtype=acc)] * len(x)
        n = torch.full((len(x),), 3, dtype=torch.int32)
        g = [torch.randn(t.shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i, t in enumerate(x)]
        args = n, gates, torch.tensor(3), ref.MODES.index(mode), ref.GRADS.index(grad), True
        wide = [t.to(acc) for t in x]
        q = ops.categorical(x, alpha, sigma, *args, dtype)
        q_wide = ops.categorical(wide, alpha, sigma, *args, acc)
        back = ops.categorical_backward(g, x, alpha, sigma, *args, True, True)
        back_wide = ops.categorical_backward([t.to(acc) for t in g], wide, alpha, sigma, *args, True, True)
        for i in range(len(x)):
            assert same(q[i], q_wide[i].to(dtype)) and same(back[0][i], back_wide[0][i].to(dtype)), i
            assert back[0][i].stride() == q[i].stride() and back[1][i].shape == alpha[i].shape
            for sums, wide_sums in zip(back[1:], back_wide[1:]):
                if EXHAUSTIVE:
                    assert same(sums[i], wide_sums[i])
                else:  # Triton kernels add up in another order where a row is not aligned to 16 bytes
                    torch.testing.assert_close(sums[i], wide_sums[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad", ref.GRADS)
def test_sums(grad):
    """Gradients of alpha, sigma and gates over many elements: the same bits every time, and close to float64."""
    n = 200_003 if EXHAUSTIVE else 3001
    generator = torch.Generator().manual_seed(5)
    x, g = torch.randn(n, generator=generator), torch.randn(n, generator=generator)
    gates = torch.tensor([1.0, 0.9, 0.7])
    alpha, sigma = torch.tensor([0.6]), torch.tensor([0.25])
    got = backward(g, x, alpha, sigma, 3, gates, grad=grad)
    again = backward(g, x, alpha, sigma, 3, gates, grad=grad)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    threaded = backward(g, x, alpha, sigma, 3, gates, grad=grad)
    torch.set_num_threads(threads)
    want = ref.categorical_backward(
        g.double(), x.double(), alpha.double(), sigma.double(), 3, gates=gates.double(), grad_of=grad
    )
    for a, b, c, d in zip(got[1:], again[1:], threaded[1:], want[1:]):
        assert torch.equal(a, b) and torch.equal(a, c)
        torch.testing.assert_close(a.double(), d, rtol=1e-4, atol=float(g.abs().sum()) * 2e-7)


@pytest.mark.parametrize("signed", [True, False])
def test_gradcheck_of_the_soft_sum(signed):
    torch.manual_seed(0)
    rows, columns = (4, 5) if EXHAUSTIVE else (2, 1)
    x = (torch.randn(rows, columns, dtype=torch.float64) * 2).requires_grad_()
    alpha = (torch.rand(rows, dtype=torch.float64) + 0.5).requires_grad_()
    for bits, sigma in ((1, torch.tensor([0.4])), (3, torch.rand(rows) + 0.2))[0 if EXHAUSTIVE else 1 :]:
        sigma = sigma.double().requires_grad_()
        gates = torch.rand(bits, dtype=torch.float64, requires_grad=True)
        for chosen in (None, gates) if EXHAUSTIVE else (gates,):
            leaves = (x, alpha, sigma) if chosen is None else (x, alpha, sigma, chosen)
            assert torch.autograd.gradcheck(
                lambda x, a, s, *z: Q.categorical(x, a, s, bits, gates=z[0] if z else None, signed=signed, mode="soft"),
                leaves,
            )


def test_gradient_of_the_soft_sum_at_other_values():
    torch.manual_seed(0)
    x = torch.randn(200, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    gates = torch.tensor([1.0, 0.8, 0.6], dtype=torch.float64, requires_grad=True)
    leaves = x, alpha, gates
    want = torch.autograd.grad(Q.categorical(x, alpha, 0.2, 3, gates=gates, mode="soft").square().sum(), leaves)
    soft = Q.categorical(x, alpha, 0.2, 3, gates=gates, mode="soft").detach()
    for mode in ("hard", "sample"):
        q = Q.categorical(x, alpha, 0.2, 3, gates=gates, mode=mode, grad="soft", seed=1)
        assert not torch.equal(q, soft)
        for a, b in zip(torch.autograd.grad(q, leaves, 2 * soft), want):
            torch.testing.assert_close(a, b)


def test_winner_gives_no_gradient_at_grid_point_zero():
    x = torch.linspace(-0.4, 0.4, 9, requires_grad=True)
    (g,) = torch.autograd.grad(Q.categorical(x, 1.0, 0.3, 3).sum(), x)
    assert (g == 0).all()
    (g,) = torch.autograd.grad(Q.categorical(x, 1.0, 0.3, 3, grad="soft").sum(), x)
    assert (g > 0).all()


def test_stable_everywhere():
    """No NaN, no infinity and no value outside of the grid, whatever the width and however far x is."""
    x = torch.cat([torch.linspace(-300, 300, 61), torch.tensor([1e6, -1e6, 3e38, -3e38])])
    for bits, ratio, signed in itertools.product((1, 4, 8), (1e7, 1e4, 100, 1, 0.01, 1e-4, 1e-9), (True, False)):
        low, high = ref.levels(bits, signed)[-1]
        gates = torch.linspace(1, 0.4, bits)
        for chosen, mode, grad in itertools.product((None, gates), ref.MODES, ref.GRADS):
            if not EXHAUSTIVE and (bits != 4 or mode == "sample" or ratio not in (1e7, 1e-9)):
                continue
            q = Q.categorical(x, 1.0, 1 / ratio, bits, gates=chosen, signed=signed, mode=mode, grad=grad, seed=1)
            assert (q >= low).all() and (q <= high).all(), (bits, ratio, signed, mode)
            got = backward(
                torch.ones_like(x), x, torch.ones(1), torch.tensor([1 / ratio]), bits, chosen, signed, mode, grad
            )
            assert all(v is None or v.isfinite().all() for v in got), (bits, ratio, signed, mode, grad)


def test_nan_and_infinity():
    x = torch.tensor(SPECIAL)
    gates = torch.tensor([1.0, 0.7, 0.9, 0.8])
    for chosen, mode in itertools.product((None, gates), ref.MODES):
        q = Q.categorical(x, 1.0, 0.3, 4, gates=chosen, mode=mode, seed=1)
        assert q[-1].isnan() and not q[:-1].isnan().any()
        if mode == "hard":
            assert q[-3] == (7 if chosen is None else q[5]) and q[-2] == (-8 if chosen is None else q[6])
        grad_x = backward(torch.ones_like(x), x, torch.ones(1), torch.full((1,), 0.3), 4, chosen, mode=mode)[0]
        assert grad_x[-1].isnan() and grad_x[:-1].isfinite().all()


def test_zero_bits_prune():
    x = torch.randn(9, requires_grad=True)
    for mode in ref.MODES:
        q = Q.categorical(x, 1.0, 0.3, 0, mode=mode, seed=1)
        assert (q == 0).all() and (torch.autograd.grad(q.sum(), x)[0] == 0).all()


def test_second_derivatives_raise():
    x = torch.randn(5, requires_grad=True)
    (g,) = torch.autograd.grad(Q.categorical(x, 1.0, 0.3, 3).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="categorical: second derivatives"):
        g.sum().backward()


def test_unused_entries_of_a_list_get_no_gradient():
    x = [torch.randn(5, requires_grad=True), torch.randn(6, requires_grad=True)]
    alpha = [torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)]
    q = Q.foreach.categorical(x, alpha, [0.3, 0.4], 3)
    assert torch.autograd.grad(q[0].sum(), x[0])[0].shape == (5,)
    Q.foreach.categorical(x, alpha, [0.3, 0.4], 3)[0].sum().backward()
    assert x[0].grad is not None and alpha[0].grad is not None and x[1].grad is None and alpha[1].grad is None


# --- the reference on values out of range -----------------------------------------------------------------------------


def test_reference_marks_values_out_of_range():
    """What a GPU gives where it cannot raise."""
    x, one = torch.randn(4, 5), torch.ones(1)
    for alpha, sigma, bits, gates in (
        (-one, one, 3, None),
        (one * 0, one, 3, None),
        (one, one * 0, 3, None),
        (one, one * torch.inf, 3, None),
        (one * torch.nan, one, 3, None),
        (one, one, 17, None),
        (one, one, -1, None),
        (one, one, 3, torch.ones(2)),
        (one, one, 2, torch.tensor([1, 1.1])),
        (one * 1e-39, one, 2, None),
    ):
        assert ref.categorical(x, alpha, sigma, bits, gates=gates).isnan().all()
        assert ref.categorical_backward(x, x, alpha, sigma, bits, gates=gates)[0].isnan().all()
    assert ref.categorical(x, one, one, 9, mode="soft").isnan().all()
    rows = torch.tensor([1.0, -1.0, 1.0, 1.0])
    assert ref.categorical(x, rows, one, 3).isnan().any(1).tolist() == [False, True, False, False]


@pytest.mark.skipif(EXHAUSTIVE, reason="values on a CPU raise; NaN: QUANTOPS_BACKEND=triton TRITON_INTERPRET=1")
@pytest.mark.parametrize("mode,grad", [("hard", "winner"), ("soft", "soft"), ("sample", "winner")])
def test_triton_marks_values_out_of_range(monkeypatch, mode, grad):
    """NaN for that tensor, and for that alone, where the kernels cannot raise; nothing is read out of bounds."""
    from quantops.kernels import categorical as kernels

    monkeypatch.setattr(kernels, "check_categorical", lambda *args: None)  # it raises on CPU
    x, one = torch.randn(4, 5), torch.ones(1)
    for alpha, sigma, bits, gates in (
        (-one, one, 3, None),
        (one, one * torch.inf, 3, None),
        (one, one, 10**6, None),
        (one, one, -1, None),
        (one, one, 3, torch.ones(2)),
        (one, one, 40, torch.ones(40)),
        (one, one, 2, torch.tensor([1, torch.nan])),
        (one * 1e-39, one, 2, None),
    ):
        args = (
            [x, x],
            [alpha, one],
            [sigma, one],
            torch.tensor([bits, 2], dtype=torch.int32),
            [] if gates is None else [gates, torch.ones(2)],
            torch.tensor(1),
            ref.MODES.index(mode),
            ref.GRADS.index(grad),
            True,
        )
        for bad, good in (
            kernels.categorical(*args, torch.float32),
            *filter(None, kernels.categorical_backward([x, x], *args, True, gates is not None)),
        ):
            assert bad.isnan().all() and not good.isnan().any(), (alpha, sigma, bits, gates)
