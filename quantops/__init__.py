"""Fused kernels for quantization-aware training with MSQ, TruncQuant and CPQ."""

from quantops import backends, decompositions, foreach, layout, reference
from quantops.activation import UniformActivation
from quantops.backends import info
from quantops.calibration import activation_scales, calibrate
from quantops.categorical_activation import CategoricalActivation
from quantops.checkpoint import float_state_dict, prepare
from quantops.convert import quantize_, unquantize_
from quantops.functional import (
    MSQ,
    absmax,
    absmean,
    categorical,
    decode,
    encode,
    lsb,
    lsb_penalty,
    msq,
    pack,
    quantize_activation,
    round_clamp,
    truncate,
    unpack,
)
from quantops.hessian import hessian_trace
from quantops.intfile import load_activation_scales, load_int, save_int
from quantops.intweight import IntWeight, to_int
from quantops.layers import has_matrices, is_linear_or_conv
from quantops.methods.cpq import CPQConfig, finish_dropbits
from quantops.methods.joint import joint_loss, joint_step
from quantops.methods.msq import MSQConfig, add_penalty_grad_
from quantops.methods.msq_controller import MSQController
from quantops.methods.multibn import MultiBatchNorm
from quantops.methods.truncquant import TruncQuantConfig, plain_model, set_bits
from quantops.modelfile import load_model, save_model
from quantops.packed import Packed
from quantops.penalty import penalty
from quantops.report import bit_report
from quantops.version import __version__

__all__ = [
    "CPQConfig",
    "CategoricalActivation",
    "IntWeight",
    "MSQ",
    "MSQConfig",
    "MSQController",
    "MultiBatchNorm",
    "Packed",
    "TruncQuantConfig",
    "UniformActivation",
    "absmax",
    "absmean",
    "activation_scales",
    "add_penalty_grad_",
    "backends",
    "bit_report",
    "calibrate",
    "categorical",
    "decode",
    "decompositions",
    "encode",
    "finish_dropbits",
    "float_state_dict",
    "foreach",
    "has_matrices",
    "hessian_trace",
    "info",
    "is_linear_or_conv",
    "joint_loss",
    "joint_step",
    "layout",
    "load_activation_scales",
    "load_int",
    "load_model",
    "lsb",
    "lsb_penalty",
    "msq",
    "pack",
    "penalty",
    "plain_model",
    "prepare",
    "quantize_",
    "quantize_activation",
    "reference",
    "round_clamp",
    "save_int",
    "save_model",
    "set_bits",
    "to_int",
    "truncate",
    "unpack",
    "unquantize_",
    "__version__",
]
