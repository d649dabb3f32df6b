"""Annotations: every public name has them, and a user's script passes ``mypy --strict``."""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import quantops

MODULES = ("quantops", "quantops.foreach", "quantops.export")
INTERNAL = ("call", "dense_rows", "empty_like")  # what foreach imports for itself
SCRIPT = """
import torch
from torch import nn

import quantops
from quantops import IntWeight, MSQConfig, MSQController, TruncQuantConfig

model: nn.Sequential = quantops.quantize_(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), MSQConfig(bits=6))
controller = MSQController(model, 8.0, interval=10, threshold=0.3, strength=1e-3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x: torch.Tensor = torch.randn(4, 8)


def task() -> torch.Tensor:
    out: torch.Tensor = model(x)
    return out.square().mean()


for _ in range(3):
    loss = task() + controller.strength * quantops.penalty(model)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    entry = controller.step(task)
    if entry is not None:
        print(entry["compression"])
report = quantops.bit_report(model)
print(report, report.rows[0].bits + 1, report.compression * 2, controller.done, controller.state_dict()["steps"])
ints: dict[str, IntWeight] = quantops.to_int(model)
q: torch.Tensor = ints["0.weight"].dequantize()
quantops.save_int(ints, "weights.safetensors")
plain: nn.Sequential = quantops.plain_model(model)

scale: torch.Tensor = quantops.absmax(q)
codes: torch.Tensor = quantops.encode(q, scale, 4)
packed: quantops.Packed = quantops.pack(codes, 4)
again: torch.Tensor = quantops.decode(packed, scale, bits=2)
value: quantops.MSQ = quantops.msq(q, None, bits=4)
listed: list[torch.Tensor] = quantops.foreach.round_clamp([q], None, 4)
acts: torch.Tensor = quantops.quantize_activation(x, 1.0, 4)

wide = quantops.quantize_(nn.Linear(8, 2), TruncQuantConfig(bits=(8, 4)))
joint = quantops.joint_loss(wide, lambda out: out.sum(), x, distill=0.5)
first: float = float(joint.losses[8])
quantops.set_bits(wide, 4)
traces: torch.Tensor = quantops.hessian_trace(task(), list(model.parameters()), 2)
print(quantops.info(), quantops.__version__, first)
"""


def _public():
    """(name, function) of public functions and of the public methods that classes of quantops define themselves."""
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]:
            value = getattr(module, name)
            if not getattr(value, "__module__", "").startswith("quantops") or name in INTERNAL:
                continue
            if inspect.isfunction(value):
                yield f"{module_name}.{name}", value
            elif inspect.isclass(value):
                for kind in value.__mro__:
                    if not kind.__module__.startswith("quantops"):
                        continue
                    for key, member in vars(kind).items():
                        member = getattr(member, "__func__", member)
                        member = member.fget if isinstance(member, property) else member
                        public = not key.startswith("_") or key in ("__init__", "__str__")
                        if public and inspect.isfunction(member) and member.__module__.startswith("quantops"):
                            yield f"{module_name}.{name}.{key}", member


def test_every_public_name_is_annotated():
    missing = set()
    for name, function in _public():
        signature = inspect.signature(function)
        holes = [
            p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name not in ("self", "cls")
        ]
        if signature.return_annotation is signature.empty:
            holes.append("return")
        if holes:
            missing.add(f"{name}: {', '.join(holes)}")
    assert not missing, "\n".join(sorted(missing))


def test_a_users_script_passes_mypy_strict(tmp_path):
    pytest.importorskip("mypy", reason="make lint installs mypy")
    assert (Path(quantops.__file__).parent / "py.typed").exists()
    (tmp_path / "script.py").write_text(SCRIPT)
    # silent: as of an installed package, errors in quantops itself are not the script's
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--cache-dir",
        str(tmp_path),
        "script.py",
    ]
    paths = os.pathsep.join([str(Path(quantops.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(command, cwd=tmp_path, env={**os.environ, "MYPYPATH": paths}, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    program = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert program.returncode == 0, program.stderr


def test_the_command_tells_the_version():
    found = subprocess.run([sys.executable, "-m", "quantops", "--version"], capture_output=True, text=True)
    assert found.stdout.split() == ["quantops", quantops.__version__] and found.returncode == 0
