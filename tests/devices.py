"""The same calls on a device and on the CPU: ``python tests/devices.py cuda FAMILY DTYPE...`` compares their results.

A process of its own for each backend, since a backend is chosen at import.
"""

import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import quantops as Q
from bench.state import WRONG
from cases import same, scales, weights
from quantops.reference.activation import KEEPS, LEARNS
from quantops.reference.uniform import GRIDS, RULES, code_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EXACT, SUMS = "exact", "sums"
FITTING = (  # what an activation keeps, and what of it is learned
    ("input", None),
    ("input", "clip"),
    ("input", "step"),
    ("bits", None),
    ("bits", "clip"),
    ("residual", None),
    ("residual", "step"),
)


def _arguments(dtype, per_row, device):
    w = weights(dtype, special=False)
    s = scales(w, per_row)
    generator = torch.Generator().manual_seed(5)
    n = torch.randint(0, 17, (len(w),), generator=generator, dtype=torch.int32)
    k = torch.where(n > 1, n // 2, 0).to(torch.int32)
    g = [torch.randn(t.shape, generator=generator).to(dtype) for t in w]
    r = torch.randn(len(w), generator=generator).to(s[0].dtype)
    lists = [[t.to(device) for t in v] for v in (w, s, g)]
    return *lists, n.to(device), k.to(device), r.to(device)


def results(device, family, dtype):
    """{(kind, name): list of tensors on CPU} of the ops of a family."""
    out = {}
    for per_row, grid in itertools.product((False, True), GRIDS):
        w, s, g, n, k, r = _arguments(dtype, per_row, device)
        key = f"{dtype} per_row={per_row} {grid}"
        if family in OF_GRIDS:
            n, k = (n.clamp(max=15), k.clamp(max=14)) if grid == "sign" else (n, k)
            for kind, found in OF_GRIDS[family](w, s, g, n, k, r, grid).items():
                out.update({(kind, f"{name} {key}"): [t.detach().cpu() for t in v] for name, v in found.items()})
        elif grid == "full" and not (per_row and family in ONCE):
            out.update(OTHERS[family](w, s, g, n, k, r, key))
    return out


def _msq(w, s, g, n, k, r, grid):
    """What a step of MSQ calls, and all that a first look at a machine takes."""
    q, penalty, nonzero, sq_error = Q.foreach.msq(w, s, n, k, grid=grid)
    grad_w, _ = torch.ops.quantops.uniform_backward(g, r, w, s, n, k, GRIDS.index(grid), True, False)
    return {
        EXACT: {"absmax": Q.foreach.absmax(w), "q": q, "nonzero": [nonzero], "grad_w": grad_w},
        SUMS: {"penalty": [penalty], "sq_error": [sq_error]},
    }


def _uniform(w, s, g, n, k, r, grid):
    back = torch.ops.quantops.uniform_backward(g, r, w, s, n, k, GRIDS.index(grid), True, True)
    codes = Q.foreach.encode(w, s, n, grid=grid)
    nonzero = Q.foreach.lsb_stats(w, s, n, k, grid=grid)[1]
    return {
        EXACT: {
            "B": Q.foreach.lsb(w, s, n, k, grid=grid),
            "nonzero": [nonzero],
            "unsigned": Q.foreach.round_clamp(w, s, n, signed=False, grid="full" if grid == "sign" else grid),
            "grad_w": back[0],
            "narrow": Q.foreach.round_clamp(w, s, n, grid=grid, out_dtype=torch.bfloat16),
            "decoded": Q.foreach.decode(codes, s, n, grid=grid, out_dtype=w[0].dtype),
            "added": Q.foreach.add_lsb_grad_([t.clone() for t in g], w, s, n, k, 0.25, grid=grid),
            **{rule: Q.foreach.encode(w, s, n, rule=rule) for rule in RULES},
        },
        SUMS: {"grad_s": back[1], "absmean": Q.foreach.absmean(w)},
    }


def _packing(w, s, g, n, k, r, grid):
    codes, found = Q.foreach.encode(w, s, n, grid=grid), {}
    for layout in ("planes", "dense"):
        packed = Q.foreach.pack(codes, [code_bits(v, grid) for v in n.tolist()], layout=layout)
        found[f"packed {layout}"] = [p.data for p in packed]
        found[f"unpacked {layout}"] = Q.foreach.unpack(packed, n - k)
        found[f"decoded {layout}"] = Q.foreach.decode(packed, s, n - k, grid=grid, out_dtype=w[0].dtype)
    return {EXACT: found}


def _truncate(w, s, g, n, k, r, key):
    """The same of family ``truncate``; tanh has the same bits everywhere too."""
    device, out = w[0].device, {}
    bits = torch.tensor([[8], [4], [1]], dtype=torch.int32, device=device).repeat(1, len(w))
    base = torch.tensor([8, 11, 16] * len(w), dtype=torch.int32, device=device)[: len(w)]
    grads = [*g, *(t.new_empty(0) for t in g), *g]
    for (rule, name), tanh in itertools.product(enumerate(RULES), (False, True)):
        q = Q.foreach.truncate(w, s, bits, base_bits=base, rule=name, companding="tanh" if tanh else None)
        grad_w, *sums = torch.ops.quantops.truncate_backward(grads, w, s, s, bits, base, rule, tanh, False, True)
        for kind, what, tensors in (
            (EXACT, "truncated", [t for v in q for t in v]),
            (EXACT, "truncate_grad_w", grad_w),
            (SUMS, "truncate_grad_s", [t for v in sums for t in v]),
        ):
            out[kind, f"{what} {name} tanh={tanh} {key}"] = [t.cpu() for t in tensors]
    return out


def _categorical_arguments(s, n):
    """alpha, sigma, and the bits of the soft sum, which has at most 8."""
    alpha = [(t.abs() + 0.05).clamp(max=1.0) for t in s]
    return alpha, [a * 0.3 for a in alpha], n.clamp(max=8)


def _gates(x, s, n):
    """Gates, and those of the soft sum."""
    gates = [torch.linspace(1, 0.6, int(b)).to(x[0].device, s[0].dtype) for b in n]
    return gates, [z[:8] for z in gates]


def _categorical(x, s, g, n, k, r, key):
    """The same of family ``categorical``. Hard classes have the same bits everywhere; a draw within the rounding of exp
    and log from an edge may be the neighbour, so that draws are compared as sums are, in the mean."""
    out, (alpha, sigma, soft_n) = {}, _categorical_arguments(s, n)
    for signed, gated in itertools.product((True, False), (False, True)):
        what = f"signed={signed} gates={gated} {key}"
        gates, soft_gates = _gates(x, s, n) if gated else (None, None)
        hard = Q.foreach.categorical(x, alpha, sigma, n, gates=gates, signed=signed)
        soft = Q.foreach.categorical(x, alpha, sigma, soft_n, gates=soft_gates, signed=signed, mode="soft")
        sample = Q.foreach.categorical(x, alpha, sigma, soft_n, gates=soft_gates, signed=signed, mode="sample", seed=5)
        out[EXACT, f"hard {what}"] = [t.cpu() for t in hard]
        out[SUMS, f"soft {what}"] = [(t if t.element_size() == 2 else t.float()).cpu() for t in soft]
        out[SUMS, f"sample {what}"] = [t.double().mean().float().cpu() for t in sample if t.numel()]
    return out


def _categorical_backward(x, s, g, n, k, r, key):
    """The same of its gradients."""
    out, (alpha, sigma, soft_n) = {}, _categorical_arguments(s, n)
    for signed, gated in itertools.product((True, False), (False, True)):
        what = f"signed={signed} gates={gated} {key}"
        gates, soft_gates = _gates(x, s, n) if gated else (None, None)
        for of, bits, z in (("winner", n, gates), ("soft", soft_n, soft_gates)):
            leaves = [[t.detach().requires_grad_() for t in v] for v in (x, alpha, sigma, *([z] if z else []))]
            q = Q.foreach.categorical(*leaves[:3], bits, gates=leaves[3] if z else None, signed=signed, grad=of)
            flat = [t for v in leaves for t in v]
            grads = torch.autograd.grad(q, flat, g, allow_unused=True)
            if x[0].dtype in (torch.float32, torch.float64):  # a last bit of float32 is more in 16 bits
                out[SUMS, f"{of} grad_x {what}"] = [v.float().cpu() for v in grads[: len(x)]]
            # In units of what they are sums of.
            size = [1 + h.double().abs().sum() for h in g] * (len(leaves) - 1)
            out[SUMS, f"{of} sums {what}"] = [(v.double() / s).float().cpu() for v, s in zip(grads[len(x) :], size)]
    return out


def _categorical_activation(x, s, g, n, k, r, key):
    """The same of family ``categorical_activation``: all that is kept is exact; x is near no edge by chance."""
    device, out = x[0].device, {}
    acc = torch.float64 if x[0].dtype == torch.float64 else torch.float32
    for bits, grad_of in itertools.product((1, 4, 8), (0, 1)):
        widths = [torch.tensor([v], dtype=acc, device=device) for v in (0.37, 0.2)]
        args = *widths, torch.tensor([bits], dtype=torch.int32, device=device), grad_of
        kept = [torch.ops.quantops.categorical_activation(t, *args, t.dtype) for t in x]
        back = [
            torch.ops.quantops.categorical_activation_backward(h, *k, *args, True, t.dtype)
            for t, h, k in zip(x, g, kept)
        ]
        what = f"{bits} {grad_of} {key}"
        out[EXACT, f"categorical_activation {what}"] = [t.cpu() for k in kept for t in k]
        if acc == x[0].dtype:  # a last bit of float32 is more in 16 bits
            out[SUMS, f"categorical_activation grad_x {what}"] = [t.float().cpu() for t, _ in back]
        size = [1 + h.double().abs().sum() for h in g]
        out[SUMS, f"categorical_activation sums {what}"] = [
            (v.double() / s).float().cpu() for (_, sums), s in zip(back, size) for v in sums
        ]
    return out


def _activation(x, s, g, n, k, r, key):
    """The same of family ``activation``: of every fitting way to keep and to learn one, and of every rule."""
    device, out = x[0].device, {}
    acc = torch.float64 if x[0].dtype == torch.float64 else torch.float32
    scale, offset = (torch.tensor([v], dtype=acc, device=device) for v in (1.3, 0.2))
    for i, (keep, learn) in enumerate(FITTING):
        front = 2 + i if keep == "input" else 0  # GELU, by tanh, SiLU
        settings = i % len(RULES), i % 2 == 0, front, KEEPS.index(keep), LEARNS.index(learn)
        args = scale, offset if i % 3 == 1 else None, torch.tensor([1 + i % 4], dtype=torch.int32, device=device)
        for j, (t, h) in enumerate(zip(x, g)):
            q, kept = torch.ops.quantops.activation(t, *args, *settings, t.dtype)
            h, t = (torch.empty_like(q).copy_(v) for v in (h, t))
            given = t if keep == "input" else None, q if keep == "bits" and learn else None, kept
            grad_x, sums = torch.ops.quantops.activation_backward(h, *given, *args, *settings, t.dtype)
            what, size = f"{j} {keep} {learn} {key}", 1 + h.double().abs().sum()
            out[EXACT, f"activation {what}"] = [v.cpu() for v in (q, kept, grad_x)]
            out[SUMS, f"activation sums {what}"] = [(v.double() / size).float().cpu() for v in sums]
    return out


def _own_scale(w, s, g, n, k, r, key):
    """The same of family ``own_scale``."""
    ops, out = torch.ops.quantops, {}
    for per_row, mean in itertools.product((False, True), (False, True)):
        some = [t for t in w if t.dim() or not per_row]
        scale = ops.own_scale(some, per_row, mean)
        parts = list(scale.split([t.shape[0] if per_row else 1 for t in some]))
        back = ops.own_scale_backward(some, parts, [torch.full_like(v, 0.5) for v in parts], mean)
        out[SUMS if mean else EXACT, f"own_scale {per_row} {mean} {key}"] = [scale.cpu()]
        out[EXACT, f"own_scale grad_w {per_row} {mean} {key}"] = [t.cpu() for t in back]
    return out


OF_GRIDS = {"msq": _msq, "uniform": _uniform, "packing": _packing}
OTHERS = {
    "truncate": _truncate,
    "categorical": _categorical,
    "categorical_backward": _categorical_backward,
    "categorical_activation": _categorical_activation,
    "activation": _activation,
    "own_scale": _own_scale,
}
ONCE = ("categorical_activation", "activation", "own_scale")  # whatever the scales of rows are
FAMILIES = (*OF_GRIDS, *OTHERS)


def compare(got, want):
    """Asserts equality: bit for bit, or for sums to the rounding of their dtype, which in 16 bits is a last place."""
    assert got.keys() == want.keys()
    for (kind, name), tensors in want.items():
        for i, (a, b) in enumerate(zip(got[kind, name], tensors, strict=True)):
            if kind == EXACT:
                assert same(a, b), (name, i)
            else:
                wide, last = b.dtype == torch.float64, torch.finfo(b.dtype).eps
                rtol, atol = (1e-10, 1e-9) if wide else (max(1e-4, last), 1e-4)
                torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=name)


def main(device, family, *dtypes):
    """Exit status WRONG where a result differs from the CPU's."""
    for dtype in (getattr(torch, name) for name in dtypes):
        try:
            compare(results(device, family, dtype), results("cpu", family, dtype))
        except AssertionError as why:
            print(f"{device} differs from the CPU: {why}", file=sys.stderr)
            return WRONG
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
