"""Names of what many functions take."""

import os
from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import torch

Bits: TypeAlias = int | torch.Tensor  # an int or an integer tensor of one element
Scale: TypeAlias = float | torch.Tensor  # a number, or a tensor with one element or one per row
ListBits: TypeAlias = int | Sequence[int] | torch.Tensor  # of a list of weights: one for all, or an entry for each
Scales: TypeAlias = Sequence[Scale]
Path: TypeAlias = str | os.PathLike[str]
ModelT = TypeVar("ModelT", bound=torch.nn.Module)
