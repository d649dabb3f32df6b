"""Graphs without ops of this library."""

import torch

from quantops import decompositions


def to_aten(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """A torch.export.ExportedProgram whose graph has aten ops alone in the place of quantops' ops.

    Such a graph runs where this library is not installed. It is equal bit for bit, but for scales that are means
    (``scale=2.8``, ``out_scale="absmean"``), which may differ in their last place. Raises ValueError for what has no
    such chain, classes that gates weigh or that are drawn (training with DropBits or ``mode="sample"``): export the
    evaluated model. TypeError for what is no ExportedProgram.
    """
    if not isinstance(program, torch.export.ExportedProgram):
        raise TypeError(
            f"program: expected a torch.export.ExportedProgram, which torch.export.export(model, args) gives, got "
            f"{type(program).__name__}"
        )
    return program.run_decompositions(decompositions.table())
