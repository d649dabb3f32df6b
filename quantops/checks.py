"""What a caller may pass, and the errors that say so: argument, what was expected, what came."""

import functools
import math

import torch

from quantops.layout import dense_rows
from quantops.reference.activation import QUARTER_BITS
from quantops.reference.categorical import GRADS, MAX_SOFT_BITS, MODES
from quantops.reference.packing import LAYOUTS, data_shape, split_shapes
from quantops.reference.truncate import COMPANDINGS
from quantops.reference.uniform import GRIDS, MAX_BITS, RULES, acc_dtype

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _kind(v):
    return f"{v.dtype} tensor of shape {tuple(v.shape)}" if isinstance(v, torch.Tensor) else type(v).__name__


def tensors(name, value, dtypes=FLOATS):
    """``value`` as a list of tensors that share one of ``dtypes`` and a device."""
    if not isinstance(value, (list, tuple)) or not value:
        raise TypeError(f"{name}: expected a non-empty list of tensors, got {_kind(value)}"
                        + (" of length 0" if isinstance(value, (list, tuple)) else ""))
    first = value[0]
    for i, t in enumerate(value):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{_entry(name, i, value)}: expected a tensor, got {_kind(t)}")
        if t.layout != torch.strided:
            raise TypeError(f"{_entry(name, i, value)}: expected a dense tensor, got layout {t.layout}")
        if t.dtype not in dtypes:
            raise TypeError(f"{_entry(name, i, value)}: expected one of {_names(dtypes)}, got {t.dtype}")
        if t.dtype != first.dtype:
            raise TypeError(f"{name}: expected one dtype, got {first.dtype} in entry 0 and {t.dtype} in entry {i}")
        if t.device != first.device:
            raise ValueError(f"{name}: expected one device, got {first.device} in entry 0 and {t.device} in entry {i}")
    return list(value)


def _entry(name, i, value):
    return name if len(value) == 1 else f"{name}[{i}]"


def _names(dtypes):
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


@functools.lru_cache(maxsize=1024)
def _constant(value, count, dtype, device):
    return torch.full((count,), value, dtype=dtype, device=device)


def _may_keep(device):
    """Whether a tensor made now may serve later calls too.

    A tensor made while tracing, under a dispatch mode (fake tensors) or for inference alone must not be kept, nor one
    on a GPU, where it may belong to a graph that is being captured, or to another stream.
    """
    return not (device.type != "cpu" or torch.compiler.is_compiling() or torch.is_inference_mode_enabled()
                or torch._C._len_torch_dispatch_stack())


def _filled(value, count, dtype, device):
    return (_constant if _may_keep(device) else _constant.__wrapped__)(value, count, dtype, device)


def integers(name, value, w, low, high):
    """``bits`` or ``k`` as an int32 tensor with one entry per weight, on the weights' device."""
    count, device = len(w), w[0].device
    if isinstance(value, torch.Tensor):
        if value.dtype not in INTS:
            raise TypeError(f"{name}: expected an integer or an integer tensor, got {_kind(value)}")
        if value.numel() != count:
            raise ValueError(f"{name}: expected one entry per weight ({count}), got shape {tuple(value.shape)}")
        if value.device != device:
            raise ValueError(f"{name}: expected device {device}, where the weights are, got {value.device}")
        # Clamped first: 2^32 + 4 must not become a plausible 4.
        return value if value.dtype == torch.int32 else value.clamp(low - 1, high + 1).to(torch.int32)
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(values) not in (1, count):
        raise ValueError(f"{name}: expected one entry per weight ({count}), got {len(values)}")
    for v in values:
        if isinstance(v, bool) or not isinstance(v, (int, torch.SymInt)):
            raise TypeError(f"{name}: expected an integer or an integer tensor, got {_kind(v)}")
        if not low <= v <= high:
            raise ValueError(f"{name}: expected {low}..{high}, got {v}")
    if len(values) == 1:
        return _filled(values[0], count, torch.int32, device)
    made = torch.tensor(values, dtype=torch.int32, pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)


def _repeated(value, w):
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * len(w) if len(values) == 1 else values


def bits(value, w):
    """Bit-widths 0..16; 0 means: the whole tensor is pruned."""
    return integers("bits", value, w, 0, MAX_BITS)


