"""The map of the package: schema, default kernel, fake and autograd of every registered op, ``torch.ops.quantops.*``.

Every op takes a list of weights; a single weight is a list of one. In all schemas: the weights of a list share dtype
and device; ``scale`` holds one contiguous tensor per weight, with one element or one per row (dim 0), of the
arithmetic dtype (float64 for float64 weights, else float32), or in family ``uniform``, as constants, one tensor with an
element for each of several weights; ``bits`` and ``k`` are int32 tensors on the weights' device with one element per
weight; per-weight sums come back as one tensor with an element per weight. ``grid`` and ``rule`` count in GRIDS and
RULES of the reference. ``covered`` promises that every weight is inside its scale (the scale is max|w|): the backward
is then the identity but for the penalty.

Of the categorical ops: ``alpha`` and ``sigma`` are like ``scale``, with equally many elements; ``gates`` holds a tensor
of ``bits`` values per weight, or is None, of the backward op []; ``seed`` is an int64 tensor of one element; ``mode``
and ``grad_of`` count in MODES and GRADS of the reference.

The default kernel of each op, in default/<family>.py, runs the reference on any device; compiled backends (see
backends.py) take over theirs. What autograd does is in autograd/<family>.py. csrc/cpu/schemas.cpp has the same schemas
for programs without Python.
"""

import torch

from quantops import autograd, checks, compiled, default
from quantops.autograd.common import below_autograd, functions, refuse_unsupported
from quantops.layout import each_scale, empty_like
from quantops.reference.activation import KEEPS
from quantops.reference.categorical_activation import QUARTER_BITS
from quantops.reference.packing import LAYOUTS, data_shape, split_shapes
from quantops.reference.uniform import acc_dtype

CPU = compiled.load_cpu()  # what serves the CPU, and why the compiled library does not; that defines the ops
_lib = torch.library.Library("quantops", "FRAGMENT")

