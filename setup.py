"""Builds the kernels: one stable-ABI library per device kind, quantops/_cpu.abi3.so and quantops/_cuda.abi3.so.

They use torch's stable ABI (2.10 and newer) and link against torch alone, so one build loads on every later torch and
Python. Only torch's headers and libraries are needed, so torch is not imported here and an isolated build uses the
torch that is already in the environment.

QUANTOPS_CUDA=auto|0|1 (default auto: where nvcc and a CUDA build of torch are found) and TORCH_CUDA_ARCH_LIST
(default "8.0;9.0+PTX") say what is built. CXX and CXXFLAGS are the compiler's, g++ or clang 14 and newer. What does not
build is left out: the Python package installs alone, with the reason beside the place of the library, where
quantops.info() finds it.
"""

import glob
import os
import re
import shutil
import subprocess
import sys
import sysconfig

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FAILED = ".failed"  # after a library's name: the file that says why it was not built
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", TORCH_TARGET]
# Every operation is rounded on its own; neither errno nor floating-point traps are read.
MATH_FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


def torch_folder():
    """The folder of the torch to build against, or None. An isolated build hides it from import, not from us."""
    find = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
    # -I leaves out PYTHONPATH, through which pip isolates builds, and finds what the environment itself has.
    for options in ([], ["-I"]):
        found = subprocess.run([sys.executable, *options, "-c", find], capture_output=True, text=True).stdout.strip()
        folder = os.path.dirname(found)
        if found and os.path.isdir(os.path.join(folder, "include")):
            return folder
    return None


def nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (home and shutil.which("nvcc", path=os.path.join(home, "bin"))) or shutil.which("nvcc")


def wants_cuda(torch):
    choice = os.environ.get("QUANTOPS_CUDA", "auto").lower()
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"QUANTOPS_CUDA: expected auto, 0 or 1, got {choice!r}")
    if choice == "1" and not nvcc():
        raise SystemExit("QUANTOPS_CUDA=1: nvcc was not found; put it on PATH or set CUDA_HOME")
    has_cuda = bool(glob.glob(os.path.join(torch or "", "lib", "libtorch_cuda.so")))
    return choice == "1" or (choice == "auto" and has_cuda and bool(nvcc()))


def gencode():
    """nvcc's target flags from TORCH_CUDA_ARCH_LIST, e.g. "8.0;9.0+PTX"."""
    flags = []
    for arch in re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0+PTX"):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", arch)
        if not match:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected entries like 9.0 or 9.0+PTX, got {arch!r}")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def includes(torch):
    """Compiler flags: our headers, and torch's as those of a system, whose warnings are not ours to mend."""
    api = os.path.join("torch", "csrc", "api", "include")
    return ["-Icsrc", "-isystem", os.path.join(torch, "include"), "-isystem", os.path.join(torch, "include", api)]


def run_compiler(command, **settings):
    """Runs a compiler. What it complains about first is in the error: the output of builds, pip shows to nobody."""
    try:
        run = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", **settings)
    except OSError as error:
        raise CompileError(f"{command[0]}: {error.strerror}") from None
    sys.stderr.write(run.stderr)
    if run.returncode:
        lines = [line.strip() for line in run.stderr.splitlines() if line.strip()] or ["it says nothing"]
        first = next((line for line in lines if "error" in line), lines[-1])
        raise CompileError(f"{command[0]} ended with status {run.returncode}: {first}")


