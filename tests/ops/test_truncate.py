"""Family ``truncate``: whatever kernels serve the CPU here against the reference, bit for bit.

Run as it is, the compiled C++ kernels are tested; under QUANTOPS_BACKEND=triton TRITON_INTERPRET=1, the Triton ones.
"""

import itertools

import pytest
import torch
import torch._dynamo.testing

import quantops as Q
from cases import EXHAUSTIVE, SPECIAL, same, scales, weights
from quantops import reference as ref
from truncate_cases import COMPANDINGS, KINDS, RULES, TANH, expected_layout, row, widths_of, with_or_without

ops = torch.ops.quantops


# ------------------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("rule, companding", KINDS)
def test_forward_equals_reference(dtype, per_row, rule, companding):
    w = weights(dtype)
    s, out = scales(w, per_row), with_or_without(w, per_row, rule)
    for count in (1, 4) if EXHAUSTIVE else (2,):
        bits, base = widths_of(w, count, seed=count)
        q = Q.foreach.truncate(w, s, bits, base_bits=base, rule=rule, out_scale=out, companding=companding)
        for j, i in itertools.product(range(count), range(len(w))):
            want = ref.truncate(
                w[i], s[i], bits[j, i], base_bits=base[i], rule=rule, out_scale=row(out, i), companding=companding
            )
            assert same(q[j][i], want), (i, bits[j, i], base[i])
            assert expected_layout(w[i], q[j][i])


@pytest.mark.parametrize("base", range(1, 17) if EXHAUSTIVE else (8,))
def test_every_width_is_the_shifted_code_on_the_full_grid(base, dtype):
    w = weights(dtype, special=False)
    s = scales(w, False)
    every = list(range(1, base + 1, 1 if EXHAUSTIVE else 3))
    for rule in RULES if EXHAUSTIVE else RULES[1:2]:
        q = Q.foreach.truncate(w, s, every, base_bits=base, rule=rule)
        codes = Q.foreach.encode(w, s, base, rule=rule)
        for n in every:
            cut = [c >> (base - n) for c in codes]
            if rule == "floor":  # truncation of the code IS the code of fewer bits
                assert all(map(torch.equal, cut, Q.foreach.encode(w, s, n, rule=rule)))
            for a, b in zip(q[every.index(n)], Q.foreach.decode(cut, s, n, grid="full", out_dtype=dtype)):
                assert same(a, b)


def test_several_widths_equal_single_calls(dtype):
    w, widths = weights(dtype), (8, 4, 2, 1) if EXHAUSTIVE else (8, 1)
    s = scales(w, True)
    for companding in COMPANDINGS if EXHAUSTIVE else (None,):
        together = Q.foreach.truncate(w, s, widths, companding=companding)
        for n, q in zip(widths, together):
            assert all(map(same, q, Q.foreach.truncate(w, s, n, companding=companding)))
        for i in (0, 6, 15):
            alone = Q.truncate(w[i], s[i], widths, companding=companding)
            assert isinstance(alone, tuple) and all(same(q, t[i]) for q, t in zip(alone, together))


def test_ways_to_give_widths():
    w = torch.randn(5, 7)
    want = Q.truncate(w, None, (6, 3))
    assert torch.equal(Q.truncate(w, None, 6), want[0])
    assert torch.equal(Q.truncate(w, None, torch.tensor(6)), want[0])
    assert all(map(torch.equal, Q.truncate(w, None, torch.tensor([6, 3])), want))
    assert all(map(torch.equal, Q.truncate(w, None, [torch.tensor(6), 3]), want))
    assert all(map(torch.equal, Q.truncate(w, None, torch.tensor([[6], [3]])), want))
    assert len(Q.truncate(w, None, torch.tensor([6]))) == len(Q.truncate(w, None, [6])) == 1
    each = Q.foreach.truncate([w, w], None, torch.tensor([[6, 3], [3, 6]]))
    assert torch.equal(each[0][0], want[0]) and torch.equal(each[1][0], want[1])
    assert torch.equal(each[0][1], want[1]) and torch.equal(each[1][1], want[0])
    per_weight = Q.foreach.truncate([w, w], None, torch.tensor([6, 3]), base_bits=[8, 4])
    assert torch.equal(per_weight[0], want[0])
    assert torch.equal(per_weight[1], Q.truncate(w, None, 3, base_bits=torch.tensor(4)))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_out_dtype(dtype, out_dtype):
    w = weights(dtype)
    s = scales(w, True)
    for t, v, q in zip(w, s, Q.foreach.truncate(w, s, 3, out_dtype=out_dtype)):
        assert same(q, ref.truncate(t, v, 3, out_dtype=out_dtype))


