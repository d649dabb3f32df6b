"""The registry: an op is one entry, with its inputs, the bytes it must move, its check and its peers.

A file of this folder with a list ``CASES`` is a family of ops; it has the family's name, as everywhere in the package.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable

import torch

import bench.ops

COPY, OURS = "copy", "quantops"


class Absent(Exception):
    """A peer that cannot be had here; says why."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """What a user could run instead.

    make: inputs -> the function that is timed, which takes the bit-width as an optional argument; raises Absent.
    forward: inputs -> (a forward pass, its parameters), where the peer trains: what autograd keeps is measured.
    compiles: its first call is timed too, and where it trains the first calls with other bit-widths.
    whole_list: takes a list as one graph, which takes long to compile.
    graph: a CUDA graph can hold its calls.
    note: in what it does less than the op, or other things.
    """

    make: Callable
    forward: Callable | None = None
    compiles: bool = False
    whole_list: bool = False
    lists: bool = True
    graph: bool = False
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    """One op. ``run(x)`` is timed after ``check(run(x), x)`` held, for ``x = inputs(shapes, dtype, device)``.

    inputs: the object has ``numel`` and ``tensors``, elements and tensors in all, ``source`` and ``target``, lists of
        tensors for the copy, and ``n``, the bit-width.
    reads, writes: element size -> bytes per element that must be read and written; the copy moves as many.
    dtypes: those the case makes sense for.
    forward: x -> (a forward pass, its parameters), where the case trains.
    keeps: element size -> bytes per element that autograd needs of it, beyond the parameters.
    cuda: the name of its kernel in csrc/cuda for short lists, with T for the element type, and longest: whether its
        longest way is the one taken; for the static table.
    turns: whether loops of its kernels turn as often as there are bits or classes, so that no static table counts them.
    table: words of 16 bytes that its kernel in csrc/cuda reads per element from a table in shared memory: its way leads
        through them, and past what is done without a table. Where turns holds as well, Triton's alone are not counted.
    optional: element size -> bytes per element that its kernel in csrc/cuda can load besides, in other calls.
    """

    name: str
    inputs: Callable
    reads: Callable[[int], float]
    writes: Callable[[int], float]
    run: Callable
    check: Callable
    peers: dict[str, Peer] = dataclasses.field(default_factory=dict)
    dtypes: tuple = (torch.float32, torch.bfloat16)
    forward: Callable | None = None
    keeps: Callable[[int], float] = lambda size: 0.0
    cuda: str | None = None
    longest: bool = True
    turns: bool = False
    table: int = 0
    optional: Callable[[int], float] = lambda size: 0.0
    family: str = ""

    def bytes(self, size):
        """Bytes per element of ``size`` bytes."""
        return self.reads(size) + self.writes(size)


def cases():
    """All cases, family by family."""
    found = []
    for entry in pkgutil.iter_modules(bench.ops.__path__):
        if not entry.name.startswith(("_", "test_", "conftest")):
            module = importlib.import_module(f"bench.ops.{entry.name}")
            found += [dataclasses.replace(case, family=entry.name) for case in getattr(module, "CASES", ())]
    names = [case.name for case in found]
    if len(names) != len(set(names)):
        raise ValueError(f"bench: two cases have one name: {sorted(n for n in names if names.count(n) > 1)}")
    return found


def copier(x, bytes_per_element, scaled=False):
    """A copy that moves as many bytes as the op must, and the factor from its bytes to those of the op.

    Of the op's own inputs to its own results: the same memory, since bandwidth depends on where the pages lie; other
    buffers were up to twice as fast. Where the op moves more, further memory is copied with them: a smaller copy
    would fit caches that the op's bytes do not (twice as fast at 1M weights and 20 bytes each). ``scaled``: it is not,
    the factor says how much more; the same for large lists, without their memory twice.
    """
    source, target = list(x.source), list(x.target)
    wanted, moved = bytes_per_element * x.numel, sum(t.nbytes for t in [*source, *target])
    if wanted > moved and not scaled:
        more = source[0].new_ones(int(wanted - moved) // (2 * source[0].element_size()))
        source, target, moved = [*source, more], [*target, torch.empty_like(more)], moved + 2 * more.nbytes
    if len(source) == 1:
        return lambda: target[0].copy_(source[0]), wanted / moved
    return lambda: torch._foreach_copy_(target, source), wanted / moved
