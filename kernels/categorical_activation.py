"""Family ``categorical_activation`` in Triton: the ops of quantops/library.py on one tensor, with what
csrc/categorical_activation_math.h has.

Forward: one kernel. Backward: :func:`fill_table` computes the factors of all places, of which there are at most 1024;
:func:`look_up` reads dL/dq, q and quarters and writes dL/dx; partial sums are added up by a third kernel, in float64
and in order. Elements stand in rows of V, which a thread moves as words of 16 bytes, and whose quarters are one number.
"""

import torch
import triton
import triton.language as tl

from quantops.kernels import categorical_backward as cb
from quantops.kernels import categorical_gates as cg
from quantops.kernels import categorical_quantizer as cq
from quantops.kernels import categorical_soft as cs
from quantops.kernels import exponential as ex
from quantops.kernels import math
from quantops.kernels.launch import TYPES, block_of, in_layouts_of, ints, launch, on_device_of
from quantops.layout import dense, empty_like
from quantops.reference.categorical import GRADS
from quantops.reference.categorical_activation import QUARTER_BITS
from quantops.reference.packing import data_shape
from quantops.reference.uniform import acc_dtype
from quantops.values import check_categorical_activation

MOST_PLACES = tl.constexpr(4 << cq.MAX_SOFT_BITS.value)
TABLE_LANES = tl.constexpr(128)  # places of one program


@triton.jit
def _bins(alpha, sigma, bits):
    """What alpha, sigma and bits fix, and the number of places."""
    l = cg.make_levels(alpha, 0, tl.load(bits), False, cq.MAX_SOFT_BITS, False)
    return cq.make_bins(tl.load(alpha), tl.load(sigma), l.low, l.high, l.valid), l


@triton.jit
def quarter_of(x, q, p):
    """k of x, whose q is at hand as it is stored; 0 where that is NaN."""
    v = 4.0 * (x * p.inv_alpha - cq.nearest_class(q, p))
    v = tl.where(v > -2.0, v, -2.0)
    return (math.floor_small(ex.at_most(v, 1.0)) + 2.0).to(tl.uint32)


@triton.jit
def place_of(q, k, p):
    """4 j + k, 0 where q is NaN."""
    place = 4.0 * cq.nearest_class(q, p) + k.to(q.dtype)
    return tl.where(place == place, place, 0.0).to(tl.int32)


