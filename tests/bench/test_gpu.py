"""``make gpu``: its stages on a CPU, and what the runner does with commands that are late, wrong, failing or absent."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import devices
import quantops
from bench import state
from bench.__main__ import main
from bench.gpu import __main__ as gpu
from bench.gpu import counters, summary
from bench.gpu import stages as runner
from bench.gpu.stages import FAILED, LATE, PASSED, SKIPPED, Command, Run, Stage
from bench.ops import registry, run, small, steps
from bench.state import ROOT, UNFINISHED, WRONG


@pytest.fixture
def a_run(tmp_path):
    """A Run whose seconds are as the stages say."""
    return Run(tmp_path / "out", tmp_path / "scratch", pace=1.0)


def _python(name, code, **options):
    return Command(name, ("-c", code), **options)


def _results(of):
    return {name: entry["result"] for name, entry in json.loads(of.path.read_text())["commands"].items()}


# The list.


def test_the_stages_are_in_order_and_within_the_budget():
    for place in (gpu.Place(), gpu.DRY):
        stages = gpu.stages(place)
        until = [stage.until for stage in stages]
        assert until == sorted(until) and until[-1] <= 60 * gpu.BUDGET - 10  # the rest is for the table
        names = [f"{stage.name}: {command.name}" for stage in stages for command in stage.commands]
        assert len(names) == len(set(names))
    assert [s.name for s in gpu.stages(gpu.Place())] == [s.name for s in gpu.stages(gpu.DRY)]


def test_what_the_stages_name_exists():
    of_gpu = gpu.Place()
    assert {*of_gpu.families, *of_gpu.slow_families} == set(devices.FAMILIES)
    assert tuple(str(d).removeprefix("torch.") for d in devices.DTYPES) == gpu.DTYPES
    known = {case.name for case in registry.cases()}
    lists = gpu.OPS, gpu.SOFT_OPS, gpu.MORE, gpu.OPS_OF_TRITON, gpu.OPS_OF_VARIANTS
    assert {*(name for v in lists for name in run._wanted(v)), *(name for name, _ in counters.MEASURED)} <= known
    assert "unquantized" in steps._chosen(gpu.STEPS).keys() & steps._chosen(gpu.COMPILED_STEPS).keys()
    assert {*of_gpu.networks.split(","), of_gpu.compiled} <= steps.NETWORKS.keys()


def test_further_libraries_are_compared(tmp_path):
    path = tmp_path / "_cuda.plain-stores.abi3.so"
    variants = next(s for s in gpu.stages(gpu.Place(libraries=(path,))) if s.name == "variants")
    (command,) = variants.commands
    assert command.name == "variant-plain-stores" and ("QUANTOPS_CUDA_LIBRARY", str(path)) in command.env
    (command,) = next(s for s in gpu.stages(gpu.Place()) if s.name == "variants").commands
    assert command.needs


def test_a_library_is_chosen_by_its_path():
    ask = "from quantops.backends import library_path; print(library_path('cuda'), library_path('cpu').name)"
    env = {**os.environ, "QUANTOPS_CUDA_LIBRARY": "/elsewhere/_cuda.b.abi3.so"}
    found = subprocess.run([sys.executable, "-c", ask], env=env, cwd=ROOT, capture_output=True, text=True).stdout
    assert found.split() == ["/elsewhere/_cuda.b.abi3.so", "_cpu.abi3.so"]


# Without a GPU.


@pytest.mark.skipif(
    quantops.info()["devices"]["cpu"]["implementation"] != "cpp",
    reason="needs the compiled CPU library, which stands for the CUDA one",
)
def test_every_stage_runs_without_a_gpu(tmp_path):
    """make gpu DRY=1: what fails here would cost minutes there."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--dry", "--out", str(tmp_path)], cwd=ROOT, text=True, capture_output=True
    )
    found = state.read(tmp_path / "gpu.json")["commands"]
    assert done.returncode == 0, done.stdout + done.stderr
    others = {name: entry["why"] for name, entry in found.items() if entry["result"] != PASSED}
    assert list(others) == ["variants: other libraries"] and "_cuda.<name>.abi3.so not found" in others.popitem()[1]
    assert {name.split(": ")[0] for name in found} == {s.name for s in gpu.stages(gpu.DRY)}
    assert {path.name for path in tmp_path.iterdir()} == {
        "gpu.json",
        "ops-cuda.json",
        "ops-triton.json",
        "steps-cuda.json",
        "steps-compiled.json",
    }
    assert "absmax per row" in done.stdout and "resnet20" in done.stdout  # the table


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "device", lambda: "")
    with pytest.raises(SystemExit, match="no CUDA device; DRY=1"):
        gpu.main([])
    monkeypatch.setattr(gpu, "device", lambda: "NVIDIA H200")
    monkeypatch.setattr(gpu, "LIBRARY", ROOT / "quantops/no_library")
    with pytest.raises(SystemExit, match="quantops/no_library is not there: make gpu-libraries builds it"):
        gpu.main([])
    with pytest.raises(SystemExit, match="expected stages of first, correct, .*, got last"):
        gpu.main(["--dry", "--only", "first,last"])


