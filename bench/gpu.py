"""``make gpu``: everything that a machine with a GPU can prove, in pieces, with no network.

Needs torch, triton, pytest and setuptools in the system's Python, nvcc and compute-sanitizer on PATH. A piece that has
passed for the same sources is not run again; what passed is in bench/results/<device>/gpu.json, the logs are in
build/gpu/. With a part's name, stops in time for a limit of 9 minutes; the same command goes on (exit status 3).
Exit status 0: all that was asked for has passed.
"""

import argparse
import dataclasses
import datetime
import json
import os
import shutil
import subprocess
import sys
import time

from bench import state
from bench.state import ROOT

PARTS = ("build", "tests", "triton", "sanitize", "bench", "steps", "report")
UNFINISHED = 3
LIMIT = 520.0  # seconds of a command with a part's name
START = 240.0  # after these, no piece is begun that cannot stop by itself
PYTHON = str(ROOT / ".venv/bin/python")
LOGS = ROOT / "build/gpu"
# What does the same whatever serves the GPU.
NO_BACKEND = ("test_bench", "test_cpu_machine_code", "test_cuda_emulated", "test_cuda_emulated_categorical_activation",
              "test_cuda_emulated_categorical", "test_cuda_emulated_packing", "test_cuda_machine_code",
              "test_triton_machine_code")


@dataclasses.dataclass(frozen=True)
class Piece:
    """A command that passes or fails.

    needs: commands on PATH. gpu: does not run without one. again: runs every time, since it is quick or depends on more
    than the sources. stops: takes --seconds and exits 3 where they did not suffice; these are the seconds that what is
    then under way may take, its compilations above all.
    """

    part: str
    name: str
    command: tuple
    env: tuple = ()
    needs: tuple = ()
    gpu: bool = True
    stops: float = 0.0
    again: bool = False


def device():
    """The name of the GPU, or ""."""
    names = state.output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    return names[0].strip() if names else ""


def _module(*words):
    return (PYTHON, "-m", *words)


def _backend(name):
    return (("QUANTOPS_BACKEND", name),)


