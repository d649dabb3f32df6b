"""Family ``uniform``: whatever kernels serve the CPU here against the reference, bit for bit; then its gradients.

Run as it is, the compiled C++ kernels are tested; under QUANTOPS_BACKEND=triton TRITON_INTERPRET=1, the Triton ones.
"""

import itertools

import pytest
import torch

import quantops as Q
from cases import EXHAUSTIVE, SPECIAL, check_scale_grad, free_gigabytes, same, scales, weights
from quantops import reference as ref

GRIDS = ref.uniform.GRIDS
SEEDS = range(3 if EXHAUSTIVE else 1)


def expected_layout(w, out):
    dense = Q.layout.dense_rows(w)
    return out.stride() == w.stride() if dense else out.is_contiguous()


def signs(grid):
    """Values that may be quantized on a grid: signed, unsigned."""
    return (True,) if grid == "sign" else (True, False)


def bits_and_k(w, seed=2, grid="full"):
    """A width for each weight, 0..16 (15 beside a sign), and a legal k."""
    generator = torch.Generator().manual_seed(seed)
    most = ref.uniform.most_bits(grid)
    n = torch.randint(0, most + 1, (len(w),), generator=generator, dtype=torch.int32)
    k = torch.where(n > 1, 1 + torch.randint(0, 100, (len(w),), generator=generator) % (n - 1).clamp(min=1), 0)
    return n, k.to(torch.int32)


@pytest.mark.parametrize("per_row", [False, True])
def test_forward_equals_reference(dtype, per_row):
    w = weights(dtype)
    s = scales(w, per_row)
    for grid, seed in itertools.product(GRIDS, SEEDS):
        n, k = bits_and_k(w, seed, grid)
        for signed in signs(grid):
            q = Q.foreach.round_clamp(w, s, n, signed=signed, grid=grid)
            for i, t in enumerate(w):
                assert same(q[i], ref.round_clamp(t, s[i], n[i], signed=signed, grid=grid)), (i, n[i], signed, grid)
                assert expected_layout(t, q[i])
        for i, b in enumerate(Q.foreach.lsb(w, s, n, k, grid=grid)):
            assert same(b, ref.lsb(w[i], s[i], n[i], k[i], grid=grid)), (i, n[i], k[i], grid)
        q = Q.foreach.msq(w, s, n, k, grid=grid).q
        for i, t in enumerate(w):
            assert same(q[i], ref.msq(t, s[i], n[i], k[i], grid=grid)[0])


@pytest.mark.parametrize("bits", range(17) if EXHAUSTIVE else (1, 8, 16))
def test_codes_equal_reference_and_decode_to_q(bits, dtype):
    w = weights(dtype)
    for per_row, rule, signed in itertools.product((False, True)[: 1 + EXHAUSTIVE], ref.uniform.RULES, (True, False)):
        s = scales(w, per_row)
        codes = Q.foreach.encode(w, s, bits, rule=rule, signed=signed)
        for i, t in enumerate(w):
            assert same(codes[i], ref.encode(t, s[i], bits, rule=rule, signed=signed)), (i, rule, signed)
            assert codes[i].numel() == 0 or 0 <= int(codes[i].min()) <= int(codes[i].max()) <= 2**bits - 1
        for grid in GRIDS[:2] if EXHAUSTIVE else GRIDS[:1]:
            back = Q.foreach.decode(codes, s, bits, grid=grid, signed=signed, out_dtype=dtype)
            for i in range(len(w)):
                assert same(back[i], ref.decode(codes[i], s[i], bits, grid=grid, signed=signed, dtype=dtype))
            if rule == "round_clamp":
                for t, q, b in zip(w, Q.foreach.round_clamp(w, s, bits, signed=signed, grid=grid), back):
                    assert same(torch.where(t.isnan(), torch.nan, b), q)


