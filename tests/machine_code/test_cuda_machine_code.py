"""What nvcc makes of the CUDA kernels, read from the machine code, on machines without a GPU too.

No registers spilled, no local memory, 128-bit loads and stores on the main path, several loads in flight where memory
is what takes time, and no multiplication fused with an addition but where that is written: all files for sm_80 and
sm_90, and one file each for what consumer GPUs have, sm_86, sm_89 and sm_120.
"""

import re

import pytest

from bench.machine_code import sass
from bench.machine_code.sass import count

ARCHS = ("80", "90")
OTHER_ARCHS = {"86": "packing", "89": "truncate", "120": "uniform"}

# The kernels whose main path must be wide: (name in the demangled symbol, does it write).
WIDE = [
    (f"{op}<{types.replace('T', t)}>", writes)
    for t in ("float", "__nv_bfloat16")
    for op, types, writes in (
        ("AbsMax", "T", False),
        ("AbsMean", "T", False),
        ("RoundClamp", "T, T", True),
        ("Msq", "T, T", True),
        ("Msq", "T, None", False),
        ("Lsb", "T", True),
        ("Encode", "T", True),
        ("Backward", "T, T, false, false", True),
        ("Backward", "T, T, true, false", True),
        ("Backward", "T, T, true, true", True),
        ("AddLsbGrad", "T", True),
        ("Decode", "float, T", True),
        ("RoundClamp", "float, T", True),
        ("Msq", "float, T", True),
        ("Nearest", "T, T", True),
        ("Nearest", "float, T", True),
        ("Bounded", "T, T, 7", True),
        ("WinnerOne", "T, T, false", True),
        ("WinnerOne", "T, T, true", True),
    )
]
WIDE = sorted(set(WIDE))
CATEGORICAL = ("Nearest", "Bounded", "WinnerOne")
WIDE = [(arch, *w) for arch in ARCHS for w in WIDE] + [("120", *w) for w in WIDE if not w[0].startswith(CATEGORICAL)]
# Those that do more with an element than read and write it, in a loop over the elements of a vector.
ROLLED = (
    "Sample<{0}, {0}>",
    "SoftValue<{0}, {0}>",
    "WinnerMany<{0}, {0}, false>",
    "WinnerMany<{0}, {0}, true>",
    "SoftBackward<{0}, {0}, false>",
    "SoftBackward<{0}, {0}, true>",
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """{(arch, demangled name): Kernel} of all .cu files, and of one each for the other archs that nvcc has."""
    if sass.nvcc() is None:
        pytest.skip("nvcc was not found: put the CUDA toolkit's on PATH, or set CUDA_HOME")
    if sass.tool("cuobjdump") is None:
        pytest.skip("cuobjdump was not found: install the CUDA toolkit's binary utilities, or triton, which has one")
    folder, known = tmp_path_factory.mktemp("cubin"), sass.run(sass.nvcc(), "--list-gpu-arch").split()
    found = sass.cuda_kernels(ARCHS, folder)
    for arch, family in OTHER_ARCHS.items():
        if f"compute_{arch}" in known:
            found |= sass.cuda_kernels([arch], folder, [s for s in sass.SOURCES if s.stem == family])
    return found


def _named(kernels, arch, start):
    """The two kernels, one for each size of the table, whose names begin so."""
    if not any(a == arch for a, _ in kernels):
        pytest.skip(f"this nvcc does not know sm_{arch}: CUDA 12.8 and newer do")
    found = [k for (a, n), k in kernels.items() if a == arch and n.startswith(start)]
    assert len(found) == 2, "one for each size of the table"
    return found


def test_every_op_has_kernels(kernels):
    for arch in ARCHS:
        assert len([name for a, name in kernels if a == arch]) > 100
    assert all(k.code and k.ptx for k in kernels.values())


def test_no_spills_and_no_local_memory(kernels):
    bad = [(*key, k.stack, k.spills) for key, k in kernels.items() if k.stack or k.spills]
    assert not bad, f"kernels with a stack or spilled registers: {bad}"
    bad = [key for key, k in kernels.items() if count((t for _, t in k.code), r"(LDL|STL)\b")]
    assert not bad, f"kernels that use local memory: {bad}"


@pytest.mark.parametrize("arch, name, writes", WIDE, ids=["-".join(w[:2]) for w in WIDE])
def test_main_path_moves_128_bits(kernels, arch, name, writes):
    """The main loop reads and writes memory in 16-byte words alone, with two or more loads under way at once."""
    for kernel in _named(kernels, arch, f"items_kernel<{name},"):
        main = max(kernel.loops(), key=lambda loop: count(loop, r"LDG\.E\.128"))
        assert count(main, r"LDG\.E\.128") == count(main, "LDG") >= 2
        assert count(main, r"STG\.E\.128") == count(main, "STG")
        assert (count(main, "STG") > 0) == writes


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ROLLED)
def test_long_code_stands_once_and_moves_128_bits(kernels, arch, name):
    """The loop over vectors, around that over elements: 16-byte words alone, and what fits the instruction cache."""
    for dtype in ("float", "__nv_bfloat16"):
        for kernel in _named(kernels, arch, f"items_kernel<{name.format(dtype)},"):
            loops = [[text for at, text in kernel.code if low <= at <= high] for low, high in kernel.spans(nested=True)]
            main = min((loop for loop in loops if count(loop, r"LDG\.E\.128")), key=len)
            assert count(main, r"LDG\.E\.128") == count(main, "LDG") == 2 - name.startswith(("Sample", "SoftValue"))
            assert count(main, r"STG\.E\.128") == count(main, "STG") == 1
            assert len(main) < 1500 and len(kernel.code) < 6000