class BuildKernels(build_ext):
    def get_ext_filename(self, fullname):
        """The same name on every Python: torch loads the libraries, which use nothing of Python's."""
        return fullname.replace(".", os.sep) + ".abi3.so"

    def build_extension(self, ext):
        cuda = ext.name.endswith("_cuda")
        self.compiler.spawn = self.compiler.call = run_compiler  # by older and by newer setuptools
        try:
            self.build_cuda(ext) if cuda else super().build_extension(ext)
        except Exception as error:
            self.leave(ext, f"was not built: {error}")
            if cuda and os.environ.get("QUANTOPS_CUDA") == "1":
                raise SystemExit(f"QUANTOPS_CUDA=1: {ext.name} was not built: {error}") from error
            served = "Triton serves GPUs" if cuda else "quantops runs on its plain PyTorch reference, right but slow"
            self.warn(f"{ext.name} was not built, {served}: {error}")
        else:
            self.leave(ext, None)

    def build_cuda(self, ext):
        target = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        lib = os.path.join(torch_folder(), "lib")
        # A CPU build of torch has no libtorch_cuda to name; in a CUDA build libtorch stands for it.
        cuda = ["-ltorch_cuda"] if os.path.exists(os.path.join(lib, "libtorch_cuda.so")) else []
        run_compiler(
            [
                nvcc(),
                "-shared",
                "-o",
                target,
                *ext.sources,
                *gencode(),
                "-std=c++17",
                "-O3",
                "-fmad=false",
                "--expt-relaxed-constexpr",
                "-DUSE_CUDA",
                TORCH_TARGET,
                "--threads",
                "2",
                "-Xcompiler",
                "-fPIC,-fvisibility=hidden,-ffp-contract=off",
                *includes(torch_folder()),
                f"-L{lib}",
                "-Xlinker",
                "--no-as-needed",
                "-ltorch",
                "-ltorch_cpu",
                *cuda,
                "-cudart",
                "shared",
            ]
        )

    def leave(self, ext, reason):
        """Leaves what says why there is no library in its place, or nothing where there is one. A library of an earlier
        build must not pass for this one."""
        name = self.get_ext_filename(self.get_ext_fullname(ext.name))
        for folder in (self.build_lib, os.path.dirname(os.path.abspath(__file__))):
            library = os.path.join(folder, name)
            for stale in [library + FAILED] + [library] * (reason is not None):
                if os.path.exists(stale):
                    os.remove(stale)
        if reason is not None:
            os.makedirs(os.path.join(self.build_lib, os.path.dirname(name)), exist_ok=True)
            with open(os.path.join(self.build_lib, name + FAILED), "w") as file:
                file.write(reason + "\n")

    # What failed to build is left out, instead of failing the installation, and its reason is installed.

    def get_outputs(self):
        return [f for name in super().get_outputs() for f in (name, name + FAILED) if os.path.exists(f)]

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()  # of optional extensions those that are there
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            inplace, regular = (path + FAILED for path in self._get_inplace_equivalent(build_py, ext))
            if os.path.exists(regular):
                self.copy_file(regular, inplace)


def extensions():
    torch = torch_folder()
    if torch is None:  # while pip asks what the build needs; see setup_requires
        return []
    found = [
        Extension(
            "quantops._cpu",
            sorted(glob.glob("csrc/cpu/*.cpp")),
            py_limited_api=True,
            optional=True,
            language="c++",
            extra_compile_args=[*includes(torch), *CXX_FLAGS, *MATH_FLAGS],
            library_dirs=[os.path.join(torch, "lib")],
            libraries=["torch_cpu"],
            depends=glob.glob("csrc/*.h") + glob.glob("csrc/cpu/*.h"),
        )
    ]
    if wants_cuda(torch):
        found.append(
            Extension(
                "quantops._cuda",
                sorted(glob.glob("csrc/cuda/*.cu")),
                py_limited_api=True,
                optional=True,
                depends=glob.glob("csrc/*.h") + glob.glob("csrc/cuda/*.cuh"),
            )
        )
    return found


PACKAGES = {
    "quantops": "quantops",
    "quantops.reference": "quantops/reference",
    "quantops.default": "quantops/default",
    "quantops.autograd": "quantops/autograd",
    "quantops.checks": "quantops/checks",
    "quantops.methods": "quantops/methods",
    "quantops.demo": "quantops/demo",
    "quantops.export": "quantops/export",
    "quantops.integrations": "quantops/integrations",
    "quantops.kernels": "kernels",
    "quantops.csrc": "csrc",
    "quantops.csrc.cpu": "csrc/cpu",
    "quantops.csrc.cuda": "csrc/cuda",
}

setup(
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={
        "quantops": ["py.typed"],
        "quantops.csrc": ["*.h"],
        "quantops.csrc.cpu": ["*.cpp", "*.h"],
        "quantops.csrc.cuda": ["*.cu", "*.cuh"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
    setup_requires=[] if torch_folder() else ["torch>=2.10"],
    # Free-threaded Pythons have no stable ABI to promise.
    options={} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
