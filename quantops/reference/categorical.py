"""The categorical quantizer with DropBits (arXiv 2109.02100) in plain PyTorch: what family ``categorical`` means.

One tensor at a time, in float32 (float64 for float64 x), with no tensor of classes: S is the logistic sigmoid, and

    g_i = alpha i,  i = lo..hi                 signed -2^(b-1)..2^(b-1) - 1, unsigned 0..2^b - 1
    pi_i = S(A_i) - S(B_i),  A_i = (alpha (i + 1/2) - x)/sigma,  B_i = (alpha (i - 1/2) - x)/sigma
    r_i = G_t(i) pi_i / sum_j G_t(j) pi_j,  G_t = gates[1] ... gates[t-1];  gates[0] counts as 1

Level t holds the classes of [lo_t, hi_t] that no lower level has: signed -2^(t-1)..2^(t-1) - 1, unsigned 0..2^t - 1.
A cumulative gate G_t below 2^-64 counts as 0: its classes are out, and it gets no gradient. So the classes that are in
are those of one interval [low, high], whatever the gates.

Since neighbours share an edge, the mass of [lo_t, hi_t] is one difference of two sigmoids. All differences are taken as
S(A) - S(B) = S(A) S(-B) (1 - exp(B - A)). Arguments of S are relative to ``c``, the class in [low, high] nearest to x;
an x farther outside than FAR sigmas counts as FAR sigmas outside, where nothing changes any more in its dtype.
sigma counts as at least alpha 2^-24 and at most alpha 2^24.

Classes are the same on every backend, and so is q of modes "hard" and "sample". Soft values and gradients may be summed
in other orders, fused, approximated and interpolated there: the root mean square of their errors against this module in
float64 is at most 4 times that of this module in their own dtype, plus 2^-24 of the largest in float32. So, element by
element, two backends differ by at most 4 units of rounding of max|g| max|j| max(1, alpha/sigma), and in dL/dalpha and
dL/dsigma by 4 of sum|g| max|j|^2 max(1, alpha/sigma)^2. In dL/dx, classes j beyond those of 8 bits allow
1 + max|j| alpha / (256 sigma) times as much, since x - alpha c of a far class is known to 2^-32 of x alone.

:func:`quantops.reference.paper.categorical` states the same a second time, with all classes and autograd.
"""

import torch
from torch.nn.functional import logsigmoid

from quantops.layout import dense_rows
from quantops.reference.uniform import acc_dtype, per_row

MAX_BITS, MAX_SOFT_BITS = 16, 8
MODES = ("hard", "soft", "sample")
GRADS = ("winner", "soft")
FAR = {torch.float32: 25.0, torch.float64: 50.0}
LEAST_GATE = 2.0**-64


def levels(bits, signed):
    """[(lo_t, hi_t)] of t = 1..bits; one class, 0, for 0 bits."""
    if bits == 0:
        return [(0, 0)]
    return [(-(2 ** (t - 1)), 2 ** (t - 1) - 1) if signed else (0, 2**t - 1) for t in range(1, bits + 1)]


def level_of(i, signed):
    """The lowest level, counted from 1, that has class i."""
    return 1 + (i if i >= 0 else -i - 1).bit_length() if signed else max(1, i.bit_length())


def cumulative_gates(gates, count):
    """G_1..G_count in float64; those below 2^-64 are 0."""
    if gates is None or count < 2:
        return torch.ones(count, dtype=torch.float64, device=None if gates is None else gates.device)
    cumulative = torch.cat([gates.new_ones(1, dtype=torch.float64), gates.detach()[1:].double()]).cumprod(0)
    return torch.where(cumulative < LEAST_GATE, 0.0, cumulative)


