"""What nvcc makes of the CUDA kernels, read from the machine code, on machines without a GPU too.

No registers spilled, no local memory, 128-bit loads and stores on the main path, several loads in flight, and no
multiplication fused with an addition, for sm_80 and sm_90.
"""

import re

import pytest

from bench import sass
from bench.sass import count

ARCHS = ("80", "90")

# The kernels whose main path must be wide: (name in the demangled symbol, does it write).
WIDE = [(f"{op}<{types.replace('T', t)}>", writes) for t in ("float", "__nv_bfloat16") for op, types, writes in (
    ("AbsMax", "T", False), ("AbsMean", "T", False), ("RoundClamp", "T, T", True), ("Msq", "T, T", True),
    ("Msq", "T, None", False), ("Lsb", "T", True), ("Encode", "T", True), ("Backward", "T, T, false, false", True),
    ("Backward", "T, T, true, false", True), ("Backward", "T, T, true, true", True), ("AddLsbGrad", "T", True),
    ("Decode", "float, T", True), ("RoundClamp", "float, T", True), ("Msq", "float, T", True))]
WIDE = sorted(set(WIDE))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """{(arch, demangled name): Kernel} of all .cu files."""
    if sass.nvcc() is None:
        pytest.skip("nvcc was not found: put the CUDA toolkit's on PATH, or set CUDA_HOME")
    if sass.tool("cuobjdump") is None:
        pytest.skip("cuobjdump was not found: install the CUDA toolkit's binary utilities, or triton, which has one")
    return sass.cuda_kernels(ARCHS, tmp_path_factory.mktemp("cubin"))


def test_every_op_has_kernels(kernels):
    for arch in ARCHS:
        assert len([name for a, name in kernels if a == arch]) > 100
    assert all(k.code and k.ptx for k in kernels.values())


def test_no_spills_and_no_local_memory(kernels):
    bad = [(*key, k.stack, k.spills) for key, k in kernels.items() if k.stack or k.spills]
    assert not bad, f"kernels with a stack or spilled registers: {bad}"
    bad = [key for key, k in kernels.items() if count((t for _, t in k.code), r"(LDL|STL)\b")]
    assert not bad, f"kernels that use local memory: {bad}"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name, writes", WIDE, ids=[w[0] for w in WIDE])
def test_main_path_moves_128_bits(kernels, arch, name, writes):
    """The main loop reads and writes memory in 16-byte words alone, with two or more loads under way at once."""
    found = [k for (a, n), k in kernels.items() if a == arch and n.startswith(f"items_kernel<{name},")]
    assert len(found) == 2, "one for each size of the table"
    for kernel in found:
        main = max(kernel.loops(), key=lambda loop: count(loop, r"LDG\.E\.128"))
        assert count(main, r"LDG\.E\.128") == count(main, "LDG") >= 2
        assert count(main, r"STG\.E\.128") == count(main, "STG")
        assert (count(main, "STG") > 0) == writes


def test_nothing_is_fused(kernels):
    """Multiplications and additions are rounded one by one; only division, once per scale, is made of FMAs."""
    bad = [key for key, k in kernels.items() if re.search(r"\bfma\.", k.ptx)]
    assert not bad, f"kernels whose PTX has fused operations: {bad}"
    loops = {key: k.loops() for key, k in kernels.items() if key[1].startswith("items_kernel")}
    bad = [key for key, bodies in loops.items() for body in bodies
           if count(body, "(LDG|STG)") and count(body, "(FFMA|DFMA)")]
    assert not bad, f"kernels with fused operations in their loops: {bad}"