def bits_and_k(bits_value, k_value, w):
    """Bit-widths and the number of LSBs looked at, 1 <= k < bits; k = 0: none, for weights with no bit to give."""
    n, k = bits(bits_value, w), integers("k", k_value, w, 0, MAX_BITS - 1)
    if not isinstance(bits_value, torch.Tensor) and not isinstance(k_value, torch.Tensor):
        for b, v in zip(_repeated(bits_value, w), _repeated(k_value, w)):
            if v >= b and v != 0:
                raise ValueError(f"k: expected 1 <= k < bits = {b} (or 0 for no LSBs), got {v}")
    return n, k


def widths(bits_value, base_value, w):
    """Widths to truncate to, as an int32 tensor (widths, weights); the base widths; whether one width was asked for.

    An int or a tensor with an entry per weight is one width. A list or tuple of these, or a tensor (widths, weights),
    is several.
    """
    one, device = not isinstance(bits_value, (list, tuple)), w[0].device
    each = (bits_value,) if one else tuple(bits_value)
    if type(base_value) is int and all(type(n) is int for n in each) and _may_keep(device):
        return *_constant_widths(each, base_value, len(w), device), one
    base = integers("base_bits", base_value, w, 1, MAX_BITS)
    if isinstance(bits_value, torch.Tensor) and bits_value.dim() > 1:
        if bits_value.dim() != 2 or bits_value.shape[1] != len(w) or not 1 <= bits_value.shape[0] <= MAX_BITS:
            raise ValueError(f"bits: expected shape (widths, weights) = (1..{MAX_BITS}, {len(w)}), got "
                             f"{tuple(bits_value.shape)}")
        flat = integers("bits", bits_value.reshape(-1), w * bits_value.shape[0], 1, MAX_BITS)
        return flat.reshape(bits_value.shape), base, False
    if not 1 <= len(each) <= MAX_BITS:
        raise ValueError(f"bits: expected 1..{MAX_BITS} widths, got {len(each)}")
    most = MAX_BITS if isinstance(base_value, torch.Tensor) else min(_repeated(base_value, w))
    numbers = [n for n in each if not isinstance(n, torch.Tensor)]
    for j, n in enumerate(numbers):
        if isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)):
            raise TypeError(f"bits: expected an integer or an integer tensor, or a sequence of these, got {_kind(n)}")
        if not 1 <= n <= most:
            raise ValueError(f"bits: expected widths in 1..base_bits = {most}, got {n}")
        if n in numbers[:j]:
            raise ValueError(f"bits: expected distinct widths, got {n} twice")
    # On a GPU numbers become tensors by fills alone, which a CUDA graph may capture.
    return torch.stack([integers("bits", n, w, 1, MAX_BITS).reshape(-1) for n in each]), base, one


@functools.lru_cache(maxsize=1024)
def _constant_widths(bits_value, base_value, count, device):
    like = [torch.empty(0, device=device)] * count
    return widths(bits_value, [base_value], like)[:2]  # a list is not looked up here again


def _one_for_each(name, value, x, what):
    """Raises where ``value`` is not a list with one ``what`` for each entry of ``x``."""
    if not isinstance(value, (list, tuple)) or len(value) != len(x):
        got = f"{len(value)}" if isinstance(value, (list, tuple)) else _kind(value)
        raise ValueError(f"{name}: expected a list with one {what} ({len(x)}), got {got}")


def scales(value, w, dtype=None, name="scale"):
    """One contiguous scale tensor per weight, of the arithmetic dtype: one element, or one per row."""
    dtype, device = dtype or acc_dtype(w[0].dtype), w[0].device
    _one_for_each(name, value, w, "entry per weight")
    return [_scale(_entry(name, i, w), s, t, dtype, device) for i, (s, t) in enumerate(zip(value, w))]


def out_scales(value, scale, w):
    """``scale`` and out_scale, [] for None, with as many elements each: where one has one per row, so has the other."""
    if value is None:
        return scale, []
    value = scales(value, w, name="out_scale")

    def spread(s, o):
        return s.reshape(()).expand(o.shape).contiguous() if s.numel() == 1 != o.numel() else s

    return [spread(s, o) for s, o in zip(scale, value)], [spread(o, s) for s, o in zip(scale, value)]


