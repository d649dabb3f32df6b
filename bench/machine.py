"""What a result depends on: device, driver, software, allocator."""

import ctypes
import datetime
import gc
import os
import platform
import re
from pathlib import Path

import torch

import quantops
from bench.state import commit, output, sources

# glibc's mallopt: fresh outputs otherwise come from the system page by page, which costs ten times the op itself.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
_allocator = {"name": "as the system has it"}

# For processes with large tensors, read when one starts. What is cut off a tensor to align it goes to the cache of its
# thread, and the freed tensor is then too small for the next: several calls take fresh memory, and all of it is kept.
WITHOUT_THREAD_CACHES = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}


def keep_memory():
    """Tells glibc to keep what was freed, as a training loop's caching allocator does on a GPU."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    done = [
        libc.mallopt(option, value) for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 1 << 28))
    ]
    if all(done):
        _allocator.update(
            name="glibc keeps freed memory",
            M_MMAP_MAX=0,
            M_TRIM_THRESHOLD="never",
            M_TOP_PAD=1 << 28,
            large_workloads=WITHOUT_THREAD_CACHES,
        )


def has_thread_caches():
    """Whether this process was started without WITHOUT_THREAD_CACHES."""
    return not WITHOUT_THREAD_CACHES.items() <= os.environ.items()


def release_memory():
    """Gives what was freed back to the system, in spite of :func:`keep_memory`."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def serving(device):
    """The implementation that serves ``device``; the reference is not one that may be timed."""
    implementation = quantops.info()["devices"][torch.device(device).type]["implementation"]
    if implementation not in ("cpp", "cuda", "triton"):
        raise SystemExit(f"bench: {device} is served by {implementation}, not by compiled kernels:\n{quantops.info()}")
    return implementation


def _version(module):
    try:
        return __import__(module).__version__
    except ImportError:
        return "absent"


def _gpu():
    properties = torch.cuda.get_device_properties(0)
    driver = output(
        "nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader"
    )
    return {
        "device": properties.name,
        "driver": driver.splitlines()[0] if driver else "unknown",
        "cuda": torch.version.cuda,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_bytes": properties.L2_cache_size,
    }


def _cpu():
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else []
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "device": f"{(names or [platform.processor()])[0]}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "driver": f"{platform.system()} {re.match('[0-9.]*', platform.release())[0]}",
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache(),
        "second_level_cache_bytes": cache_bytes(level=2),
        "huge_pages": pages.read_text().strip() if pages.exists() else "unknown",
        "allocator": dict(_allocator),
    }


def last_level_cache():
    """Bytes of the CPU's last cache, 32 MiB where the system does not say."""
    return cache_bytes() or 32 << 20


def cache_bytes(level=None):
    """Bytes of the first core's cache of a level, or of its largest; None where the system does not say."""
    found = []
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        size = (folder / "size").read_text().strip()
        if size[-1:] in "KM" and size[:-1] and level in (None, int((folder / "level").read_text())):
            found.append(int(size[:-1]) << {"K": 10, "M": 20}[size[-1]])
    return max(found, default=None)


def describe(device):
    """The head of every result."""
    kind = torch.device(device).type
    return {"kind": kind, **(_gpu() if kind == "cuda" else _cpu()), "implementation": serving(device), **versions()}


def versions():
    """Software and state of the code."""
    return {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "quantops": quantops.__version__,
        "commit": commit(),
        "sources": sources(),
        "date": datetime.date.today().isoformat(),
    }
