"""What nvcc makes of the CUDA kernels, read from the machine code, on machines without a GPU too.

No registers spilled, no local memory, 128-bit loads and stores on the main path, several loads in flight, and no
multiplication fused with an addition, for sm_80 and sm_90.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("80", "90")
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))

# The kernels whose main path must be wide: (name in the demangled symbol, does it write).
WIDE = [(f"{op}<{types.replace('T', t)}>", writes) for t in ("float", "__nv_bfloat16") for op, types, writes in (
    ("AbsMax", "T", False), ("AbsMean", "T", False), ("RoundClamp", "T, T", True), ("Msq", "T, T", True),
    ("Msq", "T, None", False), ("Lsb", "T", True), ("Encode", "T", True), ("Backward", "T, T, false, false", True),
    ("Backward", "T, T, true, false", True), ("Backward", "T, T, true, true", True), ("AddLsbGrad", "T", True),
    ("Decode", "float, T", True), ("RoundClamp", "float, T", True), ("Msq", "float, T", True))]
WIDE = sorted(set(WIDE))


def _nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (home and shutil.which("nvcc", path=os.path.join(home, "bin"))) or shutil.which("nvcc")


def _cuobjdump(nvcc):
    """nvcc's own, or the one that comes with triton."""
    beside = os.path.dirname(os.path.realpath(nvcc))
    triton = Path(sysconfig.get_path("purelib")) / "triton/backends/nvidia/bin"
    return next(filter(None, (shutil.which("cuobjdump", path=p) for p in (beside, None, str(triton)))), None)


def _demangle(names):
    out = subprocess.run(["c++filt"], input="\n".join(names), text=True, capture_output=True, check=True).stdout
    return [re.sub(r"quantops::cuda::|\(anonymous namespace\)::|^void |\(.*", "", n) for n in out.splitlines()]


class Kernel:
    """One kernel's resources, its PTX and its machine code."""

    def __init__(self, stack, spills, registers):
        self.stack, self.spills, self.registers = stack, spills, registers
        self.ptx, self.code = "", []  # code: (address, instruction)

    def loops(self):
        """Bodies of the innermost loops: code between a backward branch and its target."""
        spans = []
        for at, text in self.code:
            target = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)
            if target and int(target[1], 16) < at:
                spans.append((int(target[1], 16), at))
        inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
        return [[text for at, text in self.code if low <= at <= high] for low, high in inner]


