"""What stands in front of a quantizer of activations in the same pass, in plain PyTorch: GELU and SiLU.

    h = x * S(x)      with S(-x) = 1 - S(x), and

    gelu        S(x) = Phi(x), the normal distribution: 1 - S(|x|) = e^(-x^2/2) N(|x|) / D(|x|), with a rational N/D
    gelu_tanh   S(x) = 1 / (1 + e^-z),  z = 2 sqrt(2/pi) (x + 0.044715 x^3), which is (1 + tanh(z/2)) / 2
    silu        the same with z = x

    dh/dx = S + x S',  S' = e^(-x^2/2) / sqrt(2 pi), or S (1 - S) dz/dx

Of operations that have the same bits everywhere, as torch's own have not: codes of h are equal on every backend. Its
error is at most 1.5 units in the last place of max(|x|, 1), that of dh/dx 2 of 1. Beyond ``limit`` S is 0 or 1; what is
below counts as -limit, so that h(-inf) is not NaN, as inf * 0 is, but what h tends to, 0 in the last places.
"""

import math

import torch

from quantops.reference.tanh import exponential

SMOOTH = ("gelu", "gelu_tanh", "silu")
_SLOPE = 2 * math.sqrt(2 / math.pi)
# z = x (first + second x^2)
_LOGISTIC = {"gelu_tanh": (_SLOPE, 0.044715 * _SLOPE), "silu": (1.0, 0.0)}
# Where S is 0 or 1 to the last place: in float32, in float64.
_LIMITS = {"gelu": (6.3, 8.9), "gelu_tanh": (5.5, 7.4), "silu": (20.0, 40.0)}
# Of N and D in falling powers: minimax of the error of Phi.
_RATIO = {
    torch.float32: ((0.010964697, 0.09170872, 0.30915305, 0.5), (0.02753867, 0.22875787, 0.8133775, 1.4161904, 1.0)),
    torch.float64: (
        (
            1.6340836231568907e-05,
            0.00038274213147210007,
            0.00418754169025583,
            0.02759843455554332,
            0.11834790381922601,
            0.3325228627380732,
            0.5754773975873952,
            0.5,
        ),
        (
            4.096045105108279e-05,
            0.0009593894769804296,
            0.010537647064287944,
            0.07013704950355816,
            0.3070865166274703,
            0.9005947532839803,
            1.7199945590957622,
            1.948839355977655,
            1.0,
        ),
    ),
}


def _polynomial(coefficients, a):
    v = torch.full_like(a, coefficients[0])
    for c in coefficients[1:]:
        v = v * a + c
    return v


def front_and_slope(x, front):
    """(h, dh/dx) of x in float32 or float64, ``front`` one of SMOOTH; dh/dx is 0 where x is NaN."""
    limit = _LIMITS[front][x.dtype == torch.float64]
    low = x.clamp(min=-limit)
    t = low.clamp(max=limit)
    square, a = t * t, t.abs()
    if front == "gelu":
        top, bottom = (_polynomial(c, a) for c in _RATIO[x.dtype])
        inverse = 1 / (bottom * exponential(square * 0.5))
        small, density = top * inverse, bottom * inverse * (2 * math.pi) ** -0.5
    else:
        first, second = _LOGISTIC[front]
        small = 1 / (exponential((t * (first + second * square)).abs()) + 1)
        density = small * (1 - small) * (first + 3 * second * square)
    gate = torch.where(t < 0, small, 1 - small)
    return low * gate, torch.where(x == x, gate + t * density, torch.zeros_like(x))


def curvature(x, front):
    """The second derivative of h, by functions of torch."""
    limit = _LIMITS[front][x.dtype == torch.float64]
    x = x.clamp(-limit, limit)
    if front == "gelu":
        return torch.exp(x * x * -0.5) * (2 * math.pi) ** -0.5 * (2 - x * x)
    first, second = _LOGISTIC[front]
    s, slope = torch.sigmoid(x * (first + second * x * x)), first + 3 * second * x * x
    density = s * (1 - s)
    return density * (2 * slope + x * ((1 - 2 * s) * slope * slope + 6 * second * x))


def by_torch(x, front):
    """front(x) by torch's own function: it differs from h in the last places. ``front``: any, None included."""
    if front is None:
        return x
    if front == "relu":
        return x.relu()
    if front == "silu":
        return torch.nn.functional.silu(x)
    return torch.nn.functional.gelu(x, approximate="tanh" if front == "gelu_tanh" else "none")
