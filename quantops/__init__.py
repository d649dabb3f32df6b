"""Fused kernels for quantization-aware training: MSQ, TruncQuant, CPQ with DropBits."""

__version__ = "0.1.0"

from quantops import backends, foreach, reference
from quantops.backends import info
from quantops.functional import MSQ, absmax, absmean, decode, encode, lsb, lsb_penalty, msq, round_clamp

__all__ = [
    "MSQ", "absmax", "absmean", "backends", "decode", "encode", "foreach", "info", "lsb", "lsb_penalty", "msq",
    "reference", "round_clamp",
]
