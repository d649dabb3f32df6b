"""Any argument: lists of tensors, choices, the dtype of results; and how messages name them."""

from operator import attrgetter

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def kind(v):
    if isinstance(v, torch.Tensor):
        return f"{v.dtype} tensor of shape {tuple(v.shape)}"
    name = type(v).__name__
    return f"numpy.{name}" if type(v).__module__ == "numpy" else name  # int64 alone would read as an integer


def entry(name, i, value):
    return name if len(value) == 1 else f"{name}[{i}]"


def names(dtypes):
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensors(name, value, dtypes=FLOATS):
    """``value`` as a list of tensors that share one of ``dtypes`` and a device."""
    if not isinstance(value, (list, tuple)) or not value:
        raise TypeError(
            f"{name}: expected a non-empty list of tensors, got {kind(value)}"
            + (" of length 0" if isinstance(value, (list, tuple)) else "")
        )
    first = value[0]
    for i, t in enumerate(value):
        if not isinstance(t, torch.Tensor):
            not_symbolic(name, t)
            raise TypeError(f"{entry(name, i, value)}: expected a tensor, got {kind(t)}")
        if t.layout != torch.strided:
            raise TypeError(f"{entry(name, i, value)}: expected a dense tensor, got layout {t.layout}")
        if t.dtype not in dtypes:
            raise TypeError(f"{entry(name, i, value)}: expected one of {names(dtypes)}, got {t.dtype}")
        if t.dtype != first.dtype:
            raise TypeError(f"{name}: expected one dtype, got {first.dtype} in entry 0 and {t.dtype} in entry {i}")
        if t.device != first.device:
            raise ValueError(f"{name}: expected one device, got {first.device} in entry 0 and {t.device} in entry {i}")
    return list(value)


def not_symbolic(name, t):
    """NotImplementedError for what torch.fx.symbolic_trace puts in the place of a tensor."""
    if isinstance(t, torch.fx.Proxy):
        raise NotImplementedError(
            f"{name}: torch.fx.symbolic_trace cannot record the ops of quantops, which "
            "check their arguments: use torch.export or torch.compile"
        )


def listed(name, value, dtypes=FLOATS):
    """As :func:`tensors`, for lists that go to an op at once: what the op checks by itself, in C++, is left to it."""
    if isinstance(value, (list, tuple)) and value and alike(value, dtypes) and ops_check(value[0]):
        return list(value)
    return tensors(name, value, dtypes)


def alike(value, dtypes):
    """Whether these are tensors of one of ``dtypes``. 0.1 us for each: a loop in Python takes four times that."""
    if not all(issubclass(kind, torch.Tensor) for kind in set(map(type, value))):
        return False
    found = set(map(attrgetter("dtype"), value))
    return len(found) == 1 and found.pop() in dtypes


def ops_check(like):
    """Whether ops of tensors as ``like`` run a kernel, which checks them, and not a fake one, which does not."""
    return not (torch.compiler.is_compiling() or like.device.type == "meta" or torch._C._len_torch_dispatch_stack())


def one_for_each(name, value, x, what):
    """Raises where ``value`` is not a list with one ``what`` for each entry of ``x``."""
    if not isinstance(value, (list, tuple)) or len(value) != len(x):
        got = f"{len(value)}" if isinstance(value, (list, tuple)) else kind(value)
        raise ValueError(f"{name}: expected a list with one {what} ({len(x)}), got {got}")


def choice(name, value, allowed):
    """``value`` where it is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def dtype_of(out_dtype, w):
    """The dtype of q: the one asked for, else what autocast asks for, else the weight's own."""
    if out_dtype is not None:
        if out_dtype not in FLOATS:
            raise TypeError(f"out_dtype: expected one of {names(FLOATS)}, got {out_dtype}")
        return out_dtype
    device = w[0].device.type
    if w[0].dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return w[0].dtype


def all_or_none_on_meta(arguments):
    """ValueError for an op's arguments, {name: value}, of which a part is on the meta device: only the fake kernel sees
    those, and what it returns has no values."""
    lists = {name: v if isinstance(v, (list, tuple)) else [v] for name, v in arguments.items()}
    found = [(name, i, t) for name, v in lists.items() for i, t in enumerate(v) if isinstance(t, torch.Tensor)]
    first, _, like = found[0]
    for name, i, t in found:
        if t.is_meta != like.is_meta and name == first:
            raise ValueError(f"{name}: expected one device, got {like.device} in entry 0 and {t.device} in entry {i}")
        if t.is_meta != like.is_meta:
            raise ValueError(f"{name}: expected device {like.device}, where {first} is, got {t.device}")