def decode_scales(value, codes, out_dtype):
    """(scales, dtype of the weights): arithmetic is float64 where the first scale or ``out_dtype`` is, else float32."""
    first = value[0] if isinstance(value, (list, tuple)) and value else None
    double = torch.float64 in (out_dtype, getattr(first, "dtype", None))
    acc = torch.float64 if double else torch.float32
    return scales(value, codes, acc), dtype_of(out_dtype or acc, None)


def _scale(name, s, t, dtype, device):
    if not isinstance(s, torch.Tensor):
        if isinstance(s, bool) or not isinstance(s, (int, float)):
            raise TypeError(f"{name}: expected a number or a tensor, got {_kind(s)}")
        if not 0 <= s <= torch.finfo(dtype).max:
            raise ValueError(f"{name}: expected a finite value >= 0 of {dtype}, got {s}")
        return torch.full((), s, dtype=dtype, device=device)
    if s.dtype not in FLOATS:
        raise TypeError(f"{name}: expected one of {_names(FLOATS)}, got {s.dtype}")
    if s.device != device:
        raise ValueError(f"{name}: expected device {device}, where the weights are, got {s.device}")
    rows = t.shape[0] if len(t.shape) else 1
    if s.numel() != 1 and (s.numel() != rows or s.shape[0] != rows):
        raise ValueError(f"{name}: expected one element or one per row ({rows}) of a weight of shape "
                         f"{tuple(t.shape)}, got shape {tuple(s.shape)}")
    if s.dtype != dtype:
        s = s.to(dtype)
    return s if s.is_contiguous() else s.contiguous()


def codes(value):
    """Integer codes as a list of int32 tensors."""
    value = tensors("codes", value, INTS)
    if value[0].dtype == torch.int32:
        return value
    # Clamped first: 2^32 + 3 must not become a plausible 3.
    return [c.to(torch.int32) if c.element_size() < 4 else c.clamp(-1, 1 << 16).to(torch.int32) for c in value]


