"""Variants of the CUDA kernels that a GPU has to decide between: libraries beside the default one, each with another
setting of csrc/cuda/switches.cuh, of the families whose kernels the switches are in.

``python -m bench variants`` builds quantops/_cuda.<variant>.abi3.so for each, on a machine without a GPU too. ``make
gpu`` compares those that it finds; QUANTOPS_CUDA_LIBRARY=path gives a process their kernels in the place of all others.
"""

import subprocess

from bench.machine_code import sass

FAMILIES = ("uniform", "truncate")
DEFAULT = "default"
VARIANTS = {  # name: its definitions
    DEFAULT: (),
    "stores-streaming": ("QUANTOPS_STORES=2",),
    "segments-256-2048": ("QUANTOPS_LARGEST_SEGMENT=2048",),
    "late-loads": ("QUANTOPS_EARLY_LOADS=0",),
    "reductions-8192": ("QUANTOPS_REDUCTION_ITEMS=8192",),
    "msq-4096": ("QUANTOPS_MSQ_ITEMS=4096",),
    "two-launches": ("QUANTOPS_LAST_BLOCK_ITEMS=0",),
    "msq-2-blocks": ("QUANTOPS_MSQ_BLOCKS=2", "QUANTOPS_MSQ_BYTES=64"),
    "msq-3-blocks": ("QUANTOPS_MSQ_BLOCKS=3", "QUANTOPS_MSQ_BYTES=48"),
    "msq-64-bytes": ("QUANTOPS_MSQ_BYTES=64",),
}


def path(name):
    """Where the library of a variant is, or would be."""
    return sass.ROOT / "quantops" / f"_cuda.{name}.abi3.so"


def build(name, arch="90"):
    """Builds the library of a variant for one arch, with the flags of setup.py."""
    from torch.utils.cpp_extension import include_paths, library_paths

    libraries = [f"-L{p}" for p in library_paths()]
    subprocess.run(
        [
            sass.nvcc(),
            "-shared",
            "-o",
            str(path(name)),
            *sass.FLAGS,
            *(f"-D{d}" for d in VARIANTS[name]),
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            *(str(sass.ROOT / f"csrc/cuda/{f}.cu") for f in FAMILIES),
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden,-ffp-contract=off",
            *(f"-I{p}" for p in include_paths()),
            *libraries,
            "-Xlinker",
            "--no-as-needed",
            "-ltorch",
            "-ltorch_cpu",
            "-cudart",
            "shared",
        ],
        check=True,
    )
    return path(name)


def variants(args):
    """Builds the libraries of variants."""
    if sass.nvcc() is None:
        raise SystemExit("bench: nvcc was not found: put it on PATH or set CUDA_HOME")
    unknown = set(args.names) - set(VARIANTS)
    if unknown:
        raise SystemExit(f"bench: expected names of {', '.join(VARIANTS)}, got {', '.join(sorted(unknown))}")
    for name in args.names or VARIANTS:
        print(f"{build(name, args.arch)}: {' '.join(VARIANTS[name]) or 'as built'}", flush=True)
    return 0


def add_arguments(parser):
    """Options of ``python -m bench variants``."""
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(VARIANTS))
    parser.add_argument("--arch", default="90", help="as in sm_90")
    parser.set_defaults(call=variants)
