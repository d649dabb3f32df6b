"""Bit-level training, what MSQ is compared with: every bit of every weight is a parameter. Plain PyTorch.

Both are parametrizations of ``layer.weight`` whose original is a tensor of planes (n, 2, numel): the n binary digits
of the integer weights, least significant first, apart for positive and for negative weights. The weight is one
matrix-vector product of the planes, so that they are read once and the gradient is written once.
"""

import torch
from torch import nn
from torch.nn.utils import parametrize

HARD = 1e38  # a temperature at which the sigmoid is a step


def planes_of(integers, bits):
    """(bits, 2, numel) zeros and ones, the binary digits of |integers|: [:, 0] of the positive, [:, 1] of others."""
    magnitude = integers.flatten().abs().to(torch.int32)
    digits = (magnitude >> torch.arange(bits, device=integers.device).view(-1, 1)) & 1
    positive = integers.flatten() > 0
    return torch.stack([digits * positive, digits * ~positive], 1).float()


def _powers(exponents):
    """+2^b and -2^b in turn, as the planes lie."""
    return torch.stack([2.0**exponents, -(2.0**exponents)], 1).flatten()


def _top(weight):
    """max|w|, not 0."""
    return weight.detach().abs().max().clamp(min=torch.finfo(torch.float32).tiny)


class _RoundedSum(torch.autograd.Function):
    """rint(powers @ planes), straight through the rounding; keeps nothing of the size of the planes."""

    @staticmethod
    def forward(ctx, planes, powers):
        ctx.save_for_backward(powers)
        ctx.shape = planes.shape
        with torch.autocast(planes.device.type, enabled=False):
            return torch.mv(planes.flatten(0, 1).t(), powers).round_()

    @staticmethod
    def backward(ctx, grad):
        return torch.outer(ctx.saved_tensors[0], grad.float()).view(ctx.shape), None


class BSQWeight(nn.Module):
    """BSQ (arXiv 2102.10462): w = scale * unit * rint(sum_b 2^b (p_b - n_b)), p_b and n_b in [0, 2], straight through.

    ``scale``, a parameter, starts at max|w|, ``unit`` at 1 / (2^n - 1).
    """

    def __init__(self, weight, bits):
        super().__init__()
        self.shape, self.scale = weight.shape, nn.Parameter(_top(weight))
        self.register_buffer("size", weight.detach().abs().mean())
        self.register_buffer("unit", torch.full((), 1 / (2**bits - 1), device=weight.device))
        self.register_buffer("powers", _powers(torch.arange(bits, device=weight.device)))

    @property
    def bits(self):
        return len(self.powers) // 2

    @property
    def step(self):
        """The value of one."""
        return self.scale * self.unit

    def right_inverse(self, weight):
        return planes_of((weight / self.step).round(), self.bits)

    def forward(self, planes):
        return (_RoundedSum.apply(planes, self.powers) * self.step).view(self.shape)

    @torch.no_grad()
    def adjust(self, planes):
        """The planes of the same weights, digits that are 0 in all weights left out: most significant ones by
        themselves, least significant ones with a unit twice as large each. Sums beyond 2^n - 1 need one more."""
        integers = _RoundedSum.apply(planes, self.powers)
        digits = planes_of(integers, self.bits + 1)
        used = digits.flatten(1).any(1).nonzero().flatten().tolist()
        low, bits = (used[0], used[-1] + 1 - used[0]) if used else (0, 0)
        self.unit.mul_(2**low)
        self.resize(bits)
        return digits[low : low + bits].contiguous()

    def resize(self, bits):
        """For planes of ``bits`` bits."""
        self.powers = _powers(torch.arange(bits, device=self.unit.device))


def group_lasso(layers):
    """Sum over layers of (share of all weights) * bits * sum_b ||plane b||, which weighs a layer by its memory."""
    total = sum(planes.shape[2] for _, planes in layers)
    return sum(
        torch.linalg.vector_norm(planes.flatten(1), dim=1).sum() * (planes.shape[2] * bits / total)
        for bits, planes in layers
    )


