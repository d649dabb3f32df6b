"""What belongs to a thread: the results of its last pass, and values that it sets for itself."""

import threading

import torch


class Slot(threading.local):
    """What the last pass of this thread left for one layer. Never copied or pickled with its layer: results belong to
    a pass, and a pass to its thread."""

    def __init__(self):
        self.clear()

    def clear(self):
        self.result = None  # (the Pass, which may hold q and what else the call gave, this layer's place in it)
        self.traced = None  # q inside the graph that torch.compile is tracing now

    def __reduce__(self):
        return type(self), ()


class PerThread:
    """A value that a thread sets for itself. In its backward passes, which on a GPU run in threads of torch's own, it
    is there too, but where several threads have set one: RuntimeError. Never copied or pickled, as :class:`Slot`."""

    def __init__(self):
        self._own, self._all = _Own(), {}

    def __reduce__(self):
        return PerThread, ()

    def set(self, value):
        """None: there is no value any more."""
        self._own.value = value
        if torch.compiler.is_compiling():
            return
        if value is None:
            self._all.pop(threading.get_ident(), None)
        else:
            self._all[threading.get_ident()] = value

    def any(self):
        """Whether a thread has set one."""
        return bool(self._all)

    def get(self):
        value = self._own.value
        if value is not None or not self._all or torch.compiler.is_compiling() or not in_backward():
            return value
        values = list(self._all.values())
        if len(values) > 1:
            raise RuntimeError(
                "a checkpointed part is computed again while several threads are in joint steps of one "
                "model, and its width is not known; expected one thread, or no checkpointing"
            )
        return values[0] if values else None


class _Own(threading.local):
    def __init__(self):
        self.value = None


class Mine(threading.local):
    """The passes of a thread that may still hold q."""

    def __init__(self):
        self.passes, self.tracing = [], False

    def __reduce__(self):
        return Mine, ()


def in_backward():
    """Whether this thread is within a backward pass, where a forward is one of a checkpointed part, computed again."""
    return torch._C._current_graph_task_id() != -1
