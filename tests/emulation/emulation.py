"""The CUDA kernels run on the CPU: what the tests of this folder share.

Folder cuda_on_cpu lets a plain C++ compiler build csrc/cuda/*.cu, whose ops then serve CPU tensors, warp by warp with
shuffles and barriers. A file's checks run in a process of their own, since the CPU has kernels of its own here. New
memory is poisoned with NaN in it.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

import cases
from quantops.backends import library_path
from quantops.layout import empty_like

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("float32", "bfloat16", "float16", "float64")


def build(folder, *families, key="CPU"):
    """Compiles the families' .cu files with the host compiler; gives back the library's path. ``key``: the dispatch key
    that their ops serve."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler to build the CUDA kernels for the CPU with: install g++, or set CXX")
    library = Path(folder) / "cuda_on_cpu.so"
    subprocess.run(
        [
            compiler,
            "-x",
            "c++",
            "-std=c++17",
            "-O1",
            "-w",
            "-ffp-contract=off",
            "-fno-strict-aliasing",
            "-shared",
            "-fPIC",
            f"-DQUANTOPS_EMULATE={key}",
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            f"-I{ROOT / 'tests/emulation/cuda_on_cpu'}",
            *(f"-I{p}" for p in include_paths()),
            *(str(ROOT / f"csrc/cuda/{f}.cu") for f in families),
            "-x",
            "none",
            *(f"-L{p}" for p in library_paths()),
            "-ltorch_cpu",
            *os.environ.get("QUANTOPS_EMULATE_FLAGS", "").split(),
            "-o",
            str(library),
        ],
        check=True,
        timeout=600,
    )
    return library


class Program:
    """The checks of a file of tests, and the process that runs them: ``python emulation.py FILE LIBRARY [CHECK...]``.

    The emulated kernels of ``families`` serve CPU tensors there, in the place of the reference; ``beside_cpp``: they
    stand beside the C++ kernels, under a dispatch key that no CPU tensor has, and ``emulated`` calls them.
    """

    def __init__(self, file, *families, beside_cpp=False):
        self.file, self.families, self.checks = file, families, {}
        self.key, self.backend = ("XLA", "") if beside_cpp else ("CPU", "reference")

    def check(self, fn):
        """A check is a function that raises where something is wrong; pytest sees a test that asks the process."""

        def test(results):
            if results[fn.__name__]:
                pytest.fail(results[fn.__name__], pytrace=False)

        self.checks[fn.__name__] = fn
        test.__name__, test.__doc__ = fn.__name__, fn.__doc__
        return test

    def emulated(self, name, *args):
        """An emulated op beside the C++ one of this name."""
        keys = torch._C.DispatchKeySet(torch._C._parse_dispatch_key(self.key))
        return getattr(torch.ops.quantops, name).default.redispatch(keys, *args)

    def results(self, folder):
        """{name of the check: None, or what it raised}."""
        if not self.backend and not library_path("cpu").exists():
            pytest.skip("the C++ kernels to compare with were not built: install g++ and run pip install -e .")
        library = build(folder, *self.families, key=self.key)
        env = {**os.environ, "QUANTOPS_BACKEND": self.backend, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        out = subprocess.run(
            [sys.executable, __file__, self.file, str(library)],
            env=env,
            cwd=library.parent,
            text=True,
            capture_output=True,
            timeout=600,
        )
        try:
            return json.loads(out.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            pytest.fail(f"the emulation died with status {out.returncode}:\n{out.stdout}\n{out.stderr}")

    def main(self, library, *names):
        """What the process does: runs the checks of these names, or all, and prints their results."""
        torch.ops.load_library(library)
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)  # fills new memory with NaN, integers with their largest value
        assert torch.empty(5).isnan().all()
        found = {}
        with torch.inference_mode():  # leaves autograd out
            for name in names or self.checks:
                torch.manual_seed(0)
                start = time.time()
                try:
                    self.checks[name]()
                    found[name] = None
                except Exception:
                    found[name] = traceback.format_exc()
                print(f"{name}: {time.time() - start:.1f} s", file=sys.stderr)
        print(json.dumps(found))


def weights(dtype):
    """Those of cases.py, the large ones cut: the emulation runs a kernel thread by thread."""
    w = cases.weights(getattr(torch, dtype))
    return [t if t.numel() < 5000 else t[3:3100] if t.dim() == 1 else t[:2, :2500] for t in w]


def exact(got, want, what):
    """Equal bits, the sign of zero too, up to which NaN; and equal layout."""
    assert got.dtype == want.dtype and got.shape == want.shape, f"{what}: {got.dtype} {got.shape}"
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    nan = (got != got) & (want != want)
    wrong = (got.contiguous().view(bits) != want.contiguous().view(bits)) & ~nan
    if wrong.any():
        at = wrong.reshape(-1).nonzero().reshape(-1)
        shown = [(int(i), got.reshape(-1)[i].item(), want.reshape(-1)[i].item()) for i in at[:4]]
        raise AssertionError(f"{what}: {len(at)} of {got.numel()} differ (place, got, expected): {shown}")


def close(got, want, what):
    """Sums are taken in float64 here and there, in another order."""
    rtol = 1e-12 if got.dtype == torch.float64 else 3e-7
    torch.testing.assert_close(got, want, rtol=rtol, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")


def laid_out_like(t, w):
    """t has the layout of a result for w."""
    assert t.stride() == empty_like(w, t.dtype).stride(), f"layout {t.stride()} of a result for {w.stride()}"


def raises(calls):
    """Each of ``calls``, {text: function}, raises a ValueError with this text."""
    for text, call in calls.items():
        try:
            call()
        except ValueError as error:
            assert text in str(error), f"expected {text!r} in {str(error)!r}"
        else:
            raise AssertionError(f"no error, expected {text!r}")


if __name__ == "__main__":
    runpy.run_path(sys.argv[1])["program"].main(*sys.argv[2:])