def test_the_name_of_the_gpu(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho NVIDIA H200\necho NVIDIA H200\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpu.device() == "NVIDIA H200" and state.folder("NVIDIA H200").name == "nvidia-h200"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpu.device() == (torch.cuda.get_device_name() if torch.cuda.is_available() else "")


def test_the_commit_of_a_tree_without_git(monkeypatch):
    monkeypatch.setattr(state, "output", lambda *command: "")
    monkeypatch.delenv("QUANTOPS_COMMIT", raising=False)
    assert state.commit() == "unknown"
    monkeypatch.setenv("QUANTOPS_COMMIT", "abcdef")
    assert state.commit() == "abcdef"


def test_a_folder_that_cannot_be_written_to_is_left_alone(monkeypatch, tmp_path):
    (tmp_path / "build").write_text("a file")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    folder = gpu._scratch(False)
    assert folder.is_dir() and tmp_path not in folder.parents
    folder.rmdir()


# The runner.


def test_a_stage_ends_at_its_time(a_run, tmp_path):
    """What is under way is killed with what it has started, what it has written stays, and the next stage runs."""
    child = "import time, pathlib; time.sleep(2.5); pathlib.Path('{out}/late').touch()"
    slow = (
        "import pathlib, subprocess, sys, time; pathlib.Path('{out}/early').touch(); "
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    stages = [
        Stage("one", 1.5, "", (_python("slow", slow), _python("after", ""))),
        Stage("two", 9, "", (_python("next", "print('{seconds}')"),)),
    ]
    (tmp_path / "out").mkdir()
    begin = time.monotonic()
    assert a_run.all(stages) == UNFINISHED and time.monotonic() - begin < 6
    assert _results(a_run) == {"one: slow": LATE, "one: after": LATE, "two: next": PASSED}
    time.sleep(1.5)
    assert (tmp_path / "out/early").exists() and not (tmp_path / "out/late").exists()


def test_a_wrong_result_ends_everything(a_run, capsys):
    stages = [
        Stage(
            "one",
            60,
            "",
            (
                _python("long", "import time; time.sleep(60)"),
                _python(
                    "wrong",
                    f"""
print('q differs')
raise SystemExit({WRONG})""",
                ),
            ),
            width=2,
        ),
        Stage("two", 60, "", (_python("never", ""),)),
    ]
    begin = time.monotonic()
    assert a_run.all(stages) == WRONG and time.monotonic() - begin < 30
    assert _results(a_run) == {"one: wrong": FAILED, "one: long": LATE}
    assert json.loads(a_run.path.read_text())["commands"]["one: wrong"]["end"] == ["q differs"]
    assert "wrong ends everything: a wrong result" in capsys.readouterr().out


def test_other_failures_are_told_and_those_of_gates_end_everything(a_run, capsys):
    bad = "print('no permission'); raise SystemExit(7)"
    late = _python("by itself", f"raise SystemExit({UNFINISHED})")
    one = Stage("one", 60, "", (_python("bad", bad), late, _python("good", "")))
    assert a_run.all([one]) == 1
    assert _results(a_run) == {"one: bad": FAILED, "one: by itself": LATE, "one: good": PASSED}
    assert "exit status 7\n      | no permission" in capsys.readouterr().out
    gate = Stage("gate", 60, "", (_python("bad", bad, gate=True), _python("never", "")))
    assert a_run.all([gate]) == WRONG and "gate: never" not in _results(a_run)


def test_what_passed_is_not_run_again(a_run, tmp_path, monkeypatch):
    count = tmp_path / "count"
    once = _python("once", f"open({str(count)!r}, 'a').write('x')")
    again = _python("again", f"open({str(count)!r}, 'a').write('y'); raise SystemExit(1)")
    stages = [Stage("one", 60, "", (once, again))]

    def more(**options):
        made = Run(a_run.out, a_run.scratch, **options)
        made.all(stages)
        return count.read_text()

    a_run.all(stages)
    assert more() == "xyy" and more(device="another") == "xyyxy" and more(device="another") == "xyyxyy"
    monkeypatch.setattr(runner.state, "sources", lambda *more: "other code")
    assert more(device="another") == "xyyxyyxy"


def test_what_is_not_there_is_skipped_by_name(a_run, tmp_path):
    commands = (
        _python("tool", "", tools=("no-such-tool",)),
        _python("under", "", under=("no-such-sanitizer", "-x")),
        _python("file", "", needs=(tmp_path / "nothing",)),
        _python("under true", "", under=("true",)),
    )
    assert a_run.all([Stage("one", 60, "", commands)]) == 0
    found = json.loads(a_run.path.read_text())["commands"]
    assert _results(a_run) == {
        "one: tool": SKIPPED,
        "one: under": SKIPPED,
        "one: file": SKIPPED,
        "one: under true": PASSED,
    }
    assert found["one: tool"]["why"] == "no-such-tool not found" and "no-such-sanitizer" in found["one: under"]["why"]


def test_commands_run_side_by_side(a_run):
    """Each waits for the other."""
    wait = (
        "import pathlib, time; pathlib.Path('{scratch}/%s').touch()\n"
        "while not pathlib.Path('{scratch}/%s').exists(): time.sleep(0.01)"
    )
    pair = _python("a", wait % ("a", "b")), _python("b", wait % ("b", "a"))
    assert a_run.all([Stage("one", 60, "", pair, width=2)]) == 0


def test_without_minutes_there_are_no_bounds(tmp_path):
    run_ = Run(tmp_path / "out", tmp_path / "scratch")
    assert run_.all([Stage("one", 0, "", (_python("it", "assert '{seconds}' == 'inf'"),))]) == 0


def test_half_of_the_minutes_is_half_of_the_time(tmp_path):
    half = Run(tmp_path / "out", tmp_path / "scratch", pace=0.5)
    assert half.all([Stage("one", 40, "", (_python("it", "assert 13 <= int('{seconds}') <= 15, '{seconds}'"),))]) == 0


# Wrong results, and results that are cut short.


def test_a_result_that_differs_is_a_status_of_its_own(monkeypatch, capsys):
    right = devices.results

    def results(device, family, dtype):
        found = right("cpu", family, dtype)
        if device == "gpu":
            next(t for t in found["exact", f"q {dtype} per_row=True full"] if t.numel()).view(-1)[-1] += 1
        return found

    monkeypatch.setattr(devices, "results", results)
    assert devices.main("cpu", "msq", "bfloat16") == 0
    assert devices.main("gpu", "msq", "float32") == WRONG and "gpu differs from the CPU" in capsys.readouterr().err
    case = next(c for c in registry.cases() if c.name == "absmax")
    wrong = registry.dataclasses.replace(case, check=lambda got, x: False)
    monkeypatch.setattr(small, "cases", lambda: [wrong])
    with pytest.raises(SystemExit) as ended:
        main(["small", "--device", "cpu"])
    assert ended.value.code == WRONG and "absmax torch.float32 differs from the reference" in capsys.readouterr().err


def test_a_write_that_is_cut_short_leaves_the_old_result(monkeypatch, tmp_path):
    path = tmp_path / "folder" / "r.json"
    assert state.read(path) == {}
    state.write(path, {"a": 1})

    def cut(self, text):
        self.write_bytes(text[:3].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(KeyboardInterrupt):
        state.write(path, {"b": 2})
    assert state.read(path) == {"a": 1}


NCU = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","gpu__time_duration.sum","dram__bytes.sum.per_second","launch__registers_per_thread",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio"
"","","","us","Tbyte/s","register/thread","inst","inst"
"0","7","void items_kernel<Msq<float, float>, 60>(Table<60>)","41.5","3.21","40","1,012.5","2.5"
==PROF== Disconnected from process 7
"""


def test_counters_are_read():
    (row,) = counters.rows(NCU)
    assert row == {
        "kernel": "void items_kernel<Msq<float, float>, 60>(Table<60>)",
        "seconds": "41.5 us",
        "bytes per second": "3.21 Tbyte/s",
        "registers": "40 register/thread",
        "warps waiting per issue": {"long_scoreboard": 1012.5, "wait": 2.5},
    }
    assert counters.rows("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission") == []


def test_counters_say_why_there_are_none(monkeypatch, tmp_path, capsys):
    tool = tmp_path / "ncu"
    tool.write_text(
        '#!/bin/sh\nwhile [ "$1" != --log-file ]; do shift; done\necho "==ERROR== ERR_NVGPUCTRPERM" > "$2"\nexit 0\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert counters.main(["--out", str(tmp_path / "ncu.json")]) == 1 and not (tmp_path / "ncu.json").exists()
    assert "ERR_NVGPUCTRPERM" in capsys.readouterr().out
    tool.write_text('#!/bin/sh\nwhile [ "$1" != --log-file ]; do shift; done\ncat > "$2" <<EOF\n' + NCU + "EOF\n")
    assert counters.main(["--out", str(tmp_path / "ncu.json")]) == 0
    assert "items_kernel" in summary.table(tmp_path)


def test_the_table(tmp_path):
    """Parts of results, as a run that was cut short leaves them."""

    def ops(**shares):
        return {
            "machine": {"commit": "abc"},
            "rows": [
                {
                    "case": "msq forward",
                    "workload": workload,
                    "dtype": "bfloat16",
                    "headline": "kernel",
                    "share_of_copy": {"kernel": share},
                }
                for workload, share in shares.items()
            ],
        }

    assert summary.table(tmp_path) == ""
    state.write(
        tmp_path / "gpu.json",
        {"commands": {"ops: cuda": {"result": LATE, "why": "killed"}, "ops: it": {"result": PASSED}}},
    )
    state.write(tmp_path / "ops-cuda.json", ops(resnet20=0.625))
    state.write(tmp_path / "variant-default.json", ops(resnet20=0.5, resnet50=0.25))
    state.write(tmp_path / "variant-late-loads.json", ops(resnet20=0.75))
    state.write(
        tmp_path / "steps-cuda.json",
        {
            "rows": [
                {
                    "network": "resnet50",
                    "base": "unquantized",
                    "times": {"unquantized": {"median": 0.05}},
                    "ratio": {"unquantized": 1.0, "quantops": 1.02},
                    "absent": {"compiled chain": "out of memory"},
                }
            ]
        },
    )
    lines = [line.split() for line in summary.table(tmp_path).splitlines()]
    assert ["ops", "1", "of", "2", "passed;", "cuda:", "not", "finished", "(killed)"] in lines
    assert ["resnet20", "bf16"] in lines and ["msq", "forward", "0.62"] in lines
    assert ["variants", "default", "late-loads"] in lines
    assert ["msq", "forward", "resnet20", "bfloat16", "0.50", "0.75"] in lines and lines.count(
        ["msq", "forward", "resnet50", "bfloat16", "0.25"]
    ) == 1
    assert ["resnet50", "50.0", "ms", "unquantized", "1.000", "quantops", "1.020"] in lines
    assert ["compiled", "chain:", "out", "of", "memory"] in lines