@pytest.mark.parametrize("bits", range(16) if EXHAUSTIVE else (1, 8, 15))
def test_sign_magnitude_codes(bits, dtype):
    w = weights(dtype)
    for per_row in (False, True)[: 1 + EXHAUSTIVE]:
        s = scales(w, per_row)
        codes = Q.foreach.encode(w, s, bits, grid="sign")
        back = Q.foreach.decode(codes, s, bits, grid="sign", out_dtype=dtype)
        for t, v, c, b, q in zip(w, s, codes, back, Q.foreach.round_clamp(w, s, bits, grid="sign")):
            assert same(c, ref.encode(t, v, bits, grid="sign"))
            assert same(b, ref.decode(c, v, bits, grid="sign", dtype=dtype))
            assert same(torch.where(t.isnan(), torch.nan, b), q)
            assert not torch.signbit(b[b == 0]).any(), "zero has no sign"
            magnitude, sign = c % 2**bits, c >> bits
            assert c.numel() == 0 or 0 <= int(c.min()) <= int(c.max()) < 2 ** (bits + (bits > 0))
            assert torch.equal(sign == 1, (t < 0) & (magnitude > 0))
    w = torch.linspace(-1.5, 1.5, 4001, dtype=torch.float32).to(dtype)
    q, c = Q.round_clamp(w, 1.0, bits, grid="sign"), Q.encode(w, 1.0, bits, grid="sign")
    unit = w.to(s[0].dtype).abs().clamp(max=1)
    assert torch.equal(c % 2**bits, (unit * 2**bits).round().clamp(max=2**bits - 1).int())
    assert torch.equal(q, -Q.round_clamp(-w, 1.0, bits, grid="sign")) and (q[w == 0] == 0).all()
    if bits == 1:
        assert q.unique().tolist() == [-0.5, 0.0, 0.5]


def test_a_sign_code_with_a_cut_magnitude_is_zero():
    """A negative weight whose magnitude has been shifted away."""
    assert torch.equal(torch.signbit(Q.decode(torch.tensor([4, 0]), 1.0, 2, grid="sign")), torch.tensor([False] * 2))


def test_one_tensor_may_hold_the_scales_of_all_weights(dtype):
    w = weights(dtype, special=False)
    s, (n, k), ops = Q.foreach.absmax(w), bits_and_k(w), torch.ops.quantops
    g, r = [torch.full_like(t, 0.5) for t in w], torch.linspace(-1, 1, len(w), dtype=s[0].dtype)
    codes, q_like = ops.encode(w, s, n, 0, 0, True), ops.round_clamp(w, s, n, 0, True, True, dtype)

    def results(s):
        to = [torch.empty_like(v) for v in q_like]
        ops.round_clamp_out(list(map(Q.layout.dense, w)), s, n, 1, True, to)
        q, *sums = ops.msq(w, s, n, k, 1, True, dtype)
        backward, _ = ops.uniform_backward(g, r, w, s, n, k, 0, True, False)
        more = *ops.lsb(w, s, n, k, 0), *ops.encode(w, s, n, 1, 0, True), *ops.decode(codes, s, n, 0, True, dtype)
        return *to, *q, *sums, *backward, *ops.lsb_stats(w, s, n, k, 0, False), *more

    joined = [torch.stack(s)]
    assert all(same(a, b) for a, b in zip(results(joined), results(s), strict=True))
    for refused in (
        lambda: ops.uniform_backward(g, r, w, joined, n, k, 0, True, True),  # it is a constant
        lambda: ops.truncate(w, joined, None, n.clamp(1, 8)[None], n.clamp(8, 8), 1, False, True, False, dtype),
        lambda: ops.lsb(w[1:], joined, n[1:], k[1:], 0),
    ):
        with pytest.raises(ValueError, match="scale: expected a list with one"):
            refused()


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_out_dtype_and_out(dtype, out_dtype):
    w = weights(dtype)
    s = scales(w, True)
    n, k = bits_and_k(w)
    want = [ref.round_clamp(t, v, b, out_dtype=out_dtype) for t, v, b in zip(w, s, n)]
    for got in (Q.foreach.round_clamp(w, s, n, out_dtype=out_dtype), Q.foreach.msq(w, s, n, k, out_dtype=out_dtype).q):
        assert all(same(a, b) for a, b in zip(got, want))
    dense = [t for t in w if Q.layout.dense_rows(t)]
    keep = [i for i, t in enumerate(w) if Q.layout.dense_rows(t)]
    buffers = [torch.empty_like(t, dtype=out_dtype).fill_(7) for t in dense]
    args = dense, [s[i] for i in keep], n[keep]
    Q.foreach.round_clamp(*args, out=buffers)
    assert all(same(a, want[i]) for a, i in zip(buffers, keep))
    buffers = [b.fill_(7) for b in buffers]
    stats = Q.foreach.msq(*args, k[keep], out=buffers)
    assert stats.q[0] is buffers[0] and all(same(a, want[i]) for a, i in zip(buffers, keep))
    fresh = Q.foreach.msq(*args, k[keep])
    assert all(torch.equal(a, b) for a, b in zip(stats[2:3], fresh[2:3]))