class _Problem:
    """What x, alpha, sigma, bits and gates fix, broadcast over x."""

    def __init__(self, x, alpha, sigma, bits, gates, signed, most_bits=MAX_BITS):
        self.acc = acc_dtype(x.dtype)
        alpha, sigma = (
            per_row(torch.as_tensor(v, dtype=self.acc, device=x.device).detach(), x) for v in (alpha, sigma)
        )
        self.x, self.alpha, self.signed = x.detach().to(self.acc), alpha, signed
        inverse = 1 / alpha
        self.valid = (alpha > 0) & (inverse > 0) & (inverse < torch.inf) & (sigma > 0) & (sigma < torch.inf)
        bits = int(bits)
        if not 0 <= bits <= most_bits or (
            gates is not None and (gates.numel() != bits or not bool(((gates >= 0) & (gates <= 1)).all()))
        ):
            self.valid, bits, gates = torch.zeros_like(self.valid), 0, None
        self.beta64 = (alpha.double() / sigma.double()).clamp(2.0**-24, 2.0**24)
        self.beta = self.beta64.to(self.acc)
        self.inv_sigma = (self.beta64 / alpha.double()).to(self.acc).clamp(max=torch.finfo(self.acc).max)
        self.half = 0.5 * self.beta
        cumulative = cumulative_gates(gates, max(bits, 1)).to(x.device)
        self.levels = levels(bits, signed)[: int((cumulative > 0).sum())]
        self.weights64 = cumulative[: len(self.levels)]
        self.weights = self.weights64.to(self.acc)  # G_t
        self.low, self.high = self.levels[-1]
        self.v = self.x * inverse
        self.c = self.v.round().clamp(self.low, self.high)
        limit = self.half + FAR[self.acc]
        self.z = ((self.x - self.c * alpha) * self.inv_sigma).clamp(-limit, limit)  # (x - alpha c)/sigma

    def upper(self, i):
        """A_i, the argument of S at the upper edge of class i; its lower edge is the upper one of i - 1."""
        return self.beta * (i + 0.5 - self.c) - self.z

    def mass(self, low, high):
        """S(upper edge of high) - S(lower edge of low)."""
        a, b = self.upper(high), self.upper(low - 1)
        return a.sigmoid() * (-b).sigmoid() * -torch.expm1(-self.beta * (high - low + 1))

    def level_masses(self):
        """The mass of each level's own classes: below and above those of the levels before it."""
        masses, before = [], None
        for low, high in self.levels:
            if before is None:
                masses.append(self.mass(low, high))
            else:
                above = self.mass(before[1] + 1, high)
                masses.append(above + self.mass(low, before[0] - 1) if self.signed else above)
            before = (low, high)
        return masses

    def weight_of(self, j):
        """G of the level that class j (a tensor) is in."""
        weight = self.weights[0].expand_as(j)
        for (low, high), above in zip(self.levels, self.weights[1:]):
            weight = torch.where((j < low) | (j > high), above, weight)
        return weight

    def classes(self):
        """(i, its level, log(G pi) up to a constant of x) of every class."""
        for i in range(self.low, self.high + 1):
            t = level_of(i, self.signed)
            yield i, t, self.weights[t - 1].log() + logsigmoid(self.upper(i)) + logsigmoid(-self.upper(i - 1))

    def checked(self, value):
        return torch.where(self.valid, value, torch.full_like(value, torch.nan))


def hard_class(x, alpha, sigma, bits, *, gates=None, signed=True):
    """j = argmax r as a float tensor; clamp(rint(x * (1/alpha)), lo, hi) without gates. NaN where x is."""
    p = _Problem(x, alpha, sigma, bits, gates, signed)
    return p.checked(_winner(p))


def _winner(p):
    """Of the levels' classes nearest to x the one with the largest G pi; the nearest to x where equal.

    pi = sinh(h) / (cosh(h) + cosh(d)), h = beta/2, d = beta (i - v). Compared in float64, from v = x * (1/alpha) in
    p's dtype.
    """
    if (p.weights64 == 1).all():
        return p.c
    reach = 0.5 + 60 / p.beta64
    v = torch.minimum(torch.maximum(p.v.double(), p.low - reach), p.high + reach)
    j, best = p.c.double(), None
    for (low, high), weight in reversed(list(zip(p.levels, p.weights64))):
        i = v.round().clamp(low, high)
        d, h = p.beta64 * (i - v), 0.5 * p.beta64
        score = weight.log() + logsigmoid(h + d) + logsigmoid(h - d)
        if best is None:
            best = score
        better = score > best
        j, best = torch.where(better, i, j), torch.where(better, score, best)
    return j.to(p.acc)


