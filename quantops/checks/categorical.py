"""Family ``categorical``: modes, alpha and sigma, gates, the seed."""

import torch

from quantops.checks.arguments import FLOATS, choice, entry, kind, names, one_for_each, tensors
from quantops.checks.integral import INTS, integers, repeated
from quantops.checks.scaling import scale
from quantops.reference.categorical import GRADS, MAX_SOFT_BITS, MODES
from quantops.reference.uniform import MAX_BITS, acc_dtype


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
        one_for_each(name, value, x, "entry per tensor")
        for i, v in enumerate(value):
            if (
                not isinstance(v, torch.Tensor)
                and isinstance(v, (int, float))
                and not (0 < v <= torch.finfo(dtype).max and (name == "sigma" or 1 / torch.finfo(dtype).max <= v))
            ):
                raise ValueError(f"{entry(name, i, x)}: expected a finite value > 0 of {dtype}, got {v}")
        lists.append([scale(entry(name, i, x), v, t, dtype, device) for i, (v, t) in enumerate(zip(value, x))])
    for i, (a, s) in enumerate(zip(*lists)):
        if a.numel() != s.numel():
            one, rows = (0, s) if a.numel() == 1 else (1, a)
            lists[one][i] = lists[one][i].reshape(1).expand(rows.numel()).contiguous()
    return lists


def gates(value, bits_value, x):
    """A list of gates, one tensor of ``bits`` values per tensor of x, of the arithmetic dtype; or None."""
    if value is None:
        return None
    dtype, device = acc_dtype(x[0].dtype), x[0].device
    one_for_each("gates", value, x, "tensor per tensor of x")
    counts = [None] * len(x) if isinstance(bits_value, torch.Tensor) else repeated(bits_value, x)
    return [_gates(entry("gates", i, x), g, n, dtype, device) for i, (g, n) in enumerate(zip(value, counts))]


def _gates(name, g, count, dtype, device):
    if not isinstance(g, torch.Tensor) or g.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a tensor of {names(FLOATS)}, got {kind(g)}")
    if g.device != device:
        raise ValueError(f"{name}: expected device {device}, where x is, got {g.device}")
    if g.dim() != 1 or (count is not None and g.numel() != count):
        raise ValueError(
            f"{name}: expected shape ({'bits' if count is None else count},), one value per bit, got {tuple(g.shape)}"
        )
    return g.to(dtype).contiguous()


def seed(value, mode, x):
    """The key of the draws as an int64 tensor on x's device; None where nothing is drawn."""
    if mode != "sample":
        return None
    if isinstance(value, bool) or not isinstance(value, (int, torch.Tensor)):
        raise (ValueError if value is None else TypeError)(
            f"seed: expected an integer or an integer tensor of one element for mode 'sample', got {kind(value)}"
        )
    if not isinstance(value, torch.Tensor):
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"seed: expected an integer of 64 bits, got {value}")
        return torch.full((), value, dtype=torch.int64, device=x[0].device)
    if value.dtype not in INTS:
        raise TypeError(f"seed: expected an integer or an integer tensor of one element, got {kind(value)}")
    if value.numel() != 1 or value.device != x[0].device:
        raise ValueError(
            f"seed: expected one element on {x[0].device}, where x is, got shape {tuple(value.shape)} on {value.device}"
        )
    return value.to(torch.int64)


def structure(arguments):
    """See quantops/checks/__init__.py."""
    x = tensors("x", arguments["x"])
    acc, device, seed_tensor = acc_dtype(x[0].dtype), x[0].device, arguments["seed"]
    given = [*arguments["alpha"], *arguments["sigma"]]
    fit = [v for values in alpha_and_sigma(arguments["alpha"], arguments["sigma"], x) for v in values]
    if arguments["gates"]:
        given, fit = [*given, *arguments["gates"]], [*fit, *gates(arguments["gates"], arguments["bits"], x)]
    for a, b in zip(given, fit):
        if a is not b:
            raise ValueError(
                f"alpha, sigma, gates: expected contiguous {acc} tensors, alpha and sigma of as many "
                f"elements, got {kind(a)}, strides {a.stride()}"
            )
    if integers("bits", arguments["bits"], x, 0, MAX_BITS) is not arguments["bits"]:
        raise ValueError(f"bits: expected int32, got {arguments['bits'].dtype}")
    if seed_tensor is not None and (
        seed_tensor.dtype != torch.int64 or seed_tensor.numel() != 1 or seed_tensor.device != device
    ):
        raise ValueError(
            f"seed: expected one int64 element on {device}, got {kind(seed_tensor)} on {seed_tensor.device}"
        )
    grad = arguments.get("grad")
    if grad is not None and (
        [t.shape for t in tensors("grad", grad)] != [t.shape for t in x] or grad[0].device != device
    ):
        raise ValueError(
            f"grad: expected the shapes of x on {device}, got {[tuple(t.shape) for t in grad]} on {grad[0].device}"
        )
