"""Fused kernels for quantization-aware training with MSQ."""

from quantops import backends, foreach, layout, reference
from quantops.backends import info
from quantops.convert import is_linear_or_conv, quantize_
from quantops.functional import MSQ, absmax, absmean, categorical, decode, encode, lsb, lsb_penalty, msq, round_clamp
from quantops.hessian import hessian_trace
from quantops.intweight import IntWeight, load_int, save_int, to_int
from quantops.methods.msq import MSQConfig, MSQController, add_penalty_grad_, bit_report, penalty
from quantops.version import __version__

__all__ = [
    "IntWeight", "MSQ", "MSQConfig", "MSQController", "absmax", "absmean", "add_penalty_grad_", "backends",
    "bit_report", "categorical", "decode", "encode", "foreach", "hessian_trace", "info", "is_linear_or_conv", "layout", "load_int", "lsb", "lsb_penalty",
    "msq", "penalty", "quantize_", "reference", "round_clamp", "save_int", "to_int", "__version__",
]