def test_out_scale_of_another_kind_than_the_scale():
    w = torch.randn(6, 50)
    one, rows = Q.absmean(w), Q.absmean(w, per_row=True)
    for s, out in (
        (Q.absmax(w), rows),
        (Q.absmax(w, per_row=True), one),
        (Q.absmax(w, per_row=True), 0.5),
        (None, one),
        (2.0, rows.unsqueeze(1)),
        (rows.unsqueeze(1), one),
    ):
        q = Q.truncate(w, s, 2, out_scale=out)
        s = Q.absmax(w) if s is None else torch.as_tensor(s)
        assert same(q, ref.truncate(w, s, 2, out_scale=torch.as_tensor(out)))
    assert Q.truncate(w[:0], rows[:0], 2, out_scale=one).shape == Q.truncate(w[:0], one, 2, out_scale=rows[:0]).shape


def near_an_edge(w, scale, base, rule):
    """True where u under tanh is within 1e-6 of the edge of a code."""
    u = torch.tanh(w.double()) / torch.tanh(scale.double()) / 2 + 0.5
    u = u * (2**base - 1) + 0.5 if rule == "nearest" else u * 2**base + (0.5 if rule == "round_clamp" else 0)
    return (u - u.round()).abs() <= 1e-6 * 2**base


@pytest.mark.parametrize("rule", RULES)
def test_companding_is_tanh(dtype, rule):
    """With torch's own tanh in front, the codes are the same but at their edges."""
    w = weights(dtype, special=False)
    for base, factor in ((8, 1.0), (5, 3.0))[: 1 + EXHAUSTIVE]:
        s = [v * factor for v in Q.foreach.absmax(w)]
        for t, v, q in zip(w, s, Q.foreach.truncate(w, s, base, base_bits=base, rule=rule, companding="tanh")):
            different = q != ref.truncate(
                torch.tanh(t.to(v.dtype)), torch.tanh(v), base, base_bits=base, rule=rule, out_scale=v, out_dtype=dtype
            )
            assert not (different & ~near_an_edge(t, v, base, rule)).any()


def test_companding_of_special_values():
    w = torch.tensor(SPECIAL)
    q = Q.truncate(w, 2.0, 4, companding="tanh", out_scale=3.0)
    assert q[-1].isnan() and q[-3] == 3 and q[-2] == -3 and not q[:-1].isnan().any()


def test_tanh_is_accurate():
    """Through the slope, 1 - tanh(w)^2; through fine codes of a weight that fills the scale; and as it is."""
    for dtype, most in ((torch.float32, 4e-7), (torch.float64, 1e-15)):
        w = torch.cat([torch.linspace(-12, 12, 4000), torch.logspace(-30, 0, 100)]).to(dtype).requires_grad_()
        (grad,) = torch.autograd.grad(Q.truncate(w, 100.0, 8, companding="tanh").sum(), w)
        assert (grad - (1 - torch.tanh(w.detach().double()) ** 2)).abs().max() <= most
        x = torch.cat([torch.logspace(-300, 2, 30000, dtype=torch.float64), torch.zeros(1)]).to(dtype)
        for v in (x, -x):
            got, want = TANH(v).double(), torch.tanh(v.double())
            assert ((got - want).abs() <= 4 * torch.finfo(dtype).eps * want.abs()).all()
        assert TANH(torch.tensor([torch.inf, -torch.inf], dtype=dtype)).tolist() == [1, -1]
        assert TANH(torch.tensor(torch.nan, dtype=dtype)).isnan()
    for size in (1.0, 1e-3, 1e-20):
        w = torch.linspace(-size, size, 3001)
        q = Q.truncate(w, size, 16, base_bits=16, companding="tanh", out_scale=1.0)
        assert (q - torch.tanh(w.double()) / torch.tanh(torch.tensor(size).double())).abs().max() <= 2**-15