def pieces():
    """All pieces, in order."""
    installed = (os.environ.get("MAKE", "make"), ".venv/.installed", "TORCH=", f"PYTHON={sys.executable}",
                 "VENV_FLAGS=--system-site-packages --without-pip", "PIP_FLAGS=--no-deps --no-build-isolation")
    check = ("import torch, quantops; print(quantops.info()); from quantops.backends import library_path; "
             "assert library_path('cuda').exists(), 'the CUDA library was not built'; "
             "found = quantops.info()['devices']['cuda']['implementation']; "
             "assert found == 'cuda' or not torch.backends.cuda.is_built(), f'GPUs are served by {found}'")
    found = [Piece("build", "install", installed, (("QUANTOPS_CUDA", "1"),), ("nvcc",), gpu=False,
                   again=True),
             Piece("build", "loads", (PYTHON, "-c", check), gpu=False, again=True)]
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    for part, backend in (("tests", "cuda"), ("triton", "triton")):
        for file in tests:
            if backend == "cuda" or file.stem not in NO_BACKEND:
                found.append(Piece(part, file.stem, _module("pytest", "-q", str(file)), _backend(backend)))
        found.append(Piece(part, "small", _module("bench", "small"), _backend(backend)))
    # Without torch's caching allocator, so that every tensor is an allocation that memcheck knows the ends of.
    for backend in ("cuda", "triton"):
        for tool in ("memcheck", "racecheck"):
            for name, program in (("small", ("-m", "bench", "small")),
                                  ("devices", ("tests/test_devices.py", str(LOGS / "devices.pt")))):
                found.append(Piece("sanitize", f"{tool}-{backend}-{name}", (
                    "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", PYTHON, *program),
                    (*_backend(backend), ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")), ("compute-sanitizer",)))
    found += [Piece("bench", "ops", _module("bench", "run", "--device", "cuda", "--resume"), stops=240.0),
              Piece("steps", "steps", _module("bench", "steps", "--device", "cuda", "--resume"), stops=360.0),
              Piece("report", "static", _module("bench", "static"), needs=("nvcc",), gpu=False),
              Piece("report", "report", _module("bench", "report", "--into", "bench/README.md"), gpu=False, again=True)]
    return found


class Record:
    """What has passed, for the sources as they are."""

    def __init__(self, name):
        self.path = (state.folder(name) if name else LOGS) / "gpu.json"
        self.sources = state.sources("tests", "Makefile", "pyproject.toml")
        found = json.loads(self.path.read_text()) if self.path.exists() else {}
        same = found.get("sources") == self.sources
        self.data = found if same else {"device": name, "sources": self.sources, "commit": state.commit(), "pieces": {}}

    def passed(self, piece):
        return not piece.again and self.data["pieces"].get(f"{piece.part}: {piece.name}", {}).get("passed", False)

    def add(self, piece, passed, seconds):
        self.data["pieces"][f"{piece.part}: {piece.name}"] = {
            "passed": passed, "seconds": round(seconds, 1), "date": datetime.date.today().isoformat()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")


def run(piece, seconds, full):
    """0 where the piece passed, UNFINISHED where its time was cut short, another number where it failed.

    ``full``: ``seconds`` are all that a piece ever gets, so that taking longer is a failure.
    """
    missing = [name for name in piece.needs if not shutil.which(name)]
    if missing:
        print(f"{', '.join(missing)} not found on PATH")
        return 1
    LOGS.mkdir(parents=True, exist_ok=True)
    log, command = LOGS / f"{piece.part}-{piece.name}.log", list(piece.command)
    if piece.stops and seconds != float("inf"):
        command += ["--seconds", str(max(seconds - piece.stops, 10))]
    timeout, env = None if seconds == float("inf") else seconds, {**os.environ, **dict(piece.env)}
    with log.open("w") as file:
        try:
            status = subprocess.run(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT,
                                    timeout=timeout).returncode
        except subprocess.TimeoutExpired:
            print(f"took more than {seconds:.0f} s")
            return 1 if full and not piece.stops else UNFINISHED
        except FileNotFoundError as error:
            print(f"{error.filename} not found: make gpu PART=build comes first")
            return 1
    if status == UNFINISHED and piece.stops:
        return UNFINISHED
    if status:
        print(f"exit status {status}; the end of {log.relative_to(ROOT)}:")
        print("\n".join(log.read_text(errors="replace").splitlines()[-30:]))
    return status


def main(argv=None, of=pieces):
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("part", nargs="?", choices=PARTS, help="default: all, with no limit of time")
    args = parser.parse_args(argv)
    record, begin = Record(device()), time.monotonic()
    limit = LIMIT if args.part else float("inf")
    wanted, passed, failed, waiting = [p for p in of() if args.part in (None, p.part)], 0, [], []
    for piece in wanted:
        name = f"{piece.part}: {piece.name}"
        if record.passed(piece):
            print(f"{name}: passed before")
            passed += 1
            continue
        if piece.gpu and not record.data["device"]:
            print(f"{name}: no CUDA device (nvidia-smi names none)")
            failed.append(name)
            continue
        elapsed = time.monotonic() - begin
        if waiting or (args.part and elapsed > START):
            waiting.append(name)
            continue
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        status = run(piece, limit - elapsed, full=elapsed < 5)
        seconds = time.monotonic() - start
        if status == UNFINISHED:
            waiting.append(name)
            print(f"{name}: not finished after {seconds:.0f} s")
            continue
        record.add(piece, status == 0, seconds)
        print(f"{name}: {'passed' if status == 0 else 'FAILED'} in {seconds:.0f} s", flush=True)
        if status == 0:
            passed += 1
            continue
        failed.append(name)
        if piece.part == "build":
            break  # nothing else can be run
    print(f"{record.path.relative_to(ROOT)}: {passed} of {len(wanted)} have passed"
          + (f"; failed: {', '.join(failed)}" if failed else "")
          + (f"; not run yet, run the same again: {', '.join(waiting)}" if waiting else ""))
    return 1 if failed else UNFINISHED if waiting else 0


if __name__ == "__main__":
    raise SystemExit(main())
