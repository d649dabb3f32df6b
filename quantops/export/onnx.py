"""ONNX: weights as integers of their bits, each behind a DequantizeLinear."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from quantops.export.activations import use_integers
from quantops.export.aten import to_aten
from quantops.export.trained import need, trained
from quantops.files import write_whole
from quantops.types import Path

# (bits of a signed integer, the name of its ONNX type, the first opset whose DequantizeLinear takes it)
_INTEGERS = ((2, "INT2", 25), (4, "INT4", 21), (8, "INT8", 13), (16, "INT16", 21), (32, "INT32", 13))
FLOATS = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}


def onnx(
    model: torch.nn.Module,
    args: Any,
    path: Path,
    *,
    kwargs: dict[str, Any] | None = None,
    bits: int | None = None,
    opset: Any = 21,
    exact: bool = True,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Any:
    """Writes the evaluated model as ONNX, its quantized weights as integers: about bits/8 bytes per weight.

    A weight becomes an initializer of its integer levels, of the least signed type that holds them, and a
    DequantizeLinear with its step (per row: with axis 0): q = m * step, the training forward bit for bit. The dyadic
    grid of n bits takes n bits, the full and the sign grid, whose levels are among -(2^n - 1)..2^n - 1, one more.

        bits of a type    opset from
        2 (onnxruntime's own support aside)    25
        4, 16                                  21
        8, 32                                  13

    Quantized activations become a QuantizeLinear to unsigned or signed integers (8 bits; 4 and 16 from opset 21 on) and
    a DequantizeLinear with their step, per channel with axis 1; without integers for their levels in that opset they
    are float ops of the same values.

    onnxruntime puts its MatMulNBits in the place of many a MatMul with integer weights, which by default rounds what
    comes in to 8 bits: outputs then differ by as much as 1 % of the largest. The session option
    ``session.qdq_matmulnbits_accuracy_level`` of "1" keeps float32, and with it the outputs of the torch model.

    Args:
        model: quantized by :func:`quantops.quantize_`, in evaluation mode.
        args, kwargs: example inputs, as torch.onnx.export takes them.
        path: the file. It appears whole or not at all.
        bits: of TruncQuant, the width; default the widest.
        opset: 18 or more. A weight whose integer type has a later first opset takes a wider type.
        exact: True: activations always have the codes of the torch model: float ops give QuantizeLinear the levels.
            (Behind a fused GELU or SiLU, which leaves as the op of ONNX, but where its last places decide.)
            False: QuantizeLinear divides by the step itself, the form that runtimes put into integer kernels; of values
            next to the middle of two codes, about 1 of 10^5 at 8 bits, some get the neighbour. Floor and nearest codes
            (TruncQuant) leave as with True.
        dynamic_shapes: as torch.export has it; default: dim 0 of every tensor of ``args`` is dynamic, and its size in
            ``args`` must then be 2 or more. With ``kwargs`` the default is the sizes of the example.
        input_names, output_names: as torch.onnx.export has them.

    Returns the onnx.ModelProto. Raises ImportError without onnx and onnxscript (``pip install 'quantops[export]'``),
    and ValueError for a model that is in training mode or not quantized, for float64 weights and an opset out of range.
    """
    if dynamic_shapes is None and not kwargs:
        dynamic_shapes = _dynamic_batch(args if isinstance(args, tuple) else (args,))

    def integers(plain):
        use_integers(plain, opset, exact)

    library, (proto, weights) = (
        need("onnx"),
        float_graph(model, args, kwargs, bits, opset, dynamic_shapes, input_names, output_names, integers),
    )
    _put_integers(library, proto, weights, opset)
    library.checker.check_model(proto)
    write_whole(path, lambda file: file.write(proto.SerializeToString()))
    return proto


def _dynamic_batch(args):
    """dynamic_shapes of example inputs, each of a batch of any size."""
    for a in args:
        if isinstance(a, torch.Tensor) and a.dim() and a.shape[0] < 2:
            raise ValueError(
                f"args: expected 2 or more in dim 0 of each tensor, whose size is then left open, got shape "
                f"{tuple(a.shape)}; dynamic_shapes={(None,) * len(args)} keeps the sizes as they are"
            )
    return tuple({0: torch.export.Dim.DYNAMIC} if isinstance(a, torch.Tensor) and a.dim() else None for a in args)


def float_graph(model, args, kwargs, bits, opset, dynamic_shapes, input_names, output_names, prepare):
    """(onnx.ModelProto of the evaluated model with q as float weights, {initializer: IntWeight}). ``prepare`` changes
    its plain copy."""
    library = need("onnx")
    need("onnxscript")
    if isinstance(opset, bool) or not isinstance(opset, int) or not 18 <= opset <= library.defs.onnx_opset_version():
        raise ValueError(f"opset: expected 18..{library.defs.onnx_opset_version()}, got {opset!r}")
    args = args if isinstance(args, tuple) else (args,)
    plain, weights = trained(model, bits)
    for name, w in weights.items():
        if w.dtype not in FLOATS:
            raise ValueError(f"{name}: expected a weight of float32, float16 or bfloat16, got {w.dtype}")
    prepare(plain)
    # Not optimized: folding batch norms into weights would change these, and runtimes do it behind the integers.
    program = to_aten(torch.export.export(plain, args, kwargs, dynamic_shapes=dynamic_shapes))  # activations have ops
    proto = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        verbose=False,
        optimize=False,
        input_names=input_names,
        output_names=output_names,
    ).model_proto
    stored = {t.name for t in proto.graph.initializer}
    for name, w in weights.items():
        if not stored.intersection(other for other, v in weights.items() if v is w):
            raise ValueError(f"{name}: the exported graph has no initializer of this name; does the model use it?")
    return proto, {name: w for name, w in weights.items() if name in stored}


def put_first(graph, nodes):
    """Puts ``nodes`` before those that the graph has."""
    old = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *old])


def integer_type(levels, opset):
    """(bits, name) of the least signed type that has all levels lowest..highest."""
    lowest, highest = levels
    for width, name, first in _INTEGERS:
        if opset >= first and -(2 ** (width - 1)) <= lowest and highest < 2 ** (width - 1):
            return width, name
    raise ValueError(f"levels: expected integers of 32 bits, got {lowest}..{highest}")


def _put_integers(library, proto, weights, opset):
    graph, helper, types = proto.graph, library.helper, library.TensorProto
    old = {t.name: t for t in graph.initializer}
    nodes = []
    for name, w in weights.items():
        graph.initializer.remove(old[name])
        width, kind = integer_type(w.level_range, opset)
        graph.initializer.append(_tensor(helper, f"{name}.levels", getattr(types, kind), w.levels.cpu(), width))
        by_axis = w.step.numel() == 1 or len(w.rows) == 1
        step = (w.step if by_axis else w.step_of_each).cpu().to(torch.float32)
        shape = list(step.shape) if step.numel() > 1 else []
        graph.initializer.append(helper.make_tensor(f"{name}.step", types.FLOAT, shape, step.reshape(-1).tolist()))
        cast, inputs = w.dtype != torch.float32, [f"{name}.levels", f"{name}.step"]
        wide = f"{name}.wide" if cast else name
        if by_axis:
            axis = {"axis": w.rows[0]} if step.numel() > 1 else {}
            nodes.append(helper.make_node("DequantizeLinear", inputs, [wide], name=f"{name}.dequantize", **axis))
        else:  # a step for each entry of several dims, which DequantizeLinear has not
            nodes.append(helper.make_node("Cast", inputs[:1], [f"{name}.float"], to=types.FLOAT))
            nodes.append(helper.make_node("Mul", [f"{name}.float", inputs[1]], [wide], name=f"{name}.dequantize"))
        if cast:
            nodes.append(helper.make_node("Cast", [wide], [name], to=getattr(types, FLOATS[w.dtype])))
    put_first(graph, nodes)


def _tensor(helper, name, kind, levels, width):
    """An initializer of integers; several to a byte where they have fewer than 8 bits, the first in the low bits."""
    flat = levels.reshape(-1)
    if width < 8:
        each = 8 // width
        flat = torch.nn.functional.pad(flat & (2**width - 1), (0, -flat.numel() % each)).reshape(-1, each)
        flat = (flat << (width * torch.arange(each))).sum(1)
        data = flat.to(torch.uint8)
    else:
        data = flat.to({8: torch.int8, 16: torch.int16, 32: torch.int32}[width])
    assert data.numel() == math.ceil(levels.numel() * width / (8 * data.element_size()))
    return helper.make_tensor(name, kind, list(levels.shape), data.numpy().tobytes(), raw=True)
