"""setup.py and the compilers: g++ and clang build csrc/cpu without a warning, and a build that fails says why."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from quantops import backends, compiled

ROOT = Path(__file__).resolve().parents[2]
# One clang of those that are there: any from 14 on will do.
CLANGS = [c for c in ("clang++", "clang++-14", "clang++-19") if shutil.which(c)]
COMPILERS = [*filter(shutil.which, ["g++"]), *CLANGS[:1]]


@pytest.mark.skipif(not COMPILERS, reason="no C++ compiler")
@pytest.mark.parametrize("compiler", COMPILERS or [None])
def test_compilers_have_nothing_to_say(compiler):
    for source in sorted(ROOT.glob("csrc/cpu/*.cpp")):
        run = subprocess.run(
            [
                compiler,
                "-fsyntax-only",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-std=c++17",
                f"-I{ROOT / 'csrc'}",
                *(f"-isystem{p}" for p in include_paths()),
                "-DTORCH_TARGET_VERSION=0x020a000000000000",
                "-fvisibility=hidden",
                source,
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == 0 and not run.stderr, run.stderr[:2000]


@pytest.fixture
def tree(tmp_path):
    """What setup.py needs to build the CPU library, in a folder of its own."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "quantops/version.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    return tmp_path


def build(tree, compiler):
    """Builds in place; gives back what was said and the file that tells why there is no library."""
    # The interpreter's own launcher asks for the torch to build with; torch is where this process has it.
    env = {
        **os.environ,
        "CC": str(compiler),
        "CXX": str(compiler),
        "QUANTOPS_CUDA": "0",
        "PYTHONPATH": str(Path(torch.__file__).parents[1]),
    }
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree,
        env=env,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return run.stderr, tree / "quantops" / "_cpu.abi3.so.failed"


@pytest.mark.skipif(os.name != "posix", reason="compilers that are scripts")
def test_a_build_that_fails_says_what_failed(tree, monkeypatch):
    compiler = tree / "cxx"
    compiler.write_text("#!/bin/sh\necho 'In file x.h:' >&2\necho 'x.h:3: error: no such thing' >&2\nexit 7\n")
    compiler.chmod(0o755)
    library = tree / "quantops" / "_cpu.abi3.so"
    library.write_bytes(b"of an earlier build")
    said, failed = build(tree, compiler)
    for text in (said, failed.read_text()):
        assert f"{compiler} ended with status 7: x.h:3: error: no such thing" in text
    assert not library.exists()
    monkeypatch.setattr(compiled, "library_path", lambda kind: library)
    assert "no such thing" in compiled.load("cpu")

    failed.unlink()
    _, failed = build(tree, tree / "absent")
    assert failed.read_text() == f"was not built: {tree / 'absent'}: No such file or directory\n"
    failed.unlink()
    assert "needs a C++ compiler" in compiled.load("cpu")


@pytest.mark.skipif(not COMPILERS, reason="no C++ compiler")
def test_a_build_that_succeeds_leaves_no_reason(tree):
    """With one source alone: all of them take a minute."""
    for source in tree.glob("csrc/cpu/*.cpp"):
        if source.name != "instruction_set.cpp":
            source.unlink()
    (tree / "quantops" / "_cpu.abi3.so.failed").write_text("of an earlier build")
    said, failed = build(tree, COMPILERS[0])
    assert (tree / "quantops" / "_cpu.abi3.so").exists() and not failed.exists(), said


@pytest.mark.skipif(backends.info()["devices"]["cpu"]["implementation"] != "cpp", reason="no compiled library")
def test_info_says_which_loops_run():
    note = backends.info()["devices"]["cpu"]["note"]
    assert "loops, float16 by " in note and f"(torch: {torch.backends.cpu.get_cpu_capability()})" in note


@pytest.mark.parametrize("free_threaded", [False, True])
def test_a_library_has_one_name_and_free_threaded_wheels_promise_no_stable_abi(free_threaded):
    """torch loads the library, by that name, and nothing of Python is in it; setuptools refuses abi3 wheels there."""
    code = (
        "import sysconfig, setuptools, runpy\n"
        f"sysconfig.get_config_vars()['Py_GIL_DISABLED'] = {int(free_threaded)}\n"
        "setuptools.setup = lambda **k: print(k['options'], k['cmdclass']['build_ext'](setuptools.Distribution())"
        ".get_ext_filename('quantops._cpu'))\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    options = {} if free_threaded else {"bdist_wheel": {"py_limited_api": "cp310"}}
    assert run.stdout.split() == f"{options} {compiled.library_path('cpu').relative_to(ROOT)}".split(), run.stderr


@pytest.mark.skipif(not (compiled.library_path("cpu").exists() and shutil.which("nm")), reason="no library, or no nm")
def test_the_library_uses_nothing_of_python():
    symbols = subprocess.check_output(["nm", "-D", compiled.library_path("cpu")], text=True).splitlines()
    assert symbols and not [line for line in symbols if line.split()[-1].startswith("Py")]
