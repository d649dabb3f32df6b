"""Which implementation serves which device.

CPU: the compiled library, else the reference. CUDA: the compiled library, else Triton, else the reference.
``QUANTOPS_BACKEND=cuda|triton|reference`` (read once, at import) forces one: ``reference`` everywhere, ``cuda`` and
``triton`` on GPUs, where a forced one that is missing is an error. With ``TRITON_INTERPRET=1``, ``triton`` also serves
CPU tensors: the way to debug or check the Triton kernels without a GPU.
"""

import ctypes
import importlib
import importlib.util
import platform
import warnings

import torch

from quantops.compiled import forced, interpreted, library_path, load
from quantops.library import CPU, OPS, _lib, checked
from quantops.version import __version__

_serving: dict = {}  # device type -> (implementation, why the ones before it in the order are off)


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
    _serving["cpu"] = _setup_cpu()
    _serving["cuda"] = _setup_cuda(forced())


def _setup_cpu():
    """The compiled library, if it is to serve, was loaded with the schemas."""
    implementation, why = CPU
    if implementation == "triton":
        _require("triton", _register_triton("CPU"))
    elif implementation == "reference" and forced() != "reference":
        warnings.warn(f"quantops runs on its plain PyTorch reference, which is right but slow: {why}", stacklevel=3)
    return CPU


def _setup_cuda(choice):
    if not torch.backends.cuda.is_built():
        _require(None if interpreted() else choice, "this torch is built without CUDA")
        return "none", "this torch is built without CUDA"
    if choice == "reference":
        return "reference", "QUANTOPS_BACKEND=reference"
    why_not = []
    if choice in (None, "cuda"):
        why = "a ROCm build of torch" if torch.version.hip else load("cuda")
        if _require(choice, why) is None:
            return "cuda", ""
        why_not.append(f"cuda: {why}")
    why = _require(choice, _register_triton("CUDA"))
    if why is None:
        return "triton", "; ".join(why_not)
    return "reference", "; ".join([*why_not, f"triton: {why}"])


def _require(choice, why):
    if choice in ("cuda", "triton") and why:
        raise ImportError(f"QUANTOPS_BACKEND={choice}: {why}")
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


def info() -> Info:
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
