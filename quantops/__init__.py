"""Fused kernels for quantization-aware training with MSQ."""

from quantops import backends, foreach, layout, reference
from quantops.backends import info
from quantops.convert import is_linear_or_conv, quantize_
from quantops.functional import (
    MSQ,
    absmax,
    absmean,
    decode,
    encode,
    lsb,
    lsb_penalty,
    msq,
    pack,
    round_clamp,
    truncate,
    unpack,
)
from quantops.hessian import hessian_trace
from quantops.intweight import IntWeight, load_int, save_int, to_int
from quantops.methods.msq import MSQConfig, MSQController, add_penalty_grad_, bit_report, penalty
from quantops.packed import Packed
from quantops.version import __version__

__all__ = [
    "IntWeight", "MSQ", "MSQConfig", "MSQController", "Packed", "absmax", "absmean", "add_penalty_grad_", "backends",
    "bit_report", "decode", "encode", "foreach", "hessian_trace", "info", "is_linear_or_conv", "layout", "load_int", "lsb", "lsb_penalty",
    "msq", "pack", "penalty", "quantize_", "reference", "round_clamp", "save_int", "to_int", "truncate", "unpack",
    "__version__",
]
