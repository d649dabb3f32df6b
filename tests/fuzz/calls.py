"""Random calls of the registered ops, as JSON: {"op": name, "args": {argument: node}}.

A node is a number, a boolean, None, a list of nodes, {"dtype": name}, or a tensor: {"shape", "dtype", "values", "seed",
"layout"} or {"data", "shape", "dtype"}. What an argument may be is told by its name, which means the same in every
schema (see quantops/library.py), so that new ops are fuzzed without a word here.
"""

import functools
import math
import random

import torch

from quantops.library import OPS, ops
from quantops.reference.activation import FRONTS
from quantops.reference.packing import LAYOUTS, data_shape
from quantops.reference.uniform import GRIDS, most_bits

FAMILIES = {name: family for family, schemas in OPS.items() for name in schemas}
FLOATS = ("float32", "float32", "bfloat16", "float16", "float64")
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38, 1.0, -1.0, 0.5, -0.5, 1 / 3, math.inf, -math.inf, math.nan]
STRIDES = ("contiguous", "contiguous", "transposed", "last dims first", "every second", "expanded", "shifted")


# Tensors.


def build(node):
    """What a node stands for."""
    if isinstance(node, list):
        return [build(n) for n in node]
    if not isinstance(node, dict):
        return node
    if set(node) == {"dtype"}:
        return getattr(torch, node["dtype"])
    if "data" in node:
        return torch.tensor(node["data"], dtype=getattr(torch, node["dtype"])).reshape(node["shape"])
    return _laid_out(node["shape"], node["layout"], lambda shape: _values(node, shape))


def _values(node, shape):
    generator = torch.Generator().manual_seed(node["seed"])
    dtype, kind, n = getattr(torch, node["dtype"]), node["values"], math.prod(shape)
    if not dtype.is_floating_point:
        low, high = kind
        return torch.randint(low, high + 1, shape, generator=generator).to(dtype)
    base = torch.randn(n, generator=generator, dtype=torch.float64)
    if kind == "edges":  # on the edges of bins
        base = torch.randint(-512, 513, (n,), generator=generator) / 512.0
    elif kind == "special":
        choice = torch.randint(0, len(SPECIAL), (n,), generator=generator)
        odd = torch.tensor(SPECIAL, dtype=torch.float64)[choice]
        base = torch.where(torch.rand(n, generator=generator) < 0.3, odd, base)
    elif kind == "zeros":
        base = torch.zeros(n, dtype=torch.float64)
    elif kind == "positive":
        base = base.abs() + 0.01
    elif isinstance(kind, (int, float)):
        base = base * kind
    return base.to(dtype).reshape(shape)


def _laid_out(shape, layout, values):
    """A tensor of this shape whose memory lies in some way."""
    if layout == "transposed" and len(shape) > 1:
        return values(shape[::-1]).permute(*reversed(range(len(shape))))
    if layout == "last dims first" and len(shape) > 2:  # as channels_last
        return values([shape[0], *shape[2:], shape[1]]).movedim(-1, 1)
    if layout == "every second" and shape:
        return values([*shape[:-1], 2 * shape[-1]])[..., ::2]
    if layout == "expanded" and shape and shape[0] > 1:
        return values([1, *shape[1:]]).expand(shape)
    if layout == "shifted":  # dense, and not aligned
        flat = values([math.prod(shape) + 3])[3:]
        return flat.reshape(shape)
    return values(shape)


def tensor(rng, shape, dtype, values, layout="contiguous"):
    """A node of a tensor."""
    return {"shape": list(shape), "dtype": dtype, "values": values, "seed": rng.randrange(2**31), "layout": layout}


def exact(data, dtype, shape=None):
    """A node of a tensor of these numbers."""
    return {"data": data, "dtype": dtype, "shape": [len(data)] if shape is None else list(shape)}


def _shape(rng):
    kind = rng.random()
    if kind < 0.06:
        return []
    if kind < 0.12:
        return rng.choice([[0], [3, 0], [0, 4]])
    if kind < 0.2:
        return [rng.randrange(1, 4), rng.randrange(30000, 70000)]  # rows longer than a chunk
    if kind < 0.4:
        return [rng.randrange(1, 3000)]
    return [rng.randrange(1, 20) for _ in range(rng.randrange(1, 5))]


# Calls.


