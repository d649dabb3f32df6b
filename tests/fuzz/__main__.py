"""Random tests of quantops, for as long as you like: ``make fuzz MINUTES=10 SEED=7``, or ``python tests/fuzz --help``.

Targets: each a file here, with ``make(rng)``, a case as JSON, and ``check(case)``, which raises where something is
wrong and gives back how many values it compared.

    oracle    every op on random lists, bit for bit, against the reference and against numpy
    wild      every op on arguments that fit and arguments that do not: no memory error, under ASAN and UBSAN
    files     damaged files: load_int gives what was saved, or a ValueError
    threads   a quantized model that threads share gives each what it gives one

Each runs in a process of its own. A case is written down before it is checked, so that one that kills its process is
kept, too: as a small file in build/fuzz/, which ``make fuzz REPLAY=FILE`` checks again.
"""

import argparse
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build" / "fuzz"
TARGETS = ("oracle", "wild", "files", "threads")
MOST = 20  # failures of a target, after which it stops


def failure(target, case, error):
    """Keeps a case that failed, and says so."""
    path = FOLDER / f"{target}-{zlib.crc32(json.dumps(case).encode()):08x}.json"
    path.write_text(json.dumps({"target": target, "case": case, "error": error[-3000:]}, indent=1) + "\n")
    print(
        f"FAILED {target}: {error.strip().splitlines()[-1][:300]}\n  make fuzz REPLAY={path.relative_to(ROOT)}",
        flush=True,
    )


def child(target, seed, first, seconds):
    """Checks cases number ``first`` and on for some seconds; what came of it goes to <target>.state."""
    module = importlib.import_module(target)
    if first == 0 and hasattr(module, "untried"):
        print(*[f"not tried: {why}" for why in module.untried().values()], sep="\n", end="", flush=True)
    state, running, end = FOLDER / f"{target}.state", FOLDER / f"{target}.running", time.monotonic() + seconds
    index, values, failed = first, 0, 0
    while time.monotonic() < end and failed < MOST:
        case = module.make(random.Random(f"{target} {seed} {index}"))
        running.write_text(json.dumps(case))
        try:
            values += module.check(case)
        except Exception:
            failed += 1
            failure(target, case, traceback.format_exc())
        index += 1
        state.write_text(json.dumps({"next": index, "values": values, "failed": failed}))
    running.unlink(missing_ok=True)


def environment(target):
    """What a target's process runs with."""
    import sanitized

    text = (HERE / f"{target}.py").read_text()
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"}
    return {**env, **sanitized.environment(FOLDER)} if "\nimport sanitized" in text else env


def run(target, seed, seconds):
    """{cases, values, failed} of a target, whose process is started again where a case kills it."""
    env, end = environment(target), time.monotonic() + seconds
    total, first = {"cases": 0, "values": 0, "failed": 0}, 0
    state, running = FOLDER / f"{target}.state", FOLDER / f"{target}.running"
    while time.monotonic() < end and total["failed"] < MOST:
        state.unlink(missing_ok=True)
        done = subprocess.run(
            [
                sys.executable,
                str(HERE),
                "--child",
                target,
                "--seed",
                str(seed),
                "--first",
                str(first),
                "--seconds",
                str(end - time.monotonic()),
            ],
            env=env,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        found = json.loads(state.read_text()) if state.exists() else {"next": first, "values": 0, "failed": 0}
        for key in ("values", "failed"):
            total[key] += found[key]
        crashed = done.returncode != 0
        if crashed and not running.exists():
            sys.exit(f"{target}: its process ended with {done.returncode} outside of any case:\n{done.stderr[-3000:]}")
        if crashed:
            name = signal.Signals(-done.returncode).name if done.returncode < 0 else f"status {done.returncode}"
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line or "runtime error" in line]
            failure(
                target,
                json.loads(running.read_text()),
                f"{done.stderr[-2000:]}\nprocess ended with {name}: " + (lines[0] if lines else "it said nothing"),
            )
            total["failed"] += 1
        total["cases"] += found["next"] + crashed - first
        first = found["next"] + crashed
        if not crashed:
            break
    return total


def replay(path):
    """Checks a kept case again; the exit status."""
    kept = json.loads(Path(path).read_text())
    if os.environ.get("QUANTOPS_FUZZ_REPLAY") != "1":
        env = {**environment(kept["target"]), "QUANTOPS_FUZZ_REPLAY": "1"}
        return subprocess.run([sys.executable, str(HERE), "--replay", path], env=env).returncode
    importlib.import_module(kept["target"]).check(kept["case"])
    print(f"{path}: nothing is wrong now")
    return 0


def main():
    """Command line entry."""
    parser = argparse.ArgumentParser(
        prog="python tests/fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="of all targets together, without the build")
    parser.add_argument("--seed", type=int, help="of all cases; default: another one each time")
    parser.add_argument("--targets", default=",".join(TARGETS), help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--replay", help="a file that a failure left")
    for name, kind in (("child", str), ("first", int), ("seconds", float)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if args.replay:
        return replay(args.replay)
    if args.child:
        return child(args.child, args.seed, args.first, args.seconds)
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    targets = args.targets.split(",")
    for target in targets:
        if target not in TARGETS:
            parser.error(f"--targets: expected some of {', '.join(TARGETS)}, got {target!r}")
        environment(target)  # builds what is missing
    print(f"seed {seed}; this run again: make fuzz MINUTES={args.minutes:g} SEED={seed}", flush=True)
    failed = 0
    for target in targets:
        found = run(target, seed, 60 * args.minutes / len(targets))
        failed += found["failed"]
        print(
            f"{target:8} {found['cases']:8,} cases {found['values']:14,} values {found['failed']:4} failed", flush=True
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    sys.exit(main())