def test_special_values():
    for rule in RULES:
        q = Q.truncate(torch.tensor(SPECIAL), 1.0, 3, rule=rule)
        assert q[-1].isnan() and q[-3] == 1 and q[-2] == -1 and not q[:-1].isnan().any()
        assert not Q.truncate(torch.tensor(SPECIAL[:-1]), 0.0, 3, rule=rule).any()


def test_determinism_and_no_alias():
    w = torch.randn(3, 1000)
    g = [torch.randn(3, 1000)] * 2
    s = torch.rand(3) + 0.5

    def run():
        q = Q.truncate(w, s, (8, 1), companding="tanh")
        bits = torch.tensor([[8], [1]], dtype=torch.int32)
        grad_w, grad_s, _ = ops.truncate_backward(g, [w], [s], [], bits, bits[0], 1, True, False, True)
        return [*q, *grad_w, *grad_s]

    first = run()
    assert all(map(torch.equal, first, run()))
    assert len({t.untyped_storage().data_ptr() for t in [w, *first]}) == 5


# ------------------------------------------------------------------------------------------------ as an op of torch


def test_compile_is_one_graph_while_bits_change():
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    w = [torch.randn(8, 5, requires_grad=True), torch.randn(7, requires_grad=True)]

    def step(w, bits, base):
        q = Q.foreach.truncate(w, None, bits, base_bits=base)
        loss = sum((t * t).sum() * (j + 1) for j, v in enumerate(q) for t in v)
        return loss

    compiled = torch.compile(step, fullgraph=True, backend=frames)
    for base in (8, 5, 4):
        bits = torch.tensor([[base, base], [2, 3]], dtype=torch.int32)
        base = torch.full((2,), base, dtype=torch.int32)
        want = torch.autograd.grad(step(w, bits, base), w)
        got = torch.autograd.grad(compiled(w, bits, base), w)
        assert all(map(torch.equal, got, want))
    assert frames.frame_count == 1


