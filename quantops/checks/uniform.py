"""Family ``uniform``: what its ops need besides what is common to all."""

import functools

import torch

from quantops.checks.arguments import choice, dtype_of, kind, tensors
from quantops.checks.integral import INTS, bits, integers, may_keep, repeated
from quantops.checks.scaling import ready_scales, scales
from quantops.checks.written import own_memory
from quantops.layout import each_scale
from quantops.reference.uniform import GRIDS, MAX_BITS, RULES, acc_dtype


def bits_and_k(bits_value, k_value, w, grid=0):
    """Bit-widths and the number of LSBs looked at, 1 <= k < bits; k = 0: none, for weights with no bit to give."""
    if type(bits_value) is int and type(k_value) is int and may_keep(w[0].device):
        return _constant_bits_and_k(bits_value, k_value, len(w), w[0].device, grid)
    n, k = bits(bits_value, w, grid), integers("k", k_value, w, 0, MAX_BITS - 1)
    if not isinstance(bits_value, torch.Tensor) and not isinstance(k_value, torch.Tensor):
        for b, v in zip(repeated(bits_value, w), repeated(k_value, w)):
            if v >= b and v != 0:
                raise ValueError(f"k: expected 1 <= k < bits = {b} (or 0 for no LSBs), got {v}")
    return n, k


@functools.lru_cache(maxsize=1024)
def _constant_bits_and_k(bits_value, k_value, count, device, grid):
    like = [torch.empty(0, device=device)] * count
    return bits_and_k([bits_value], [k_value], like, grid)  # lists are not looked up here


def grid_index(grid, signed=True, rule="round_clamp"):
    """A grid as the ops take it; None is the dyadic one, the default of round_clamp codes."""
    index = 0 if grid is None else GRIDS.index(choice("grid", grid, GRIDS))
    choice("signed", signed, (True, False))
    _sign_grid(index, signed, RULES.index(rule))
    return index


def grid_structure(arguments):
    """The part of :func:`structure` of ops that take a grid."""
    grid, rule = arguments["grid"], arguments.get("rule", 0)
    if not 0 <= grid < len(GRIDS):
        raise ValueError(f"grid: expected 0..{len(GRIDS) - 1}, got {grid}")
    if not 0 <= rule < len(RULES):
        raise ValueError(f"rule: expected 0..{len(RULES) - 1}, got {rule}")
    _sign_grid(grid, arguments.get("signed", True), rule)


def _sign_grid(grid, signed, rule):
    """ValueError for what the sign grid does not go with; grid and rule are indices."""
    if GRIDS[grid] == "sign" and not signed:
        raise ValueError("grid: expected 'dyadic' or 'full' for unsigned values, got 'sign'")
    if GRIDS[grid] == "sign" and rule:
        raise ValueError(f"rule: expected 'round_clamp' on the sign grid, got {RULES[rule]!r}")


def rule_index(rule):
    """A code rule as the ops take it."""
    return RULES.index(choice("rule", rule, RULES))


def strength(value):
    """A factor of the penalty, as a Python number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"strength: expected a number or a tensor, got {kind(value)}")
    if not 0 <= value <= torch.finfo(torch.float32).max:
        raise ValueError(f"strength: expected a finite float32 number >= 0, got {value}")


def decode_scales(value, codes, out_dtype):
    """(scales, dtype of the weights): arithmetic is float64 where the first scale or ``out_dtype`` is, else float32."""
    first = value[0] if isinstance(value, (list, tuple)) and value else None
    double = torch.float64 in (out_dtype, getattr(first, "dtype", None))
    acc = torch.float64 if double else torch.float32
    return scales(value, codes, acc), dtype_of(out_dtype or acc, None)


def structure(arguments):
    """See quantops/checks/__init__.py."""
    if "grid" in arguments:
        grid_structure(arguments)
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
    scale = arguments["scale"] if arguments.get("scale_grad") else each_scale(arguments["scale"], w)
    ready_scales("scale", scale, w, acc)
    for name in ("bits", "k"):
        n = arguments.get(name)
        if n is not None and integers(name, n, w, 0, MAX_BITS) is not n:
            raise ValueError(f"{name}: expected int32, got {n.dtype}")
    for name, dtype, count in (
        ("grad_penalty", acc, len(w)),
        ("strength", acc, len(w)),
        ("penalty", acc, len(w)),
        ("nonzero", torch.int64, len(w)),
        ("sq_error", acc, len(w)),
    ):
        t = arguments.get(name)
        if t is not None and (t.dtype != dtype or t.numel() != count or t.device != w[0].device):
            raise ValueError(
                f"{name}: expected {count} elements of {dtype} on {w[0].device}, got {kind(t)} on {t.device}"
            )
    written = {"grad": arguments["grad"]} if "strength" in arguments else {}
    if "q" in arguments:
        written["out"] = arguments["q"]
    written |= {name: [arguments[name]] for name in ("penalty", "nonzero", "sq_error") if name in arguments}
    if written:
        read = (arguments.get(name) for name in ("bits", "k", "strength"))
        own_memory(written, [*w, *arguments["scale"], *(t for t in read if t is not None)])
