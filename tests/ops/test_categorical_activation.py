"""Family ``categorical_activation``: against its reference, and against the chain of other ops that it is made of.

Run as it is, the compiled C++ kernels are tested; under QUANTOPS_BACKEND=triton TRITON_INTERPRET=1, the Triton ones.
"""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import quantops as Q
from cases import EXHAUSTIVE, SPECIAL, same, weights
from quantops import reference as ref
from quantops.layout import dense, in_memory
from quantops.reference.categorical import GRADS
from quantops.reference.categorical_activation import factors

ops = torch.ops.quantops
forward, backward = ops.categorical_activation, ops.categorical_activation_backward
BITS = tuple(range(1, 9)) if EXHAUSTIVE else (1, 8)
RATIOS = (10, 2, 0.5, 0.05) if EXHAUSTIVE else (2,)  # alpha/sigma


def accumulates(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def widths(bits, dtype, alpha=0.37, ratio=2.0):
    """(alpha, sigma, bits) as the ops take them."""
    a = torch.tensor([alpha], dtype=accumulates(dtype))
    return a, a / ratio, torch.tensor([bits], dtype=torch.int32)


def kinds_of(dtype):
    """Tensors of many shapes, layouts and alignments; the last has NaN, infinities and huge values."""
    x = weights(dtype)
    if not EXHAUSTIVE:
        long = torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(dtype)
        x = [x[2], x[4], x[6], x[8], x[9], long[:4099], long[3:], x[-1]]
    return [t.abs() if i % 2 else t for i, t in enumerate(x)]


def spread(n, bits, alpha, dtype, seed=0):
    """x over the grid and two cells beyond."""
    generator = torch.Generator().manual_seed(seed)
    return ((torch.rand(n, generator=generator, dtype=torch.float64) * (2**bits + 4) - 2) * alpha).to(dtype)


def chain(x, alpha, sigma, bits, grad_of, dtype, g):
    """[q, dL/dx, dL/dalpha, dL/dsigma] from the ops of other families: every place is a row of its own."""
    q = ops.categorical([x], [alpha], [sigma], bits, [], None, 0, grad_of, False, dtype)[0]
    inverse, top = 1 / alpha, 2 ** int(bits) - 1
    j = (q.to(alpha.dtype) * inverse).round().clamp(max=top)
    k = (((x.to(alpha.dtype) * inverse - j) * 4).floor() + 2).clamp(0, 3).nan_to_num(0).to(torch.int32)
    data = ops.pack([k], [2], 1)
    k = ops.unpack(data, list(q.shape), [q.dim()], [2], torch.full_like(bits, 2), 1)[0]
    place = (4 * j.nan_to_num(-1e9) + k).clamp(0, 4 * top + 3).long().flatten()
    middle = (torch.arange(4 * top + 4, dtype=alpha.dtype) - 1.5) * (alpha / 4)
    middle[0], middle[-1] = -torch.inf, torch.inf
    rows = [[v.expand(len(middle)).contiguous()] for v in (alpha, sigma)]
    one = torch.ones_like(middle)
    found = ops.categorical_backward([one], [middle], *rows, bits, [], None, 0, grad_of, False, True, False)[:3]
    by_x, by_alpha, by_sigma = (v[0].index_select(0, place).view(q.shape) for v in found)
    g = g.to(alpha.dtype)
    return [q, (g * by_x).to(x.dtype), *((g.double() * v.double()).sum() for v in (by_alpha, by_sigma))]


# --- values -----------------------------------------------------------------------------------------------------------


def test_values_equal_reference(dtype):
    outs = (torch.float32, torch.bfloat16, torch.float16, torch.float64) if EXHAUSTIVE else (torch.bfloat16,)
    for (i, x), out in itertools.product(enumerate(kinds_of(dtype)), outs):
        for bits, alpha in ((BITS[i % len(BITS)], 0.37), (0 if i % 7 == 0 else 3, 1e-3))[: 2 if EXHAUSTIVE else 1]:
            args = widths(bits, dtype, alpha)
            q, quarters = forward(x, *args, 1, out)
            values, packed = ref.categorical_activation(in_memory(dense(x)), *args, out_dtype=out)
            assert same(in_memory(q), values) and torch.equal(quarters, packed), (i, bits, out)
            assert q.shape == x.shape and quarters.numel() == -(-x.numel() // 4)
            assert q.stride() == (x.stride() if Q.layout.dense_rows(x) else torch.empty(x.shape).stride())


@pytest.mark.parametrize("bits", BITS)
def test_every_quarter_of_every_cell(bits):
    """On and beside every edge: what is kept says in which quarter x is."""
    alpha = 0.5  # a power of two: quarters are exact
    top = 2**bits - 1
    edges = torch.arange(-4, 4 * top + 5) / 4 * alpha
    x = torch.cat([edges, torch.nextafter(edges, torch.tensor(1e9)), torch.nextafter(edges, torch.tensor(-1e9))])
    q, quarters = forward(x, *widths(bits, x.dtype, alpha), 1, x.dtype)
    j = (x / alpha).round().clamp(0, top)
    assert torch.equal(q, alpha * j)
    k = ref.unpack(quarters, x.shape, 2, layout="dense")
    inside = ((x / alpha - j).abs() <= 0.5) & (x / alpha - j < 0.5)
    below = alpha * (j + (k - 2) / 4)
    assert ((below <= x) & (x < below + alpha / 4))[inside].all() and k[x < -0.25 * alpha].eq(0).all()
    assert k[x > (top + 0.25) * alpha].eq(3).all()


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("bits", BITS if EXHAUSTIVE else (3,))
def test_gradients_equal_the_chain(bits, grad, dtype):
    """dL/dx of soft sums bit for bit; of the winner, whose products and sums are fused in the one alone, and the sums,
    to their rounding."""
    outs = (dtype, torch.bfloat16, torch.float32) if EXHAUSTIVE else (dtype,)
    for ratio, alpha, out in itertools.product(RATIOS, (0.37, 1e-3) if EXHAUSTIVE else (0.37,), outs):
        args = widths(bits, dtype, alpha, ratio)
        x = spread(501, bits, alpha, dtype)
        x[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(out)
        want = chain(x, *args, GRADS.index(grad), out, g)
        q, quarters = forward(x, *args, GRADS.index(grad), out)
        grad_x, sums = backward(g, q, quarters, *args, GRADS.index(grad), True, dtype)
        what = f"{ratio} {alpha} {out}"
        assert same(q, want[0]) and (grad == "winner" or same(grad_x, want[1])), what
        unit = torch.finfo(args[0].dtype).eps
        room = 4 * unit * 2**bits * max(1, ratio) * float(g.double().abs().amax())
        torch.testing.assert_close(grad_x, want[1], rtol=2 * torch.finfo(dtype).eps, atol=room, equal_nan=True)
        for a, b, size in zip(sums, want[2:], (1, ratio)):  # terms of as much as j alpha/sigma, that of sigma twice
            room = 4 * unit * 2**bits * max(1, ratio) * max(1, size) * float(g.double().abs().sum())
            assert a.shape == (1,) and a.dtype == args[0].dtype
            torch.testing.assert_close(a.double(), b.reshape(1).double(), rtol=4 * unit, atol=room, msg=what)


@pytest.mark.parametrize("grad", GRADS)
def test_error_of_float32(grad):
    """The factors of dL/dx, dL/dalpha and dL/dsigma: at most four times the error of plain PyTorch in float32."""
    for bits, ratio in itertools.product(BITS, RATIOS):
        args = widths(bits, torch.float32, 0.37, ratio)
        x = spread(400 if EXHAUSTIVE else 50, bits, 0.37, torch.float32)
        q, quarters = forward(x, *args, 0, x.dtype)
        place = (4 * (q / args[0]).round() + ref.unpack(quarters, x.shape, 2, layout="dense")).long()
        exact = [v[place] for v in factors(args[0].double()[0], args[1].double()[0], bits, grad)]
        torchs = [v[place] for v in factors(args[0][0], args[1][0], bits, grad)]
        # One element at a time, so that the sums have one term each.
        rows = range(len(x)) if EXHAUSTIVE else range(0, len(x), 20)
        got = [
            backward(
                torch.ones(1),
                q[i : i + 1],
                *forward(x[i : i + 1], *args, 0, x.dtype)[1:],
                *args,
                GRADS.index(grad),
                True,
                x.dtype,
            )
            for i in rows
        ]
        got = [torch.stack([v[0][0] for v in got]), *(torch.stack([v[1][n][0] for v in got]) for n in (0, 1))]
        for name, a, b, c in zip(("x", "alpha", "sigma"), got, torchs, exact):
            b, c = b[list(rows)], c[list(rows)]
            room = 4 * (b.double() - c).square().mean().sqrt() + max(1, float(c.abs().max())) * 2.0**-22
            assert (a.double() - c).square().mean().sqrt() <= room, (name, bits, ratio)


@pytest.mark.parametrize("grad", GRADS)
def test_float64_equals_reference(grad):
    for bits, ratio in itertools.product((0, *BITS), RATIOS):
        args = widths(bits, torch.float64, 0.37, ratio)
        x = spread(300, bits, 0.37, torch.float64)
        g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        q, quarters = forward(x, *args, 0, x.dtype)
        grad_x, sums = backward(g, q, quarters, *args, GRADS.index(grad), True, x.dtype)
        want = ref.categorical_activation_backward(g, q, quarters, *args, grad_of=grad)
        room = 1e-13 * 2**bits * max(ratio, 1) ** 2 * float(g.abs().sum())
        for a, b in zip((grad_x, *sums), want):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=room, msg=lambda m: f"{bits} bits, {ratio}: {m}")


def test_dtypes_and_layouts(dtype):
    """Storage dtypes, strides, empty tensors, gradients of other layouts: a kernel's arithmetic does not see them."""
    args = widths(3, dtype)
    for i, x in enumerate(kinds_of(dtype)[:-1]):
        for grad_dtype in {dtype, torch.float32} if EXHAUSTIVE else {dtype}:
            g = torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).to(grad_dtype)
            if i % 3 == 1:
                g = torch.randn(()).to(grad_dtype).expand(x.shape)  # the gradient of a sum
            if x.dim() == 4 and i % 2:
                g = g.contiguous(memory_format=torch.channels_last)
            q, quarters = forward(x, *args, 1, dtype)
            grad_x, sums = backward(g, q, quarters, *args, 1, True, dtype)
            assert grad_x.stride() == q.stride() and grad_x.dtype == dtype
            acc = accumulates(dtype)
            wide = q.to(acc).contiguous()
            flat = ref.pack(ref.unpack(quarters, (x.numel(),), 2, layout="dense"), 2, layout="dense")
            assert torch.equal(flat, quarters)  # padded with zeros
            k = torch.empty_like(q, dtype=torch.int32)
            in_memory(k).copy_(ref.unpack(quarters, (x.numel(),), 2, layout="dense"))
            plain = backward(
                g.to(acc).contiguous(), wide, ref.pack(k.contiguous(), 2, layout="dense"), *args, 1, True, acc
            )
            assert same(grad_x, plain[0].to(dtype)), i
            for a, b in zip(sums, plain[1]):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(1 + g.double().nan_to_num().abs().sum()))
            without = backward(g, q, quarters, *args, 1, False, dtype)
            assert same(without[0], grad_x) and without[1] == []


