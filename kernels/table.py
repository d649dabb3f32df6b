"""What a launch over a list of tensors knows of each: a table in device memory, moved there by one copy.

Tables hold numbers (addresses, sizes), never references. They are kept by content, so that a training loop whose
tensors stay where they are rebuilds nothing, and by stream, so that no other stream reads one before it is filled.
While a CUDA graph is captured, the copy becomes a node that reads its host memory again at every replay: that memory
is never freed or reused, and the device table belongs to the graph alone.
"""

import collections
import threading

import numpy as np
import torch

_KEPT_BYTES = 64 << 20
_ARENA_BYTES = 1 << 20

_lock = threading.Lock()  # autograd runs backward passes in threads of its own
_kept = collections.OrderedDict()  # (device, stream, dtype, content) -> table
_kept_size = 0
_arenas = []  # pinned memory for captured copies, handed out once and never freed; the last one has room
_arena_used = _ARENA_BYTES


def on_device(array, device):
    """The numpy ``array`` as a tensor on ``device``, ready for work on the current stream."""
    if device.type == "cpu":
        return torch.from_numpy(array)
    with _lock:
        return _table(array, device)


def _table(array, device):
    global _kept_size
    if torch.cuda.is_current_stream_capturing():
        return _copy(_captured_host(array), array, device)
    key = (device, torch.cuda.current_stream(device).cuda_stream, array.dtype.char, array.tobytes())
    table = _kept.get(key)
    if table is not None:
        _kept.move_to_end(key)
        return table
    _reserve()
    table = _copy(torch.empty(array.nbytes, dtype=torch.uint8, pin_memory=True), array, device)
    _kept[key] = table
    _kept_size += array.nbytes
    while _kept_size > _KEPT_BYTES and len(_kept) > 1:
        _kept_size -= _kept.popitem(last=False)[1].nbytes
    return table


def _copy(host, array, device):
    host.numpy()[:] = np.frombuffer(array.tobytes(), np.uint8)
    return torch.empty_like(host, device=device).copy_(host, non_blocking=True).view(torch.from_numpy(array).dtype)


def _reserve():
    """Pins memory for captures to come: allocating it during one may be refused."""
    global _arena_used
    if _arena_used > _ARENA_BYTES // 2:
        _arenas.append(torch.empty(_ARENA_BYTES, dtype=torch.uint8, pin_memory=True))
        _arena_used = 0


def _captured_host(array):
    global _arena_used
    size = -(-array.nbytes // 16) * 16
    if _arena_used + size > _ARENA_BYTES:
        _arenas.insert(0, torch.empty(array.nbytes, dtype=torch.uint8, pin_memory=True))
        return _arenas[0]
    start, _arena_used = _arena_used, _arena_used + size
    return _arenas[-1][start: start + array.nbytes]
