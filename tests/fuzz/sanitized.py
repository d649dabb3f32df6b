"""The CPU library built with sanitizers, in the place of the one that is installed."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-omit-frame-pointer",
    "-w",
]
KINDS = {"address,undefined": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
KIND = os.environ.get("QUANTOPS_FUZZ_SANITIZER", "address,undefined")


def build(folder, kind=KIND):
    """The path of the library; compiled where it is not there for these sources."""
    sources = sorted(p for p in (ROOT / "csrc").glob("cpu/*.cpp") if p.stem != "schemas")  # Python has defined the ops
    digest = hashlib.sha256(repr((FLAGS, kind)).encode())
    for path in [*sorted((ROOT / "csrc").glob("*.h")), *sorted((ROOT / "csrc" / "cpu").iterdir())]:
        digest.update(path.read_bytes())
    work = folder / kind.replace(",", "-")
    library = work / f"cpu-{digest.hexdigest()[:12]}.so"
    if library.exists():
        return library
    if shutil.which("g++") is None:
        sys.exit("the target wild needs g++, for its sanitizers; --targets chooses the others")
    from torch.utils.cpp_extension import include_paths, library_paths

    print(f"building the CPU library with -fsanitize={kind}", flush=True)
    shutil.rmtree(work, ignore_errors=True)  # of other sources
    work.mkdir(parents=True)
    sanitize = [f"-fsanitize={kind}"] + ["-fno-sanitize-recover=undefined"] * ("undefined" in kind)
    waiting, running, objects = list(sources), [], []
    while waiting or running:
        while waiting and len(running) < 2:
            source = waiting.pop(0)
            objects.append(work / f"{source.stem}.o")
            running.append(
                subprocess.Popen(
                    [
                        "g++",
                        "-c",
                        *FLAGS,
                        *sanitize,
                        f"-I{ROOT / 'csrc'}",
                        *(f"-isystem{p}" for p in include_paths()),
                        source,
                        "-o",
                        objects[-1],
                    ]
                )
            )
        if running.pop(0).wait():
            sys.exit("the build with sanitizers failed")
    part = library.with_suffix(".part")
    subprocess.run(
        ["g++", "-shared", *sanitize, *objects, *(f"-L{p}" for p in library_paths()), "-ltorch_cpu", "-o", part],
        check=True,
    )
    part.rename(library)
    return library


def environment(folder, kind=KIND):
    """Of a process that uses it: the sanitizers' own libraries come first, and Python's memory is malloc's."""
    library = build(folder, kind)
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in KINDS[kind]
    ]
    return {
        "QUANTOPS_BACKEND": "reference",
        "QUANTOPS_FUZZ_LIBRARY": str(library),
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=2048",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }


def load():
    """Registers the sanitized kernels over the reference's. To be called once, in a process of this environment."""
    import torch

    import quantops

    assert quantops.info()["devices"]["cpu"]["implementation"] == "reference"
    torch.ops.load_library(os.environ["QUANTOPS_FUZZ_LIBRARY"])
