"""The state of the sources, without importing torch: what a result, or a check that passed, belongs to."""

import hashlib
import json
import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNFINISHED, WRONG = 3, 4  # exit statuses: the time was up, --resume goes on; a kernel's result is wrong
RESULTS = ROOT / "bench" / "results"
CODE = ("setup.py", "quantops", "kernels", "csrc", "bench")  # what a figure depends on
SUFFIXES = {".py", ".h", ".cpp", ".cu", ".cuh"}


class Wrong(SystemExit):
    """A kernel's result that differs from the reference: nothing is timed. Ends a process with status WRONG."""

    def __init__(self, what):
        super().__init__(what)
        self.code = WRONG


def output(*command):
    """What a command prints, "" where it fails or is not there."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError:  # not there, or not to be run
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def sources(*more):
    """A digest of all code that a figure depends on, and of ``more`` files and folders: equal digests, equal code."""
    digest = hashlib.sha256()
    for name in (*CODE, *more):
        path = ROOT / name
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.suffix in SUFFIXES and file.is_file():
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def commit():
    """The commit, with -dirty where code differs from it; QUANTOPS_COMMIT where the tree has no .git."""
    found = output("git", "rev-parse", "--short=12", "HEAD")
    if not found:
        return os.environ.get("QUANTOPS_COMMIT", "unknown")
    changed = output("git", "status", "--porcelain", "--", *(c for c in CODE if c != "bench"), "bench/*.py")
    return found + "-dirty" * bool(changed)


def folder(device):
    """Where the results of the device of this name are."""
    return RESULTS / re.sub(r"\W+", "-", device).strip("-").lower()


def read(path):
    """The JSON that :func:`write` wrote, {} where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path, data):
    """Writes JSON, a dict: what is at ``path`` is whole at any time. Without quantops, which a bad build breaks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text(data))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def text(data):
    """A dict as compact JSON, with a line for each key, and for each row of a list of dicts."""

    def value(v):
        if v and isinstance(v, list) and all(isinstance(row, dict) for row in v):
            return "[\n" + ",\n".join(compact(row) for row in v) + "\n]"
        return compact(v)

    compact = json.JSONEncoder(separators=(",", ":")).encode
    return "{\n" + ",\n".join(f"{compact(str(k))}:{value(v)}" for k, v in data.items()) + "\n}\n"
