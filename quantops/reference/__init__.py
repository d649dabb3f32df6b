"""The specification: every op in plain PyTorch, any dtype, any device. The only oracle of tests and benches."""

from quantops.reference.activation import activation, activation_backward
from quantops.reference.categorical import categorical, categorical_backward
from quantops.reference.categorical_activation import categorical_activation, categorical_activation_backward
from quantops.reference.own_scale import own_scale_backward
from quantops.reference.packing import pack, unpack
from quantops.reference.truncate import truncate, truncate_backward, truncate_scale_terms
from quantops.reference.uniform import (
    absmax,
    absmean,
    add_lsb_grad,
    decode,
    encode,
    lsb,
    lsb_penalty,
    msq,
    round_clamp,
    uniform_backward,
)

__all__ = [
    "absmax",
    "absmean",
    "categorical_activation",
    "categorical_activation_backward",
    "activation",
    "activation_backward",
    "add_lsb_grad",
    "categorical",
    "categorical_backward",
    "decode",
    "encode",
    "lsb",
    "lsb_penalty",
    "msq",
    "own_scale_backward",
    "pack",
    "round_clamp",
    "truncate",
    "truncate_backward",
    "truncate_scale_terms",
    "uniform_backward",
    "unpack",
]
