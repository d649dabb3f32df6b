"""What stands in front of a quantizer of activations in the same pass, in Triton: csrc/activation_front.h under the
same names."""

import triton
import triton.language as tl

from quantops.kernels import math
from quantops.kernels.tanh import exponential_of

RELU, GELU, GELU_TANH = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # the order of FRONTS in the reference
SLOPE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2/pi)
CUBE = tl.constexpr(0.044715 * 1.5957691216057308)


@triton.jit
def ratio_top(a):
    """N(a) of 1 - Phi(a) = e^(-a^2/2) N(a) / D(a), a >= 0."""
    if a.dtype == tl.float64:
        v = 1.6340836231568907e-05 * a + 0.00038274213147210007
        v = v * a + 0.00418754169025583
        v = v * a + 0.02759843455554332
        v = v * a + 0.11834790381922601
        v = v * a + 0.3325228627380732
        v = v * a + 0.5754773975873952
        return v * a + 0.5
    else:
        v = 0.010964697 * a + 0.09170872
        v = v * a + 0.30915305
        return v * a + 0.5


@triton.jit
def ratio_bottom(a):
    """D(a)"""
    if a.dtype == tl.float64:
        v = 4.096045105108279e-05 * a + 0.0009593894769804296
        v = v * a + 0.010537647064287944
        v = v * a + 0.07013704950355816
        v = v * a + 0.3070865166274703
        v = v * a + 0.9005947532839803
        v = v * a + 1.7199945590957622
        v = v * a + 1.948839355977655
        return v * a + 1.0
    else:
        v = 0.02753867 * a + 0.22875787
        v = v * a + 0.8133775
        v = v * a + 1.4161904
        return v * a + 1.0


@triton.jit
def front_and_slope(x, FRONT: tl.constexpr):
    """h and dh/dx, which is 0 where x is NaN; of x itself where no smooth front stands."""
    if FRONT <= RELU:
        h, slope = x, 1.0
    else:
        if FRONT == GELU:
            limit: tl.constexpr = 8.9 if x.dtype == tl.float64 else 6.3
        elif FRONT == GELU_TANH:
            limit: tl.constexpr = 7.4 if x.dtype == tl.float64 else 5.5
        else:
            limit: tl.constexpr = 40.0 if x.dtype == tl.float64 else 20.0
        low = tl.where(x < -limit, -limit, x)
        t = tl.where(low > limit, limit, low)
        square = t * t
        if FRONT == GELU:
            a = tl.abs(t)
            bottom = ratio_bottom(a)
            inverse = math.divide(1.0, bottom * exponential_of(square * 0.5))
            small = ratio_top(a) * inverse
            density = bottom * inverse * 0.3989422804014327
        else:
            z, slope_of_z = t, 1.0
            if FRONT == GELU_TANH:
                z = t * (square * CUBE + SLOPE)
                slope_of_z = square * (3.0 * CUBE) + SLOPE
            small = math.divide(1.0, exponential_of(tl.abs(z)) + 1.0)
            density = small * (1.0 - small) * slope_of_z
        gate = tl.where(t < 0.0, small, 1.0 - small)
        h, slope = low * gate, tl.where(x == x, gate + t * density, 0.0)
    return h, slope