@pytest.mark.parametrize("per_row", [False, True])
def test_sums(dtype, per_row):
    w = weights(dtype, special=False)
    s = scales(w, per_row)
    acc = s[0].dtype
    for grid, seed in itertools.product(GRIDS, SEEDS):
        n, k = bits_and_k(w, seed, grid)
        got = Q.foreach.msq(w, s, n, k, grid=grid)
        alone = Q.foreach.lsb_stats(w, s, n, k, grid=grid)
        again = Q.foreach.msq(w, s, n, k, grid=grid)
        for i, t in enumerate(w):
            _, penalty, nonzero, sq_error = ref.msq(t, s[i], n[i], k[i], grid=grid)
            assert got.nonzero[i] == nonzero and alone[1][i] == nonzero
            for have, want in ((got.penalty[i], penalty), (got.sq_error[i], sq_error)):
                assert have.dtype == acc
                torch.testing.assert_close(have, want, rtol=4e-6 if acc == torch.float32 else 1e-12, atol=0)
            assert torch.equal(got.penalty[i], again.penalty[i]) and torch.equal(got.sq_error[i], again.sq_error[i])
            assert torch.equal(got.penalty[i], alone[0][i]) and torch.equal(got.sq_error[i], alone[2][i])


def test_sums_error_is_within_four_times_torchs_own():
    w = torch.randn(3_000_001 if EXHAUSTIVE else 30_001, generator=torch.Generator().manual_seed(0))
    r = Q.msq(w, None, 6, 1)
    exact = (r.q.double() - w.double()).square()
    wide = (r.q - w).square()
    ours = (r.sq_error.double() - exact.sum()).abs()
    bound = 4 * (wide.sum().double() - exact.sum()).abs() + exact.sum() * 2**-23
    assert ours <= bound
    mean, want = Q.absmean(w).double(), w.double().abs().mean()
    assert (mean - want).abs() <= 4 * (w.abs().mean().double() - want).abs() + want * 2**-23


@pytest.mark.parametrize("name,special", [("absmax", True), ("absmean", False)])  # sums of huge values overflow
def test_scales(dtype, name, special):
    w = weights(dtype, special=special)
    for per_row in (False, True):
        some = [t for t in w if t.dim()] if per_row else w
        for t, s in zip(some, getattr(Q.foreach, name)(some, per_row=per_row)):
            want = getattr(ref, name)(t, per_row=per_row)
            if name == "absmax":
                assert same(s, want)
            else:
                torch.testing.assert_close(s, want, rtol=1e-6 if s.dtype == torch.float32 else 1e-12, atol=0)
            assert s.shape == want.shape and not s.requires_grad


def test_absmean_of_nan_is_nan(dtype):
    w = torch.ones(3, 40, dtype=dtype)
    w[1, 7] = torch.nan
    assert Q.absmean(w).isnan() and Q.absmean(w, per_row=True).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("per_row", [False, True])
def test_backward_equals_reference(dtype, per_row):
    w = weights(dtype)
    s = scales(w, per_row)
    for seed, (grid, signed) in enumerate((g, v) for g in GRIDS for v in signs(g)):
        n, k = bits_and_k(w, seed, grid)
        for g_dtype in {dtype, torch.float32}:
            g = [torch.randn(t.shape, generator=torch.Generator().manual_seed(i)).to(g_dtype) for i, t in enumerate(w)]
            r = torch.randn(len(w), dtype=s[0].dtype)
            for grad, penalty in ((g, None), (g, r), ([], r)):
                if penalty is not None and not signed:
                    continue
                got_w, got_s = torch.ops.quantops.uniform_backward(
                    grad, penalty, w, s, n, k, GRIDS.index(grid), signed, True
                )
                for i, t in enumerate(w):
                    want_w, _ = ref.uniform_backward(
                        grad[i] if grad else None,
                        None if penalty is None else penalty[i],
                        t,
                        s[i],
                        n[i],
                        k[i],
                        grid=grid,
                        signed=signed,
                    )
                    assert same(got_w[i], want_w), (i, n[i], k[i])
                    check_scale_grad(got_s[i], grad[i] if grad else None, t, s[i], n[i], grid, signed, (i, n[i], k[i]))
                assert (
                    torch.ops.quantops.uniform_backward(grad, penalty, w, s, n, k, GRIDS.index(grid), signed, False)[1]
                    == []
                )