def stored_bits(value, count):
    """The bit-widths to pack ``count`` tensors with, as integers: memory is laid out by them."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValueError(f"bits: expected one entry per tensor ({count}), got {len(values)}")
    for n in values:
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"bits: expected an integer, since the size of the result depends on it, got {_kind(n)}")
        if not 0 <= n <= MAX_BITS:
            raise ValueError(f"bits: expected 0..{MAX_BITS}, got {n}")
    return values


def packed(value):
    """A list of Packed of one layout. That their data fit their shapes, the ops check."""
    from quantops.packed import Packed

    if not isinstance(value, (list, tuple)) or not value:
        raise TypeError(f"packed: expected a non-empty list of Packed, got {_kind(value)}"
                        + (" of length 0" if isinstance(value, (list, tuple)) else ""))
    for i, p in enumerate(value):
        if not isinstance(p, Packed):
            raise TypeError(f"{_entry('packed', i, value)}: expected a Packed, got {_kind(p)}")
        if p.layout != value[0].layout:
            raise ValueError(f"packed: expected one layout, got {value[0].layout!r} in entry 0 and {p.layout!r} in "
                             f"entry {i}")
    choice("packed.layout", value[0].layout, LAYOUTS)
    return value


def packed_data(data, shapes, stored, layout):
    """Raises where packed tensors do not have the shapes that codes of ``shapes`` and ``stored`` bits take."""
    if len(shapes) != len(data):
        raise ValueError(f"dims: expected one entry per weight ({len(data)}), got {len(shapes)}")
    for i, (d, shape, n) in enumerate(zip(tensors("data", data, (torch.uint8,)), shapes,
                                          stored_bits(stored, len(data)))):
        expected = data_shape(math.prod(shape), n, layout)
        if min(shape, default=0) < 0 or d.shape != expected or not d.is_contiguous():
            raise ValueError(f"{_entry('data', i, data)}: expected a contiguous tensor of shape {expected} for codes "
                             f"of {n} bits and of shape {tuple(shape)} in {layout!r}, got shape {tuple(d.shape)}, "
                             f"strides {d.stride()}")


def bits_of_stored(value, stored, data):
    """Bit-widths to read, from 0 to those that are stored (None: all), as :func:`bits` has them."""
    value = stored if value is None else value
    read = bits(value, data)
    if not isinstance(value, torch.Tensor):
        for m, n in zip(_repeated(value, data), stored):
            if m > n:
                raise ValueError(f"bits: expected 0..{n}, the bits that are stored, got {m}")
    return read


# Family categorical.


def categorical_mode(mode, grad):
    """(mode, grad) as the ops take them."""
    return MODES.index(choice("mode", mode, MODES)), GRADS.index(choice("grad", grad, GRADS))


def categorical_bits(value, x, mode, grad):
    """Bit-widths: up to 16, and up to 8 where a soft sum is taken."""
    return integers("bits", value, x, 0, MAX_SOFT_BITS if "soft" in (mode, grad) else MAX_BITS)


def alpha_and_sigma(alpha, sigma, x):
    """Lists of alpha and sigma: contiguous, of the arithmetic dtype, one element or one per row, as many in both."""
    dtype, device = acc_dtype(x[0].dtype), x[0].device
    lists = []
    for name, value in (("alpha", alpha), ("sigma", sigma)):
        _one_for_each(name, value, x, "entry per tensor")
        for i, v in enumerate(value):
            if not isinstance(v, torch.Tensor) and isinstance(v, (int, float)) and not (
                    0 < v <= torch.finfo(dtype).max and (name == "sigma" or 1 / torch.finfo(dtype).max <= v)):
                raise ValueError(f"{_entry(name, i, x)}: expected a finite value > 0 of {dtype}, got {v}")
        lists.append([_scale(_entry(name, i, x), v, t, dtype, device) for i, (v, t) in enumerate(zip(value, x))])
    for i, (a, s) in enumerate(zip(*lists)):
        if a.numel() != s.numel():
            one, rows = (0, s) if a.numel() == 1 else (1, a)
            lists[one][i] = lists[one][i].reshape(1).expand(rows.numel()).contiguous()
    return lists


def gates(value, bits_value, x):
    """A list of gates, one tensor of ``bits`` values per tensor of x, of the arithmetic dtype; [] for None."""
    if value is None:
        return []
    dtype, device = acc_dtype(x[0].dtype), x[0].device
    _one_for_each("gates", value, x, "tensor per tensor of x")
    counts = [None] * len(x) if isinstance(bits_value, torch.Tensor) else _repeated(bits_value, x)
    return [_gates(_entry("gates", i, x), g, n, dtype, device) for i, (g, n) in enumerate(zip(value, counts))]


def _gates(name, g, count, dtype, device):
    if not isinstance(g, torch.Tensor) or g.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a tensor of {_names(FLOATS)}, got {_kind(g)}")
    if g.device != device:
        raise ValueError(f"{name}: expected device {device}, where x is, got {g.device}")
    if g.dim() != 1 or (count is not None and g.numel() != count):
        raise ValueError(f"{name}: expected shape ({'bits' if count is None else count},), one value per bit, got "
                         f"{tuple(g.shape)}")
    return g.to(dtype).contiguous()


def seed(value, mode, x):
    """The key of the draws as an int64 tensor on x's device; None where nothing is drawn."""
    if mode != "sample":
        return None
    if isinstance(value, bool) or not isinstance(value, (int, torch.Tensor)):
        raise (ValueError if value is None else TypeError)(
            f"seed: expected an integer or an integer tensor of one element for mode 'sample', got {_kind(value)}")
    if not isinstance(value, torch.Tensor):
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"seed: expected an integer of 64 bits, got {value}")
        return torch.full((), value, dtype=torch.int64, device=x[0].device)
    if value.dtype not in INTS:
        raise TypeError(f"seed: expected an integer or an integer tensor of one element, got {_kind(value)}")
    if value.numel() != 1 or value.device != x[0].device:
        raise ValueError(f"seed: expected one element on {x[0].device}, where x is, got shape {tuple(value.shape)} on "
                         f"{value.device}")
    return value.to(torch.int64)


