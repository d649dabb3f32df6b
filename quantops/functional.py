"""The ops as a user calls them: one weight in, results out. ``foreach`` has the same names for lists of weights.

Notation of the docstrings. ``w``: weight, float32, bfloat16, float16 or float64, any shape. ``scale`` s: a number, or
a tensor with one element or one per row (dim 0) of ``w``; None: max|w|, where the backward without a penalty is the
identity and costs nothing (a NaN or infinity in w then leaves no usable scale: an error on CPU, NaN elsewhere).
``bits`` n: 0..16, an int or an integer tensor on the weight's device, so that a change of bits recompiles nothing; 0
means: the whole tensor is pruned, q = 0. Arithmetic is float32 (float64 for float64), each operation rounded on its
own, ``rint`` half to even. Codes and values are equal, bit for bit, on every backend.

    u = clamp(w * (0.5/s) + 0.5, 0, 1)     signed             u = clamp(w * (1/s), 0, 1)     unsigned
    c = min(rint(2^n u), 2^n - 1)          round_clamp, MSQ (arXiv 2507.22349)
    q = m * step                           one rounded product
        dyadic grid     m = c - 2^(n-1), step = s 2^(1-n) signed       m = c, step = s 2^-n unsigned
        full grid       m = 2c - (2^n - 1), step = s / (2^n - 1) signed        m = c unsigned

The sign grid (signed, round_clamp; n up to 15) counts bits as BSQ does, n of magnitude beside a sign. It is symmetric
with an exact zero, nests as the others, and has three values at n = 1:

    u = min(|w| * (1/s), 1)   c = min(rint(2^n u), 2^n - 1)   m = sign(w) c   step = s 2^-n
    B_k = sign(w) (c_n - 2^k c_(n-k))

NaN in w gives NaN in q there (code 0), +-inf clamps. On CPU, values of bits, k or scale out of range raise; on other
devices they are not read back and give NaN (integers: -2^31). Strided weights are copied unless their rows are dense
(contiguous, channels_last). Gradients: straight-through, ``inside`` meaning |w| <= s (unsigned 0 <= w <= s).
"""

from collections.abc import Sequence

import torch

from quantops import checks, foreach
from quantops.autograd.common import call
from quantops.foreach import MSQ
from quantops.library import ops
from quantops.packed import Packed
from quantops.sharded import by_parts
from quantops.types import Bits, Scale


def _one(scale):
    return None if scale is None else [scale]


def _outs(out):
    return None if out is None else [out]


def absmax(w: torch.Tensor, *, per_row: bool = False, grad: bool = False) -> torch.Tensor:
    """max|w|: 0-dim, or (rows,) with ``per_row``. float32 (float64 for float64).

    0 for an empty weight; NaN if w has one. A constant for autograd; with ``grad`` the function of w that it is,
    ds/dw = sign(w) / (number of weights of that size) where |w| = s, else 0, at the cost of a pass in backward.
    """
    return foreach.absmax([w], per_row=per_row, grad=grad)[0]


def absmean(w: torch.Tensor, *, per_row: bool = False, grad: bool = False) -> torch.Tensor:
    """mean|w|: 0-dim, or (rows,) with ``per_row``. float32 (float64 for float64).

    0 for an empty weight; NaN if w has one. A constant for autograd; with ``grad`` the function of w that it is,
    ds/dw = sign(w) / (number of weights), at the cost of a pass in backward.
    """
    return foreach.absmean([w], per_row=per_row, grad=grad)[0]


