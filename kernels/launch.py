"""Host side of every family: lists of tensors into tables of addresses, and launches."""

import numpy as np
import torch
import triton.language as tl

from quantops.kernels.memory import RUN
from quantops.kernels.table import FIRST_CALL, on_device

TYPES = {
    torch.float32: tl.float32, torch.float64: tl.float64, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16,
    torch.int32: tl.int32,
}
_READ, _HELD = 128 * 128, 128 * 256  # bytes of a program's 128 threads
SHORT_ROW = 256  # rows up to here share a program, in tiles


def block_of(acc, *read, values=1):
    """Elements per program, a power of two: 128 bytes of the lists ``read`` per thread, eight 128-bit loads in flight,
    and 256 bytes of the ``values`` that the arithmetic of an element holds at once."""
    most = min(_READ // sum(t[0].element_size() for t in read), _HELD // (values * acc.itemsize))
    return 1 << (most.bit_length() - 1)


def launch(kernel, programs, *args, **constants):
    # Contraction into fused multiply-adds is off: plain float32 arithmetic is the specification.
    if not programs:
        return
    try:
        kernel[(programs,)](*args, **constants, num_warps=4, enable_fp_fusion=False)
    except RuntimeError as error:
        if "capturing" in str(error):
            raise RuntimeError(f"quantops: {kernel.__name__}: {FIRST_CALL}") from error
        raise


def on_device_of(tensors):
    """The launches of a call go to the device of its tensors."""
    return torch.cuda.device_of(tensors[0])


def widest(*lists):
    """Bits of the widest element type."""
    return max(8 * t[0].element_size() for t in lists if t)


def addresses(tensors, count):
    return [0] * count if tensors is None else [t.data_ptr() for t in tensors]


def all_aligned(*columns):
    """1 where the addresses in all columns are multiples of 16."""
    union = np.zeros(len(columns[0]), np.int64)
    for a in columns:
        union |= np.asarray(a, np.int64)
    return union % 16 == 0


def owners(counts, device):
    """What :func:`quantops.kernels.memory.owner` reads: the tensor of every RUN-th program, then the first program past
    each tensor."""
    ends = np.cumsum(counts)
    tensors = np.searchsorted(ends, np.arange(0, ends[-1], RUN.value), side="right")  # passes over empty ones
    return on_device(np.concatenate([tensors, ends]).astype(np.int32), device)


def starts(counts):
    """The first of each, where ``counts`` are numbered through."""
    return np.concatenate([[0], np.cumsum(counts)[:-1]])


def ints(t):
    return t if t.dtype == torch.int32 and t.is_contiguous() else t.to(torch.int32).contiguous()


def in_layouts_of(w, tensors):
    """``tensors`` in the layouts of ``w``; those that have it already are taken as they are."""
    return [t if t.stride() == v.stride() else torch.empty_strided(v.shape, v.stride(), dtype=t.dtype,
                                                                  device=t.device).copy_(t)
            for t, v in zip(tensors, w)]