OPS = {
    # name: schema of arguments and results. A family's ops stand together; default/<family>.py and kernels/<family>.py
    # have functions of these names and arguments.
    "uniform": {
        "absmax": "(Tensor[] w, bool per_row) -> Tensor",
        "absmean": "(Tensor[] w, bool per_row) -> Tensor",
        "round_clamp": "(Tensor[] w, Tensor[] scale, Tensor bits, int grid, bool signed, bool covered, "
        "ScalarType dtype) -> Tensor[]",
        "round_clamp_out": "(Tensor[] w, Tensor[] scale, Tensor bits, int grid, bool signed, Tensor(a!)[] q) -> ()",
        "msq": "(Tensor[] w, Tensor[] scale, Tensor bits, Tensor k, int grid, bool covered, ScalarType dtype) -> "
        "(Tensor[] q, Tensor penalty, Tensor nonzero, Tensor sq_error)",
        "msq_out": "(Tensor[] w, Tensor[] scale, Tensor bits, Tensor k, int grid, Tensor(a!)[] q, "
        "Tensor(b!) penalty, Tensor(c!) nonzero, Tensor(d!) sq_error) -> ()",
        "lsb": "(Tensor[] w, Tensor[] scale, Tensor bits, Tensor k, int grid) -> Tensor[]",
        "lsb_stats": "(Tensor[] w, Tensor[] scale, Tensor bits, Tensor k, int grid, bool covered) -> "
        "(Tensor penalty, Tensor nonzero, Tensor sq_error)",
        "uniform_backward": "(Tensor[] grad, Tensor? grad_penalty, Tensor[] w, Tensor[] scale, Tensor bits, Tensor k, "
        "int grid, bool signed, bool scale_grad) -> (Tensor[] grad_w, Tensor[] grad_scale)",
        "add_lsb_grad_": "(Tensor(a!)[] grad, Tensor[] w, Tensor[] scale, Tensor bits, Tensor k, int grid, "
        "Tensor strength) -> ()",
        "encode": "(Tensor[] w, Tensor[] scale, Tensor bits, int rule, int grid, bool signed) -> Tensor[]",
        "decode": "(Tensor[] codes, Tensor[] scale, Tensor bits, int grid, bool signed, ScalarType dtype) -> Tensor[]",
    },
    # Scales as functions of their weights, through which gradients flow, as not through absmax and absmean: max|w|, or
    # `mean` mean|w|.
    "own_scale": {
        "own_scale": "(Tensor[] w, bool per_row, bool mean) -> Tensor",
        "own_scale_backward": "(Tensor[] w, Tensor[] scale, Tensor[] grad_scale, bool mean) -> Tensor[] grad_w",
    },
    # bits: (widths, weights). Lists of q and of their gradients run width by width: that of width j of weight i is
    # entry j * len(w) + i, an empty tensor where there is no gradient. out_scale: None where it is the scale, of the
    # backward op [] (AOTInductor makes None of an empty list, and exports no backward op). `exact`:
    # the slope of q is out_scale/scale, not 1, which is up to autograd.
    "truncate": {
        "truncate": "(Tensor[] w, Tensor[] scale, Tensor[]? out_scale, Tensor bits, Tensor base_bits, int rule, "
        "bool tanh, bool covered, bool exact, ScalarType dtype) -> Tensor[] q",
        "truncate_backward": "(Tensor[] grads, Tensor[] w, Tensor[] scale, Tensor[] out_scale, Tensor bits, "
        "Tensor base_bits, int rule, bool tanh, bool covered, bool scale_grad) -> "
        "(Tensor[] grad_w, Tensor[] grad_scale, Tensor[] grad_out_scale)",
    },
    # `data` is uint8 in the layout of LAYOUTS[layout], of codes of `stored` bits each. `sizes` are those of all shapes,
    # one after another, of which each weight has `dims`. The bits that are packed are integers, not a tensor: the size
    # of `data` depends on them.
    "packing": {
        "pack": "(Tensor[] codes, int[] bits, int layout) -> Tensor[]",
        "unpack": "(Tensor[] data, SymInt[] sizes, int[] dims, int[] stored, Tensor bits, int layout) -> Tensor[]",
        "decode_packed": "(Tensor[] data, SymInt[] sizes, int[] dims, int[] stored, Tensor[] scale, Tensor bits, "
        "int layout, int grid, bool signed, ScalarType dtype) -> Tensor[]",
    },
    "categorical": {
        "categorical": "(Tensor[] x, Tensor[] alpha, Tensor[] sigma, Tensor bits, Tensor[]? gates, Tensor? seed, "
        "int mode, int grad_of, bool signed, ScalarType dtype) -> Tensor[]",
        "categorical_backward": "(Tensor[] grad, Tensor[] x, Tensor[] alpha, Tensor[] sigma, Tensor bits, "
        "Tensor[] gates, Tensor? seed, int mode, int grad_of, bool signed, bool scale_grad, bool gate_grad) -> "
        "(Tensor[] grad_x, Tensor[] grad_alpha, Tensor[] grad_sigma, Tensor[] grad_gates)",
    },
    # One tensor at a time. scale, offset: one element, or one per channel (dim 1). rule, front, keep and learn count in
    # RULES and in FRONTS, KEEPS and LEARNS of the reference. `kept` is uint8, in the order of q's memory, which is
    # dense: a bit (eight to a byte) or a number per element, or nothing; `sums` is [] or [grad_scale, grad_offset];
    # `dtype` is that of q, in the backward that of x. grad, and x or q where they are needed, are laid out as q was.
    "activation": {
        "activation": "(Tensor x, Tensor scale, Tensor? offset, Tensor bits, int rule, bool signed, int front, "
        "int keep, int learn, ScalarType dtype) -> (Tensor q, Tensor kept)",
        "activation_backward": "(Tensor grad, Tensor? x, Tensor? q, Tensor kept, Tensor scale, Tensor? offset, "
        "Tensor bits, int rule, bool signed, int front, int keep, int learn, ScalarType dtype) -> "
        "(Tensor grad_x, Tensor[] sums)",
    },
    # One tensor at a time, with one alpha and one sigma. `quarters` is uint8, 2 bits per element in the order of q's
    # memory, which is dense; `sums` is [] or [grad_alpha, grad_sigma]; `dtype` is that of q, in the backward that of x.
    "categorical_activation": {
        "categorical_activation": "(Tensor x, Tensor alpha, Tensor sigma, Tensor bits, int grad_of, ScalarType dtype) "
        "-> (Tensor q, Tensor quarters)",
        "categorical_activation_backward": "(Tensor grad, Tensor q, Tensor quarters, Tensor alpha, Tensor sigma, "
        "Tensor bits, int grad_of, bool scale_grad, ScalarType dtype) -> (Tensor grad_x, Tensor[] sums)",
    },
}

# Where a family's code is, column by column: the grid of the package. tests/package/test_grid.py walks it.
CELLS = {
    "reference": "quantops/reference/{}.py",  # what it means, in plain PyTorch: the oracle
    "default": "quantops/default/{}.py",  # that over lists, for any device
    "checks": "quantops/checks/{}.py",
    "autograd": "quantops/autograd/{}.py",  # of families that have an op in AUTOGRAD
    "C++": "csrc/cpu/{}.cpp",
    "CUDA": "csrc/cuda/{}.cu",
    "Triton": "kernels/{}.py",
    "tests": "tests/ops/test_{}.py",
    "emulation": "tests/emulation/test_{}.py",  # the CUDA kernels, run on the CPU
    "bench": "bench/ops/{}.py",
}

