"""Uniform quantizers in plain PyTorch: what the kernels of family ``uniform`` mean.

One tensor at a time, every operation rounded on its own, in float32 (float64 for float64 weights). The functions
carry no gradient: :func:`uniform_backward` states it. ``scale`` has one element, or one per row (dim 0) of ``w``;
``bits`` and ``k`` are integers or integer tensors with one element. ``bits``, ``k`` or a scale entry out of range
gives NaN (integers: ``INVALID``; a count: -1), never a plausible number; on CPU the ops raise instead.

On the sign grid the code in between, here called the signed code, runs from -(2^n - 1) to 2^n - 1. What ``encode``
gives is its magnitude with the sign as bit n: n + 1 bits, so that a shift cuts the magnitude.
"""

import torch

MAX_BITS = 16
INVALID = -(2**31)  # integer results of a tensor whose bits, k or scale are out of range
RULES = ("round_clamp", "floor", "nearest")
GRIDS = ("dyadic", "full", "sign")
SIGN_BITS = MAX_BITS - 1  # the most on the sign grid, whose codes have a sign bit besides


def most_bits(grid):
    """The largest bit-width on a grid."""
    return SIGN_BITS if grid == "sign" else MAX_BITS


def code_bits(bits, grid):
    """The bits of a code, of a weight of ``bits`` bits (an integer or an integer tensor): a sign is one more."""
    return bits + (bits > 0) * 1 if grid == "sign" else bits