PHILOX_ROUNDS, PHILOX_M, PHILOX_W = 10, (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def philox(seed, index):
    """Philox4x32-10 (Salmon et al. 2011): four tensors of 32 random bits for each counter ``index`` (int64)."""
    mask = 0xFFFFFFFF
    seed = torch.as_tensor(seed, device=index.device).reshape(())
    key = [seed & mask, (seed >> 32) & mask]
    c = [index & mask, (index >> 32) & mask, torch.zeros_like(index), torch.zeros_like(index)]
    for _ in range(PHILOX_ROUNDS):
        (hi0, lo0), (hi1, lo1) = (_multiply(m, v) for m, v in zip(PHILOX_M, (c[0], c[2])))
        c = [hi1 ^ c[1] ^ key[0], lo1, hi0 ^ c[3] ^ key[1], lo0]
        key = [(k + w) & mask for k, w in zip(key, PHILOX_W)]
    return c


def _multiply(a, b):
    """High and low 32 bits of the product of two 32-bit numbers."""
    low, high = (b & 0xFFFF) * a, (b >> 16) * a
    total = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (total >> 32), total & 0xFFFFFFFF


def uniforms(x, seed, offset=0):
    """Two 24-bit integers per element: counter ``offset`` + its place in x's memory (row-major where not dense)."""
    index = torch.arange(offset, offset + x.numel(), device=x.device)
    index = index.as_strided(x.shape, x.stride()) if dense_rows(x) else index.view(x.shape)
    words = philox(seed, index)
    return words[0] >> 8, words[1] >> 8


def _draw(p, seed, offset, like):
    """A class drawn from r: first one of the intervals [lo_t, hi_t], of which r is a mixture, then in it.

    sum_i G pi_i = sum_t (G_t - G_(t+1)) mass[lo_t, hi_t]. Inside, the logistic distribution of the edges is inverted:
    with u in (0, 1) and F = (1-u) S(B) + u S(A), log(F/(1-F)) lies between B and A, distributed as it should. Where
    these are less than a sigma apart, a difference of logarithms has too few digits: it is taken from B on, which is
    log(1 + u (1-exp(B-A)) S(A)/S(B) / ((1-u) + u S(-A)/S(-B))).
    """
    first, second = uniforms(like, seed, offset)
    steps = p.weights - torch.cat([p.weights[1:], p.weights.new_zeros(1)])
    parts = [step * p.mass(low, high) for step, (low, high) in zip(steps, p.levels)]
    left = first.to(p.acc) * 2.0**-24 * sum(parts)
    u, rest = ((k.to(p.acc) * 2.0**-24 + 2.0**-25) for k in (second, 2**24 - 1 - second))
    j = torch.full_like(p.x, torch.nan)
    limit = p.half + FAR[p.acc]
    for part, (low, high) in zip(parts, p.levels):
        c = p.c.clamp(low, high)
        z = (p.z + p.beta * (p.c - c)).clamp(-limit, limit)
        a, b = p.beta * (high + 0.5 - c) - z, p.beta * (low - 0.5 - c) - z
        below = rest * b.sigmoid() + u * a.sigmoid()
        above = rest * (-b).sigmoid() + u * (-a).sigmoid()
        i = c + ((below.log() - above.log() + z) / p.beta).round()
        width = p.beta * (high - low + 1)
        ratio = u * -torch.expm1(-width) * (a.sigmoid() / b.sigmoid()) / (rest + u * ((-a).sigmoid() / (-b).sigmoid()))
        i = torch.where(width < 1, (low + (ratio.log1p() / p.beta - 0.5)).round(), i).clamp(low, high)
        j = torch.where(j.isnan() & ((left < part) | (high == p.high)), i, j)
        left = left - part
    return j


def _mean_offset(p):
    """(log of the largest G pi, sum of G pi over it, mean of i - c under r)."""
    largest = None
    for _, _, log_weight in p.classes():
        largest = log_weight if largest is None else torch.maximum(largest, log_weight)
    total, first = torch.zeros_like(p.x), torch.zeros_like(p.x)
    for i, _, log_weight in p.classes():
        weight = (log_weight - largest).exp()
        total, first = total + weight, first + weight * (i - p.c)
    return largest, total, first / total


def categorical(x, alpha, sigma, bits, *, gates=None, signed=True, mode="hard", seed=None, offset=0, out_dtype=None):
    """q of one tensor. hard: alpha argmax r; soft: sum r_i g_i; sample: alpha j with j drawn from r.

    ``seed``, ``offset``: key and first counter of the draws.
    """
    p = _Problem(x, alpha, sigma, bits, gates, signed, MAX_SOFT_BITS if mode == "soft" else MAX_BITS)
    if mode == "soft":
        f = p.c + _mean_offset(p)[2]
    else:
        f = _winner(p) if mode == "hard" else _draw(p, seed, offset, x)
    return p.checked(p.alpha * f).to(out_dtype or x.dtype)


def categorical_backward(
    grad, x, alpha, sigma, bits, *, gates=None, signed=True, mode="hard", grad_of="winner", seed=None, offset=0
):
    """(dL/dx, dL/dalpha, dL/dsigma, dL/dgates or None) from ``grad`` = dL/dq; sums in float64, rounded once.

    See :func:`quantops.categorical` for the equations of both kinds, "winner" and "soft".
    """
    soft = mode == "soft" or grad_of == "soft"
    p = _Problem(x, alpha, sigma, bits, gates, signed, MAX_SOFT_BITS if soft else MAX_BITS)
    g = grad.to(p.acc)
    if soft:
        terms = _soft_terms(p)
    else:
        terms = _winner_terms(p, _winner(p) if mode == "hard" else _draw(p, seed, offset, x))
    by_x, by_alpha, by_sigma, by_gate = terms
    grad_gates = None
    if gates is not None:
        grad_gates = torch.zeros_like(gates)
        for t, term in enumerate(by_gate, 1):
            grad_gates[t] = (g * p.checked(p.alpha * term)).double().sum() / gates[t].double()
    grad_x = p.checked(g * by_x).to(x.dtype)
    grad_alpha, grad_sigma = (_total(g * p.checked(by), like, x) for by, like in ((by_alpha, alpha), (by_sigma, sigma)))
    return grad_x, grad_alpha, grad_sigma, grad_gates


def factors(x, alpha, sigma, bits, *, signed=True, grad_of="winner"):
    """What dL/dq is multiplied by in the gradients of x, alpha and sigma: of the hard mode, without gates."""
    p = _Problem(x, alpha, sigma, bits, None, signed, MAX_SOFT_BITS if grad_of == "soft" else MAX_BITS)
    terms = _soft_terms(p) if grad_of == "soft" else _winner_terms(p, _winner(p))
    return [p.checked(term) for term in terms[:3]]


def _total(term, like, x):
    """The sum over what one element of ``like`` covers."""
    term = term.double()
    total = term.sum() if like.numel() == 1 else term.reshape(like.numel(), x[:1].numel()).sum(1)
    return total.to(like.dtype).reshape(like.shape)


def _winner_terms(p, j):
    """Factors of dL/dq in the gradients of x, alpha, sigma, and of gates[t]/alpha, t = 1, 2, ...

    dL/dr_j = g alpha j for the class j that won; D = sum_i G pi_i = sum_t (G_t - G_(t+1)) mass[lo_t, hi_t].
    """

    def slope(a):
        return a.sigmoid() * (-a).sigmoid()

    a, b = p.upper(j), p.upper(j - 1)
    sharp = -torch.expm1(-p.beta)
    masses = [w * m for w, m in zip(p.weights, p.level_masses())]
    total = sum(masses)
    r = p.weight_of(j) * a.sigmoid() * (-b).sigmoid() * sharp / total
    # dlog D: with respect to x, times sigma; and to alpha, times sigma, the edges counted from class j.
    by_x, by_alpha = torch.zeros_like(p.x), torch.zeros_like(p.x)
    steps = p.weights - torch.cat([p.weights[1:], p.weights.new_zeros(1)])
    for step, (low, high) in zip(steps, p.levels):
        top, bottom = slope(p.upper(high)), slope(p.upper(low - 1))
        by_x = by_x + step * (bottom - top)
        by_alpha = by_alpha + step * ((high + 0.5 - j) * top + (j + 0.5 - low) * bottom)
    t = a.sigmoid() - (-b).sigmoid() - by_x / total
    q = 0.5 * ((-a).sigmoid() / (-b).sigmoid() + b.sigmoid() / a.sigmoid()) / sharp - by_alpha / total
    distance = p.beta * (j - p.c) - p.z  # (alpha j - x)/sigma
    factor = j * r * p.beta
    gates = []
    for s in range(1, len(p.levels)):
        low, high = p.levels[s - 1]
        gates.append(j * r * (((j < low) | (j > high)).to(r.dtype) - sum(masses[s:]) / total))
    return factor * t, j + factor * (q - j * t), factor * (distance * t - p.beta * q), gates


def _soft_terms(p):
    """As _winner_terms, for q = sum_i r_i g_i: covariances under r."""
    largest, total, mean = _mean_offset(p)
    by_x, by_alpha = torch.zeros_like(p.x), torch.zeros_like(p.x)
    gates = [torch.zeros_like(p.x) for _ in p.levels[1:]]
    sharp = -torch.expm1(-p.beta)
    for i, t, log_weight in p.classes():
        n = i - p.c
        a, b = p.upper(i), p.upper(i - 1)
        deviation = (log_weight - largest).exp() / total * (n - mean)
        slope = a.sigmoid() - (-b).sigmoid()
        by_x = by_x + deviation * slope
        by_alpha = by_alpha + deviation * (0.5 * a.sigmoid() * (-b).sigmoid() * sharp + n * slope)
        for s in range(1, t):
            gates[s - 1] = gates[s - 1] + deviation
    in_x = p.beta * by_x
    return in_x, p.c * (1 - in_x) + mean - p.beta * by_alpha, p.beta * (p.beta * by_alpha - p.z * by_x), gates
