"""The compiled libraries: where they are, and how they are loaded. Their kernels register themselves.

That of the CPU also defines the schemas, so that programs without Python have the ops; quantops/library.py, which loads
it first, defines them where it is not there. That of the GPU only implements them.
"""

import os
from pathlib import Path

import torch

CHOICES = ("cuda", "triton", "reference")


def forced():
    """What QUANTOPS_BACKEND asks for, or None. ImportError for what there is not."""
    choice = os.environ.get("QUANTOPS_BACKEND") or None
    if choice is not None and choice not in CHOICES:
        raise ImportError(f"QUANTOPS_BACKEND: expected one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


def interpreted():
    """Whether Triton's interpreter is to serve CPU tensors."""
    return forced() == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def library_path(kind):
    """Where the compiled library of ``kind`` ("cpu", "cuda") is, or would be; QUANTOPS_CUDA_LIBRARY: another build."""
    other = os.environ.get("QUANTOPS_CUDA_LIBRARY") if kind == "cuda" else None
    return Path(other or Path(__file__).parent / f"_{kind}.abi3.so")


def load(kind):
    """Loads a compiled library. Returns why it could not, or None."""
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


def load_cpu():
    """(implementation that serves the CPU, why not the compiled one or None), having loaded that where it does."""
    if forced() == "reference":
        return "reference", "QUANTOPS_BACKEND=reference"
    if interpreted():
        return "triton", "the Triton interpreter, TRITON_INTERPRET=1"
    why = load("cpu")
    return ("reference", why) if why else ("cpp", "")