class FixedBits(nn.Module):
    """w = gain * step * clamp(rint(u / step), -m, m), m = 2^n - 1, straight through: u is finetuned at the bits found,
    and ``step`` is learned, its gradient over sqrt(numel m) as that of LSQ (arXiv 1902.08153).

    The penalty makes weights small where a batch norm follows. ``gain`` gives u the size that weights had when training
    began, which its rate is made for. ``weight``: what ``of``, a BSQWeight, gives.
    """

    def __init__(self, of, weight, bits):
        super().__init__()
        size = weight.detach().abs().mean()
        self.most = float(2**bits - 1)
        self.slowness = max(1.0, weight.numel() * self.most) ** -0.5
        self.register_buffer("gain", torch.where(size > 0, size / of.size, 1.0))
        self.step = nn.Parameter(of.step.detach() / self.gain)

    def right_inverse(self, w):
        return w / self.gain

    def forward(self, u):
        step = self.step.detach() + (self.step - self.step.detach()) * self.slowness
        v = u / step
        return (v + (v.round().clamp(-self.most, self.most) - v).detach()) * (self.gain * step)

    @torch.no_grad()
    def clamp_(self, u):
        """To where the levels are."""
        top = self.most * self.step.abs()
        u.clamp_(-top, top)


class CSQWeight(nn.Module):
    """CSQ (arXiv 2212.02770): w = scale / (2^n - 1) * sum_b 2^b S(beta g_b) (S(beta p_b) - S(beta n_b)), no rounding.

    S: the logistic sigmoid, which becomes a step as the temperature beta grows; g_b, a parameter, chooses the bits.
    ``beta`` is that of the bits, ``beta_gates`` that of the gates; both are changed in place.
    """

    def __init__(self, weight, bits, margin=1.0):
        super().__init__()
        self.shape, self.margin = weight.shape, margin
        soft = torch.tensor(margin).sigmoid().item()
        self.scale = nn.Parameter(_top(weight) / ((2 * soft - 1) * soft))  # at beta = 1 the weights are as given
        self.unit = 1 / (2**bits - 1)
        self.gates = nn.Parameter(torch.full((bits,), margin, device=weight.device))
        self.register_buffer("powers", _powers(torch.arange(bits, device=weight.device)))
        self.register_buffer("beta", torch.ones((), device=weight.device))
        self.register_buffer("beta_gates", torch.ones((), device=weight.device))

    @property
    def bits(self):
        """The number of bits that are chosen."""
        return int((self.gates > 0).sum())

    def right_inverse(self, weight):
        return (2 * planes_of((weight / _top(weight) / self.unit).round(), len(self.gates)) - 1) * self.margin

    def forward(self, planes):
        with torch.autocast(planes.device.type, enabled=False):
            chosen = torch.sigmoid(self.beta_gates * self.gates).repeat_interleave(2)
            soft = torch.sigmoid(self.beta * planes.flatten(0, 1))
            return torch.mv(soft.t(), self.powers * chosen * (self.scale * self.unit)).view(self.shape)

    @torch.no_grad()
    def keep_chosen(self, planes):
        """The planes that are chosen, for good."""
        chosen = self.gates > 0
        self.resize(chosen.nonzero().flatten().tolist())
        self.beta_gates.fill_(HARD)
        return planes[chosen].contiguous()

    def resize(self, exponents):
        """For the planes of these bits alone."""
        device = self.gates.device
        self.powers = _powers(torch.tensor(exponents, dtype=torch.int64, device=device))
        self.gates = nn.Parameter(torch.full((len(exponents),), self.margin, device=device), requires_grad=False)

    @torch.no_grad()
    def harden(self, planes):
        """Steps in the place of sigmoids: the final, binary weights."""
        planes[planes == 0] = -1.0
        self.beta.fill_(HARD)
        self.beta_gates.fill_(HARD)


def parametrized(model, kind):
    """[(name, layer, its parametrization)] of the layers with one of ``kind``."""
    return [
        (name, m, m.parametrizations.weight[0])
        for name, m in model.named_modules()
        if parametrize.is_parametrized(m, "weight") and isinstance(m.parametrizations.weight[0], kind)
    ]


def planes(layer):
    """The planes of a layer, a Parameter."""
    return layer.parametrizations.weight.original


def set_planes(layer, value):
    """Planes of another shape: a new Parameter."""
    layer.parametrizations.weight.original = nn.Parameter(value)