@pytest.mark.parametrize("arch", [*ARCHS, "89"])
@pytest.mark.parametrize("dtype", ["float", "__nv_bfloat16"])
def test_truncate_moves_128_bits(kernels, arch, dtype):
    """The loop over the widths stores q, or loads gradients, in 16-byte words alone, two or more at once."""
    for name, op, other in (
        (f"truncate_kernel<{dtype}, {dtype},", "STG", "LDG"),
        *((f"truncate_backward_kernel<{dtype}, {dtype}, {kind},", "LDG", "STG") for kind in range(3)),
    ):
        for kernel in _named(kernels, arch, name):
            main = max(kernel.loops(), key=lambda loop: count(loop, rf"{op}\.E\.128"))
            assert count(main, rf"{op}\.E\.128") == count(main, op) >= 2, name
            assert count((text for _, text in kernel.code), rf"{other}\.E\.128") >= 2


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "name, read",
    [
        ("categorical_activation_kernel<T, T>", 1),
        ("categorical_activation_kernel<float, T>", 1),
        ("factor_kernel<T, T, T, true>", 2),
        ("factor_kernel<T, T, T, false>", 2),
        ("factor_kernel<T, T, float, true>", 2),
    ],
)
@pytest.mark.parametrize("dtype", ["float", "__nv_bfloat16"])
def test_activations_move_128_bits(kernels, arch, name, read, dtype):
    """The loop over several vectors: beside 16-byte words, one number for the quarters of each. Where sums are
    wanted, a row of the table comes from shared memory as one word of 16 bytes."""
    name = name.replace("T", dtype)
    kernel = kernels[arch, name]
    main = max(kernel.loops(), key=lambda loop: count(loop, r"LDG\.E\.128"))
    vectors = count(main, r"(LDG|STG)\.E\.U(8|16)")
    assert vectors >= 2, "several at a time"
    assert count(main, "LDG") - count(main, r"LDG\.E\.128") == (vectors if name.startswith("factor") else 0)
    assert count(main, "STG") - count(main, r"STG\.E\.128") == (0 if name.startswith("factor") else vectors)
    assert count(main, r"LDG\.E\.128") >= read * vectors and count(main, r"STG\.E\.128") >= vectors
    assert count(main, r"LDS\.128") == (count(main, "LDS") if name.endswith("true>") else 0)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["activation_kernel<{0}, {0}, false, false>", "gradient_kernel<{0}, false, false>"])
