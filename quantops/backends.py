"""Which implementation serves which device.

CPU: the compiled library, else the reference. CUDA: the compiled library, else Triton, else the reference.
``QUANTOPS_BACKEND=cuda|triton|reference`` (read once, at import) forces one: ``reference`` everywhere, ``cuda`` and
``triton`` on GPUs, where a forced one that is missing is an error. With ``TRITON_INTERPRET=1``, ``triton`` also serves
CPU tensors: the way to debug or check the Triton kernels without a GPU.
"""

import ctypes
import importlib
import importlib.util
import os
import platform
import warnings
from pathlib import Path

import torch

from quantops.library import OPS, _lib, checked
from quantops.version import __version__

CHOICES = ("cuda", "triton", "reference")

_serving: dict = {}  # device type -> (implementation, why the ones before it in the order are off)


def library_path(kind):
    """Where the compiled library of ``kind`` ("cpu", "cuda") is, or would be; QUANTOPS_CUDA_LIBRARY: another build."""
    other = os.environ.get("QUANTOPS_CUDA_LIBRARY") if kind == "cuda" else None
    return Path(other or Path(__file__).parent / f"_{kind}.abi3.so")


def _load_library(kind):
    """Loads a compiled library, whose kernels register themselves. Returns why it could not, or None."""
    path = library_path(kind)
    if not path.exists():
        failed = path.with_name(path.name + ".failed")  # by setup.py
        why = f"{path.name} " + (
            failed.read_text().strip()
            if failed.exists()
            else f"was not built (it needs {'nvcc' if kind == 'cuda' else 'a C++ compiler'} at installation)"
        )
        if (Path(__file__).parents[1] / "setup.py").exists():
            why += f"; this is the source tree {path.parents[1]}: pip install -e . builds it in place"
        return why
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


def _register_triton(key):
    """Routes every op on ``key`` to the Triton kernels, imported at the first call. Returns why not, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    for family, schemas in OPS.items():
        for name in schemas:
            _lib.impl(name, _lazy(family, name), key)
    return None


def _lazy(family, name):
    def kernel(*args):
        return getattr(importlib.import_module(f"quantops.kernels.{family}"), name)(*args)

    return checked(name, kernel)


def _setup():
    forced = os.environ.get("QUANTOPS_BACKEND") or None
    if forced is not None and forced not in CHOICES:
        raise ImportError(f"QUANTOPS_BACKEND: expected one of {', '.join(CHOICES)}, got {forced!r}")
    _serving["cpu"] = _setup_cpu(forced)
    _serving["cuda"] = _setup_cuda(forced)


def _setup_cpu(forced):
    if forced == "reference":
        return "reference", "QUANTOPS_BACKEND=reference"
    if forced == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return "triton", _require(forced, _register_triton("CPU")) or "the Triton interpreter, TRITON_INTERPRET=1"
    why = _load_library("cpu")
    if why:
        warnings.warn(f"quantops runs on its plain PyTorch reference, which is right but slow: {why}", stacklevel=2)
    return ("reference", why) if why else ("cpp", "")


def _setup_cuda(forced):
    if not torch.backends.cuda.is_built():
        interpreted = forced == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        _require(None if interpreted else forced, "this torch is built without CUDA")
        return "none", "this torch is built without CUDA"
    if forced == "reference":
        return "reference", "QUANTOPS_BACKEND=reference"
    why_not = []
    if forced in (None, "cuda"):
        why = "a ROCm build of torch" if torch.version.hip else _load_library("cuda")
        if _require(forced, why) is None:
            return "cuda", ""
        why_not.append(f"cuda: {why}")
    why = _require(forced, _register_triton("CUDA"))
    if why is None:
        return "triton", "; ".join(why_not)
    return "reference", "; ".join([*why_not, f"triton: {why}"])


def _require(forced, why):
    if forced in ("cuda", "triton") and why:
        raise ImportError(f"QUANTOPS_BACKEND={forced}: {why}")
    return why


class Info(dict):
    """What :func:`info` found, printable."""

    def __str__(self):
        lines = [f"quantops {self['version']}, torch {self['torch']}, Python {self['python']}"]
        for device, entry in self["devices"].items():
            lines.append(f"  {device:5} {entry['implementation']:10} {entry['note']}".rstrip())
        return "\n".join(lines)


def _instruction_set():
    """Which of its loops the compiled CPU library runs on this processor, as it says itself."""
    tell = ctypes.CDLL(library_path("cpu")).quantops_instruction_set
    tell.restype = ctypes.c_char_p
    return tell().decode()


def info():
    """Which implementation serves which device, and why another is off. Print it, or read it as a dict."""
    compiled = _serving["cpu"][0] == "cpp"
    notes = {
        ("cpu", "cpp"): (
            f"compiled C++, {_instruction_set()} (torch: {torch.backends.cpu.get_cpu_capability()}), "
            f"{torch.get_num_threads()} threads"
        )
        if compiled
        else "",
        ("cuda", "cuda"): "compiled CUDA C++",
        ("cuda", "triton"): "Triton kernels, compiled at their first call",
    }
    devices = {}
    for device, (implementation, why) in _serving.items():
        note = "; ".join(filter(None, [notes.get((device, implementation), ""), why]))
        devices[device] = {"implementation": implementation, "note": note}
    if torch.cuda.is_available():
        devices["cuda"]["note"] += f" [{torch.cuda.get_device_name()}]"
    return Info(version=__version__, torch=torch.__version__, python=platform.python_version(), devices=devices)


_setup()
