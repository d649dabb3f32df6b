"""Fused kernels for quantization-aware training: MSQ, TruncQuant, CPQ with DropBits."""

from quantops.version import __version__

from quantops import backends, foreach, layout, reference
from quantops.backends import info
from quantops.functional import MSQ, absmax, absmean, decode, encode, lsb, lsb_penalty, msq, round_clamp

__all__ = [
    "MSQ", "absmax", "absmean", "backends", "decode", "encode", "foreach", "info", "lsb", "lsb_penalty", "msq",
    "reference", "round_clamp",
]
