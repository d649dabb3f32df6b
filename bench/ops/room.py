"""Whether a row fits the memory of a CPU machine, where what does not fit ends the process: told beforehand, from what
the row and its peers allocate on a part of the workload."""

import math
import re
from pathlib import Path

from bench import machine, measure
from bench.ops.registry import Absent

LARGE = 1 << 27  # elements: smaller workloads fit whatever is done with them
PART = 64  # of the rows of each weight, one in as many
SHARE = 0.9  # of what the system calls available


def is_large(shapes):
    """Whether tensors of these shapes come to so many elements that memory must be thought of."""
    return sum(map(math.prod, shapes)) > LARGE


class Room:
    """The memory of a row. Absent, with the figures, where the case alone does not fit."""

    def __init__(self, case, shapes, dtype):
        part = [(math.ceil(rows / PART), *rest) for rows, *rest in shapes]
        self.factor = sum(map(math.prod, shapes)) / sum(map(math.prod, part))
        self.available = SHARE * available()

        def row():
            x = case.inputs(part, dtype, "cpu")
            copied = x.source, x.target  # held beside the results
            case.check(case.run(x), x)
            x.numel = sum(map(math.prod, shapes))  # for peers that are absent for the size of the whole
            return x, copied

        (self.x, *_), self.kept, self.peak = measure.allocated(row)
        self._check(self.kept, self.peak)

    def take(self, peer):
        """Makes room for a peer beside those that have it. Absent, with the figures, where there is none."""
        if peer.compiles:
            raise Absent(f"more than {LARGE >> 20}M weights: what a compiled graph allocates is not known beforehand")
        function, kept, made = measure.allocated(lambda: peer.make(self.x))
        called = measure.peak_bytes(function, "cpu")
        # It is made a second time where it trains, for what its forward pass keeps.
        kept, peak = self.kept + kept, max(self.peak, kept + made, called)
        self._check(kept, peak)
        self.kept, self.peak = kept, peak

    def _check(self, kept, peak):
        needs = self.factor * (kept + peak)
        if needs > self.available:
            raise Absent(f"needs {needs / 2**30:.0f} GiB of memory, {self.available / 2**30:.0f} are there")


def available():
    """Bytes that can be allocated, after what this process has freed was given back."""
    machine.release_memory()
    return 1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