def _count(instructions, pattern):
    return sum(bool(re.search(rf"(^|\s){pattern}", text)) for text in instructions)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """{(arch, demangled name): Kernel} of all .cu files, compiled with the flags of setup.py, one nvcc per arch."""
    from torch.utils.cpp_extension import include_paths

    nvcc = _nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found: put the CUDA toolkit's on PATH, or set CUDA_HOME")
    cuobjdump = _cuobjdump(nvcc)
    if cuobjdump is None:
        pytest.skip("cuobjdump was not found: install the CUDA toolkit's binary utilities, or triton, which has one")
    folder, jobs = tmp_path_factory.mktemp("cubin"), []
    for source in SOURCES:
        for arch in ARCHS:
            target = folder / f"{source.stem}_{arch}.o"
            jobs.append((arch, target, subprocess.Popen([
                nvcc, "-c", str(source), "-o", str(target), "-std=c++17", "-O3", "-fmad=false",
                "--expt-relaxed-constexpr", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000",
                f"-gencode=arch=compute_{arch},code=[sm_{arch},compute_{arch}]", "-Xptxas", "-v", "-Xcompiler", "-fPIC",
                *(f"-I{p}" for p in include_paths())], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)))
    found = {}
    for arch, target, job in jobs:
        log = job.communicate(timeout=900)[0]
        assert job.returncode == 0, log
        report = re.findall(
            r"Function properties for (\S+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill "
            r"loads\n.*?Used (\d+) registers", log)
        names = dict(zip((r[0] for r in report), _demangle(r[0] for r in report)))
        for mangled, stack, stores, loads, registers in report:
            found[arch, names[mangled]] = Kernel(int(stack), int(stores) + int(loads), int(registers))

        def dump(what):
            return subprocess.run([cuobjdump, what, str(target)], text=True, capture_output=True, check=True).stdout

        parts = re.split(r"Function : (\S+)", dump("-sass"))
        for mangled, body in zip(parts[1::2], parts[2::2]):
            found[arch, names[mangled]].code = [
                (int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", body, re.M)]
        parts = re.split(r"\.entry (\w+)\(", dump("-ptx"))
        for mangled, body in zip(parts[1::2], parts[2::2]):
            found[arch, names[mangled]].ptx = body
    return found


def test_every_op_has_kernels(kernels):
    for arch in ARCHS:
        assert len([name for a, name in kernels if a == arch]) > 100
    assert all(k.code and k.ptx for k in kernels.values())


def test_no_spills_and_no_local_memory(kernels):
    bad = [(*key, k.stack, k.spills) for key, k in kernels.items() if k.stack or k.spills]
    assert not bad, f"kernels with a stack or spilled registers: {bad}"
    bad = [key for key, k in kernels.items() if _count((t for _, t in k.code), r"(LDL|STL)\b")]
    assert not bad, f"kernels that use local memory: {bad}"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name, writes", WIDE, ids=[w[0] for w in WIDE])
def test_main_path_moves_128_bits(kernels, arch, name, writes):
    """The main loop reads and writes memory in 16-byte words alone, with two or more loads under way at once."""
    found = [k for (a, n), k in kernels.items() if a == arch and n.startswith(f"items_kernel<{name},")]
    assert len(found) == 2, "one for each size of the table"
    for kernel in found:
        main = max(kernel.loops(), key=lambda loop: _count(loop, r"LDG\.E\.128"))
        assert _count(main, r"LDG\.E\.128") == _count(main, "LDG") >= 2
        assert _count(main, r"STG\.E\.128") == _count(main, "STG")
        assert (_count(main, "STG") > 0) == writes


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["float", "__nv_bfloat16"])
def test_truncate_moves_128_bits(kernels, arch, dtype):
    """The loop over the widths stores q, or loads gradients, in 16-byte words alone, two or more at once."""
    for name, op, other in ((f"truncate_kernel<{dtype}, {dtype},", "STG", "LDG"),
                            *((f"truncate_backward_kernel<{dtype}, {dtype}, {kind},", "LDG", "STG") for kind in range(3))):
        found = [k for (a, n), k in kernels.items() if a == arch and n.startswith(name)]
        assert len(found) == 2, "one for each size of the table"
        for kernel in found:
            main = max(kernel.loops(), key=lambda loop: _count(loop, rf"{op}\.E\.128"))
            assert _count(main, rf"{op}\.E\.128") == _count(main, op) >= 2, name
            assert _count((text for _, text in kernel.code), rf"{other}\.E\.128") >= 2


@pytest.mark.parametrize("name, loads, stores", [
    ("pack_kernel<{}", 8, 1), ("unpack_kernel<{}, Codes", 4, 2), ("unpack_kernel<{}, Values<float, float>", 4, 2),
    ("unpack_kernel<{}, Values<float, __nv_bfloat16>", 4, 1), ("unpack_kernel<{}, Values<double, double>", 4, 4)])
def test_packing_moves_128_bits(kernels, arch, name, loads, stores):
    """Whole tiles: all loads of one before the first is needed; beside them, single elements of the last tile alone."""
    for layout in ("false", "true"):
        found = [k for (a, n), k in kernels.items() if a == arch and n.startswith(name.format(layout) + ",")]
        assert len(found) == 2, "one for each size of the table"
        for kernel in found:
            code = [text for _, text in kernel.code]
            assert _count(code, r"LDG\.E\.128") == loads and _count(code, r"STG\.E\.128") >= stores
            first, last = (next(i for i, text in order if re.search(r"\bLDG\.E\.128", text)) for order in (
                enumerate(code), reversed(list(enumerate(code)))))
            assert not _count(code[first:last], "(STS|SHFL)"), "a load waits for another"


def test_nothing_is_fused(kernels):
    """Multiplications and additions are rounded one by one; only division, once per scale, is made of FMAs."""
    bad = [key for key, k in kernels.items() if re.search(r"\bfma\.", k.ptx)]
    assert not bad, f"kernels whose PTX has fused operations: {bad}"
    loops = {key: k.loops() for key, k in kernels.items() if key[1].startswith("items_kernel")}
    bad = [key for key, bodies in loops.items() for body in bodies
           if _count(body, "(LDG|STG)") and _count(body, "(FFMA|DFMA)")]
    assert not bad, f"kernels with fused operations in their loops: {bad}"
