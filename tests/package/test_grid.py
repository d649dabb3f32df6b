"""The grid of the package: every op has its cell in every column, and no file is outside of it and of what is named
here. Columns and their paths are CELLS of quantops/library.py."""

import ast
import re
from pathlib import Path

import pytest

from quantops import checks, default, library, reference
from quantops.library import AUTOGRAD, CELLS, OPS

ROOT = Path(__file__).parents[2]
FAMILIES = tuple(OPS)
# Ops whose reference has another name: the same into given memory, or a part of it.
REFERENCES = {
    "round_clamp_out": "round_clamp",
    "msq_out": "msq",
    "lsb_stats": "msq",
    "add_lsb_grad_": "add_lsb_grad",
    "decode_packed": "decode",
    "own_scale": "absmax",
}
REDUCTIONS = "own_scale"  # absmax or absmean, by the kernels of these: it is registered beside them

# The files of a column's folder that belong to no family. Those of a family are its cell, and parts of it: the family's
# name and an idea.
HELPERS = {
    "quantops/reference": {"__init__.py", "paper.py", "tanh.py"},
    "quantops/default": {"__init__.py"},
    "quantops/autograd": {"__init__.py", "common.py"},
    "quantops/checks": {"__init__.py", "arguments.py", "integral.py", "scaling.py", "written.py"},
    "csrc": {
        *("exponential.h", "grid_argument.h", "packed_tensor.h", "quant_math.h", "stable_tensor.h", "tanh.h"),
        "serve.cpp",
    },
    "csrc/cpu": {"blocks.h", "chunks.h", "instruction_set.cpp", "list.h", "schemas.cpp", "simd.h"},
    "csrc/cuda": {
        "elements.cuh",
        "launch.cuh",
        "magnitudes.cuh",
        "one_tensor.cuh",
        "sums.cuh",
        "switches.cuh",
        "table.cuh",
    },
    "kernels": {"__init__.py", "exponential.py", "launch.py", "math.py", "memory.py", "table.py", "tanh.py"},
    "tests/ops": {f"test_{name}.py" for name in ("aliasing", "devices", "errors", "limits", "torch", "transforms")},
    "tests/emulation": {"conftest.py", "emulation.py"},
    "bench/ops": {
        *("__init__.py", "test_ops.py", "registry.py", "peers.py", "shapes.py", "room.py"),  # a row
        # Commands, and what they tell.
        *("run.py", "calls.py", "small.py", "steps.py", "compare.py", "report.py", "targets.py"),
    },
}
IDEAS = "arguments|backward|draw|front|gates|gradients|lookup|loops|math|quantizer|record|soft"
ROOMS = {
    "tests": {"bench", "emulation", "export", "fuzz", "integrations", "machine_code", "ops", "package", "training"},
    "bench": {"gpu", "machine_code", "ops", "results", "training"},
    "csrc": {"cpu", "cuda"},
    "quantops": {"autograd", "checks", "default", "demo", "export", "integrations", "methods", "reference"},
}
SOURCES = {".py", ".h", ".cpp", ".cu", ".cuh"}


def _text(column, family, like="{}"):
    folder, _, name = CELLS[column].format(like.format(family)).rpartition("/")
    return "".join(path.read_text() for path in sorted((ROOT / folder).glob(name)))


def _registered(column, family):
    return set(re.findall(r"m\.impl\(\"(\w+)\"", _text(column, family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_its_file_in_every_column(family):
    without = [] if set(OPS[family]) & set(AUTOGRAD) else ["autograd"]
    missing = [path for column, path in CELLS.items() if not (ROOT / path.format(family)).is_file()]
    assert missing == [CELLS[column] for column in without]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_op_is_in_its_cell_of_every_column(family):
    ops = set(OPS[family])
    assert all(hasattr(reference, REFERENCES.get(op, op)) for op in ops)
    assert all(callable(getattr(getattr(default, family), op)) for op in ops)
    assert callable(getattr(checks, family).structure)
    assert {AUTOGRAD[op].__module__ for op in ops & set(AUTOGRAD)} <= {f"quantops.autograd.{family}"}
    assert all(hasattr(library, f"_fake_{op}") for op in ops)

    beside = {"uniform": ops | {REDUCTIONS}, "own_scale": ops - {REDUCTIONS}}
    for column in ("C++", "CUDA"):
        assert _registered(column, family) == beside.get(family, ops), column
    bound = set()
    for node in ast.parse(_text("Triton", family)).body:
        bound |= {node.name} if isinstance(node, ast.FunctionDef) else set()
        bound |= {a.name for a in node.names} if isinstance(node, ast.ImportFrom) else set()
    assert ops <= bound

    tests, emulated = _text("tests", family, "{}*"), _text("emulation", family)
    assert not [op for op in ops if not re.search(rf"\b{op.removesuffix('_out')}\b", tests)]
    assert not [op for op in ops if not re.search(rf"\b{op}\b", emulated)]
    assert "CASES = " in _text("bench", family)  # that every op is in one: tests/bench/test_bench.py


def test_every_family_runs_in_the_interpreter():
    (names,) = re.findall(r"^INTERPRETED := (.+)$", (ROOT / "Makefile").read_text(), re.M)
    assert set(FAMILIES) <= set(names.split())
    assert all((ROOT / f"tests/ops/test_{name}.py").is_file() for name in names.split())


@pytest.mark.parametrize("folder", HELPERS)
def test_no_file_is_outside(folder):
    files = {p.name for p in (ROOT / folder).iterdir() if p.suffix in SOURCES}
    of_families = re.compile(rf"(test_)?({'|'.join(FAMILIES)})(_({IDEAS}))*\.\w+")
    assert {f for f in files if not of_families.fullmatch(f)} == HELPERS[folder]


@pytest.mark.parametrize("folder", ROOMS)
def test_no_folder_is_outside(folder):
    found = {p.name for p in (ROOT / folder).iterdir() if p.is_dir() and not p.is_symlink()}
    assert found - {"__pycache__"} == ROOMS[folder]


def test_no_file_is_too_long():
    """Of 600 lines and more no one has an idea: they are split by what they are about."""
    for room in ("quantops", "kernels", "csrc", "tests", "bench"):
        for path in (ROOT / room).rglob("*"):
            if path.suffix in SOURCES:
                lines = path.read_text().count("\n")
                assert lines <= 600, f"{path.relative_to(ROOT)}: {lines} lines"