class _Call:
    """The choices of one call that fits, of which each argument is a part."""

    def __init__(self, rng, op):
        self.rng, self.op = rng, op
        names = [a.name for a in getattr(ops, op).default._schema.arguments]
        self.single = FAMILIES[op] in ("categorical_activation", "activation")
        count = 1 if self.single else rng.choice([1, 1, 2, 3, 7])
        self.shapes = [_shape(rng) for _ in range(count)]
        if "per_row" in names:
            self.per_row = rng.random() < 0.5
            self.shapes = [s or [1] for s in self.shapes] if self.per_row else self.shapes
        self.dtype = rng.choice(FLOATS)
        self.acc = "float64" if self.dtype == "float64" else "float32"
        self.soft = "mode" in names or FAMILIES[op] == "categorical_activation"
        self.rule, self.grid = rng.randrange(3), rng.randrange(len(GRIDS)) if "grid" in names else 0
        self.sign = GRIDS[self.grid] == "sign"
        self.rule, self.signed = 0 if self.sign else self.rule, self.sign or rng.random() < 0.5
        self.front, self.keep, self.learn = rng.choice(
            [  # as quantops/checks/activation.py lets them stand together
                (front, keep, learn)
                for front in range(len(FRONTS))
                for keep, learns in enumerate(((0, 1, 2), (0, 1), (0, 2)))
                for learn in learns
                if front < 2 or keep == 0
            ]
        )
        self.offset = rng.random() < 0.3 and self.front != 1
        self.signed = self.signed and not (self.front == 1 and "front" in names)
        most = 8 if self.soft else most_bits(GRIDS[self.grid])
        least = 1 if "base_bits" in names else 0
        self.bits = [rng.randrange(least, most + 1) for _ in range(count)]
        self.widths = rng.randrange(1, 4)
        self.rows = [bool(s) and rng.random() < 0.3 for s in self.shapes]
        self.writes = "q" in names and op.endswith("_out")
        dense = self.writes or op in ("add_lsb_grad_",) or self.single
        self.layouts = ["contiguous" if dense else rng.choice(STRIDES) for _ in self.shapes]
        self.out = rng.choice(FLOATS)
        self.kinds = [rng.choice(["normal", "normal", "edges", "special", "zeros", 1e-6, 1e6]) for _ in self.shapes]
        self.step = math.exp(rng.uniform(-4, 1))  # alpha of the categorical family
        self.layout = rng.randrange(2)
        self.mode = rng.randrange(3)
        self.read = [rng.randrange(0, max(n - self.sign, 0) + 1) for n in self.bits]

    @staticmethod
    def absent(kind):
        """A list of the type ``kind`` that is not there."""
        return None if kind.startswith("Optional") else []

    def argument(self, name, kind):
        """The node of an argument, by its name; NotImplementedError for names that no schema here has had."""
        rng, many, acc = self.rng, range(len(self.shapes)), self.acc
        each = lambda values, dtype=None, layouts=self.layouts: [  # noqa: E731
            tensor(rng, self.shapes[i], dtype or self.dtype, values(i), layouts[i]) for i in many
        ]
        spread = lambda values: [  # noqa: E731
            tensor(rng, [self.shapes[i][0]] if self.rows[i] else [], acc, values) for i in many
        ]
        if kind == "bool":
            chosen = {"covered": False, "per_row": getattr(self, "per_row", False), "signed": self.signed}
            return chosen.get(name, rng.random() < 0.5)
        if name == "kept":
            n = math.prod(self.shapes[0])
            return tensor(rng, [0 if self.keep == 0 else -(-n // 8) if self.keep == 1 else n], "uint8", [0, 255])
        if self.op == "activation_backward" and name in ("x", "q"):
            there = self.keep == 0 if name == "x" else self.keep == 1 and self.learn
            return tensor(rng, self.shapes[0], self.out, self.kinds[0]) if there else None
        if name in ("scale", "offset") and FAMILIES[self.op] == "activation":
            s = self.shapes[0]
            n = s[1] if len(s) > 1 and self.rows[0] else 1
            if self.op == "activation_backward":
                acc = "float64" if self.out == "float64" else "float32"
            return None if name == "offset" and not self.offset else tensor(rng, [n], acc, "positive")
        if name in ("w", "x"):
            made = each(lambda i: self.kinds[i])
            return made[0] if self.single else made
        if name in ("grad", "q") and not self.single:
            if self.writes or name == "q":
                return each(lambda i: "zeros", self.out)
            dtype = self.dtype if self.op == "add_lsb_grad_" else self.out
            return each(lambda i: "normal", dtype)
        if name in ("grad", "q"):
            return tensor(rng, self.shapes[0], self.out, "normal" if name == "grad" else "positive")
        if name == "grads":
            return [
                tensor(rng, self.shapes[i] if rng.random() < 0.8 else [0], self.dtype, "normal")
                for _ in range(self.widths)
                for i in many
            ]
        if name == "codes":
            return [
                tensor(rng, s, "int32", [0, 2**n - 1], layout)
                for s, n, layout in zip(self.shapes, self.bits, self.layouts)
            ]
        if name in ("scale", "out_scale") and not self.single:
            return self.absent(kind) if name == "out_scale" and rng.random() < 0.5 else spread("positive")
        if name == "grad_scale":
            return spread("normal")
        if name in ("alpha", "sigma", "scale"):
            step = self.step * (1 if name != "sigma" else math.exp(rng.uniform(-3, 3)))
            if self.op == "categorical_activation_backward":
                acc = "float64" if self.out == "float64" else "float32"
            made = [exact([step] * (s[0] if r else 1), acc) for s, r in zip(self.shapes, self.rows)]
            return exact([step], acc) if self.single else made
        if name == "bits" and kind.startswith("List"):
            return self.bits
        if name == "bits" and "base_bits" in self.names:
            return exact(
                [rng.randrange(1, n + 1) for _ in range(self.widths) for n in self.bits],
                "int32",
                [self.widths, len(self.bits)],
            )
        if name == "bits" and "stored" in self.names:
            return exact(self.read, "int32")
        if name in ("bits", "base_bits"):
            return exact(self.bits, "int32")
        if name == "stored":
            return self.bits
        if name == "k":
            return exact([rng.randrange(1, n) if n > 1 else 0 for n in self.bits], "int32")
        if name == "gates":
            return (
                self.absent(kind)
                if rng.random() < 0.5
                else [exact([rng.choice([0.0, 1.0, rng.random()]) for _ in range(n)], acc) for n in self.bits]
            )
        if name == "seed":
            return exact([rng.randrange(2**40)], "int64", [])
        if name in ("penalty", "sq_error", "grad_penalty", "strength", "nonzero"):
            n = 1 if name == "strength" else len(self.shapes)
            return exact([0] * n, "int64") if name == "nonzero" else exact([rng.random() for _ in range(n)], acc)
        if name == "data":
            return [
                tensor(rng, data_shape(math.prod(s), n, LAYOUTS[self.layout]), "uint8", [0, 255])
                for s, n in zip(self.shapes, self.bits)
            ]
        if name == "quarters":
            return tensor(rng, data_shape(math.prod(self.shapes[0]), 2, "dense"), "uint8", [0, 255])
        if name == "sizes":
            return [size for s in self.shapes for size in s]
        if name == "dims":
            return [len(s) for s in self.shapes]
        if name == "layout":
            return self.layout
        if name in ("rule", "mode", "grid", "front", "keep", "learn"):
            return getattr(self, name)
        if name == "grad_of":
            return rng.randrange(2)
        if name == "dtype":
            return {"dtype": self.out}
        raise NotImplementedError(f"{self.op}: no values are known for the argument {name} of type {kind}")

    def make(self):
        """The call."""
        schema = getattr(ops, self.op).default._schema
        self.names = [a.name for a in schema.arguments]
        args = {a.name: self.argument(a.name, str(a.type)) for a in schema.arguments}
        if args.get("grad_penalty") and (not args["signed"] or self.rng.random() < 0.3):
            args["grad_penalty"] = None  # LSBs are those of signed codes
        return {"op": self.op, "args": args}


def fitting(rng, op=None):
    """A call whose arguments fit, of any op."""
    return _Call(rng, op or rng.choice(sorted(FAMILIES.keys() - untried().keys()))).make()


@functools.cache
def untried():
    """{op: why} of those whose arguments are not known here."""
    found = {}
    for op in FAMILIES:
        try:
            _Call(random.Random(0), op).make()
        except NotImplementedError as why:
            found[op] = str(why)
    return found