@pytest.mark.parametrize("dtype", ["float", "__nv_bfloat16"])
def test_uniform_activations_move_128_bits(kernels, arch, name, dtype):
    """The loop over two vectors of eight elements: beside 16-byte words, of each a byte of bits, or eight numbers."""
    kernel = kernels[arch, name.format(dtype)]
    main = max(kernel.loops(), key=lambda loop: count(loop, r"LDG\.E\.128"))
    words = 2 * (2 if dtype == "float" else 1)
    forward = name.startswith("activation")
    assert count(main, r"LDG\.E\.128") >= words * (1 if forward else 2) and count(main, r"STG\.E\.128") == words
    kept = "STG" if forward else "LDG"
    assert count(main, kept) - count(main, rf"{kept}\.E\.128") == count(main, rf"{kept}\.E\.(U8|64)") == 4
    print(f"{len(main)} instructions for 16 elements")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["activation_kernel<{0}, {0}, false, true>", "gradient_kernel<{0}, false, true>"])
@pytest.mark.parametrize("dtype", ["float", "__nv_bfloat16"])
def test_activations_behind_fronts_move_128_bits(kernels, arch, name, dtype):
    """Nothing but x, or x and dL/dq, comes in, and nothing but the result goes out, in 16-byte words alone."""
    kernel = kernels[arch, name.format(dtype)]
    main = max(kernel.loops(), key=lambda loop: count(loop, r"LDG\.E\.128"))
    words = 2 * (2 if dtype == "float" else 1)
    assert count(main, r"LDG\.E\.128") == count(main, "LDG") == words * (1 if name.startswith("activation") else 2)
    assert count(main, r"STG\.E\.128") == count(main, "STG") == words
    print(f"{len(main)} instructions for 16 elements, {kernel.registers} registers")


@pytest.mark.parametrize("arch", [*ARCHS, "86"])
@pytest.mark.parametrize(
    "name, loads, stores",
    [
        ("pack_kernel<{}", 8, 1),
        ("unpack_kernel<{}, Codes", 4, 2),
        ("unpack_kernel<{}, Values<float, float>", 4, 2),
        ("unpack_kernel<{}, Values<float, __nv_bfloat16>", 4, 1),
        ("unpack_kernel<{}, Values<double, double>", 4, 4),
    ],
)
def test_packing_moves_128_bits(kernels, arch, name, loads, stores):
    """Whole tiles: all loads of one before the first is needed; beside them, single elements of the last tile alone."""
    for layout in ("false", "true"):
        for kernel in _named(kernels, arch, name.format(layout) + ","):
            code = [text for _, text in kernel.code]
            assert count(code, r"LDG\.E\.128") == loads and count(code, r"STG\.E\.128") >= stores
            first, last = (
                next(i for i, text in order if re.search(r"\bLDG\.E\.128", text))
                for order in (enumerate(code), reversed(list(enumerate(code))))
            )
            assert not count(code[first:last], "(STS|SHFL)"), "a load waits for another"


def test_only_what_is_written_as_fused_is(kernels):
    """Products, sums and fused ones are all of the kinds that say how they round, which no assembler joins."""
    bad = [(*key, k.loosely_rounded()[0]) for key, k in kernels.items() if k.loosely_rounded()]
    assert not bad, f"kernels whose PTX leaves roundings to the assembler: {bad}"
    quantizing = [k.ptx for (_, name), k in kernels.items() if name.startswith("items_kernel<Msq<float")]
    assert quantizing
    assert all(len(re.findall(rf"\b{op}\.rn\.f32", ptx)) > 20 for ptx in quantizing for op in ("mul", "fma"))
