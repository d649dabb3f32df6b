"""The state of the sources, without importing torch: what a result, or a check that passed, belongs to."""

import hashlib
import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
CODE = ("setup.py", "quantops", "kernels", "csrc", "bench")  # what a figure depends on
SUFFIXES = {".py", ".h", ".cpp", ".cu", ".cuh"}


def output(*command):
    """What a command prints, "" where it fails or is not there."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
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
