"""QONNX (arXiv 2206.07527): float weights behind Quant and BipolarQuant nodes of any bits, for FINN and hls4ml."""

from collections.abc import Sequence
from typing import Any

import torch

from quantops.export.activations import use_quant
from quantops.export.onnx import float_graph, put_first
from quantops.export.trained import need, signed_bits
from quantops.files import write_whole
from quantops.types import Path

DOMAIN, OPSET = "qonnx.custom_op.general", 18


def qonnx(
    model: torch.nn.Module,
    args: Any,
    path: Path,
    *,
    kwargs: dict[str, Any] | None = None,
    bits: int | None = None,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Any:
    """Writes the evaluated model as QONNX: each quantized weight is q behind a node that gives q again, bit for bit.

        grid                   node
        dyadic, n bits         Quant, scale = step, n bits, signed
        full, 1 bit            BipolarQuant, scale = step
        other symmetric grids  Quant, scale = step, n + 1 bits, signed, narrow: the full grid has its odd levels

    Quantized activations of the dyadic grid (MSQ, CPQ) become a Quant with their step, where some values next to the
    middle of two codes, about 1 of 10^5 at 8 bits, get the neighbour; others leave as float ops of the same values.

    Arguments, result and errors are those of :func:`quantops.export.onnx`, but that shapes are those of ``args`` unless
    ``dynamic_shapes`` says otherwise, as tools for hardware want them. Needs the package qonnx, whose
    ``ModelWrapper(path)`` reads the file.
    """
    library = need("onnx")
    need("qonnx.core.modelwrapper")

    def quant(plain):
        use_quant(plain, DOMAIN)

    proto, weights = float_graph(model, args, kwargs, bits, OPSET, dynamic_shapes, input_names, output_names, quant)
    graph, helper, nodes = proto.graph, library.helper, []
    for t in graph.initializer:
        if t.name in weights:
            w, name = weights[t.name], t.name
            t.name = f"{name}.float"
            step = w.step_of_each.cpu().float()
            scale = step if w.bits else step + 1.0  # of a pruned weight any scale gives 0
            inputs = [t.name, f"{name}.scale"]
            constants = {f"{name}.scale": scale}
            if w.grid == "full" and w.bits == 1:
                kind, settings = "BipolarQuant", {}
            else:
                kind = "Quant"
                settings = {"signed": 1, "narrow": int(w.grid != "dyadic"), "rounding_mode": "ROUND"}
                constants[f"{name}.zero"] = scale.new_zeros(())
                constants[f"{name}.bits"] = scale.new_full((), max(signed_bits(w), 2))  # qonnx takes 1 bit for bipolar
                inputs += [f"{name}.zero", f"{name}.bits"]
            nodes += [helper.make_node(kind, inputs, [name], domain=DOMAIN, name=f"{name}.quant", **settings)]
            graph.initializer.extend(library.numpy_helper.from_array(v.numpy(), key) for key, v in constants.items())
    put_first(graph, nodes)
    if all(entry.domain != DOMAIN for entry in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    write_whole(path, lambda file: file.write(proto.SerializeToString()))
    return proto
