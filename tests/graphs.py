"""CUDA graphs, real ones and emulated ones, for tests that run with either."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quantops.checks import integral


class EmulatedGraph(TorchDispatchMode):
    """A CUDA graph of CPU tensors. Its nodes are the ops that were called; a replay calls them on the same memory.

    As a captured copy from the host does, a node that reads what no node has written, nor ``inputs``, reads memory that
    was freed after the capture: other numbers lie there at a replay.
    """

    def __init__(self, inputs):
        super().__init__()
        self.nodes, self.written, self.read = [], {_storage(t) for t in inputs}, {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        given = {_storage(t): t for t in _tensors((args, kwargs))}
        self.read.update((at, t) for at, t in given.items() if at not in self.written)
        self.written |= {_storage(t) for t in _tensors(out)} - given.keys()
        self.nodes.append((op, args, kwargs or {}, out))
        return out

    def replay(self):
        for t in self.read.values():
            t.fill_(1)
        for op, args, kwargs, out in self.nodes:
            for to, value in zip(_tensors(out), _tensors(op(*args, **kwargs)), strict=True):
                if _storage(to) != _storage(value):
                    to.copy_(value)


def _storage(t):
    return t.untyped_storage().data_ptr()


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [t for v in values for t in _tensors(v)]


def captured(call, inputs, monkeypatch):
    """(a graph of ``call()``, what it returned), for ``inputs`` on a GPU or, emulated, on the CPU."""
    if inputs[0].device.type == "cpu":
        with monkeypatch.context() as patch, EmulatedGraph(inputs) as graph:
            patch.setattr(integral, "capturing", lambda device: True)
            return graph, call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results