@pytest.mark.parametrize("grad", GRADS)
def test_sums(grad):
    """Over many elements: the same bits every time, whatever the threads, and close to float64."""
    n = 200_003 if EXHAUSTIVE else 9001
    args, gi = widths(4, torch.float32), GRADS.index(grad)
    x, g = spread(n, 4, 0.37, torch.float32), torch.randn(n, generator=torch.Generator().manual_seed(2))
    q, quarters = forward(x, *args, gi, x.dtype)
    got = backward(g, q, quarters, *args, gi, True, x.dtype)[1]
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    again = backward(g, q, quarters, *args, gi, True, x.dtype)[1]
    torch.set_num_threads(threads)
    place = (4 * (q / args[0]).round() + ref.unpack(quarters, x.shape, 2, layout="dense")).long()
    by = factors(args[0].double()[0], args[1].double()[0], 4, grad)[1:]
    for a, b, v in zip(got, again, by):
        assert torch.equal(a, b)
        terms = g.double() * v[place]
        torchs = abs(float(terms.float().sum().double() - terms.sum()))
        assert abs(float(a - terms.sum())) <= 4 * torchs + 1e-6 * float(terms.abs().sum())


def test_what_no_forward_pass_gives():
    """Any q and quarters stay inside the tables, and mean what the reference says."""
    q = torch.tensor([*SPECIAL, 1e9, -1e9, 0.2, 5.0])
    quarters = torch.randint(0, 256, (-(-q.numel() // 4),), dtype=torch.uint8)
    for bits in (1, 4, 8):
        args = widths(bits, torch.float32)
        got = backward(torch.ones_like(q), q, quarters, *args, 1, True, q.dtype)
        want = ref.categorical_activation_backward(torch.ones_like(q), q, quarters, *args)
        for a, b in zip((got[0], *got[1]), want):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


# --- autograd ---------------------------------------------------------------------------------------------------------


def gradients(x, args, g):
    leaves = [t.detach().requires_grad_() for t in (x, *args[:2])]
    q = forward(*leaves, args[2], 1, x.dtype)[0]
    return q.detach(), *torch.autograd.grad(q, leaves, g)


def test_saved_tensors_in_another_layout():
    """Hooks that give back a contiguous q, as torch.autograd.graph.save_on_cpu may."""
    x = spread(2 * 3 * 5 * 5, 4, 0.37, torch.float32).view(2, 3, 5, 5).to(memory_format=torch.channels_last)
    args, g = widths(4, x.dtype), torch.randn(x.shape)
    want = gradients(x, args, g)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        got = gradients(x, args, g)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    x = spread(60, 4, 0.37, torch.float32).view(6, 10)
    args, g = widths(4, x.dtype), torch.randn(x.shape)
    leaves = [t.detach().requires_grad_() for t in (x, *args[:2])]
    q = checkpoint(lambda *v: forward(*v, args[2], 1, x.dtype)[0], *leaves, use_reentrant=reentrant)
    q.backward(g)
    got = q.detach(), *(t.grad for t in leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, gradients(x, args, g)))


def test_second_derivatives_raise_and_changes_in_place_do():
    x = torch.rand(20, requires_grad=True)
    alpha, sigma, bits = (t.requires_grad_() if t.is_floating_point() else t for t in widths(4, x.dtype))
    q = forward(x, alpha, sigma, bits, 1, x.dtype)[0]
    (g,) = torch.autograd.grad(q.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        g.sum().backward()
    q = forward(x, alpha, sigma, bits, 1, x.dtype)[0]
    with torch.no_grad():
        q.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        q.sum().backward()


def test_only_what_is_wanted():
    x, (alpha, sigma, bits) = torch.rand(20), widths(4, torch.float32)
    for wanted in itertools.product((False, True), repeat=3):
        leaves = [t.detach().requires_grad_(want) for t, want in zip((x, alpha, sigma), wanted)]
        q, quarters = forward(*leaves, bits, 1, x.dtype)
        assert q.requires_grad == any(wanted) and not quarters.requires_grad
        if any(wanted):
            q.sum().backward()
        assert [t.grad is not None for t in leaves] == list(wanted)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"] if EXHAUSTIVE else ["aot_eager"])
def test_compile(backend):
    torch._dynamo.reset()
    args = widths(4, torch.float32)
    compiled = torch.compile(
        lambda x, a, s: forward(x * 1, a, s, args[2], 1, x.dtype)[0] * 1, fullgraph=True, backend=backend
    )
    for shape, layout in (((2, 3, 5, 5), torch.channels_last), ((7, 9), torch.contiguous_format)):
        x = spread(150, 4, 0.37, torch.float32)[: torch.Size(shape).numel()].view(shape).to(memory_format=layout)
        g = torch.randn(shape)
        leaves = [t.detach().requires_grad_() for t in (x, *args[:2])]
        q = compiled(*leaves)
        for a, b in zip((q.detach(), *torch.autograd.grad(q, leaves, g)), gradients(x, args, g)):
            torch.testing.assert_close(a, b)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_values_out_of_range_raise_on_a_cpu():
    x, (alpha, sigma, bits) = torch.rand(4), widths(4, torch.float32)
    q, quarters = forward(x, alpha, sigma, bits, 1, x.dtype)
    for bad, text in (
        ((-alpha, sigma, bits), "alpha"),
        ((alpha * 1e-39, sigma, bits), "alpha"),
        ((alpha, sigma * torch.nan, bits), "sigma"),
        ((alpha, sigma, bits + 5), r"bits.*0\.\.8.*got 9"),
    ):
        with pytest.raises(ValueError, match=text):
            forward(x, *bad, 1, x.dtype)
        with pytest.raises(ValueError, match=text):
            backward(x, q, quarters, *bad, 1, True, x.dtype)


@pytest.mark.parametrize(
    "name, bad, error",
    [
        ("x", torch.ones(4, dtype=torch.int32), (TypeError, ValueError)),
        ("alpha", torch.ones(2), ValueError),
        ("alpha", torch.ones(1).double(), ValueError),
        ("sigma", torch.ones(1).double(), ValueError),
        ("bits", torch.tensor([4]), ValueError),
        ("grad_of", 2, ValueError),
        ("dtype", torch.int32, ValueError),
        ("q", torch.ones(4, 2)[:, 0], ValueError),
        ("grad", torch.ones(5), ValueError),
        ("quarters", torch.zeros(2, dtype=torch.uint8), ValueError),
        ("quarters", torch.zeros(1), ValueError),
    ],
)
def test_arguments_that_do_not_fit(name, bad, error):
    alpha, sigma, bits = widths(4, torch.float32)
    both = {"alpha": alpha, "sigma": sigma, "bits": bits, "grad_of": 1}
    given = {"x": torch.rand(4), **both, "dtype": torch.float32}
    kept = {
        "grad": torch.rand(4),
        "q": torch.rand(4),
        "quarters": torch.zeros(1, dtype=torch.uint8),
        **both,
        "scale_grad": True,
        "dtype": torch.float32,
    }
    for op, arguments in ((forward, given), (backward, kept)):
        op(*arguments.values())
        if name in arguments:
            with pytest.raises(error, match=name):
                op(*{**arguments, name: bad}.values())


def test_reference_marks_values_out_of_range():
    """NaN where values cannot be read back to raise."""
    x, (alpha, sigma, bits) = torch.rand(4), widths(4, torch.float32)
    for bad in (
        (-alpha, sigma, bits),
        (alpha, sigma * torch.inf, bits),
        (alpha, sigma, bits + 5),
        (alpha, sigma, -bits),
    ):
        q, quarters = ref.categorical_activation(x, *bad)
        assert q.isnan().all()
        assert all(v.isnan().all() for v in ref.categorical_activation_backward(x, x, quarters, *bad))


@pytest.mark.skipif(EXHAUSTIVE, reason="of the Triton kernels: run it with QUANTOPS_BACKEND=triton TRITON_INTERPRET=1")
@pytest.mark.parametrize("grad_of", [0, 1])
def test_triton_marks_values_out_of_range(monkeypatch, grad_of):
    """NaN where the kernels cannot raise; nothing is read out of bounds."""
    from quantops.kernels import categorical_activation as kernels

    monkeypatch.setattr(kernels, "check_categorical_activation", lambda *args: None)  # it raises on CPU
    x, (alpha, sigma, bits) = torch.rand(4), widths(4, torch.float32)
    for bad in (
        (-alpha, sigma, bits),
        (alpha, sigma * torch.inf, bits),
        (alpha, sigma, bits + 5),
        (alpha, sigma, -bits),
    ):
        q, quarters = forward(x, *bad, grad_of, x.dtype)
        grad_x, sums = backward(x, x, quarters, *bad, grad_of, True, x.dtype)
        assert all(v.isnan().all() for v in (q, grad_x, *sums))