# The autograd kernels of the ops through which gradients flow. The results of the others never require grad.
AUTOGRAD = {
    "round_clamp": autograd.uniform.round_clamp,
    "msq": autograd.uniform.msq,
    "lsb_stats": autograd.uniform.lsb_stats,
    "uniform_backward": autograd.uniform.uniform_backward,
    "own_scale": autograd.own_scale.own_scale,
    "own_scale_backward": autograd.own_scale.own_scale_backward,
    "truncate": autograd.truncate.truncate,
    "truncate_backward": autograd.truncate.truncate_backward,
    "categorical": autograd.categorical.categorical,
    "categorical_backward": autograd.categorical.categorical_backward,
    "activation": autograd.activation.activation,
    "activation_backward": autograd.activation.activation_backward,
    "categorical_activation": autograd.categorical_activation.categorical_activation,
    "categorical_activation_backward": autograd.categorical_activation.categorical_activation_backward,
}

ops = torch.ops.quantops


def checked(name, kernel):
    """A Python kernel of the op ``name`` behind what the compiled ones do by themselves: the ops can be called
    directly, with anything, and those without an autograd kernel of their own must not be recorded."""
    names = [a.name for a in getattr(ops, name).default._schema.arguments]
    family = next(family for family, schemas in OPS.items() if name in schemas)
    structure = getattr(checks, family).structure

    def checked_kernel(*args):
        arguments = dict(zip(names, args))
        structure(arguments)
        with torch.no_grad():
            if family == "uniform" and "scale" in arguments:
                listed = arguments["codes" if "codes" in arguments else "w"]
                arguments["scale"] = each_scale(arguments["scale"], listed)
            return kernel(*arguments.values())

    return checked_kernel


