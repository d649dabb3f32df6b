"""The weight matrices of each kind of layer, and which of their dims are its outputs: the rows that per_row scales.

    layer                                           parameters                              rows
    Linear, Conv1d, 2d, 3d; Bilinear (1)            weight                                  dim 0
    ConvTranspose1d, 2d, 3d                         weight; its groups share the scales     dim 1
    Conv1D of transformers (GPT-2)                  weight, (in, out)                       dim 1
    MultiheadAttention                              in_proj_weight, or q_proj_weight,       dim 0
                                                    k_proj_weight and v_proj_weight
    RNN, LSTM, GRU and their cells                  weight_ih..., weight_hh..., weight_hr   dim 0, each gate's own
    experts: a module with ``num_experts``          every parameter with 3 dims,            dims 0 and 1: a scale for
                                                    (experts, out, in)                      each expert and row
    the same with ``is_transposed``                 (experts, in, out)                      dims 0 and 2
    Embedding, EmbeddingBag (1); not by default     weight                                  dim 0: each entry
    any other module, where chosen                  weight                                  dim 0

(1) Under autocast these compute with their weights as they are, and q has the dtype of the weight.

``overrides={pattern: {"rows": 1}}`` sets the rows of a weight that lies in another way, a dim or a tuple of dims.
"""

import fnmatch
from typing import NamedTuple

import torch

WEIGHT = "weight"
ROWS = (0,)  # where nothing else is said


class Kind(NamedTuple):
    """A row of the table: its modules, patterns of their parameters, the dims that are rows."""

    fits: object  # module -> bool
    parameters: tuple[str, ...]
    rows: tuple[int, ...] = ROWS
    dims: int | None = None  # that a parameter must have
    default: bool = True  # whether has_matrices chooses it
    cast: bool = True  # whether autocast casts its parameters, or what it computes with them


def _named(name, library):
    """Of modules of a library that need not be installed."""
    return lambda module: any(
        cls.__name__ == name and cls.__module__.partition(".")[0] == library for cls in type(module).__mro__
    )


def _is(*classes):
    return lambda module: isinstance(module, classes)


_nn = torch.nn
KINDS = (
    Kind(_is(_nn.Linear, _nn.Conv1d, _nn.Conv2d, _nn.Conv3d), (WEIGHT,)),
    Kind(_is(_nn.Bilinear), (WEIGHT,), cast=False),
    Kind(_is(_nn.ConvTranspose1d, _nn.ConvTranspose2d, _nn.ConvTranspose3d), (WEIGHT,), (1,)),
    Kind(_named("Conv1D", "transformers"), (WEIGHT,), (1,)),
    Kind(_is(_nn.MultiheadAttention), ("in_proj_weight", "[qkv]_proj_weight")),
    Kind(_is(_nn.RNNBase, _nn.RNNCellBase), ("weight_[ih][hr]*",)),
    Kind(lambda m: hasattr(m, "num_experts") and getattr(m, "is_transposed", False), ("*",), (0, 2), 3),
    Kind(lambda m: hasattr(m, "num_experts"), ("*",), (0, 1), 3),
    Kind(_is(_nn.Embedding, _nn.EmbeddingBag), (WEIGHT,), default=False, cast=False),
)


def kind_of(module):
    """The row of the table for ``module``, None for other modules."""
    return next((kind for kind in KINDS if kind.fits(module)), None)


def matrices(module):
    """Names of the parameters of ``module`` itself that are weight matrices by the table: ("weight",) where it has no
    row."""
    kind = kind_of(module)
    if kind is None or kind.parameters == (WEIGHT,):
        return (WEIGHT,)
    return tuple(
        name
        for name, p in _of(module)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in kind.parameters) and kind.dims in (None, p.dim())
    )


def _of(module):
    """(name, tensor) of the parameters of ``module`` itself, those behind parametrizations too."""
    for name, p in module._parameters.items():
        if p is not None:
            yield name, p
    for name, owner in getattr(module, "parametrizations", {}).items():
        if hasattr(owner, "original"):
            yield name, owner.original


def is_cast(module):
    """Whether autocast casts the weights of ``module``."""
    kind = kind_of(module)
    return kind is None or kind.cast


def rows_of(module, parameter):
    """The dims of a parameter of ``module`` that are rows."""
    kind = kind_of(module)
    return kind.rows if kind is not None and parameter in matrices(module) else ROWS


def check_rows(name, rows, weight):
    """``rows`` as a tuple of dims; ValueError where ``weight`` has no such dims."""
    dims = (rows,) if isinstance(rows, int) else rows
    good = (
        isinstance(dims, (list, tuple))
        and dims
        and all(type(d) is int and 0 <= d < weight.dim() for d in dims)
        and len(set(dims)) == len(dims)
    )
    if not good:
        raise ValueError(f"{name}: rows: expected a dim of 0..{weight.dim() - 1}, or some of them, got {rows!r}")
    return tuple(dims)


def is_linear_or_conv(name: str, module: torch.nn.Module) -> bool:
    """A filter for :func:`quantops.quantize_`: Linear and Conv1d, 2d, 3d."""
    return isinstance(module, (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d))


def has_matrices(name: str, module: torch.nn.Module) -> bool:
    """The default filter of :func:`quantops.quantize_`: every layer of the table in quantops/layers.py but embeddings
    (an embedding that shares its weight with a layer that is chosen has the same quantized weight, see
    :class:`quantops.convert.QuantConfig`)."""
    kind = kind_of(module)
    return kind is not None and kind.default and bool(matrices(module))


def adapters(model):
    """The modules of adapters (LoRA and others of peft): what a layer has beside the ``base_layer`` that it wraps."""
    found = set()
    for module in model.modules():
        children = dict(module.named_children())  # of ScriptModules too, whose _modules are no dict
        if children.pop("base_layer", None) is not None:
            own = (m for child in children.values() for m in child.modules())
            found.update(own)
    return found


# A weight with its rows in front, as all kernels take it.


def to_rows(w, rows):
    """``w`` with ``rows`` as dim 0: itself, a view where its layout allows it, or a copy."""
    if rows == ROWS:
        return w
    rest = [d for d in range(w.dim()) if d not in rows]
    return w.permute(*rows, *rest).flatten(0, len(rows) - 1)


def from_rows(t, rows, shape):
    """What :func:`to_rows` was given, a weight of ``shape``."""
    if rows == ROWS:
        return t
    order = [*rows, *(d for d in range(len(shape)) if d not in rows)]
    return t.unflatten(0, [shape[d] for d in rows]).permute(*(order.index(d) for d in range(len(shape))))
