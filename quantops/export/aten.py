"""Graphs without ops of this library."""

import torch

from quantops import decompositions
from quantops.library import ops

GATES = 4  # their place among the arguments of categorical


def to_aten(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """A torch.export.ExportedProgram whose graph has aten ops alone in the place of quantops' ops.

    Such a graph runs where this library is not installed. It is equal bit for bit, but for scales that are means
    (``scale=2.8``, ``out_scale="absmean"``), which may differ in their last place. Raises ValueError for what has no
    such chain: classes that are drawn (training with ``mode="sample"``) or that gates weigh (training with DropBits,
    and evaluation too with ``evaluate="gate"``). Export :func:`quantops.plain_model` of such a model, or, but for
    ``evaluate="gate"``, the evaluated one. TypeError for what is no ExportedProgram.
    """
    if not isinstance(program, torch.export.ExportedProgram):
        raise TypeError(
            f"program: expected a torch.export.ExportedProgram, which torch.export.export(model, args) gives, got "
            f"{type(program).__name__}"
        )
    for node in program.graph.nodes:
        if node.target is ops.categorical.default and len(node.args) > GATES and node.args[GATES]:
            raise ValueError(
                "program: expected classes without gates in a graph of aten ops, got gates, as of training with "
                "DropBits or of CPQConfig(evaluate='gate'); export quantops.plain_model(model), or, but for "
                "evaluate='gate', call model.eval() before the export"
            )
    return program.run_decompositions(decompositions.table())