def test_add_lsb_grad(dtype):
    w = weights(dtype)
    for per_row, grid in itertools.product((False, True), ("dyadic", "sign")):
        s, (n, k) = scales(w, per_row), bits_and_k(w, grid=grid)
        grad = [torch.randn_like(t) for t in w]
        strength = torch.linspace(0.2, 0.7, len(w), dtype=s[0].dtype) if per_row else 0.37
        each = strength if per_row else [0.37] * len(w)
        want = [ref.add_lsb_grad(*a, grid=grid) for a in zip(grad, each, w, s, n, k)]
        version = grad[0]._version
        Q.foreach.add_lsb_grad_(grad, w, s, n, k, strength, grid=grid)
        assert all(same(a, b) for a, b in zip(grad, want))
        assert grad[0]._version > version


def test_add_lsb_grad_to_a_gradient_in_another_layout():
    w = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    grad = torch.randn(8, 4, 3, 3)
    want = ref.add_lsb_grad(grad, 0.5, w, ref.absmax(w), 4, 2)
    Q.foreach.add_lsb_grad_([grad], [w], None, 4, 2, 0.5)
    assert torch.equal(grad, want)


def test_nested_bins():
    """The reason for the rule: a weight with B_k = 0 keeps its value when k bits are dropped."""
    w = torch.randn(10000)
    s = Q.absmax(w)
    for (n, k), grid in itertools.product(((8, 1), (8, 3), (4, 2), (2, 1)), ("dyadic", "sign")):
        zero = Q.lsb(w, s, n, k, grid=grid) == 0
        assert 0 < zero.sum() < len(w)
        assert torch.equal(Q.round_clamp(w, s, n, grid=grid)[zero], Q.round_clamp(w, s, n - k, grid=grid)[zero])


def test_the_sign_grid_is_the_unsigned_one_of_magnitudes():
    w = torch.cat([torch.randn(3000) * 0.4, torch.arange(-64, 65) / 64])
    for n, k in ((15, 4), (8, 3), (5, 1), (2, 1)):
        size = w.abs()
        q = Q.round_clamp(size, 1.0, n, signed=False) * w.sign()
        assert torch.equal(Q.round_clamp(w, 1.0, n, grid="sign"), q)
        high, low = (Q.encode(size, 1.0, b, signed=False) for b in (n, n - k))
        assert torch.equal(Q.lsb(w, 1.0, n, k, grid="sign"), (high - 2**k * low) * w.sign().int())
        want = (high - 2**k * low).abs().double().sum() * 2.0**-n
        torch.testing.assert_close(Q.lsb_penalty(w, 1.0, n, k, grid="sign").double(), want)


def test_autograd_matches_reference():
    torch.manual_seed(0)
    w = torch.randn(40, 30, requires_grad=True)
    s = torch.rand(40, 1, dtype=torch.float32).add(0.5).requires_grad_()
    g = torch.randn(40, 30)
    for grid in GRIDS:
        r = Q.msq(w, s, 5, 2, grid=grid)
        assert not r.sq_error.requires_grad and not r.nonzero.requires_grad
        gw, gs = torch.autograd.grad((r.q * g).sum() + 0.3 * r.penalty, (w, s))
        want_w, want_s = ref.uniform_backward(g, torch.tensor(0.3), w.detach(), s.detach(), 5, 2, grid=grid)
        assert same(gw, want_w) and gs.shape == s.shape
        torch.testing.assert_close(gs, want_s, rtol=1e-4, atol=1e-5)
    (gw,) = torch.autograd.grad(Q.lsb_penalty(w, s, 5, 2), w)
    assert same(gw, ref.uniform_backward(None, torch.tensor(1.0), w.detach(), s.detach(), 5, 2)[0])


def test_identity_backward_is_the_gradient_itself():
    w = torch.randn(64, 64, requires_grad=True)
    q = Q.round_clamp(w, None, 4)
    seen = []
    q.register_hook(lambda g: seen.append(g.data_ptr()))
    w.register_hook(lambda g: seen.append(g.data_ptr()))
    (q * torch.randn(64, 64)).sum().backward()
    assert seen[0] == seen[1]