def choice(name, value, allowed):
    """``value`` where it is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def full_grid(grid):
    """True for the full grid, False for the dyadic one, which is the default of round_clamp codes."""
    return grid is not None and choice("grid", grid, GRIDS) == GRIDS[1]


def tanh(companding):
    """True for companding with tanh, False for none."""
    return COMPANDINGS.index(choice("companding", companding, COMPANDINGS)) == 1


def rule_index(rule):
    """A code rule as the ops take it."""
    return RULES.index(choice("rule", rule, RULES))


def dtype_of(out_dtype, w):
    """The dtype of q: the one asked for, else what autocast asks for, else the weight's own."""
    if out_dtype is not None:
        if out_dtype not in FLOATS:
            raise TypeError(f"out_dtype: expected one of {_names(FLOATS)}, got {out_dtype}")
        return out_dtype
    device = w[0].device.type
    if w[0].dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return w[0].dtype


def gradients(grad, w):
    """``grad`` as gradients of ``w`` that may be added to in place."""
    tensors("grad", grad, (w[0].dtype,))
    for i, (g, t) in enumerate(zip(grad, w)):
        if g.shape != t.shape or g.device != t.device or g.requires_grad or len(grad) != len(w):
            raise ValueError(f"grad[{i}]: expected a tensor of shape {tuple(t.shape)} on {t.device} that does not "
                             f"require grad, one for each of {len(w)} weights, got shape {tuple(g.shape)} on "
                             f"{g.device}, requires_grad={g.requires_grad}, {len(grad)} in all")


