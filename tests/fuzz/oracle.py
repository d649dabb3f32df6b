"""Every op on random lists equals its default kernel, the reference; codes, q and packed bits equal numpy's too.

Integers, q, codes and packed bits are equal bit for bit; sums and soft results within bounds.
"""

import numpy as np
import torch
from calls import FAMILIES, build, fitting, untried  # noqa: F401  untried: for the runner

from cases import same
from quantops import default
from quantops.library import ops
from quantops.reference.packing import LAYOUTS
from quantops.reference.uniform import GRIDS

torch.set_num_threads(1)
EXACT = (  # of msq the first result
    "absmax",
    "round_clamp",
    "round_clamp_out",
    "lsb",
    "encode",
    "decode",
    "truncate",
    "pack",
    "unpack",
    "decode_packed",
)


def make(rng):
    """A call that fits, of any op."""
    return fitting(rng)


def check(case):
    """Compares its results, and what it has written."""
    name, nodes = case["op"], case["args"]
    got, want = ({a: build(n) for a, n in nodes.items()} for _ in range(2))
    outputs = [a.name for a in getattr(ops, name).default._schema.arguments if a.alias_info and a.alias_info.is_write]
    default_kernel = getattr(getattr(default, FAMILIES[name]), name)
    with torch.no_grad():
        try:
            expected = default_kernel(*want.values())
        except ValueError:
            expected = ValueError
        try:
            found = getattr(ops, name)(*got.values())
        except (ValueError, RuntimeError) as error:
            assert expected is ValueError or "expected" in str(error), f"{name}: {error}"
            return 0
    if expected is ValueError:
        return 0  # values out of range, which each kernel refuses in its own order
    if outputs:
        expected, found = ([a[o] for o in outputs] for a in (want, got))
    for i, (a, b) in enumerate(zip(_parts(found), _parts(expected))):
        for j, (x, y) in enumerate(zip(a, b)):
            _compare(name, i, x, y, got, f"{name}, result {i}, entry {j}")
    return sum(t.numel() for part in _parts(found) for t in part) + _numpy(name, got, found)


def _parts(result):
    """The results, each as a list of tensors."""
    result = (
        [result]
        if isinstance(result, torch.Tensor)
        or (result and isinstance(result[0], torch.Tensor) and isinstance(result, list))
        else list(result)
    )
    return [[r] if isinstance(r, torch.Tensor) else list(r) for r in result]


def _compare(name, part, got, want, args, what):
    kinds = [(t.dtype, tuple(t.shape)) for t in (got, want)]
    assert kinds[0] == kinds[1], f"{what}: {kinds[0]}, the reference gives {kinds[1]}"
    sampled = name.startswith("categorical") and (name != "categorical" or args["gates"] or args["mode"] != 0)
    if (
        not got.dtype.is_floating_point
        or name in EXACT
        or (name in ("msq", "msq_out", "activation") and part == 0)
        or (name == "categorical" and not sampled)
    ):
        if got.dtype == torch.uint8 and name == "categorical_activation":
            return  # quarters at the edges of cells are told by the sums of the backward pass
        assert same(got, want), f"{what}: {_differing(got, want)}"
        return
    if name == "categorical" and args["mode"] != 1:  # with gates classes may be as likely, and draws lie at an edge
        differing = int(((got != want) & ~(got.isnan() & want.isnan())).sum())
        assert differing <= 2 + got.numel() // 500, f"{what}: {differing} of {got.numel()} differ"
        return
    if not bool(torch.isfinite(want).all()) or not bool(torch.isfinite(got).all()):
        return  # a sum that overflows does so in its own order
    spread = max(
        (
            float(t.abs().max())
            for t in _tensors(args)
            if t.numel() and t.is_floating_point() and bool(torch.isfinite(t).all())
        ),
        default=1.0,
    )
    single = any(t.dtype not in (torch.float64, got.dtype) for t in _tensors(args) if t.is_floating_point())
    double = got.dtype == torch.float64 and not single  # in which arithmetic is, too
    coarse = 1e-7 if double else {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(got.dtype, 2e-4)
    worst = float((got.double() - want.double()).abs().max()) if got.numel() else 0.0
    limit = coarse * (float(want.abs().max()) + spread) if got.numel() else 0.0
    if name.endswith("_backward") and part and not double:  # sums of many terms, up to a level each, that cancel
        most = max(t.numel() for t in _tensors(args))
        limit += 1e-7 * most * spread * 2.0 ** int(args["bits"].max() if "bits" in args else 0)
    if name in ("msq", "msq_out", "lsb_stats", "absmean"):  # sums of what is not negative
        limit = (1e-5 if got.dtype == torch.float32 else 1e-11) * float(want.abs().max()) if got.numel() else 0.0
    assert worst <= limit, f"{what}: differs by {worst}, allowed are {limit}"


def _tensors(args):
    return [t for v in args.values() for t in (v if isinstance(v, list) else [v]) if isinstance(t, torch.Tensor)]


def _differing(got, want):
    wrong = ((got != want) & ~((got != got) & (want != want))).reshape(-1).nonzero().reshape(-1)
    return [(int(i), got.reshape(-1)[i].item(), want.reshape(-1)[i].item()) for i in wrong[:4]]


# A second oracle, which shares nothing with quantops: numpy, each operation rounded on its own.


def _numpy(name, args, found):
    """How many values numpy confirms, of the ops that it knows."""
    if name == "encode" and GRIDS[args["grid"]] != "sign":
        return sum(
            _same_codes(w, s, int(n), args["rule"], args["signed"], c)
            for w, s, n, c in zip(args["w"], args["scale"], args["bits"], found)
        )
    if name == "pack" and args["layout"] == LAYOUTS.index("planes"):
        return sum(_same_planes(c, n, d) for c, n, d in zip(args["codes"], args["bits"], found))
    return 0


def _same_codes(w, scale, n, rule, signed, codes):
    acc = np.float64 if w.dtype == torch.float64 else np.float32
    x = w.to(torch.float64 if acc is np.float64 else torch.float32).numpy()
    s = scale.numpy().reshape(()) if scale.numel() == 1 else scale.numpy().reshape(-1, *[1] * (w.dim() - 1))
    top = acc(2**n - 1)
    with np.errstate(all="ignore"):
        if not np.isfinite(acc(1) / s).all():
            return 0
        u = np.clip((x * (acc(0.5) / s) + acc(0.5)) if signed else x * (acc(1) / s), acc(0), acc(1))
        c = [
            lambda: np.minimum(np.rint(acc(2**n) * u), top),
            lambda: np.minimum(np.floor(acc(2**n) * u), top),
            lambda: np.rint(top * u),
        ][rule]()
    want = np.where(np.isnan(x), 0, c).astype(np.int32)
    wrong = (codes.numpy() != want).sum()
    assert not wrong, f"encode, numpy: {wrong} of {want.size} codes of {n} bits differ, rule {rule}"
    return want.size


def _same_planes(codes, n, data):
    bits = codes.numpy().reshape(-1).astype(np.uint32)
    for j in range(n):
        plane = np.packbits(((bits >> (n - 1 - j)) & 1).astype(np.uint8), bitorder="little")
        assert (data[j].numpy()[: plane.size] == plane).all() and not data[j].numpy()[plane.size :].any(), "pack, numpy"
    return bits.size * (n > 0)