def test_unused_entries_of_a_list_get_no_gradient_or_zeros():
    w = [torch.randn(5, requires_grad=True), torch.randn(6, requires_grad=True)]
    Q.foreach.round_clamp(w, None, 3)[0].sum().backward()
    assert torch.equal(w[0].grad, torch.ones(5)) and w[1].grad is None
    w = [t.detach().requires_grad_() for t in w]
    r = Q.foreach.msq(w, None, 3, 1)
    (r.q[0].sum() + r.penalty[1]).backward()
    assert torch.equal(w[0].grad, torch.ones(5))
    assert same(w[1].grad, Q.lsb(w[1].detach(), None, 3).sign().float())


@pytest.mark.parametrize("learned", [False, True])
def test_double_backward(learned):
    """The backward is linear in g and r; second derivatives follow from that, as finite differences show."""
    torch.manual_seed(0)
    w = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    s = torch.full((6,), 1.1, dtype=torch.float64, requires_grad=learned)
    g = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    r = torch.randn((), dtype=torch.float64, requires_grad=True)

    def backward(g, r):
        out = Q.msq(w, s, 4, 1)
        wanted = (w, s) if learned else (w,)
        return torch.autograd.grad((out.q * g).sum() + r * out.penalty, wanted, create_graph=True)

    assert torch.autograd.gradcheck(backward, (g, r))


def test_hessian_vector_product_through_the_quantizer():
    """STE: the quantizer's Hessian is zero, so Hv is the loss's own Hessian at q where inside, else zero."""
    torch.manual_seed(0)
    w = torch.randn(12, requires_grad=True)
    a = torch.randn(12, 12)
    a = a @ a.t()
    for scale, inside in ((None, torch.ones(12)), (torch.tensor(0.8), (w.detach().abs() <= 0.8).float())):
        q = Q.round_clamp(w, scale, 4)
        (grad,) = torch.autograd.grad(0.5 * q @ a @ q, w, create_graph=True)
        v = torch.randn(12)
        (hv,) = torch.autograd.grad(grad, w, v)
        torch.testing.assert_close(hv, inside * (a @ (inside * v)))


def test_more_tensors_than_one_table_holds():
    count = 1500 if EXHAUSTIVE else 150
    w = [torch.randn(i % 7) for i in range(count)]
    n = torch.arange(count, dtype=torch.int32) % 9
    s = Q.foreach.absmax(w)
    q = Q.foreach.msq(w, s, n, 0)
    for i in range(0, count, 61):
        assert same(q.q[i], ref.round_clamp(w[i], s[i], n[i]))
        assert same(q.sq_error[i], ref.msq(w[i], s[i], n[i], 0)[3])


def test_writing_to_out_is_seen_by_autograd():
    w, x = torch.randn(3, 4), torch.randn(2, 4, requires_grad=True)
    for write in (lambda: Q.round_clamp(w, None, 4, out=buffer), lambda: Q.msq(w, None, 4, out=buffer)):
        buffer = torch.randn(3, 4)
        y = x @ buffer.t()
        write()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_q_never_aliases_w():
    w = torch.randn(8).round()
    assert Q.round_clamp(w, 4.0, 16).data_ptr() != w.data_ptr()


def test_nan_and_infinity():
    w = torch.tensor(SPECIAL)
    q = Q.round_clamp(w, 1.0, 4)
    assert q[-1].isnan() and q[-3] == 1 - 2 / 16 and q[-2] == -1 and not q[:-1].isnan().any()
    assert Q.encode(w, 1.0, 4)[-1] == 0
    assert Q.absmax(w).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_of_any_bits_counts_nothing(dtype):
    """Among many weights, where loops read codes from the bits of sums: NaNs of either sign and any payload."""
    w = torch.randn(3000, generator=torch.Generator().manual_seed(0)).to(dtype)
    nans = torch.tensor([0x7FC00001, 0x7F810000, 0x7FFFFFFF, -1, -0x3FFFFF], dtype=torch.int32).view(torch.float32)
    w[5:2500:499] = nans.to(dtype)[:5]
    w[7:2000:97] = torch.inf
    for bits, k in ((8, 1), (3, 1), (5, 2)):
        want, got = ref.msq(w, torch.tensor(0.9), bits, k), Q.msq(w, 0.9, bits, k)
        assert w.isnan().sum() == 5 and same(got.q, want[0]) and got.nonzero == want[2] and got.sq_error.isnan()
        assert torch.equal(Q.lsb(w, 0.9, bits, k), ref.lsb(w, torch.tensor(0.9), bits, k))


