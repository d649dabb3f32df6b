"""Results as JSON, ``bench/results/<device>/<kind>-<implementation>.json``: written row by row, and taken up again."""

import json
import time
from pathlib import Path

import torch

from bench import machine, state
from bench.state import UNFINISHED


class Result:
    """A result on disk: ``machine``, ``rows``, and whatever else is set in ``data``."""

    def __init__(self, kind, args):
        head = machine.describe(args.device)
        self.path = args.out or state.folder(head["device"]) / f"{kind}-{head['implementation']}.json"
        self.data = {"machine": head, "rows": []}
        if args.resume and self.path.exists():
            found = read_json(self.path)
            if all(found["machine"].get(k) == head[k] for k in ("device", "sources", "torch", "implementation")):
                self.data = found
        self.end = time.monotonic() + args.seconds

    @property
    def rows(self):
        return self.data["rows"]

    def time_is_up(self):
        """True once ``--seconds`` have passed; says so."""
        if time.monotonic() < self.end:
            return False
        print("the time is up; the same command with --resume goes on")
        return True

    def add(self, row):
        """Adds a row and writes the file."""
        self.rows.append(row)
        self.write()

    def write(self):
        """Writes the file."""
        state.write(self.path, self.data)


def read_json(path):
    """The dict of a result; SystemExit naming the file where it is damaged."""
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise SystemExit(f"bench: {path} is damaged, {error}: remove it, or put a whole one there") from None
    if not isinstance(found, dict):
        raise SystemExit(f"bench: {path} holds no result but a {type(found).__name__}: remove it")
    return found


def read_runs(folder):
    """{name: result} of the finished trainings in a folder, and of those that were gathered beside it, by name."""
    gathered = folder.with_suffix(".json")
    found = {run_name(r): r for r in (read_json(gathered)["runs"] if gathered.exists() else ())}
    found.update((path.stem, read_json(path)) for path in folder.glob("*.json"))
    return dict(sorted(found.items()))


def run_name(result):
    """The name of a training's file."""
    return f"{result['label']}-seed{result['configuration']['seed']}"


def gather(folder):
    """Moves the finished trainings of a folder into one file beside it, a line each."""
    if runs := read_runs(folder):
        state.write(folder.with_suffix(".json"), {"runs": list(runs.values())})
        for path in folder.glob("*.json"):
            path.unlink()


def read_states(name, path):
    """What torch.save wrote; ValueError naming the file where it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{name}: {path} is no state dict: {error.strerror}") from None
    except Exception as error:  # torch, zipfile and pickle raise errors of many kinds
        raise ValueError(
            f"{name}: {path} is damaged or was not written by torch.save ({type(error).__name__}): remove "
            "it, or put a whole one there"
        ) from None


def prepare(args):
    """The device is there, and on CPU memory is kept."""
    if torch.device(args.device).type == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("bench: no CUDA device")
    elif not args.allocator_as_is:
        machine.keep_memory()


def add_arguments(parser):
    """Options of every command that measures."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile-seconds", type=float, default=110, help="time box of what compiles")
    parser.add_argument("--allocator-as-is", action="store_true", help="do not tell glibc to keep freed memory")
    parser.add_argument("--keep-caches", action="store_true", help="first calls take what was compiled before")
    parser.add_argument("--resume", action="store_true", help="go on with the result of the same code, if there is one")
    parser.add_argument("--seconds", type=float, default=float("inf"), help=f"stop after this time, exit {UNFINISHED}")
    parser.add_argument("--out", type=Path, help="the JSON to write")
