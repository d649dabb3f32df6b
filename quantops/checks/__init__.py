"""What a caller may pass, and the errors that say so: argument, what was expected, what came.

Two kinds of files. By what is checked: any argument (arguments.py), integers, scales, tensors that are written. By
family, named as everywhere: what its ops alone take, and ``structure``. Nothing here knows an op.

``structure(arguments)`` raises where an op's arguments, {name: value}, do not fit each other, so that a kernel stays
within them. The functions of ``foreach`` have checked more than this by then; the ops can also be called directly.
"""

from quantops.checks import activation, categorical, categorical_activation, own_scale, packing, truncate, uniform
from quantops.checks.arguments import FLOATS, all_or_none_on_meta, choice, dtype_of, listed, not_symbolic, tensors
from quantops.checks.categorical import alpha_and_sigma, categorical_bits, categorical_mode, gates, seed
from quantops.checks.integral import bits, codes
from quantops.checks.packing import bits_of_stored, packed_data, stored_bits
from quantops.checks.scaling import scales
from quantops.checks.truncate import out_scales, tanh, widths
from quantops.checks.uniform import bits_and_k, decode_scales, grid_index, rule_index, strength
from quantops.checks.written import gradients, outputs, own_memory

__all__ = [
    "FLOATS",
    "activation",
    "all_or_none_on_meta",
    "alpha_and_sigma",
    "bits",
    "bits_and_k",
    "bits_of_stored",
    "categorical",
    "categorical_activation",
    "categorical_bits",
    "categorical_mode",
    "choice",
    "codes",
    "decode_scales",
    "dtype_of",
    "gates",
    "gradients",
    "grid_index",
    "listed",
    "not_symbolic",
    "out_scales",
    "outputs",
    "own_memory",
    "own_scale",
    "packed_data",
    "packing",
    "rule_index",
    "scales",
    "seed",
    "stored_bits",
    "strength",
    "tanh",
    "tensors",
    "truncate",
    "uniform",
    "widths",
]
