"""Results as JSON, ``bench/results/<device>/<kind>-<implementation>.json``: written row by row, and taken up again."""

import json
import time
from pathlib import Path

import torch

from bench import machine, state
from bench.state import UNFINISHED
from quantops.files import write_whole


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
        write_json(self.path, self.data)


def write_json(path, data):
    """What is at ``path`` is whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=1) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def read_json(path):
    """The dict of a result; SystemExit naming the file where it is damaged."""
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise SystemExit(f"bench: {path} is damaged, {error}: remove it, or put a whole one there") from None
    if not isinstance(found, dict):
        raise SystemExit(f"bench: {path} holds no result but a {type(found).__name__}: remove it")
    return found


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
