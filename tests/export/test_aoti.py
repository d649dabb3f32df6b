"""AOTInductor packages of all three methods, run from Python and by a C++ program without it; schemas in C++."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import quantops as Q
from quantops.library import OPS

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
compiled = pytest.mark.skipif(
    Q.info()["devices"]["cpu"]["implementation"] != "cpp" or COMPILER is None, reason="no compiled library, or compiler"
)


def test_schemas_in_cpp_are_those_of_the_table():
    text = (ROOT / "csrc" / "cpu" / "schemas.cpp").read_text()
    found = ["".join(re.findall(r'"([^"]*)"', call)) for call in re.findall(r"m\.def\((.*?)\);", text, re.DOTALL)]
    assert found == [name + schema for schemas in OPS.values() for name, schema in schemas.items()]


@compiled
@pytest.mark.parametrize(
    "backend, loaded, text",
    [
        (
            "reference",
            "lib = torch.library.Library('quantops', 'FRAGMENT'); lib.define('absmax(Tensor[] w) -> Tensor')",
            "quantops::absmax(Tensor[] w) -> Tensor, expected",
        ),
        # As one that was built before the schemas were in C++: it has kernels, and defines no op.
        ("", "torch.ops.load_library = lambda path: None", "no quantops::absmax, expected quantops::absmax(Tensor[] w"),
    ],
    ids=["another schema", "no schema"],
)
def test_a_library_of_other_sources_is_refused(backend, loaded, text, tmp_path):
    """It would read arguments that are not there."""
    env = {**os.environ, "QUANTOPS_BACKEND": backend, "PYTHONPATH": str(ROOT)}
    program = f"import torch; {loaded}; import quantops"
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert f"was built from other sources: it has {text}" in run.stderr and "build it again" in run.stderr


class Networks(nn.Module):
    """A small network of each method, with and without quantized activations, in one graph: a package takes seconds."""

    configs = {
        "msq": Q.MSQConfig(bits=4, act_bits=4),
        "scale_grad": Q.MSQConfig(bits=2, scale=2.8, scale_grad=True, per_row=True),
        "truncquant": Q.TruncQuantConfig(bits=(8, 4), act_bits="weights"),
        "out_scale": Q.TruncQuantConfig(
            bits=(4, 2), scale="absmax", companding="tanh", out_scale="absmean", batch_norm=False
        ),
        "cpq": Q.CPQConfig(bits=3, act_bits=4),
        "dropbits": Q.CPQConfig(bits=4, dropbits="learned"),
    }

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.each = nn.ModuleList()
        for config in self.configs.values():
            net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
            self.each.append(Q.quantize_(net, config))

    def forward(self, x):
        return torch.stack([net(x) for net in self.each])


@compiled
def test_packages_run_from_python_and_from_cpp(tmp_path):
    model = Networks()
    x = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    model(x)  # activations start from a batch
    model.eval()
    want = model(x).detach()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    got = torch._inductor.aoti_load_package(package)(x)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)

    torch_folder, serve = Path(torch.__file__).parent, tmp_path / "serve"
    lib = torch_folder / "lib"
    flags = ["-std=c++20", "-w", f"-I{torch_folder / 'include'}", f"-L{lib}", f"-Wl,-rpath,{lib}"]
    subprocess.run(
        [COMPILER, *flags, ROOT / "csrc" / "serve.cpp", "-o", serve, "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"],
        check=True,
    )
    for count in (5, 2):
        y = x[:count].contiguous()
        run = subprocess.run(
            [serve, Q.backends.library_path("cpu"), package, *map(str, y.shape)],
            input=y.numpy().tobytes(),
            capture_output=True,
        )
        assert run.returncode == 0, run.stderr.decode()
        found = torch.frombuffer(bytearray(run.stdout), dtype=torch.float32).reshape(len(model.each), count, 3)
        torch.testing.assert_close(found, model(y).detach(), rtol=1e-6, atol=1e-6)
    run = subprocess.run([serve, tmp_path / "absent.so", package, "1"], capture_output=True, text=True)
    assert run.returncode == 1 and "absent.so" in run.stderr
