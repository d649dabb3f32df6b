"""Family ``activation``: against its reference, against the codes of family ``uniform``, and against the papers' own
chains of tensor ops.

Run as it is, the compiled C++ kernels are tested; under QUANTOPS_BACKEND=triton TRITON_INTERPRET=1, the Triton ones.
"""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import quantops as Q
from cases import EXHAUSTIVE, SPECIAL, same, weights
from quantops import default
from quantops.reference.activation import FRONTS, KEEPS, LEARNS, RESIDUALS
from quantops.reference.uniform import RULES

ops = torch.ops.quantops
FITTING = (
    ("input", None),
    ("input", "clip"),
    ("input", "step"),
    ("bits", None),
    ("bits", "clip"),
    ("residual", None),
    ("residual", "step"),
)


def accumulates(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def kinds_of(dtype):
    """Tensors of many shapes, layouts and alignments; the last has NaN, infinities and huge values."""
    x = weights(dtype)
    if not EXHAUSTIVE:
        long = torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(dtype)
        x = [x[2], x[4], x[6], x[9], long[3:1100], x[-1]]
    return x


def options(rule, signed, front, keep, learn):
    return RULES.index(rule), signed, FRONTS.index(front), KEEPS.index(keep), LEARNS.index(learn)


def check(x, g, scale, offset, bits, settings, out):
    """Both ops against the default kernels, which are the reference: values bit for bit, sums to their rounding."""
    n, (_, _, _, keep, learn) = torch.tensor([bits], dtype=torch.int32), settings
    args = scale, offset, n, *settings
    q, kept = ops.activation(x, *args, out)
    want_q, want_kept = default.activation.activation(x, *args, out)
    assert same(q, want_q) and torch.equal(kept, want_kept)
    assert q.stride() == (x.stride() if Q.layout.dense_rows(x) else torch.empty(x.shape).stride())
    g, x = (torch.empty_strided(q.shape, q.stride(), dtype=t.dtype).copy_(t) for t in (g.to(out), x))
    given = g, x if keep == 0 else None, q if keep == 1 and learn else None, kept, *args, x.dtype
    grad_x, sums = ops.activation_backward(*given)
    want_x, want_sums = default.activation.activation_backward(*given)
    assert same(grad_x, want_x) and grad_x.stride() == want_x.stride()
    assert len(sums) == len(want_sums) == 2 * bool(learn)
    for a, b in zip(sums, want_sums):
        assert a.shape == b.shape == scale.shape and a.dtype == b.dtype
        room = 4 * torch.finfo(a.dtype).eps * float(g.double().nan_to_num().abs().sum())
        torch.testing.assert_close(a, b, rtol=1e-5, atol=room, equal_nan=True)


@pytest.mark.parametrize("rule", RULES)
def test_equals_reference(rule, dtype):
    outs = (dtype, torch.bfloat16, torch.float16, torch.float32, torch.float64)
    acc, generator = accumulates(dtype), torch.Generator().manual_seed(0)
    for i, x in enumerate(kinds_of(dtype)):
        x = x if x.numel() < 9000 else x[3:5000] if x.dim() == 1 else x[:1, :5000]
        g = torch.randn(x.shape, generator=generator)
        fitting = FITTING if EXHAUSTIVE else FITTING[i % 3 :: 3]
        for (j, (keep, learn)), channels in itertools.product(enumerate(fitting), (False, True)):
            if channels and not (x.dim() > 1 and 1 < x.shape[1] < 100):
                continue
            signed, has_offset = (i + j) % 2 == 0, j % 3 == 1
            count = x.shape[1] if channels else 1
            scale = (torch.rand(count, generator=generator) * 2 + 0.01).to(acc)
            offset = (torch.randn(count, generator=generator) / 3).to(acc) if has_offset else None
            front = "relu" if not signed and not has_offset and i % 3 == 1 else None
            if keep == "input":
                front = ("gelu", "gelu_tanh", "silu", front)[(i + RULES.index(rule)) % 4]
            settings = options(rule, signed, front, keep, learn)
            check(x, g, scale, offset, (0, 1, 3, 4, 8, 16)[(i + j) % 6], settings, outs[(i + j) % 5])


@pytest.mark.parametrize("rule, grid", [("round_clamp", "dyadic"), ("floor", "full"), ("nearest", "full")])
@pytest.mark.parametrize("signed", [False, True])
def test_is_decode_of_encode(rule, grid, signed):
    """So that integers stand for activations as they do for weights."""
    edges = torch.arange(-600, 601) / 512 * 0.7
    x = torch.cat([edges, torch.nextafter(edges, torch.tensor(9.0)), torch.tensor(SPECIAL), torch.randn(1000)])
    for bits in (1, 2, 4, 8, 16) if EXHAUSTIVE else (1, 4):
        for scale in (0.7, 1.0, 2.0**-100, 2.0**100) if EXHAUSTIVE else (0.7,):
            codes = Q.encode(x, scale, bits, rule=rule, signed=signed)
            want = Q.decode(codes, scale, bits, grid=grid, signed=signed)
            want = torch.where(x.isnan(), x, want)
            assert same(Q.quantize_activation(x, scale, bits, rule=rule, signed=signed), want), (bits, scale)


def test_floor_codes_are_cut():
    """TruncQuant: the codes of m bits are those of n bits shifted."""
    x = torch.randn(5000).abs()
    codes = Q.encode(x, 2.0, 8, rule="floor", signed=False)
    for m in (4, 2, 1):
        q = Q.quantize_activation(x, 2.0, m, rule="floor")
        assert torch.equal(q, Q.decode(codes >> 8 - m, 2.0, m, grid="full", signed=False))


# --- against the papers -----------------------------------------------------------------------------------------------


def spread(seed=0, n=6000):
    """(x, g) in float64: signed, one and a half scales of 1 wide."""
    generator = torch.Generator().manual_seed(seed)
    return (
        3 * torch.rand(n, generator=generator, dtype=torch.float64) - 1.5,
        torch.randn(n, generator=generator, dtype=torch.float64),
    )


def gradients(x, scale, g, offset=None, **settings):
    leaves = [t.detach().clone().requires_grad_() for t in (x, scale, *([] if offset is None else [offset]))]
    q = Q.quantize_activation(leaves[0], leaves[1], 4, offset=leaves[2] if len(leaves) > 2 else None, **settings)
    return q.detach(), *torch.autograd.grad(q, leaves, g)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("keep", ["input", "residual"])
def test_lsq(signed, keep):
    """arXiv 1902.08153, equations 1 to 3 and the factor of section 2.2, in the step; 2004.09576 with an offset."""
    low, top = (-8, 7) if signed else (0, 15)
    for offset in (None, torch.tensor([0.3], dtype=torch.float64)):
        x, g = spread()
        step = torch.tensor([0.08], dtype=torch.float64)
        count = 8 if signed else 16  # steps of a scale
        v = (x if offset is None else x - offset) / step
        got = gradients(x, step * count, g, offset, signed=signed, learn="step", keep=keep)
        code = v.round().clamp(low, top)
        torch.testing.assert_close(got[0], code * step + (0 if offset is None else offset))
        inside = (v >= low) & (v <= count)  # the scale itself is the end here, a step beyond the last level
        inside = inside if not signed else v.abs() <= count
        assert torch.equal(got[1], g * inside)
        factor = (x.numel() * top) ** -0.5
        exact = (g * torch.where(inside, code - v, code)).sum() * factor / count
        terms = (g.abs() * inside).sum() * factor / count
        assert abs(float(got[2] - exact)) <= (1e-12 if keep == "input" else 1 / (2 * RESIDUALS)) * float(terms)
        if keep == "residual":  # the error of a residual is as often above as below: far less in the sum
            assert abs(float(got[2] - exact)) <= 0.06 / (2 * RESIDUALS) * float(terms)
        if offset is not None:
            torch.testing.assert_close(got[3], ((g * ~inside).sum() * factor).reshape(1))


@pytest.mark.parametrize("rule", RULES)
def test_error_of_a_residual(rule):
    """Each number that is kept says (q - x) / (a code step) to half of 1/126."""
    x, _ = spread()
    for signed, bits in itertools.product((False, True), (1, 2, 4)):
        settings = options(rule, signed, None, "residual", "step")
        scale = torch.ones(1, dtype=torch.float64)
        q, kept = ops.activation(x, scale, None, torch.tensor([bits], dtype=torch.int32), *settings, x.dtype)
        inside = (x <= 1) & (x >= (-1 if signed else 0))
        assert torch.equal((kept > 0) & (kept < 255), inside)
        assert torch.equal(kept == 255, x > 1) and torch.equal(kept == 0, ~inside & (x <= 1))
        span = 1 + int(signed)
        code_step = span / (2**bits - 1) if rule != "round_clamp" else span / 2**bits
        error = ((kept.double() - 128) / RESIDUALS - (q - x) / code_step)[inside].abs().max()
        assert 0.4 / RESIDUALS < error <= 0.5 / RESIDUALS + 1e-12


def test_pact():
    """arXiv 1805.06085, equations 1 to 3: the clip gets the sum of g where x is at or above it."""
    x, g = spread()
    for keep in ("input", "bits"):
        q, grad_x, grad_clip = gradients(
            x, torch.ones(1, dtype=torch.float64), g, rule="nearest", front="relu", learn="clip", keep=keep
        )
        torch.testing.assert_close(q, (x.clamp(0, 1) * 15).round() / 15)
        assert torch.equal(grad_x, g * ((x > 0) & (x <= 1)))
        torch.testing.assert_close(grad_clip, g[x > 1].sum().reshape(1))


def test_relu_in_front():
    """The same as the two one after the other, at 0 too."""
    x, g = torch.cat([torch.randn(100), torch.tensor(SPECIAL)]), torch.randn(100 + len(SPECIAL))
    for rule, keep in itertools.product(RULES, KEEPS):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        a = Q.quantize_activation(leaves[0], 0.8, 3, rule=rule, keep=keep, front="relu")
        b = Q.quantize_activation(leaves[1].relu(), 0.8, 3, rule=rule, keep=keep)
        a.backward(g), b.backward(g)
        assert same(a, b) and torch.equal(leaves[0].grad, leaves[1].grad)


def test_channels():
    """A scale per channel is that of each channel alone, whatever the layout."""
    x, g = torch.randn(3, 5, 7, 9), torch.randn(3, 5, 7, 9)
    scale, offset = torch.rand(5) + 0.2, torch.randn(5) / 4
    layouts = torch.contiguous_format, torch.channels_last
    for layout, (keep, learn) in itertools.product(layouts, FITTING[1:] if EXHAUSTIVE else FITTING[4::2]):
        laid, settings = x.to(memory_format=layout), dict(signed=True, keep=keep)
        got = (
            gradients(laid, scale, g, offset, **settings, learn=learn)
            if learn
            else [Q.quantize_activation(laid, scale, 4, offset=offset, **settings)]
        )
        for c in range(5 if EXHAUSTIVE else 2):
            if learn:
                one = gradients(
                    x[:, c : c + 1],
                    scale[c : c + 1],
                    g[:, c : c + 1],
                    offset[c : c + 1],
                    signed=True,
                    keep=keep,
                    learn=learn,
                )
                for a, b in zip(got[2:], one[2:]):
                    torch.testing.assert_close(a[c : c + 1], b, rtol=1e-5, atol=1e-5)
                assert torch.equal(got[1][:, c : c + 1], one[1])
            want = Q.quantize_activation(x[:, c : c + 1], scale[c], 4, offset=offset[c], signed=True)
            assert torch.equal(got[0][:, c : c + 1], want)


def test_sums():
    """The same bits every time, whatever the threads; and as close to float64 as float32 sums of torch."""
    n = 200_003 if EXHAUSTIVE else 9001
    x, g = torch.randn(n, generator=torch.Generator().manual_seed(1)), torch.randn(n)
    for learn in ("clip", "step"):
        got = gradients(x, torch.ones(1), g, signed=True, learn=learn)
        threads = torch.get_num_threads()
        torch.set_num_threads(3)
        again = gradients(x, torch.ones(1), g, signed=True, learn=learn)
        torch.set_num_threads(threads)
        assert torch.equal(got[2], again[2])
        exact = gradients(x, torch.ones(1), g, signed=True, learn=learn, keep="input")[2]
        if learn == "clip":
            terms = torch.where(x > 1, g * 0.875, torch.where(x < -1, -g, 0 * g))
            want = float(terms.double().sum())
            assert abs(float(got[2]) - want) <= 4 * abs(float(terms.sum()) - want) + 1e-6 * float(terms.abs().sum())
            assert torch.equal(got[2], exact)
        else:
            assert abs(float(got[2] - exact)) <= float(g.abs().sum()) / (8 * 2 * RESIDUALS * (7 * n) ** 0.5)


# --- what is kept -----------------------------------------------------------------------------------------------------


def kept_bytes(x, scale, known=(), **settings):
    """Bytes that autograd keeps beyond ``known``, which somebody keeps anyway."""
    found = {}

    def pack(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        q = Q.quantize_activation(x, scale, 4, **settings)
    for t in (q, scale, *known):
        found.pop(t.untyped_storage().data_ptr(), None)
    return sum(found.values()), q


def test_what_is_kept():
    n = 8000
    for dtype in (torch.float32, torch.bfloat16):
        x, scale = torch.randn(n, dtype=dtype, requires_grad=True), torch.ones(1, requires_grad=True)
        small = 16  # bits
        assert n // 8 <= kept_bytes(x, scale)[0] <= n // 8 + small
        assert n // 8 <= kept_bytes(x, scale, learn="clip")[0] <= n // 8 + small
        assert n <= kept_bytes(x, scale, learn="step")[0] <= n + small
        assert kept_bytes(x, scale, known=[x], learn="step", keep="input")[0] <= small
        # Without sums q is not kept either.
        fixed = scale.detach()
        with torch.no_grad():
            assert kept_bytes(x, fixed)[0] == 0


# --- autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", KEEPS)
def test_second_derivatives(keep):
    """Those of dL/dx, which is linear in g: through a network, as Hessian traces take them. The others raise."""
    x, w = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    learn = None if keep == "bits" else "step"
    scale = torch.full((1,), 2.0, dtype=torch.float64, requires_grad=True)

    def loss(quantize):
        return (quantize(x @ w) ** 3).sum()

    def ste(h):
        inside = (h.detach() >= 0) & (h.detach() <= 2)
        q = Q.quantize_activation(h.detach(), 2.0, 4)
        return q + (h * inside - (h * inside).detach())

    products = []
    for quantize in (lambda h: Q.quantize_activation(h, scale, 4, learn=learn, keep=keep), ste):
        (grad,) = torch.autograd.grad(loss(quantize), w, create_graph=True)
        products.append(torch.autograd.grad((grad * torch.ones_like(grad)).sum(), w)[0])
    torch.testing.assert_close(*products)
    if learn:
        (grad,) = torch.autograd.grad(
            loss(lambda h: Q.quantize_activation(h, scale, 4, learn=learn, keep=keep)), scale, create_graph=True
        )
        with pytest.raises(NotImplementedError, match="second derivatives of the scale"):
            grad.sum().backward()


def test_only_what_is_wanted():
    x = torch.rand(20)
    for wanted in itertools.product((False, True), repeat=3):
        leaves = [t.clone().requires_grad_(want) for t, want in zip((x, torch.ones(1), torch.zeros(1)), wanted)]
        for keep, learn in FITTING:
            q = Q.quantize_activation(leaves[0], leaves[1], 4, offset=leaves[2], keep=keep, learn=learn)
            assert q.requires_grad == any(wanted)
            if any(wanted):
                grads = torch.autograd.grad(q.sum(), [t for t in leaves if t.requires_grad], allow_unused=True)
                assert all(g is not None for g in grads) or not learn


def test_saved_tensors_in_another_layout_and_expanded_gradients():
    x = torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last)
    for g in (torch.randn(x.shape), torch.randn(()).expand(x.shape)):
        for keep, learn in FITTING[1:]:
            want = gradients(x, torch.ones(1), g, keep=keep, learn=learn) if learn else None
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
                got = gradients(x, torch.ones(1), g, keep=keep, learn=learn) if learn else None
            assert not learn or all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    x, scale = torch.randn(6, 10, requires_grad=True), torch.ones(1, requires_grad=True)
    for learn in ("clip", "step"):
        g = torch.randn(6, 10)
        q = checkpoint(lambda a, b: Q.quantize_activation(a, b, 4, learn=learn), x, scale, use_reentrant=reentrant)
        x.grad = scale.grad = None
        q.backward(g)
        want = gradients(x, scale, g, learn=learn)
        assert all(torch.equal(a, b) for a, b in zip((q, x.grad, scale.grad), want))


def test_changes_in_place_raise():
    x, scale = torch.rand(20, requires_grad=True), torch.ones(1, requires_grad=True)
    q = Q.quantize_activation(x, scale, 4, learn="clip")
    with torch.no_grad():
        q.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        q.sum().backward()


def test_compile():
    torch._dynamo.reset()
    n = torch.tensor([4], dtype=torch.int32)
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, s: Q.quantize_activation(x * 1, s, n, learn="step") * 1, fullgraph=True, backend=frames
    )
    for bits in (4, 2):
        n.fill_(bits)
        x = torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
        scale, g = torch.ones(1, requires_grad=True), torch.randn(2, 3, 5, 5)
        q = compiled(x, scale)
        eager = Q.quantize_activation(x, scale, n, learn="step")
        got, want = ((v, *torch.autograd.grad(v, (x, scale), g)) for v in (q, eager))
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b)
    assert frames.frame_count == 1