@triton.jit
def _tile(N: tl.constexpr, V: tl.constexpr):
    """Elements of N/V rows of V, and of a row the bits that their quarters have."""
    column = tl.arange(0, V)[None, :]
    return tl.arange(0, N // V)[:, None] * V + column, (2 * column).to(tl.uint32)


@triton.jit
def _word(address, start, V: tl.constexpr):
    """Pointer to the quarters of element ``start``, V of them in a number."""
    if V == 8:
        return address.to(tl.pointer_type(tl.uint16)) + start // 8
    else:
        return address + start // 4


@triton.jit
def _quantize(
    x_ptr,
    q_ptr,
    quarters,
    left,
    p,
    Q_T: tl.constexpr,
    A: tl.constexpr,
    V: tl.constexpr,
    N: tl.constexpr,
    WHOLE: tl.constexpr,
):
    i, shift = _tile(N, V)
    if WHOLE:
        x = math.widen(tl.load(x_ptr + i), A)
    else:
        x = math.widen(tl.load(x_ptr + i, mask=i < left, other=0), A)
    q = math.narrow(p.alpha * cq.nearest_class(x, p), Q_T)
    k = quarter_of(x, math.widen(q, A), p)
    row = tl.arange(0, N // V)
    if WHOLE:
        tl.store(q_ptr + i, q)
        tl.store(quarters + row, tl.sum(k << shift, axis=1).to(quarters.dtype.element_ty))
    else:
        tl.store(q_ptr + i, q, mask=i < left)
        k = tl.where(i < left, k, 0)
        tl.store(quarters + row, tl.sum(k << shift, axis=1).to(quarters.dtype.element_ty), mask=row * V < left)


@triton.jit(do_not_specialize=["numel"])
def quantize(
    x, q, quarters, alpha, sigma, bits, numel, Q_T: tl.constexpr, A: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per BLOCK elements."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    p, _ = _bins(alpha, sigma, bits)
    if numel - start >= BLOCK:
        _quantize(x + start, q + start, _word(quarters, start, V), 0, p, Q_T, A, V, BLOCK, True)
    else:  # four at a time, so that no byte is written past the end
        _quantize(x + start, q + start, _word(quarters, start, 4), numel - start, p, Q_T, A, 4, BLOCK, False)


@triton.jit
def _soft(x, p, l):
    """The soft factors at x, one class up and down at a time."""
    c = cq.nearest_class(x, p)
    z = cq.offset_of(x, c, p)
    y, w = ex.exponential(z - p.half), ex.exponential(-z - p.half)
    reach = cs.soft_reach(l, p.beta)
    weight, slope = cs.soft_center(y, w)
    u, first = weight, tl.zeros_like(c)
    step = tl.zeros([], c.dtype)
    inner = ex.exponential(-p.beta * step)
    for _ in range(1, reach + 1):
        step += 1.0
        outer = ex.exponential(-p.beta * step)
        pair = cs.soft_pair(y, w, inner, outer)
        up, down = tl.where(c + step <= p.high, pair.up, 0.0), tl.where(c - step >= p.low, pair.down, 0.0)
        weight += up + down
        first += step * (up - down)
        inner = outer
    inv = math.divide(1.0, weight)
    mean = first * inv
    sharp = ex.one_minus_exp(p.beta.to(tl.float64)).to(c.dtype)
    deviation = -u * mean
    by_x, by_width = deviation * slope, deviation * (0.5 * sharp * u)
    step = tl.zeros([], c.dtype)
    inner = ex.exponential(-p.beta * step)
    for _ in range(1, reach + 1):
        step += 1.0
        outer = ex.exponential(-p.beta * step)
        pair = cs.soft_pair(y, w, inner, outer)
        up = tl.where(c + step <= p.high, pair.up, 0.0) * (step - mean)
        down = tl.where(c - step >= p.low, pair.down, 0.0) * (-step - mean)
        by_x += up * pair.up_slope - down * pair.down_slope
        by_width += up * (0.5 * sharp * pair.up + step * pair.up_slope) + down * (
            0.5 * sharp * pair.down + step * pair.down_slope
        )
        inner = outer
    return cs.soft_factors(by_x * inv, by_width * inv, c, z, mean, p)


@triton.jit
def _winner(x, p):
    c = cq.nearest_class(x, p)
    k = cb.make_one_interval(p)
    w = cb.mirrored_offset(x, c, p, k)
    rt, rq = cb.winner_of_one(c, cb.edge_power(w, k), k)
    _, in_alpha, in_sigma = cb.factors_of_one(c, w, rt, rq, p, k)
    return k.scale * cb.mirrored(c * rt, c, k), in_alpha, in_sigma


@triton.jit
def fill_table(table, alpha, sigma, bits, A: tl.constexpr, SOFT: tl.constexpr):
    """The factors of dL/dq in dL/dx, dL/dalpha and dL/dsigma at TABLE_LANES places; MOST_PLACES of each."""
    p, l = _bins(alpha, sigma, bits)
    first, count = tl.program_id(0) * TABLE_LANES, 4 * (l.high + 1)
    if first < count:
        place = first + tl.arange(0, TABLE_LANES)
        x = (place.to(A) - 1.5) * (0.25 * p.alpha)
        x = tl.where(place == 0, -float("inf"), tl.where(place == count - 1, float("inf"), x))
        if SOFT:
            in_x, in_alpha, in_sigma = _soft(x, p, l)
        else:
            in_x, in_alpha, in_sigma = _winner(x, p)
        valid = p.alpha == p.alpha
        tl.store(table + place, tl.where(valid, in_x, float("nan")))
        tl.store(table + MOST_PLACES + place, tl.where(valid, in_alpha, float("nan")))
        tl.store(table + 2 * MOST_PLACES + place, tl.where(valid, in_sigma, float("nan")))


@triton.jit
def _look_up(
    g_ptr,
    q_ptr,
    quarters,
    out_ptr,
    table,
    left,
    p,
    OUT_T: tl.constexpr,
    A: tl.constexpr,
    V: tl.constexpr,
    N: tl.constexpr,
    SCALE_GRAD: tl.constexpr,
    WHOLE: tl.constexpr,
):
    i, shift = _tile(N, V)
    row = tl.arange(0, N // V)
    if WHOLE:
        q, g = math.widen(tl.load(q_ptr + i), A), math.widen(tl.load(g_ptr + i), A)
        word = tl.load(quarters + row)
    else:
        q = math.widen(tl.load(q_ptr + i, mask=i < left, other=0), A)
        g = math.widen(tl.load(g_ptr + i, mask=i < left, other=0), A)
        word = tl.load(quarters + row, mask=row * V < left, other=0)
    place = place_of(q, (word.to(tl.uint32)[:, None] >> shift) & 3, p)
    out = math.narrow(g * tl.load(table + place), OUT_T)
    in_alpha, in_sigma = tl.zeros([], A), tl.zeros([], A)
    if SCALE_GRAD:
        of_alpha = g * tl.load(table + MOST_PLACES + place)
        of_sigma = g * tl.load(table + 2 * MOST_PLACES + place)
        if not WHOLE:
            of_alpha, of_sigma = tl.where(i < left, of_alpha, 0.0), tl.where(i < left, of_sigma, 0.0)
        in_alpha, in_sigma = tl.sum(of_alpha), tl.sum(of_sigma)
    if WHOLE:
        tl.store(out_ptr + i, out)
    else:
        tl.store(out_ptr + i, out, mask=i < left)
    return in_alpha, in_sigma


@triton.jit(do_not_specialize=["numel"])
def look_up(
    g,
    q,
    quarters,
    out,
    table,
    partials,
    alpha,
    sigma,
    bits,
    numel,
    OUT_T: tl.constexpr,
    A: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE_GRAD: tl.constexpr,
):
    """One program per BLOCK elements; ``partials``: its sums for alpha and sigma."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    p, _ = _bins(alpha, sigma, bits)
    if numel - start >= BLOCK:
        in_alpha, in_sigma = _look_up(
            g + start,
            q + start,
            _word(quarters, start, V),
            out + start,
            table,
            0,
            p,
            OUT_T,
            A,
            V,
            BLOCK,
            SCALE_GRAD,
            True,
        )
    else:
        in_alpha, in_sigma = _look_up(
            g + start,
            q + start,
            _word(quarters, start, 4),
            out + start,
            table,
            numel - start,
            p,
            OUT_T,
            A,
            4,
            BLOCK,
            SCALE_GRAD,
            False,
        )
    if SCALE_GRAD:
        tl.store(partials + 2 * tl.program_id(0), in_alpha.to(tl.float64))
        tl.store(partials + 2 * tl.program_id(0) + 1, in_sigma.to(tl.float64))


@triton.jit(do_not_specialize=["programs"])
def finish_sums(partials, in_alpha, in_sigma, programs, A: tl.constexpr, BLOCK: tl.constexpr):
    """Second stage of dL/dalpha and dL/dsigma: one program."""
    lanes = tl.arange(0, BLOCK)
    alpha, sigma = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for j in range(0, programs, BLOCK):
        mask = j + lanes < programs
        alpha += tl.load(partials + 2 * (j + lanes), mask=mask, other=0.0)
        sigma += tl.load(partials + 2 * (j + lanes) + 1, mask=mask, other=0.0)
    tl.store(in_alpha, tl.sum(alpha).to(A))
    tl.store(in_sigma, tl.sum(sigma).to(A))


# Host side.


def _row(*tensors):
    """Elements of a row: 16 bytes of the narrowest type, but whole bytes of quarters."""
    return max(4, 16 // min(t.element_size() for t in tensors))


def categorical_activation(x, alpha, sigma, bits, grad_of, dtype):
    check_categorical_activation(alpha, sigma, bits)
    x = dense(x)
    q = empty_like(x, dtype)
    quarters = x.new_empty(data_shape(x.numel(), QUARTER_BITS, "dense"), dtype=torch.uint8)
    block = block_of(alpha.dtype, [x], values=4)
    with on_device_of([x]):
        launch(
            quantize,
            triton.cdiv(x.numel(), block),
            x,
            q,
            quarters,
            alpha,
            sigma,
            ints(bits),
            x.numel(),
            Q_T=TYPES[dtype],
            A=TYPES[alpha.dtype],
            V=_row(x, q),
            BLOCK=block,
        )
    return q, quarters


def categorical_activation_backward(grad, q, quarters, alpha, sigma, bits, grad_of, scale_grad, dtype):
    check_categorical_activation(alpha, sigma, bits)
    (grad,) = in_layouts_of([q], [grad])
    out, sums = empty_like(q, dtype), [torch.empty_like(v) for v in (alpha, sigma) if scale_grad]
    bits, acc = ints(bits), TYPES[acc_dtype(dtype)]
    block = block_of(alpha.dtype, [grad], [q], values=8)
    programs = triton.cdiv(q.numel(), block)
    with on_device_of([q]):
        table = torch.empty(3 * MOST_PLACES.value, dtype=alpha.dtype, device=q.device)
        partials = torch.empty(2 * programs, dtype=torch.float64, device=q.device)
        if programs:
            launch(
                fill_table,
                MOST_PLACES.value // TABLE_LANES.value,
                table,
                alpha,
                sigma,
                bits,
                A=acc,
                SOFT=GRADS[grad_of] == "soft",
            )
        launch(
            look_up,
            programs,
            grad,
            q,
            quarters,
            out,
            table,
            partials,
            alpha,
            sigma,
            bits,
            q.numel(),
            OUT_T=TYPES[dtype],
            A=acc,
            V=_row(grad, q, out),
            BLOCK=block,
            SCALE_GRAD=scale_grad,
        )
        if scale_grad:
            launch(finish_sums, 1, partials, *sums, programs, A=acc, BLOCK=1024)
    return out, sums
