"""Runs stages of commands: within bounds, in parallel where they may, each result written as soon as it exists.

A stage ends at its time: whatever is then under way is killed with all that it has started, and what that has written
stays. A command that exits with WRONG, a kernel's wrong result, ends everything. What has passed for the same sources
is not run again.
"""

import contextlib
import dataclasses
import datetime
import os
import shutil
import signal
import subprocess
import sys
import time

from bench import state
from bench.state import ROOT, UNFINISHED, WRONG

PASSED, FAILED, SKIPPED, LATE = "passed", "FAILED", "skipped", "not finished"
KEPT_LINES = 30  # of the output of a command that failed


@dataclasses.dataclass(frozen=True)
class Command:
    """``python`` with ``argv``, where "{out}" is the folder of results, "{scratch}" one for the rest, and "{seconds}"
    what is left of the stage.

    env: variables in addition. under: a tool in front of it. tools, needs: further tools, and files; without one of
    them the command is skipped, by name. gate: any failure ends everything, not only a wrong result.
    """

    name: str
    argv: tuple
    env: tuple = ()
    under: tuple = ()
    tools: tuple = ()
    needs: tuple = ()
    gate: bool = False


@dataclasses.dataclass(frozen=True)
class Stage:
    """Commands that are begun in this order, ``width`` at a time, until ``until`` seconds after the first stage."""

    name: str
    until: float
    what: str
    commands: tuple
    width: int = 1


class Run:
    """A run of stages. ``out``: the folder of results, with what became of every command in gpu.json.

    ``pace``: seconds for each second of ``Stage.until``; None: no bounds.
    """

    def __init__(self, out, scratch, pace=None, env=(), device=""):
        self.out, self.scratch, self.pace, self.env = out, scratch, pace, dict(env)
        self.path, self.begin, self.running = out / "gpu.json", time.monotonic(), {}
        sources = state.sources("tests", "Makefile", "pyproject.toml")
        found = state.read(self.path)
        if found.get("sources") != sources or found.get("device") != device:
            found = {"device": device, "sources": sources, "commit": state.commit(), "commands": {}}
        self.data = found

    def write(self):
        state.write(self.path, self.data)

    def all(self, stages):
        """Runs the stages; the exit status: 0, WRONG, UNFINISHED where time was short, 1 where anything else failed."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        try:
            for stage in stages:
                print(f"{self._now()} {stage.name}: {stage.what}", flush=True)
                if not self.stage(stage):
                    return WRONG
        finally:
            for command in list(self.running):
                self._kill(command)
        known = {f"{s.name}: {c.name}" for s in stages for c in s.commands}
        results = {entry["result"] for name, entry in self.data["commands"].items() if name in known}
        return 1 if FAILED in results else UNFINISHED if LATE in results else 0

    def stage(self, stage):
        """False where everything ends with it."""
        end = self.begin + stage.until * self.pace if self.pace else float("inf")
        waiting, going_on = list(stage.commands), True
        while (waiting or self.running) and going_on:
            while waiting and len(self.running) < stage.width:
                self._begin(stage, waiting.pop(0), end)
            time.sleep(0.02)
            for command, process in list(self.running.items()):
                if process.poll() is not None:
                    going_on = self._ended(stage, command, process.returncode) and going_on
                elif time.monotonic() > end:
                    self._kill(command)
                    going_on = self._note(stage, command, LATE, f"killed at the end of {stage.name}") and going_on
        for command in list(self.running):
            self._kill(command)
            self._note(stage, command, LATE, "killed, since another one ended everything")
        return going_on

    def _begin(self, stage, command, end):
        entry = self.data["commands"].get(f"{stage.name}: {command.name}", {})
        if entry.get("result") == PASSED:
            print(f"{self._now()}   {command.name}: passed before")
            return
        missing = [name for name in (*command.under[:1], *command.tools) if not shutil.which(name)]
        missing += [str(path) for path in command.needs if not path.exists()]
        if missing:
            self._note(stage, command, SKIPPED, f"{', '.join(missing)} not found")
            return
        left = end - time.monotonic()
        if left <= 0:
            self._note(stage, command, LATE, "not begun")
            return
        words = {"{out}": str(self.out), "{scratch}": str(self.scratch), "{seconds}": f"{max(left - 5, 1):.0f}"}
        argv = [*command.under, sys.executable, *command.argv]
        if left == float("inf"):  # no --seconds
            words["{seconds}"] = "inf"
        for word, value in words.items():
            argv = [a.replace(word, value) for a in argv]
        with self._log(stage, command).open("w") as log:
            self.running[command] = subprocess.Popen(
                argv,
                cwd=ROOT,
                env={**os.environ, **self.env, **dict(command.env)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.data["commands"][f"{stage.name}: {command.name}"] = {"result": LATE, "begun": self._seconds()}

    def _ended(self, stage, command, status):
        del self.running[command]
        result = {0: PASSED, UNFINISHED: LATE}.get(status, FAILED)
        return self._note(stage, command, result, f"exit status {status}" * (result == FAILED), status)

    def _note(self, stage, command, result, why="", status=0):
        """Writes what became of a command and says it; False where everything ends with it."""
        name = f"{stage.name}: {command.name}"
        begun = self.data["commands"].get(name, {}).get("begun", self._seconds())
        entry = {"result": result, "seconds": round(self._seconds() - begun, 1), "date": str(datetime.date.today())}
        if why:
            entry["why"] = why
        log, ends = self._log(stage, command), status == WRONG or (result != PASSED and command.gate)
        if result in (FAILED, LATE) and log.exists():
            entry["end"] = log.read_text(errors="replace").splitlines()[-KEPT_LINES:]
        self.data["commands"][name] = entry
        self.write()
        print(f"{self._now()}   {command.name}: {result} after {entry['seconds']:.0f} s {why}".rstrip(), flush=True)
        if result == FAILED:
            print("\n".join(f"      | {line}" for line in entry.get("end", [])), flush=True)
        if ends:
            print(f"{command.name} ends everything: {'a wrong result' if status == WRONG else 'nothing is worth it'}")
        return not ends

    def _kill(self, command):
        process = self.running.pop(command)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _log(self, stage, command):
        return self.scratch / f"{stage.name}-{command.name}.log".replace(" ", "-").replace("/", "-")

    def _seconds(self):
        return round(time.monotonic() - self.begin, 1)

    def _now(self):
        return f"[{self._seconds():5.0f} s]"