def test_autocast():
    x = torch.randn(30, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        q = Q.quantize_activation(x, 1.0, 4)
    assert q.dtype == torch.bfloat16
    assert Q.quantize_activation(x, 1.0, 4, out_dtype=torch.float16).dtype == torch.float16
    q.sum().backward()
    assert x.grad.dtype == torch.float32


# --- bad input --------------------------------------------------------------------------------------------------------

X = torch.randn(2, 3, 4)
NAN = float("nan")
BAD = {
    "scale zero": (dict(scale=0.0), ValueError, r"scale: expected values in 2\^-100..2\^100, got \[?0"),
    "scale negative": (dict(scale=-1.0), ValueError, r"scale: .*-1"),
    "scale NaN": (dict(scale=torch.tensor([1, NAN, 1])), ValueError, r"scale: .*nan"),
    "scale infinite": (dict(scale=torch.tensor(torch.inf)), ValueError, r"scale: .*inf"),
    "scale tiny": (dict(scale=1e-31), ValueError, r"scale: "),
    "scale length": (dict(scale=torch.ones(2)), ValueError, r"scale: .*per channel \(3, dim 1\).*got shape \(2,\)"),
    "scale text": (dict(scale="1"), TypeError, r"scale: expected a number or a tensor, got str"),
    "scale integers": (dict(scale=torch.ones(1, dtype=torch.int32)), TypeError, r"scale: .*int32"),
    "scale device": (dict(scale=torch.ones(1, device="meta")), ValueError, r"scale: expected device cpu"),
    "offset NaN": (dict(offset=NAN), ValueError, r"offset: expected a finite number"),
    "offset length": (dict(offset=torch.ones(4)), ValueError, r"offset: .*per channel"),
    "bits": (dict(bits=17), ValueError, r"bits: expected 0\.\.16, got 17"),
    "bits in a tensor": (dict(bits=torch.tensor(-1)), ValueError, r"bits.*0\.\.16, got -1"),
    "bits count": (dict(bits=torch.tensor([4, 4])), ValueError, r"bits: .*shape \(2,\)"),
    "rule": (dict(rule="ceil"), ValueError, r"rule: expected one of 'round_clamp', 'floor', 'nearest', got 'ceil'"),
    "signed": (dict(signed=None), ValueError, r"signed: "),
    "front": (dict(front="tanh"), ValueError, r"front: expected one of None, 'relu', 'gelu', .*'silu', got 'tanh'"),
    "gelu and bits": (dict(front="gelu", keep="bits"), ValueError, r"keep: expected 'input' with front='gelu'.*'bits'"),
    "silu and residual": (dict(front="silu", keep="residual", learn="step"), ValueError, r"keep: expected 'input'"),
    "relu and signed": (dict(front="relu", signed=True), ValueError, r"front: expected unsigned .*signed codes"),
    "relu and an offset": (dict(front="relu", offset=0.1), ValueError, r"front: .*an offset"),
    "keep": (dict(keep="q"), ValueError, r"keep: "),
    "learn": (dict(learn="lsq"), ValueError, r"learn: "),
    "bits for a step": (dict(keep="bits", learn="step"), ValueError, r"keep: expected 'input' or 'residual'.*'bits'"),
    "residual for a clip": (dict(keep="residual", learn="clip"), ValueError, r"keep: expected 'input' or 'bits'"),
    "integers": (dict(x=torch.ones(3, dtype=torch.int32)), TypeError, r"x: .*int32"),
    "no tensor": (dict(x=[1.0]), TypeError, r"x: expected a tensor, got list"),
    "out_dtype": (dict(out_dtype=torch.int8), TypeError, r"out_dtype: "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, text = BAD[name]
    with pytest.raises(error, match=text):
        Q.quantize_activation(**{"x": X, "scale": 1.0, "bits": 4, **change})


@pytest.mark.parametrize(
    "name, bad",
    [
        ("scale", torch.ones(2)),
        ("scale", torch.ones(1).double()),
        ("offset", torch.ones(3)),
        ("bits", torch.tensor([4])),
        ("rule", 3),
        ("front", 5),
        ("front", 2),
        ("keep", 3),
        ("learn", 3),
        ("learn", 2),
        ("dtype", torch.int32),
        ("grad", torch.ones(4, 2)[:, 0]),
        ("q", torch.ones(5)),
        ("q", None),
        ("kept", torch.zeros(2, dtype=torch.uint8)),
        ("kept", torch.zeros(1)),
        ("x", None),
    ],
)
def test_the_ops_themselves_read_nothing_out_of_bounds(name, bad):
    shared = {
        "scale": torch.ones(1),
        "offset": None,
        "bits": torch.tensor([4], dtype=torch.int32),
        "rule": 0,
        "signed": False,
        "front": 0,
        "keep": 1,
        "learn": 1,
        "dtype": torch.float32,
    }
    forward = {"x": torch.rand(4), **shared}
    backward = {
        "grad": torch.rand(4),
        "x": None,
        "q": torch.rand(4),
        "kept": torch.zeros(1, dtype=torch.uint8),
        **shared,
    }
    for op, arguments in ((ops.activation, forward), (ops.activation_backward, backward)):
        op(*arguments.values())
        if name not in arguments or (name == "x" and op is ops.activation):
            continue
        wrong = {**arguments, name: bad}
        if name == "x":
            wrong |= {"keep": 0, "kept": torch.zeros(0, dtype=torch.uint8)}
        with pytest.raises(ValueError, match="keep" if name in ("learn", "front") and bad == 2 else name):
            op(*wrong.values())


def test_reference_marks_values_out_of_range():
    """NaN where values cannot be read back to raise."""
    x, one, n = torch.rand(4), torch.ones(1), torch.tensor(4)
    for scale, offset, bits in (
        (-one, None, n),
        (one * NAN, None, n),
        (one * 0, None, n),
        (one, one * torch.inf, n),
        (one, None, n + 13),
        (one, None, n - 5),
        (one * 1e-31, None, n),
    ):
        q, kept = Q.reference.activation(x, scale, bits, offset=offset, keep="residual")
        assert q.isnan().all()
        found = Q.reference.activation_backward(x, None, None, kept, scale, bits, offset=offset, learn="step")
        assert all(v.isnan().all() for v in found)


@pytest.mark.parametrize("front", [None, "gelu"])
@pytest.mark.parametrize(
    "dtype, out_dtype", [*itertools.permutations((torch.float32, torch.bfloat16, torch.float64), 2)]
)
def test_second_derivatives_where_q_has_another_dtype(dtype, out_dtype, front):
    """dL/dq of q's dtype, dL/dx of x's: the second pass gives the first one's gradient in q's."""

    def second(x, out_dtype):
        q = Q.quantize_activation(x, 1.0, 4, out_dtype=out_dtype, front=front)
        g = torch.ones_like(q, requires_grad=True)
        (first,) = torch.autograd.grad(q, x, g, create_graph=True)
        return torch.autograd.grad(first.double().square().sum(), g)[0]

    x = torch.linspace(-2, 2, 33).to(dtype)
    got, wide = second(x.requires_grad_(), out_dtype), second(x.detach().double().requires_grad_(), torch.float64)
    assert got.dtype == out_dtype
    torch.testing.assert_close(got.double(), wide, rtol=0.03, atol=0.01)


def test_scales_and_offsets_of_any_shape_with_an_entry_per_channel():
    x = torch.randn(2, 3, 4, 4)
    want = Q.quantize_activation(x, torch.ones(3), 4, offset=torch.zeros(3))
    for scale, offset in ((torch.ones(3, 1, 1), torch.zeros(3, 1, 1)), (torch.ones(3), torch.zeros(1, 1))):
        assert torch.equal(Q.quantize_activation(x, scale, 4, offset=offset), want)


@pytest.mark.parametrize("value", [1e300, 10**400, float("nan"), float("inf")])
def test_numbers_that_are_none_of_the_dtype(value):
    with pytest.raises(ValueError, match="scale: expected a finite number of torch.float32"):
        Q.quantize_activation(torch.ones(3), value, 4)
    with pytest.raises(ValueError, match="offset: expected a finite number of torch.float32"):
        Q.quantize_activation(torch.ones(3), 1.0, 4, offset=value)