def round_clamp(
    w: torch.Tensor,
    scale: Scale | None,
    bits: Bits,
    *,
    signed: bool = True,
    grid: str | None = None,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The round-clamp quantizer of MSQ (arXiv 2507.22349): q = m * step, see the module's equations.

    Scaling by 2^n, not 2^n - 1, nests the bins: those of n - k bits are unions of those of n bits.

    Args:
        grid: "dyadic" (default: exact zero, two's complement, dropping a zero LSB changes no value), "full" or "sign".
        out_dtype: dtype of q; default w's own, under autocast the autocast dtype.
        out: memory for q, with w's shape and strides, and no other argument's: ValueError. (A compiled graph checks it
            when it runs, or writes to a copy first.) No gradient flows then.

    Returns q in w's shape. dL/dw = g * inside; dL/ds = sum g * (q/s - (w/s) * inside). Saves nothing but its inputs.
    Raises ValueError or TypeError naming the argument, what was expected and what came.
    """
    return foreach.round_clamp([w], _one(scale), bits, signed=signed, grid=grid, out_dtype=out_dtype, out=_outs(out))[0]


def lsb(w: torch.Tensor, scale: Scale | None, bits: Bits, k: Bits = 1, *, grid: str | None = None) -> torch.Tensor:
    """The LSB residual B_k = c_n - 2^k c_(n-k) (int32, w's shape), 1 <= k < n; arXiv 2507.22349.

    ``grid`` matters where it is "sign". 0 means: representable with n - k bits. sign(B) points away from the
    nearest value whose k LSBs are zero. ``k = 0`` gives zeros. No gradient.
    """
    return foreach.lsb([w], _one(scale), bits, k, grid=grid)[0]


def lsb_penalty(
    w: torch.Tensor, scale: Scale | None, bits: Bits, k: Bits = 1, *, grid: str | None = None
) -> torch.Tensor:
    """R = sum |B_k| * (value of one code step) (0-dim), the L1 penalty on the k LSBs; arXiv 2507.22349.

    A code step is s 2^(1-n) on the dyadic grid, 2s / (2^n - 1) on the full one and s 2^-n on the sign grid. dR/dw =
    sign(B_k) * inside; the step and the scale are constants in R. Double backward works.
    """
    return foreach.lsb_penalty([w], _one(scale), bits, k, grid=grid)[0]


def msq(
    w: torch.Tensor,
    scale: Scale | None,
    bits: Bits,
    k: Bits = 1,
    *,
    grid: str | None = None,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> MSQ:
    """:func:`round_clamp` and the sums that MSQ trains and prunes by, from one pass over w; arXiv 2507.22349.

    Returns MSQ(q, penalty, nonzero, sq_error), the sums 0-dim. ``k`` as in :func:`lsb`. dL/dw = g * inside +
    r * sign(B_k) * inside with g = dL/dq, r = dL/dR. Nothing is saved for backward but the inputs: B is computed again.
    """
    q, *sums = foreach.msq([w], _one(scale), bits, k, grid=grid, out_dtype=out_dtype, out=_outs(out))
    return MSQ(q[0], *(v[0] for v in sums))


def encode(
    w: torch.Tensor,
    scale: Scale | None,
    bits: Bits,
    *,
    rule: str = "round_clamp",
    grid: str | None = None,
    signed: bool = True,
) -> torch.Tensor:
    """Integer codes c in 0..2^n - 1 (int32, w's shape).

    ``rule``: "round_clamp" min(rint(2^n u), 2^n - 1), "floor" min(floor(2^n u), 2^n - 1) of TruncQuant
    (arXiv 2506.11431), "nearest" rint((2^n - 1) u) of DoReFa. ``grid`` matters where it is "sign": codes of n + 1 bits,
    bit n the sign and those below it the magnitude, c + 2^n [w < 0 and c > 0]. NaN gives code 0. No gradient.
    """
    return foreach.encode([w], _one(scale), bits, rule=rule, grid=grid, signed=signed)[0]


def decode(
    codes: torch.Tensor | Packed,
    scale: Scale,
    bits: Bits | None = None,
    *,
    grid: str | None = None,
    signed: bool = True,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """q = m * step of integer codes: what the quantizer gave in training, bit for bit.

    ``codes``: any integer dtype; others than int32 are converted first. Or a :class:`quantops.Packed`: then ``bits`` m,
    up to those that are stored (default all), says how many are read, and q is that of the codes c >> (n-m) of m bits,
    computed without ever writing codes. With planes, m/8 bytes per weight are read. ``bits`` does not count the sign of
    the sign grid, whose codes (of a Packed, ``packed.bits``) have one bit more. ``out_dtype``: default float32 (float64
    where the scale is). A code outside 0..2^n - 1 (sign grid: 2^(n+1) - 1) raises on CPU and gives NaN elsewhere. No
    gradient.
    """
    return foreach.decode([codes], [scale], bits, grid=grid, signed=signed, out_dtype=out_dtype)[0]


def truncate(
    w: torch.Tensor,
    scale: Scale | None,
    bits: Bits | Sequence[Bits],
    *,
    base_bits: Bits = 8,
    rule: str = "floor",
    companding: str | None = None,
    out_scale: Scale | None = None,
    slope: str = "ste",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Weights whose low bits are cut off by a shift: TruncQuant (arXiv 2506.11431).

        c_N = the code of width N = base_bits by ``rule``         see :func:`encode`; signed
        c_m = c_N >> (N - m)                                      for every width m of ``bits``
        q_m = (2 c_m - (2^m - 1)) * (out_scale / (2^m - 1))       the full grid, which ends at +-out_scale

    With the rule "floor" c_m is the code of m bits itself, so what is trained at one width is what the others, and the
    integer weights, are truncated from.

    Args:
        bits: 1..base_bits, an int or a 0-dim integer tensor: q. A sequence of these, or a 1-dim integer tensor: a tuple
            of q, one per width, from one read of w; widths are distinct.
        base_bits: N, 1..16, an int or an integer tensor.
        companding: "tanh": the codes are those of tanh(w) with scale tanh(s), as in DoReFa (arXiv 1606.06160). This
            tanh has the same bits on every backend, a few units in the last place from torch.tanh.
        out_scale: the scale of q, as ``scale`` is given; default: the scale. E.g. the mean of |w|.
        slope: "ste" or "exact", see below.
        out_dtype: dtype of q; default w's own, under autocast the autocast dtype.

    Gradients, with g_m = dL/dq_m, and x = w/s:

        dL/dw = sum_m g_m * inside                                           the slope is 1 whatever out_scale is
        dL/ds = sum_m sum g_m * (q_m/s - x * inside)                         without an out_scale
        dL/ds = - sum_m sum g_m * x * inside;  dL/d out_scale = sum_m sum g_m * q_m/out_scale        with one

    Under companding dL/dw is multiplied by 1 - tanh(w)^2, and x = (tanh(w) / tanh(s)) * (1 - tanh(s)^2): the same
    equations through tanh. ``slope="exact"`` multiplies dL/dw, and the terms of dL/ds that have x, by the slope that q
    has, out_scale/s, under companding out_scale/tanh(s), where out_scale is s if there is none: the true derivative of
    out_scale tanh(w)/tanh(s). One pass more where the slope is not 1. All gradients of a call are read once; nothing is
    saved but the inputs. Second derivatives count w and s as constants in these, as the STE has it, but for the slope
    of tanh.

    A bit-width, base width or scale out of range raises ValueError on CPU; on other devices values in tensors are not
    read back and give NaN for that output.
    """
    several = isinstance(bits, (list, tuple))
    if isinstance(bits, torch.Tensor):
        several = bits.ndim > 0
        bits = bits.unsqueeze(1) if bits.ndim == 1 else bits
    q = foreach.truncate(
        [w],
        _one(scale),
        bits,
        base_bits=base_bits,
        rule=rule,
        companding=companding,
        out_scale=_one(out_scale),
        slope=slope,
        out_dtype=out_dtype,
    )
    return tuple(v for (v,) in q) if several else q[0]


def pack(codes: torch.Tensor, bits: int, *, layout: str = "planes") -> Packed:
    """Codes in ``bits`` bits each: a :class:`quantops.Packed`, which :func:`unpack` and :func:`decode` read.

    ``codes``: integers 0..2^bits - 1 of any shape, dtype and strides. ``bits``: 0..16, an integer, not a tensor as in
    the quantizers: the size of the result depends on it. ``layout``: "planes", bit planes that can be read at any lower
    precision, or "dense", consecutive bits; see :class:`quantops.Packed` for the bytes.

    On CPU, codes out of range raise. On other devices they are not read back: of such a code only the low ``bits`` bits
    are stored, which stand for another weight. No gradient.
    """
    return foreach.pack([codes], bits, layout=layout)[0]


def unpack(packed: Packed, bits: Bits | None = None) -> torch.Tensor:
    """The codes (int32) of a :class:`quantops.Packed`; with ``bits`` m, the m most significant of n: c >> (n-m).

    ``bits``: 0..n (default n), an integer or an integer tensor. With planes, m/8 bytes per weight are read. More bits
    than are stored raise; in a tensor that is not on the CPU they are not read back and give -2^31. No gradient.
    """
    return foreach.unpack([packed], bits)[0]


def categorical(
    x: torch.Tensor,
    alpha: Scale,
    sigma: Scale,
    bits: Bits,
    *,
    gates: torch.Tensor | None = None,
    signed: bool = True,
    mode: str = "hard",
    grad: str = "winner",
    seed: Bits | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The categorical quantizer of CPQ with DropBits (arXiv 2109.02100), without a tensor of the 2^b classes.

    Grid g_i = alpha i, i = lo..hi (signed -2^(b-1)..2^(b-1) - 1, unsigned 0..2^b - 1). With S the logistic sigmoid,

        pi_i = S((g_i + alpha/2 - x)/sigma) - S((g_i - alpha/2 - x)/sigma)
        r_i  = G_t(i) pi_i / sum_j G_t(j) pi_j,  G_t = gates[1] ... gates[t-1]

    where t(i) is the bit level of class i, counted from 1: signed 1 + bit_length(i if i >= 0 else -i - 1), unsigned
    max(1, bit_length(i)). A cumulative gate below 2^-64 counts as 0: those levels are out, and get no gradient.

    Args:
        x: float32, bfloat16, float16 or float64, any shape.
        alpha, sigma: step and width, numbers or tensors with one element or one per row (dim 0) of x; > 0.
        bits: 0..16 (0: pruned, q = 0); 0..8 where a soft sum is taken. An int or an integer tensor on x's device.
        gates: None, or a tensor of ``bits`` values in [0, 1]; gates[0] counts as 1.
        mode: "hard" q = alpha j, j = argmax r: without gates clamp(rint(x * (1/alpha)), lo, hi); with gates and equal r
            the class nearest to x. "soft" q = sum r_i g_i. "sample" q = alpha j with j drawn from r.
        grad: "winner" or "soft", for modes hard and sample: see below.
        seed: for "sample", an int or an integer tensor of one element. The draw of an element is a function of the seed
            and its place in x's memory (row-major where x is not dense) alone: Philox4x32-10, the same on every
            backend.
        out_dtype: dtype of q; default x's own, under autocast the autocast dtype.

    Gradients, with g = dL/dq, the edges A_i, B_i = (alpha (i +- 1/2) - x)/sigma, T_i = S(A_i) + S(B_i) - 1 and
    Q_i = (S'(A_i) + S'(B_i)) / (2 pi_i):

        dlog pi_i/dx     = T_i / sigma
        dlog pi_i/dalpha = (Q_i - i T_i) / sigma
        dlog pi_i/dsigma = ((g_i - x) T_i - alpha Q_i) / sigma^2
        dlog (G pi)_i/dgates[s] = [t(i) > s] / gates[s],  s >= 1, gates[s] > 0

    ``grad="winner"``, the paper's multi-class straight-through estimator: of the class j that won, dL/dr_j = g g_j with
    dr_j = r_j (dlog (G pi)_j - sum_i r_i dlog (G pi)_i); other classes get nothing; and g j goes to alpha. A weight at
    grid point 0 gets no gradient. ``grad="soft"``: the exact gradient of the soft sum q = sum_i r_i g_i at the value of
    the other mode, dq = sum_i r_i (g_i - q) dlog (G pi)_i, and g q/alpha to alpha. Mode "soft" is exact.

    Sums are deterministic. Nothing is saved for backward but the inputs. Second derivatives raise NotImplementedError.

    Returns q in x's shape. Raises ValueError or TypeError naming the argument, what was expected and what came; values
    on other devices than the CPU are not read back and give NaN where out of range. NaN in x gives NaN there.
    """
    return foreach.categorical(
        [x],
        [alpha],
        [sigma],
        bits,
        gates=None if gates is None else [gates],
        signed=signed,
        mode=mode,
        grad=grad,
        seed=seed,
        out_dtype=out_dtype,
    )[0]


def quantize_activation(
    x: torch.Tensor,
    scale: Scale,
    bits: Bits,
    *,
    offset: Scale | None = None,
    rule: str = "round_clamp",
    signed: bool = False,
    front: str | None = None,
    keep: str | None = None,
    learn: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Activations by the uniform code rules, with as little kept for the backward pass as it needs.

        v = h(x) - offset,  c = the code of v by ``rule``,  q = m * step + offset        the equations above

    on the dyadic grid by round_clamp (step = scale 2^-bits unsigned, scale 2^(1-bits) signed: the levels of LSQ), on
    the full grid by floor and nearest (step = scale / (2^bits - 1), the levels of PACT and DoReFa). With floor codes m
    bits are the codes of n > m bits shifted by n - m (TruncQuant, arXiv 2506.11431).

    Args:
        x: float32, bfloat16, float16 or float64, any shape.
        scale: the end of the range, > 0 (2^-100..2^100): a number, or a tensor with one element or one per channel
            (dim 1).
        bits: 0..16, an int or an integer tensor with one element.
        offset: None, or values like ``scale``: LSQ+ (arXiv 2004.09576).
        rule: "round_clamp", "floor" or "nearest". signed: |v| <= scale is inside, else 0 <= v <= scale.
        front: what stands in front, h, in the same pass. None: h(x) = x. "relu": unsigned, without an offset; q is the
            same without it, and the gradient at x = 0 is that of the ReLU. "gelu", "gelu_tanh" (its approximation by
            tanh), "silu": as torch's own to 1.5 units in the last place of max(|x|, 1), with the same bits on every
            backend; h(-inf) is 0 in the last places.
        keep: what autograd keeps of each element: "bits", whether it is inside, 1 bit, and q, which the next layer
            keeps too, where learn="clip" (the side that an element is on is read from it: take "input" where an offset
            is so large that the first and the last value are one number of q's dtype); "residual", 8 bits, in which
            (q - x) / step is known to 1/252; "input", x itself, 0 bits where somebody keeps it anyway, the only one
            with GELU or SiLU in front. Default: "input" with these, "residual" with learn="step", else "bits".
        learn: what gradient scale and offset get, if they require one. With "inside" as above:

            None     none
            "clip"   PACT (arXiv 1805.06085): dL/dscale = sum of g * (the last value / scale) where v > scale (on the
                     full grid: of g), less that below -scale where signed
            "step"   LSQ (arXiv 1902.08153): to this the sum of g * (q - v)/scale inside is added, and all is divided by
                     sqrt(elements of the scale * last level). LSQ's inside ends at the last value, as it does by
                     rule="nearest"; by round_clamp it ends a step later, at scale, and gradients differ in between

            and dL/doffset = sum of g outside, divided likewise. NaN counts as below.
        out_dtype: dtype of q; default x's own, under autocast the autocast dtype.

    dL/dx = g * inside * dh/dx, straight-through, of which second derivatives are there; those of the other two raise
    NotImplementedError. Sums are deterministic. NaN in x gives NaN there. Strided x are copied unless they are dense.

    Returns q in x's shape. Raises ValueError or TypeError naming the argument, what was expected and what came; values
    on other devices than the CPU are not read back and give NaN where out of range.
    """
    (x,) = checks.tensors("x", [x])
    keep = checks.activation.default_keep(front, learn) if keep is None else keep
    options = checks.activation.choices(rule, signed, front, keep, learn, offset)
    s, o = checks.activation.channel_values("scale", scale, x), None
    if offset is not None:
        o = checks.activation.channel_values("offset", offset, x)
        s, o = (v.reshape(-1).expand(max(s.numel(), o.numel())).contiguous() for v in (s, o))
    n, dtype = checks.bits(bits, [x]).reshape(1), checks.dtype_of(out_dtype, [x])

    def quantized(x, s, o):
        return call(ops.activation, x, s, o, n, *options, dtype)[0]

    return by_parts(quantized, x, s, o, lsq=learn == "step")
