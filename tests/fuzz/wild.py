"""Every op, called directly, with arguments that fit and that do not: an error, or results, and no memory error.

The kernels are those of a library with sanitizers, which end the process where one reads or writes out of bounds. A
call that fits is spoiled in up to three places.
"""

import os

import sanitized
import torch
from calls import FLOATS, STRIDES, build, fitting, tensor

from quantops.library import ops

if "QUANTOPS_FUZZ_LIBRARY" in os.environ:  # not where the runner reads this file
    sanitized.load()
    torch.set_num_threads(2)

DTYPES = (*FLOATS, "int32", "int64", "uint8", "bool", "complex64")
NUMBERS = (0, 1, -1, 2, 3, 8, 16, 17, 31, 32, 33, 63, 64, 255, 2**31 - 1, -(2**31), 2**31, 2**40, 2**63 - 1, -(2**63))
REFUSALS = (ValueError, RuntimeError, TypeError, NotImplementedError, IndexError, MemoryError, OverflowError)


def make(rng):
    """A call, spoiled or not."""
    case = fitting(rng)
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        name = rng.choice(sorted(case["args"]))
        case["args"][name] = _spoiled(rng, case["args"][name])
    return case


def _spoiled(rng, node):
    if isinstance(node, bool):
        return not node
    if isinstance(node, int):
        return rng.choice(NUMBERS)
    if node is None:
        return tensor(rng, [rng.randrange(4)], rng.choice(DTYPES[:5]), "normal")
    if isinstance(node, list):
        if not node or rng.random() < 0.2:
            return rng.choice([[], node * 2, node[:-1], [*node, *node[:1]]])
        i = rng.randrange(len(node))
        return [*node[:i], _spoiled(rng, node[i]), *node[i + 1 :]]
    if "data" in node:
        kind = rng.randrange(4)
        if kind == 0 and node["data"]:
            data = list(node["data"])
            data[rng.randrange(len(data))] = rng.choice(
                [n for n in NUMBERS if -(2**31) <= n < 2**31]
                if "int" in node["dtype"]
                else [0.0, -1.0, 1e-39, 3e38, float("nan"), float("inf")]
            )
            return {**node, "data": data}
        if kind == 1:
            return {"data": node["data"][:-1], "shape": [max(len(node["data"]) - 1, 0)], "dtype": node["dtype"]}
        if kind == 2:
            return {"data": [*node["data"], 1], "shape": [len(node["data"]) + 1], "dtype": node["dtype"]}
        return tensor(rng, node["shape"], rng.choice(FLOATS), "normal")
    if "values" in node:
        kind = rng.randrange(4)
        if kind == 0:
            shape = [*node["shape"]]
            if shape:
                shape[rng.randrange(len(shape))] = rng.choice([0, 1, 2, 3, 5, 17, 40000])
            return tensor(rng, shape if shape else [3], node["dtype"], node["values"], node["layout"])
        if kind == 1:
            dtype = rng.choice(DTYPES[:8])
            integral = dtype in DTYPES[5:]
            fits = isinstance(node["values"], list) == integral
            values = node["values"] if fits else [0, 1] if integral else "special"
            return tensor(rng, node["shape"], dtype, values, node["layout"])
        if kind == 2:
            return {**node, "layout": rng.choice(STRIDES)}
        if isinstance(node["values"], list):
            return {**node, "values": rng.choice([[-1, 1], [0, 2**16], [-(2**31), 2**31 - 1]])}
        return {**node, "values": rng.choice(["special", "zeros", 1e30, -1e-30])}
    return rng.choice([{"dtype": d} for d in DTYPES])


def check(case):
    """Calls the op. Whatever it raises, it must be one of the errors that say what is wrong."""
    try:
        args = [build(n) for n in case["args"].values()]
    except (RuntimeError, IndexError):  # no tensor is like that
        return 0
    with torch.no_grad():
        try:
            getattr(ops, case["op"])(*args)
        except REFUSALS:
            return 0
    return 1
