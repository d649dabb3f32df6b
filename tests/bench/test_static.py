"""How instructions of machine code are counted: ways, loops, occupancy."""

import pytest

from bench.machine_code import sass, static


def _kernel(*texts):
    kernel = sass.Kernel(0, 0, 32)
    kernel.code = [(16 * i, text) for i, text in enumerate(texts)]
    return kernel


def _opcodes(way):
    return [sass.opcode(text) for _, text in way]


def test_ways_through_machine_code():
    kernel = _kernel(
        "MOV R1, R2",
        "@P0 BRA 0x40",
        "CALL.REL 0x90",
        "FADD R1, R1, R2",
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "@P1 BRA 0x70",
        "FRND R4, R4",
        "STG.E.128 desc[UR4][R2.64], R4",
        "@!P2 BRA 0x40",
        "EXIT",
    )
    assert kernel.spans() == [(0x40, 0x80)]
    assert _opcodes(kernel.around(0x40, 0x80, [0x70], longest=True)) == ["LDG", "BRA", "FRND", "STG", "BRA"]
    assert _opcodes(kernel.around(0x40, 0x80, [0x70], longest=False)) == ["LDG", "BRA", "STG", "BRA"]
    assert _opcodes(kernel.shortest([0x40, 0x70])) == ["MOV", "BRA", "LDG", "BRA", "STG", "BRA", "EXIT"]
    found = static.cuda_cost(kernel, reads=4, writes=4)
    assert (
        found["bytes"] == 8
        and found["elements"] == 4
        and found["instructions"] == {"issue": 1.25, "alu": 0, "fp64": 0, "conversions": 0.25}
    )
    assert found["binds"] == "memory" and found["share_of_copy"] == 1 and found["occupancy"] == 1
    with pytest.raises(static.NoMainPath, match="STG of 12 bytes a thread expected"):
        static.cuda_cost(kernel, reads=4, writes=3)


def test_a_loop_over_results_is_counted_as_often_as_it_turns():
    kernel = _kernel(
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "FMUL R4, R4, R4",
        "STG.E.128 desc[UR4][R2.64], R4",
        "@P0 BRA 0x10",
        "@P1 BRA 0x0",
        "EXIT",
    )
    found = static.cuda_cost(kernel, reads=4, writes=16)  # four results of what was read once
    assert found["instructions"]["issue"] == (1 + 4 * 3 + 1) / 4 and found["bytes"] == 20


def test_occupancy():
    assert static.occupancy(sass.Kernel(0, 0, 80), 256) == 24 / 64  # three blocks of 8 warps in 65536 registers
    assert static.occupancy(sass.Kernel(0, 0, 32, shared=100 * 1024), 128) == 8 / 64


def test_bits_kept_beside_wide_accesses_are_on_the_way():
    """4 elements and a nibble for each: the way leads through the byte's load and not past it."""
    kernel = _kernel(
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "@P2 BRA 0x50",
        "LDG.E.U16 R8, desc[UR4][R2.64]",
        "SHF.R R8, R8, R9",
        "FMUL R4, R4, R8",
        "STG.E.128 desc[UR4][R2.64], R4",
        "@P1 BRA 0x0",
        "EXIT",
    )
    found = static.cuda_cost(kernel, reads=4.5, writes=4, longest=False)
    assert found["elements"] == 4 and found["bytes"] == 8.5 and found["instructions"]["issue"] == 7 / 4
    assert static.cuda_cost(kernel, reads=4, writes=4, longest=False)["instructions"]["issue"] == 4 / 4
    assert static.cuda_cost(kernel, reads=2, writes=4, longest=False, optional=2)["bytes"] == 6
    with pytest.raises(static.NoMainPath, match="LDG of 1 bytes a thread expected for bits"):
        static.cuda_cost(kernel, reads=4.25, writes=4)


def test_where_ways_part_between_loads_a_loop_with_fewer_is_counted():
    kernel = _kernel(
        "@P0 BRA 0x40",
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "STG.E.128 desc[UR4][R2.64], R4",
        "BRA 0x60",
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "STG.E.128 desc[UR4][R2.64], R4",
        "@P1 BRA 0x0",
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "STG.E.128 desc[UR4][R2.64], R4",
        "@P1 BRA 0x70",
        "EXIT",
    )
    found = static.cuda_cost(kernel, reads=4, writes=4)
    assert found["elements"] == 4 and found["instructions"]["issue"] == 3 / 4
