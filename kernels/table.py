"""What a launch over a list of tensors knows of each: a table in device memory, moved there by one copy.

Tables hold numbers (addresses, sizes), never references, and belong to one launch: pinned host memory and device memory
come from torch's caching allocators, which know when the stream is done with them. While a CUDA graph is captured, the
copy becomes a node that reads its host memory again at every replay: that memory is never freed or reused.
"""

import threading

import numpy as np
import torch

FIRST_CALL = ("while a CUDA graph is captured, Triton's kernels can neither be loaded nor pin host memory: call the "
              "same ops once before the capture, as torch.cuda.graph asks")
_ARENA_BYTES = 16 << 20

_lock = threading.Lock()  # autograd runs backward passes in threads of its own
_arenas = []  # pinned memory for captured copies, handed out once and never freed; the last one has room
_arena_used = _ARENA_BYTES


def on_device(array, device):
    """The numpy ``array`` as a tensor on ``device``, ready for work on the current stream."""
    if device.type == "cpu":
        return torch.from_numpy(array)
    with _lock:
        if torch.cuda.is_current_stream_capturing():
            host = _captured_host(array)
        else:
            _reserve()
            host = torch.empty(array.nbytes, dtype=torch.uint8, pin_memory=True)
        return _copy(host, array, device)


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
    if not _arenas:
        raise RuntimeError(f"quantops: {FIRST_CALL}")
    if _arena_used + size > _ARENA_BYTES:
        _arenas.insert(0, torch.empty(array.nbytes, dtype=torch.uint8, pin_memory=True))
        return _arenas[0]
    start, _arena_used = _arena_used, _arena_used + size
    return _arenas[-1][start: start + array.nbytes]