def strength(value):
    """A factor of the penalty, as a Python number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"strength: expected a number or a tensor, got {_kind(value)}")
    if not 0 <= value < float("inf"):
        raise ValueError(f"strength: expected a finite number >= 0, got {value}")


def outputs(out, w, dtype):
    """``out`` as buffers that q may be written to."""
    tensors("out", out)
    if len(out) != len(w):
        raise ValueError(f"out: expected one tensor per weight ({len(w)}), got {len(out)}")
    for i, (o, t) in enumerate(zip(out, w)):
        name = _entry("out", i, out)
        if o.requires_grad or (torch.is_grad_enabled() and t.requires_grad):
            raise ValueError(f"{name}: results written in place carry no gradient: expected an out that does not "
                             "require grad, and a w that does not, or torch.no_grad(); got one that requires grad")
        if o.shape != t.shape or o.device != t.device:
            raise ValueError(f"{name}: expected shape {tuple(t.shape)} on {t.device}, got {tuple(o.shape)} on "
                             f"{o.device}")
        if dtype is not None and o.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {o.dtype}")
        if o.stride() != t.stride() or not dense_rows(o):
            raise ValueError(f"{name}: expected a dense tensor with w's strides {t.stride()}, got {o.stride()}")
    if not torch.compiler.is_compiling():
        _no_overlap(out, w)
    return list(out)


def _no_overlap(out, w):
    """No memory of ``out`` may be that of a weight or of another out: the launch reads and writes in no order."""
    spans = sorted((t.data_ptr(), t.data_ptr() + _reach(t), i) for i, t in enumerate([*out, *w]) if t.numel())
    last, owner = 0, -1
    for start, end, i in spans:
        if start < last and min(i, owner) < len(out):
            raise ValueError(f"{_entry('out', min(i, owner), out)}: expected memory of its own, got some that a weight "
                             "or another out has too")
        if end > last:
            last, owner = end, i


def _reach(t):
    """Bytes from the first to the last element of a tensor that has any."""
    if t.is_contiguous():
        return t.numel() * t.element_size()
    return (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))) * t.element_size()


def all_or_none_on_meta(arguments):
    """ValueError for an op's arguments, {name: value}, of which a part is on the meta device: only the fake kernel sees
    those, and what it returns has no values."""
    found = [(name, t) for name, v in arguments.items() for t in (v if isinstance(v, (list, tuple)) else [v])
             if isinstance(t, torch.Tensor)]
    for name, t in found:
        if t.is_meta != found[0][1].is_meta:
            raise ValueError(f"{name}: expected device {found[0][1].device}, where {found[0][0]} is, got {t.device}")


def structure(arguments):
    """Whether an op's arguments, {name: value}, fit each other, so that a kernel stays within them.

    The functions of ``foreach`` have checked more than this by then; the ops can also be called directly.
    """
    if "layout" in arguments:
        return packing_structure(arguments)
    if "grad_of" in arguments and "mode" not in arguments:
        return _activation_structure(arguments)
    if "alpha" in arguments:
        return _categorical_structure(arguments)
    w = tensors("codes", arguments["codes"], INTS) if "codes" in arguments else tensors("w", arguments["w"])
    for name in ("grad", "q"):
        listed = arguments.get(name)
        if listed and [t.shape for t in tensors(name, listed)] != [t.shape for t in w]:
            raise ValueError(f"{name}: expected the shapes of the weights, got {[tuple(t.shape) for t in listed]}")
        if listed and listed[0].device != w[0].device:
            raise ValueError(f"{name}: expected device {w[0].device}, got {listed[0].device}")
    if "scale" not in arguments:
        return
    first = arguments["scale"][0] if arguments["scale"] else None
    acc = first.dtype if "codes" in arguments and first is not None else acc_dtype(w[0].dtype)
    for given, fit in zip(arguments["scale"], scales(arguments["scale"], w, acc)):
        if given is not fit:
            raise ValueError(f"scale: expected contiguous {acc} tensors, got {given.dtype}, strides {given.stride()}")
    if "base_bits" in arguments:
        _truncation(arguments, w)
        return
    for name in ("bits", "k"):
        n = arguments.get(name)
        if n is not None and integers(name, n, w, 0, MAX_BITS) is not n:
            raise ValueError(f"{name}: expected int32, got {n.dtype}")
    for name, dtype, count in (("grad_penalty", acc, len(w)), ("strength", acc, 1), ("penalty", acc, len(w)),
                               ("nonzero", torch.int64, len(w)), ("sq_error", acc, len(w))):
        t = arguments.get(name)
        if t is not None and (t.dtype != dtype or t.numel() != count or t.device != w[0].device):
            raise ValueError(f"{name}: expected {count} elements of {dtype} on {w[0].device}, got {_kind(t)} on "
                             f"{t.device}")


def _truncation(arguments, w):
    """The part of :func:`structure` that the ops of family ``truncate`` have of their own."""
    scale, out_scale, bits, base, grads = (
        arguments.get(name) for name in ("scale", "out_scale", "bits", "base_bits", "grads"))
    if not 0 <= arguments["rule"] < len(RULES):
        raise ValueError(f"rule: expected 0, 1 or 2, got {arguments['rule']}")
    for given, fit in zip(out_scale, scales(out_scale, w, name="out_scale") if out_scale else []):
        if given is not fit:
            raise ValueError(f"out_scale: expected contiguous {fit.dtype} tensors, got {given.dtype}, strides "
                             f"{given.stride()}")
    if [s.numel() for s in out_scale] != [s.numel() for s in scale][: len(out_scale)]:
        raise ValueError("out_scale: expected as many elements as in scale")
    if bits.dim() != 2 or bits.shape[1] != len(w) or not 1 <= bits.shape[0] <= MAX_BITS:
        raise ValueError(f"bits: expected shape (1..{MAX_BITS} widths, {len(w)}), got {tuple(bits.shape)}")
    for name, t, count in (("bits", bits, bits.shape[0]), ("base_bits", base, 1)):
        if integers(name, t, w * count, 1, MAX_BITS) is not t:
            raise ValueError(f"{name}: expected int32, got {t.dtype}")
    if grads is None:
        return
    if len(tensors("grads", grads)) != bits.numel() or grads[0].device != w[0].device:
        raise ValueError(f"grads: expected {bits.numel()} tensors on {w[0].device}, one per width and weight, got "
                         f"{len(grads)} on {grads[0].device}")
    for i, g in enumerate(grads):
        if g.numel() and g.shape != w[i % len(w)].shape:
            raise ValueError(f"grads[{i}]: expected shape {tuple(w[i % len(w)].shape)}, got {tuple(g.shape)}")


def packing_structure(arguments):
    """:func:`structure` for the ops of family ``packing``."""
    if arguments["layout"] not in range(len(LAYOUTS)):
        raise ValueError(f"layout: expected 0..{len(LAYOUTS) - 1}, got {arguments['layout']}")
    if "codes" in arguments:
        stored_bits(arguments["bits"], len(tensors("codes", arguments["codes"], (torch.int32,))))
        return
    data, bits_read = arguments["data"], arguments["bits"]
    shapes = split_shapes(arguments["sizes"], arguments["dims"])
    packed_data(data, shapes, arguments["stored"], LAYOUTS[arguments["layout"]])
    if integers("bits", bits_read, data, 0, MAX_BITS) is not bits_read:
        raise ValueError(f"bits: expected int32, got {bits_read.dtype}")
    if "scale" in arguments:
        scale = tensors("scale", arguments["scale"], (torch.float32, torch.float64))
        if len(scale) != len(data):
            raise ValueError(f"scale: expected a list with one entry per weight ({len(data)}), got {len(scale)}")
        for i, (s, shape) in enumerate(zip(scale, shapes)):
            rows = shape[0] if len(shape) else 1
            if s.device != data[0].device or not s.is_contiguous() or s.numel() not in (1, rows):
                raise ValueError(f"{_entry('scale', i, scale)}: expected one element or one per row ({rows}), "
                                 f"contiguous, on {data[0].device}, got {_kind(s)} on {s.device}")


def _categorical_structure(arguments):
    x = tensors("x", arguments["x"])
    acc, device, seed_tensor = acc_dtype(x[0].dtype), x[0].device, arguments["seed"]
    given = [*arguments["alpha"], *arguments["sigma"]]
    fit = [v for values in alpha_and_sigma(arguments["alpha"], arguments["sigma"], x) for v in values]
    if arguments["gates"]:
        given, fit = [*given, *arguments["gates"]], [*fit, *gates(arguments["gates"], arguments["bits"], x)]
    for a, b in zip(given, fit):
        if a is not b:
            raise ValueError(f"alpha, sigma, gates: expected contiguous {acc} tensors, alpha and sigma of as many "
                             f"elements, got {_kind(a)}, strides {a.stride()}")
    if integers("bits", arguments["bits"], x, 0, MAX_BITS) is not arguments["bits"]:
        raise ValueError(f"bits: expected int32, got {arguments['bits'].dtype}")
    if seed_tensor is not None and (seed_tensor.dtype != torch.int64 or seed_tensor.numel() != 1
                                    or seed_tensor.device != device):
        raise ValueError(f"seed: expected one int64 element on {device}, got {_kind(seed_tensor)} on "
                         f"{seed_tensor.device}")
    grad = arguments.get("grad")
    if grad is not None and ([t.shape for t in tensors("grad", grad)] != [t.shape for t in x]
                             or grad[0].device != device):
        raise ValueError(f"grad: expected the shapes of x on {device}, got {[tuple(t.shape) for t in grad]} on "
                         f"{grad[0].device}")


def _activation_structure(arguments):
    """:func:`structure` for the ops of family ``activation``."""
    backward = "q" in arguments
    x, = tensors("q" if backward else "x", [arguments["q" if backward else "x"]])
    dtype, quarters = arguments["dtype"], arguments.get("quarters")
    if dtype not in FLOATS:
        raise ValueError(f"dtype: expected one of {_names(FLOATS)}, got {dtype}")
    if arguments["grad_of"] not in range(len(GRADS)):
        raise ValueError(f"grad_of: expected 0 or 1, got {arguments['grad_of']}")
    acc = acc_dtype(dtype if backward else x.dtype)
    for name, kind in (("alpha", acc), ("sigma", acc), ("bits", torch.int32)):
        t = arguments[name]
        if t.dtype != kind or t.numel() != 1 or t.device != x.device:
            raise ValueError(f"{name}: expected one element of {kind} on {x.device}, got {_kind(t)} on {t.device}")
    if not backward:
        return
    grad, = tensors("grad", [arguments["grad"]])
    if grad.shape != x.shape or grad.device != x.device:
        raise ValueError(f"grad: expected shape {tuple(x.shape)} on {x.device}, got {tuple(grad.shape)} on "
                         f"{grad.device}")
    if not dense_rows(x):
        raise ValueError(f"q: expected a dense tensor, as the forward pass gives it, got strides {x.stride()}")
    expected = data_shape(x.numel(), QUARTER_BITS, "dense")
    if (quarters.shape != expected or quarters.dtype != torch.uint8 or quarters.device != x.device
            or not quarters.is_contiguous()):
        raise ValueError(f"quarters: expected a contiguous uint8 tensor of shape {expected} on {x.device}, got "
                         f"{_kind(quarters)} on {quarters.device}")