def _with_autograd(op, fn):
    """``fn(keyset, op, args)`` where an argument wants a gradient, else the op itself."""

    def kernel(keyset, *args):
        refuse_unsupported(op, args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return below_autograd(keyset, op, args)
        return fn(keyset, op, args)

    return kernel


def _define(name, schema):
    """Defines an op where no compiled library has been loaded. ImportError where one has another op of this name, or
    none: its kernels would read arguments that are not there."""
    known = hasattr(ops, name)
    if not known and CPU[0] != "cpp":
        _lib.define(name + schema)
        return
    found = getattr(ops, name).default._schema if known else f"no quantops::{name}"
    want = torch._C.parse_schema(f"quantops::{name}{schema}")
    if str(found) != str(want):
        raise ImportError(
            f"{compiled.library_path('cpu')} was built from other sources: it has {found}, expected {want}; build it "
            "again (pip install .)"
        )


for _family, _schemas in OPS.items():
    for _name, _schema in _schemas.items():
        _define(_name, _schema)
        _kernel = checked(_name, getattr(getattr(default, _family), _name))
        _lib.impl(_name, _kernel, "CompositeExplicitAutograd")
        if _name in AUTOGRAD:
            _op = getattr(ops, _name)
            functions[_op] = functions[_op.default] = AUTOGRAD[_name]
            _lib.impl(_name, _with_autograd(_op.default, AUTOGRAD[_name]), "Autograd", with_keyset=True)
        else:
            _lib.impl(_name, torch.library.fallthrough_kernel, "Autograd")


# Fakes: shapes, dtypes and layouts of the results.


def _fake(fn):
    name = fn.__name__.removeprefix("_fake_")
    names = [a.name for a in getattr(ops, name).default._schema.arguments]

    def fake(*args, **kwargs):
        checks.all_or_none_on_meta({**dict(zip(names, args)), **kwargs})
        return fn(*args, **kwargs)

    torch.library.register_fake("quantops::" + name, fake, lib=_lib)
    return fn


def _sums(w):
    acc = w[0].new_empty(len(w), dtype=acc_dtype(w[0].dtype))
    return acc, w[0].new_empty(len(w), dtype=torch.int64), torch.empty_like(acc)


def _scales(w, per_row):
    n = sum(t.shape[0] for t in w) if per_row else len(w)
    return w[0].new_empty(n, dtype=acc_dtype(w[0].dtype))


@_fake
def _fake_absmax(w, per_row):
    return _scales(w, per_row)


@_fake
def _fake_absmean(w, per_row):
    return _scales(w, per_row)


@_fake
def _fake_own_scale(w, per_row, mean):
    return _scales(w, per_row)


@_fake
def _fake_own_scale_backward(w, scale, grad_scale, mean):
    return [empty_like(t, t.dtype) for t in w]


@_fake
def _fake_round_clamp(w, scale, bits, grid, signed, covered, dtype):
    return [empty_like(t, dtype) for t in w]


@_fake
def _fake_round_clamp_out(w, scale, bits, grid, signed, q):
    return None


@_fake
def _fake_msq(w, scale, bits, k, grid, covered, dtype):
    return [empty_like(t, dtype) for t in w], *_sums(w)


@_fake
def _fake_msq_out(w, scale, bits, k, grid, q, penalty, nonzero, sq_error):
    return None


@_fake
def _fake_lsb(w, scale, bits, k, grid):
    return [empty_like(t, torch.int32) for t in w]


@_fake
def _fake_lsb_stats(w, scale, bits, k, grid, covered):
    return _sums(w)


@_fake
def _fake_uniform_backward(grad, grad_penalty, w, scale, bits, k, grid, signed, scale_grad):
    return [empty_like(t, t.dtype) for t in w], [torch.empty_like(s) for s in scale] if scale_grad else []


@_fake
def _fake_add_lsb_grad_(grad, w, scale, bits, k, grid, strength):
    return None


@_fake
def _fake_encode(w, scale, bits, rule, grid, signed):
    return [empty_like(t, torch.int32) for t in w]


@_fake
def _fake_decode(codes, scale, bits, grid, signed, dtype):
    return [empty_like(c, dtype) for c in codes]


@_fake
def _fake_truncate(w, scale, out_scale, bits, base_bits, rule, tanh, covered, exact, dtype):
    return [empty_like(t, dtype) for _ in range(bits.shape[0]) for t in w]


@_fake
def _fake_truncate_backward(grads, w, scale, out_scale, bits, base_bits, rule, tanh, covered, scale_grad):
    sums = [[torch.empty_like(s) for s in v] if scale_grad else [] for v in (scale, out_scale)]
    return [empty_like(t, t.dtype) for t in w], *sums


@_fake
def _fake_pack(codes, bits, layout):
    return [c.new_empty(data_shape(c.numel(), n, LAYOUTS[layout]), dtype=torch.uint8) for c, n in zip(codes, bits)]


@_fake
def _fake_unpack(data, sizes, dims, stored, bits, layout):
    return [d.new_empty(shape, dtype=torch.int32) for d, shape in zip(data, split_shapes(sizes, dims))]


@_fake
def _fake_decode_packed(data, sizes, dims, stored, scale, bits, layout, grid, signed, dtype):
    return [d.new_empty(shape, dtype=dtype) for d, shape in zip(data, split_shapes(sizes, dims))]


@_fake
def _fake_categorical(x, alpha, sigma, bits, gates, seed, mode, grad_of, signed, dtype):
    return [empty_like(t, dtype) for t in x]


@_fake
def _fake_categorical_backward(grad, x, alpha, sigma, bits, gates, seed, mode, grad_of, signed, scale_grad, gate_grad):
    alphas, sigmas = ([torch.empty_like(v) for v in values] if scale_grad else [] for values in (alpha, sigma))
    return (
        [empty_like(t, t.dtype) for t in x],
        alphas,
        sigmas,
        [g.new_empty(g.numel()) for g in gates] if gate_grad else [],
    )


@_fake
def _fake_activation(x, scale, offset, bits, rule, signed, front, keep, learn, dtype):
    size = {"input": 0, "bits": -(-x.numel() // 8), "residual": x.numel()}[KEEPS[keep]]
    return empty_like(x, dtype), x.new_empty(size, dtype=torch.uint8)


@_fake
def _fake_activation_backward(grad, x, q, kept, scale, offset, bits, rule, signed, front, keep, learn, dtype):
    return empty_like(grad, dtype), [torch.empty_like(scale) for _ in range(2)] if learn else []


@_fake
def _fake_categorical_activation(x, alpha, sigma, bits, grad_of, dtype):
    return empty_like(x, dtype), x.new_empty(data_shape(x.numel(), QUARTER_BITS, "dense"), dtype=torch.uint8)


@_fake
def _fake_categorical_activation_backward(grad, q, quarters, alpha, sigma, bits, grad_of, scale_grad, dtype):
    return empty_like(q, dtype), [torch.empty_like(alpha), torch.empty_like(sigma)] if scale_grad else []