def acc_dtype(dtype):
    """The dtype of all arithmetic on a weight of ``dtype``, and of its scale."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _as_int(n, like):
    return torch.as_tensor(n, device=like.device).reshape(()).to(torch.int64)


def _pow2(n, dtype):
    """2^n for an integer tensor 0 <= n <= 17, exactly; 1 outside (the caller marks that case invalid)."""
    return torch.bitwise_left_shift(torch.ones_like(n), n.clamp(0, MAX_BITS + 1)).to(dtype)


def per_row(v, w):
    """``v`` (one element, or one per row) shaped to broadcast over ``w``."""
    if v.numel() == 1:
        return v.reshape(())
    return v.reshape(-1, *[1] * (w.dim() - 1))


def _valid(scale, bits, grid, k=None):
    ok = (scale >= 0) & (scale < torch.inf) & (bits >= 0) & (bits <= most_bits(grid))
    if k is not None:
        ok = ok & (((k >= 1) & (k < bits)) | (k == 0))
    return ok


def _inverse(scale):
    """1/s, and 0 where s = 0 or 1/s overflows."""
    inv = torch.div(torch.ones_like(scale), scale)
    return torch.where(inv.abs() < torch.inf, inv, torch.zeros_like(inv))


def _unit(w, scale, signed, grid="dyadic"):
    """u in [0, 1], on the sign grid in [-1, 1]: the weight on the scale of the codes. NaN stays NaN."""
    degenerate, half = _inverse(scale) == 0, 0.5 if signed and grid != "sign" else 0.0
    inv = torch.where(degenerate, torch.zeros_like(scale), torch.div(torch.full_like(scale, half or 1.0), scale))
    t = w * inv
    t = torch.where(degenerate & (w == w), torch.zeros_like(t), t)  # inf * 0
    return torch.clamp(t + half, -1.0 if grid == "sign" else 0.0, 1.0)


def _code(u, bits, rule="round_clamp"):
    """The code of u as a float: an integer 0..2^n - 1, on the sign grid the signed code, or NaN."""
    full, top = _pow2(bits, u.dtype), _pow2(bits, u.dtype) - 1
    if rule == "round_clamp":
        return torch.clamp(torch.round(full * u), -top, top) + 0.0  # -0 is 0
    if rule == "floor":
        return torch.minimum(torch.floor(full * u), top)
    if rule == "nearest":
        return torch.round(top * u)
    raise ValueError(f"rule: expected one of {RULES}, got {rule!r}")


def _unit_step(bits, dtype, grid, signed):
    """The step of a scale of one; 0 for a pruned tensor (0 bits)."""
    if grid == "full":
        step = 1.0 / (_pow2(bits, dtype) - 1)
    else:
        step = (2.0 if signed and grid == "dyadic" else 1.0) / _pow2(bits, dtype)
    return torch.where(bits == 0, torch.zeros_like(step), step)


def _step(scale, bits, grid, signed):
    if grid != "full":
        return scale * _unit_step(bits, scale.dtype, grid, signed)
    step = scale / (_pow2(bits, scale.dtype) - 1)
    return torch.where(bits == 0, torch.zeros_like(step), step)


def _level(c, bits, grid, signed):
    """The integer level m of code c (both floats)."""
    if not signed or grid == "sign":
        return c
    if grid == "dyadic":
        half = torch.where(
            bits == 0,
            torch.zeros_like(bits),
            torch.bitwise_left_shift(torch.ones_like(bits), (bits - 1).clamp(0, MAX_BITS)),
        )
        return c - half.to(c.dtype)
    return 2 * c - (_pow2(bits, c.dtype) - 1)


def _inside(w, scale, signed):
    return (w.abs() <= scale) if signed else ((w >= 0) & (w <= scale))


def _to_int(c, valid):
    c = torch.where(c == c, c, torch.zeros_like(c)).to(torch.int32)
    return torch.where(valid, c, torch.full_like(c, INVALID))


def _nan_where_not(valid, v):
    return torch.where(valid, v, torch.full_like(v, torch.nan))


def _check(grid, signed, rule="round_clamp"):
    if grid == "sign" and not signed:
        raise ValueError("grid: expected 'dyadic' or 'full' for unsigned values, got 'sign'")
    if grid == "sign" and rule != "round_clamp":
        raise ValueError(f"rule: expected 'round_clamp' on the sign grid, got {rule!r}")


def _prepare(w, scale, bits, grid, k=0):
    acc = acc_dtype(w.dtype)
    bits, k = _as_int(bits, w), _as_int(k, w)
    scale = per_row(torch.as_tensor(scale, dtype=acc, device=w.device), w) + 0.0  # -0 is 0
    return w.to(acc), scale, bits, k, _valid(scale, bits, grid, k)


def absmax(w, *, per_row=False):
    """max|w|, per tensor (0-dim) or per row; 0 for an empty one, NaN where w has a NaN."""
    a = w.detach().to(acc_dtype(w.dtype)).abs()
    a = a.reshape(w.shape[0], w[:1].numel()) if per_row else a.reshape(1, -1)
    s = a.amax(1) if a.shape[1] else a.new_zeros(a.shape[0])
    return s if per_row else s.reshape(())


def absmean(w, *, per_row=False):
    """mean|w|, per tensor (0-dim) or per row; 0 for an empty one. Summed in float64."""
    acc = acc_dtype(w.dtype)
    a = w.detach().to(torch.float64).abs()
    a = a.reshape(w.shape[0], w[:1].numel()) if per_row else a.reshape(1, -1)
    count = max(a.shape[1], 1)
    s = a.sum(1) / count
    s = torch.where(s.isinf(), (a * 2.0**-64).sum(1) / count * 2.0**64, s).to(acc)  # a sum past the largest float64
    return s if per_row else s.reshape(())


def encode(w, scale, bits, *, rule="round_clamp", grid=None, signed=True):
    """Integer codes c (int32), 0 where w is NaN; on the sign grid |c| + 2^n [c < 0] of the signed code c."""
    grid = grid or "dyadic"
    _check(grid, signed, rule)
    w, scale, bits, _, valid = _prepare(w, scale, bits, grid)
    c = _code(_unit(w, scale, signed, grid), bits, rule)
    return _to_int(torch.where(c < 0, _pow2(bits, c.dtype) - c, c), valid)


def decode(codes, scale, bits, *, grid=None, signed=True, dtype=None):
    """q = m * step of integer codes; NaN where a code is outside 0..2^n - 1 (sign grid: 2^(n+1) - 1)."""
    acc, grid = acc_dtype(scale.dtype), grid or "dyadic"
    _check(grid, signed)
    bits = _as_int(bits, codes)
    scale = per_row(torch.as_tensor(scale, dtype=acc, device=codes.device), codes) + 0.0  # -0 is 0
    c = codes.to(acc)
    valid = _valid(scale, bits, grid) & (c >= 0) & (c < _pow2(code_bits(bits, grid), acc))
    magnitudes = _pow2(bits, acc)
    c = torch.where(c < magnitudes, c, magnitudes - c)  # a sign bit is there on the sign grid alone
    q = _level(c, bits, grid, signed) * _step(scale, bits, grid, signed)
    return _nan_where_not(valid, q).to(dtype or acc)


def _quantize(w, scale, bits, grid, signed, valid):
    _check(grid, signed)
    c = _code(_unit(w, scale, signed, grid), bits)
    return _nan_where_not(valid, _level(c, bits, grid, signed) * _step(scale, bits, grid, signed))


def round_clamp(w, scale, bits, *, signed=True, grid=None, out_dtype=None):
    """q = m * step with the round-clamp code rule."""
    grid, dtype = grid or "dyadic", out_dtype or w.dtype
    w, scale, bits, _, valid = _prepare(w, scale, bits, grid)
    return _quantize(w, scale, bits, grid, signed, valid).to(dtype)


def _lsb(w, scale, bits, k, grid):
    """B as a float, 0 where w is NaN."""
    u = _unit(w, scale, True, grid)
    b = _code(u, bits) - _pow2(k, u.dtype) * _code(u, (bits - k).clamp(min=0))
    return torch.where(b == b, b, torch.zeros_like(b))


def lsb(w, scale, bits, k=1, *, grid=None):
    """The LSB residual B_k = c_n - 2^k c_(n-k) (int32), of signed codes on the sign grid; k = 0: all zero."""
    grid = grid or "dyadic"
    w, scale, bits, k, valid = _prepare(w, scale, bits, grid, k)
    return _to_int(_lsb(w, scale, bits, k, grid), valid)


def msq(w, scale, bits, k=1, *, grid=None, out_dtype=None):
    """(q, penalty, nonzero, sq_error) of one weight; sums are taken in float64 and rounded once."""
    grid, dtype = grid or "dyadic", out_dtype or w.dtype
    w, scale, bits, k, valid = _prepare(w, scale, bits, grid, k)
    q = _quantize(w, scale, bits, grid, True, valid)
    b = torch.where(valid, _lsb(w, scale, bits, k, grid), torch.zeros_like(w)).abs()
    levels = 2.0 if grid == "full" else 1.0  # in a code step
    penalty = (b.double() * _step(scale, bits, grid, True).double()).sum() * levels
    penalty = _nan_where_not(valid.all(), penalty.to(w.dtype))
    nonzero = torch.where(valid.all(), (b != 0).sum(), -1)
    sq_error = ((q - w) * (q - w)).double().sum().to(w.dtype)
    return q.to(dtype), penalty, nonzero, _nan_where_not(valid.all(), sq_error)


def lsb_penalty(w, scale, bits, k=1, *, grid=None):
    """R = sum |B_k| * (value of one code step)."""
    return msq(w, scale, bits, k, grid=grid)[1]


def scale_grad_term(w, scale, bits, grid, signed, k=0):
    """dq/ds per element: q/s - (w/s) * inside, where q/s is m times the step of a scale of one."""
    _check(grid, signed)
    w, s, bits, _, valid = _prepare(w, scale, bits, grid, k)
    c = _code(_unit(w, s, signed, grid), bits)
    ratio = _level(c, bits, grid, signed) * _unit_step(bits, w.dtype, grid, signed)
    return _nan_where_not(valid, ratio - torch.where(_inside(w, s, signed), w * _inverse(s), torch.zeros_like(w)))


def uniform_backward(grad, grad_penalty, w, scale, bits, k=0, *, grid=None, signed=True):
    """(dL/dw, dL/ds) of q and R: ``grad`` = dL/dq or None, ``grad_penalty`` = dL/dR or None.

    dL/dw = g * inside + r * sign(B) * inside;  dL/ds = sum g * (q/s - (w/s) * inside), taken in float64 and
    rounded once, in the shape of ``scale``.
    """
    grid = grid or "dyadic"
    term = scale_grad_term(w, scale, bits, grid, signed, k)
    dtype, shape = w.dtype, scale.shape
    w, s, bits, k, valid = _prepare(w, scale, bits, grid, k)
    zero = torch.zeros_like(w)
    g = zero if grad is None else grad.to(w.dtype)
    total = g
    if grad_penalty is not None:
        total = g + grad_penalty.to(w.dtype) * torch.sign(_lsb(w, s, bits, k, grid))
    grad_w = _nan_where_not(valid, torch.where(_inside(w, s, signed), total, zero))
    term = (g * term).double()
    grad_s = term.sum() if scale.numel() == 1 else term.reshape(shape.numel(), w[:1].numel()).sum(1)
    return grad_w.to(dtype), grad_s.to(s.dtype).reshape(shape)


def add_lsb_grad(grad, strength, w, scale, bits, k=1, *, grid=None):
    """grad + strength * sign(B) * inside: the penalty's gradient, added to one that is already there."""
    grid, dtype = grid or "dyadic", grad.dtype
    w, s, bits, k, valid = _prepare(w, scale, bits, grid, k)
    r = torch.as_tensor(strength, dtype=w.dtype, device=w.device) * torch.sign(_lsb(w, s, bits, k, grid))
    total = grad.to(w.dtype) + torch.where(_inside(w, s, True), r, torch.zeros_like(w))
    return _nan_where_not(valid, total).to(dtype)