def test_scale_zero_gives_zero():
    w = torch.tensor([1.0, -2.0, float("inf"), 0.0])
    for grid, signed in ((g, v) for g in GRIDS for v in signs(g)):
        assert torch.equal(Q.round_clamp(w, 0.0, 3, grid=grid, signed=signed), torch.zeros(4))


def test_zero_bits_prune():
    for grid in GRIDS:
        assert torch.equal(Q.round_clamp(torch.randn(9), 1.0, 0, grid=grid), torch.zeros(9))


def test_reference_marks_values_out_of_range():
    """What a GPU gives where it cannot raise: NaN, or an integer that no code can be."""
    w = torch.randn(4, 5)
    good = torch.ones(())
    for n, k, s in (
        (17, 0, good),
        (-1, 0, good),
        (3, 3, good),
        (3, -1, good),
        (3, 1, -good),
        (3, 1, good * torch.nan),
        (3, 1, good * torch.inf),
    ):
        q, penalty, nonzero, sq_error = ref.msq(w, s, n, k)
        assert q.isnan().all() and penalty.isnan() and nonzero == -1 and sq_error.isnan()
        assert (ref.lsb(w, s, n, k) == ref.uniform.INVALID).all()
        grad_w, grad_s = ref.uniform_backward(w, good, w, s, n, k)
        assert grad_w.isnan().all() and grad_s.isnan().all()


@pytest.mark.skipif(not EXHAUSTIVE, reason="billions of elements: not for Triton's interpreter")
@pytest.mark.skipif(free_gigabytes() < 12, reason="needs 12 GB of free memory")
def test_more_than_two_to_the_31_elements():
    part = torch.zeros(2**30 + 7, dtype=torch.bfloat16)  # 2 GiB; a list may hold it three times
    part[-3:] = torch.tensor([0.9, -1.0, 0.26])
    penalty, nonzero, sq_error = Q.foreach.lsb_stats([part] * 3, None, 3, 1)
    few = Q.foreach.lsb_stats([part[-3:]], None, 3, 1)
    assert nonzero.tolist() == few[1].tolist() * 3 and few[1] > 0
    assert torch.equal(penalty, few[0].expand(3)) and torch.allclose(sq_error, few[2].expand(3))
    del part
    long = torch.zeros(2**31 + 9, dtype=torch.bfloat16)
    long[-1] = -3.0
    q = Q.round_clamp(long, None, 2, out=torch.empty_like(long))
    assert q[-1] == -3.0 and q[-2] == 0 and Q.absmax(long) == 3.0


@pytest.mark.parametrize("columns", [20, 700, 50000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_absmean_of_weights_near_the_top(dtype, columns):
    top = torch.finfo(dtype).max
    w = torch.full((3, columns), top, dtype=dtype) * torch.tensor([[1], [-0.5], [0.25]], dtype=dtype)
    expected = (
        torch.tensor([1, 0.5, 0.25], dtype=torch.float64).mul(float(top)).to(Q.reference.uniform.acc_dtype(dtype))
    )
    for absmean in (Q.absmean, Q.reference.absmean):
        torch.testing.assert_close(absmean(w, per_row=True), expected, rtol=1e-6, atol=0)
        assert absmean(w).isfinite() and absmean(torch.tensor([torch.inf, 1.0], dtype=dtype)) == torch.inf
        assert absmean(torch.tensor([torch.nan, top], dtype=dtype)).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_a_scale_near_the_top(dtype):
    scale = torch.tensor(torch.finfo(dtype).max, dtype=dtype)
    w = torch.tensor([0.0, 0.3, -1.0], dtype=dtype) * scale
    for bits, k in ((1, 0), (2, 1), (4, 0)):
        ours, want = Q.msq(w, scale, bits, k, grid="full"), Q.reference.msq(w, scale, bits, k, grid="full")
        assert same(ours.q, want[0]) and ours.nonzero == want[2]
        torch.testing.assert_close(ours.penalty, want[1], rtol=1e-6, atol=0)
        assert ours.penalty.isfinite() and (k > 0 or ours.penalty == 0)