@pytest.mark.parametrize("companding", [None, "tanh"])
def test_compile_with_dynamic_shapes(companding):
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def f(w, s):
        q = Q.truncate(w, s, (8, 4, 2, 1), companding=companding)
        return sum(t.square().sum() for t in q)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=frames)
    for rows in (5, 9, 14):
        w, s = torch.randn(rows, 7, requires_grad=True), torch.rand(rows).add(0.5).requires_grad_()
        for a, b in zip(torch.autograd.grad(compiled(w, s), (w, s)), torch.autograd.grad(f(w, s), (w, s))):
            assert torch.equal(a, b)
    assert frames.frame_count == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_is_saved_for_backward_but_the_inputs(compiled):
    torch._dynamo.reset()
    w = [torch.randn(64, 32, requires_grad=True), torch.randn(1000, requires_grad=True)]
    known, kept = {t.data_ptr() for t in w}, []

    def pack(t):
        if t.data_ptr() not in known:
            kept.append(t.numel() * t.element_size())
        return t

    def forward(w, bits):
        return torch.cat([q.flatten() for v in Q.foreach.truncate(w, None, bits, companding="tanh") for q in v]).sum()

    if compiled:
        forward = torch.compile(forward, fullgraph=True, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = forward(w, torch.tensor([[8, 8], [2, 3]], dtype=torch.int32))
    loss.backward()
    assert sum(kept) <= 2 * (4 + 4 + 8), kept  # per weight: its scale, base width and two widths


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_emits_its_dtype_directly(dtype):
    w = torch.randn(20, 10, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        q = Q.truncate(w, None, (8, 1))
    assert all(t.dtype == dtype for t in q)
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(q, Q.truncate(w, None, (8, 1))))
    sum(t.float().sum() for t in q).backward()
    assert w.grad.dtype == torch.float32 and torch.equal(w.grad, torch.full_like(w, 2))


def test_more_tensors_than_one_table_holds():
    count = 900 if EXHAUSTIVE else 40
    w = [torch.randn(i % 7) for i in range(count)]
    s = Q.foreach.absmax(w)
    q = Q.foreach.truncate(w, s, (8, 4, 1))
    for i, (j, n) in itertools.product(range(0, count, 31), enumerate((8, 4, 1))):
        assert same(q[j][i], ref.truncate(w[i], s[i], n))
    every = Q.foreach.truncate(w[:150], s[:150], list(range(1, 17)), base_bits=16)
    for i, n in itertools.product(range(0, min(count, 150), 31), (1, 9, 16)):
        assert same(every[n - 1][i], ref.truncate(w[i], s[i], n, base_bits=16))


# --------------------------------------------------------------------------------------------------------- bad input

W = torch.randn(4, 6)
N = torch.tensor([[4]], dtype=torch.int32)
ONE = torch.ones(())


def _op(w=W, scale=ONE, out=(), bits=N, base=N[0], rule=1, dtype=torch.float32):
    return ops.truncate([w], [scale], list(out), bits, base, rule, False, False, False, dtype)


def _back(grads, bits=N, out=()):
    return ops.truncate_backward(grads, [W], [ONE], list(out), bits, N[0], 1, False, False, True)


BAD = {
    "repeated": (lambda: Q.truncate(W, None, (8, 4, 8)), ValueError, r"bits: expected distinct widths, got 8 twice"),
    "repeated, tensor": (lambda: Q.truncate(W, None, torch.tensor([4, 4])), ValueError, r"bits\[1\].*distinct.*4"),
    "above base": (lambda: Q.truncate(W, None, (8, 4), base_bits=6), ValueError, r"bits: .*1\.\.base_bits = 6, got 8"),
    "above base, tensor": (lambda: Q.truncate(W, None, torch.tensor(9)), ValueError, r"bits.*base_bits = 8.*9"),
    "zero": (lambda: Q.truncate(W, None, 0), ValueError, r"bits: .*1\.\.base_bits = 8, got 0"),
    "zero, tensor": (lambda: Q.truncate(W, None, torch.tensor([4, 0])), ValueError, r"bits\[1\].*0"),
    "2^32 + 4": (lambda: Q.truncate(W, None, torch.tensor(2**32 + 4)), ValueError, r"bits.*base_bits = 8"),
    "no width": (lambda: Q.truncate(W, None, ()), ValueError, r"bits: expected 1\.\.16 widths, got 0"),
    "float": (lambda: Q.truncate(W, None, (4, 2.0)), TypeError, r"bits: expected an integer .*float"),
    "bool": (lambda: Q.truncate(W, None, True), TypeError, r"bits: .*bool"),
    "float tensor": (lambda: Q.truncate(W, None, torch.tensor([4.0])), TypeError, r"bits: .*integer"),
    "3 dims": (
        lambda: Q.truncate(W, None, torch.ones(1, 1, 1, dtype=torch.int32)),
        ValueError,
        r"bits: expected shape \(widths, weights\) .*\(1, 1, 1\)",
    ),
    "shape of widths": (
        lambda: Q.foreach.truncate([W, W], None, torch.ones(2, 3, dtype=torch.int32)),
        ValueError,
        r"bits: expected shape \(widths, weights\) = \(1\.\.16, 2\), got \(2, 3\)",
    ),
    "17 widths": (lambda: Q.truncate(W, None, torch.arange(17)), ValueError, r"bits: .*1\.\.16.*17"),
    "a width for another device": (
        lambda: Q.truncate(W, None, [4, torch.ones((), dtype=torch.int32, device="meta")]),
        ValueError,
        r"bits: expected device cpu",
    ),
    "base above 16": (lambda: Q.truncate(W, None, 4, base_bits=17), ValueError, r"base_bits: expected 1\.\.16, got 17"),
    "base 0": (lambda: Q.truncate(W, None, 4, base_bits=0), ValueError, r"base_bits: expected 1\.\.16, got 0"),
    "base, tensor": (lambda: Q.truncate(W, None, 4, base_bits=torch.tensor(17)), ValueError, r"base_bits.*1\.\.16.*17"),
    "base float": (lambda: Q.truncate(W, None, 4, base_bits=8.0), TypeError, r"base_bits: expected an integer"),
    "rule": (lambda: Q.truncate(W, None, 4, rule="ceil"), ValueError, r"rule: expected one of .*'ceil'"),
    "companding": (lambda: Q.truncate(W, None, 4, companding="mu"), ValueError, r"companding: expected one of .*'mu'"),
    "scale negative": (lambda: Q.truncate(W, -1.0, 4), ValueError, r"scale: expected a finite value >= 0 .*got -1"),
    "scale NaN": (lambda: Q.truncate(W, torch.tensor(torch.nan), 4), ValueError, r"scale.*>= 0, got.*nan"),
    "scale infinite with tanh": (
        lambda: Q.truncate(W, torch.tensor(torch.inf), 4, companding="tanh"),
        ValueError,
        r"scale.*>= 0, got.*inf",
    ),
    "out_scale negative": (lambda: Q.truncate(W, 1.0, 4, out_scale=-1.0), ValueError, r"out_scale: .*>= 0 .*got -1"),
    "out_scale, tensor": (
        lambda: Q.truncate(W, 1.0, 4, out_scale=torch.tensor(-1.0)),
        ValueError,
        r"out_scale.*>= 0.*-1",
    ),
    "out_scale shape": (
        lambda: Q.truncate(W, 1.0, 4, out_scale=torch.ones(3)),
        ValueError,
        r"out_scale: expected one element or one per row \(4\).*\(3,\)",
    ),
    "out_scale no list": (
        lambda: Q.foreach.truncate([W], None, 4, out_scale=1.0),
        ValueError,
        r"out_scale: expected a list",
    ),
    "out_dtype": (lambda: Q.truncate(W, 1.0, 4, out_dtype=torch.int8), TypeError, r"out_dtype: .*int8"),
    "weight": (lambda: Q.truncate(W.int(), 1.0, 4), TypeError, r"w: .*int32"),
    "op: scale's dtype": (lambda: _op(scale=torch.ones((), dtype=torch.float64)), ValueError, r"scale: .*float64"),
    "op: widths' shape": (lambda: _op(bits=N[0]), ValueError, r"bits: expected shape"),
    "op: widths' dtype": (lambda: _op(bits=N.long()), ValueError, r"bits: expected .*int32, got .*int64"),
    "op: base's count": (lambda: _op(base=torch.tensor([4, 4], dtype=torch.int32)), ValueError, r"base_bits: "),
    "op: out_scale's count": (lambda: _op(out=[torch.ones(4)]), ValueError, r"out_scale: .*as many elements"),
    "op: out_scale's length": (lambda: _op(out=[torch.ones(())] * 2), ValueError, r"out_scale: expected a list"),
    "op: rule": (lambda: _op(rule=3), ValueError, r"rule: expected 0\.\.2, got 3"),
    "op: gradients' count": (lambda: _back([W, W]), ValueError, r"grads: expected .*1.*, got 2"),
    "op: gradients' shape": (lambda: _back([W.t()]), ValueError, r"grads\[0\]: expected .*\(4, 6\).*got \(6, 4\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_error(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()


def test_reference_marks_values_out_of_range():
    """What a GPU gives where it cannot raise: NaN for that output, and in the gradient that it has a part in."""
    good = torch.ones(())
    for n, base, s, out in (
        (0, 8, good, None),
        (9, 8, good, None),
        (-1, 8, good, None),
        (4, 17, good, None),
        (4, 0, good, None),
        (4, 8, -good, None),
        (4, 8, good * torch.nan, good),
        (4, 8, good, -good),
        (4, 8, good, good * torch.inf),
    ):
        for companding in COMPANDINGS:
            options = {"base_bits": base, "companding": companding, "out_scale": out}
            assert ref.truncate(W, s, n, **options).isnan().all()
            assert ref.truncate_backward([W], W, s, [n], **options)[0].isnan().all()
            assert not ref.truncate_backward([None], W, s, [n], **options)[0].any()


def test_two_bits_of_the_nearest_rule_hold_normal_weights_better_than_dyadic_ones():
    """Squared error over the weights' energy at the best scale, near 1.87 and 2.6 mean|w|."""
    w = torch.randn(200_000, generator=torch.Generator().manual_seed(0))

    def least(quantize):
        return min(
            float((quantize(f * w.abs().mean()) - w).square().sum() / w.square().sum())
            for f in torch.arange(1.2, 3.2, 0.1)
        )

    nearest = least(lambda s: Q.truncate(w, s, 2, base_bits=2, rule="nearest"))
    assert 0.115 < nearest < 0.122 < 0.145 < least(lambda s: Q.round_clamp(w, s, 2)) < 0.155
