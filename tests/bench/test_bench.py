"""The harness of the benchmarks: what it refuses, what it writes, what it says. No test here asserts a speed."""

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from bench import headline, machine, measure, state, store
from bench.__main__ import main
from bench.ops import calls, registry, report, room, run, shapes
from bench.ops.registry import OURS, Peer
from bench.ops.uniform import Inputs
from bench.training import tables
from quantops.library import OPS, ops

ROOT = Path(__file__).resolve().parents[2]
COMPILED_HERE = run.quantops.info()["devices"]["cpu"]["implementation"] == "cpp"
needs_library = pytest.mark.skipif(not COMPILED_HERE, reason="needs the compiled CPU library, which alone is timed")
QUICK = ["--workloads", "tiny", "--dtypes", "float32", "--budget", "0.001", "--device", "cpu"]


def _case(**changes):
    values = dict(
        name="a case",
        inputs=Inputs,
        reads=lambda s: s,
        writes=lambda s: s,
        check=lambda got, x: True,
        run=lambda x: ops.round_clamp_out(x.w, x.scale, x.bits, False, True, x.target),
    )
    return registry.Case(**{**values, **changes})


def _plan(**changes):
    values = dict(device="cpu", budget=0.001, compile_seconds=60, no_peers=False, compile_all=False, keep_caches=False)
    return run.Plan(types.SimpleNamespace(**{**values, **changes}))


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The path of the result of one run of all cases."""
    if not COMPILED_HERE:
        pytest.skip("needs the compiled CPU library, which alone is timed")
    path = tmp_path_factory.mktemp("device") / "ops-cpp.json"
    assert main(["run", *QUICK, "--out", str(path)]) == 0
    return path


# The registry.


def test_every_op_of_every_family_is_in_a_case():
    """What is not measured cannot be promised. Variants of an op that another case measures are named here."""
    variants = {"msq", "round_clamp", "lsb_penalty"}
    seen = set()
    for case in registry.cases():
        for dtype in case.dtypes[:1]:
            x = case.inputs(shapes.shapes_of("tiny"), dtype, "cpu")
            seen |= {
                op.name().removeprefix("quantops::")
                for op, _ in measure.dispatched(lambda: case.run(x))
                if op.namespace == "quantops"
            }
    assert {name for family in OPS.values() for name in family} - variants <= seen


@needs_library
def test_a_run_has_every_case_and_says_what_is_absent(result):
    data = json.loads(result.read_text())
    assert [r["case"] for r in data["rows"]] == [c.name for c in registry.cases() if torch.float32 in c.dtypes]
    assert data["machine"]["implementation"] == "cpp" and data["machine"]["sources"] == state.sources()
    assert {"commit", "date", "torch", "triton", "driver", "allocator"} <= data["machine"].keys()
    for row in data["rows"]:
        case = next(c for c in registry.cases() if c.name == row["case"])
        assert case.peers.keys() == row["ratio"].keys() | row["absent"].keys()
        assert row["share_of_copy"].keys() == {"warm", "cold"} and row["share_of_copy"]["warm"] > 0
        assert row["launches"][OURS] >= 1 and row["peak_bytes"][OURS] >= 0
        assert ("saved_bytes" in row) == (case.forward is not None)
    step = next(r for r in data["rows"] if r["case"] == "msq step")
    # q, the penalty's residual and more for the chain, a scale and a penalty per weight for the op.
    assert step["saved_bytes"]["eager"] > 8 * step["numel"] and step["saved_bytes"][OURS] < 100 * step["tensors"]
    assert step["launches"]["eager"] > 10 * step["launches"][OURS] > 0
    assert step["peak_bytes"]["eager"] > step["peak_bytes"][OURS]


def test_other_libraries_are_absent_or_run():
    """Never silently: a peer that cannot be had raises Absent with the reason."""
    x = Inputs(shapes.shapes_of("tiny"), torch.float32, "cpu")
    for case in registry.cases():
        for name, peer in case.peers.items():
            if name in ("torchao", "Brevitas") and case.name == "msq step":
                try:
                    grads = peer.make(x)()
                except registry.Absent as why:
                    assert "cannot be imported" in str(why)
                else:
                    assert len(grads) == x.tensors


def test_a_wrong_result_is_not_timed():
    def off_by_a_bit(x):
        ops.round_clamp_out(x.w, x.scale, x.bits - 1, False, True, x.target)
        return x.target

    right = next(c for c in registry.cases() if c.name == "round_clamp")
    wrong = _case(run=off_by_a_bit, check=right.check)
    with pytest.raises(SystemExit, match="a case on tiny float32 differs from the reference; it is not timed"):
        run.measure_one(wrong, "tiny", "float32", _plan())


def test_the_reference_is_not_timed():
    env = {**os.environ, "QUANTOPS_BACKEND": "reference"}
    done = subprocess.run(
        [sys.executable, "-m", "bench", "run", *QUICK], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "cpu is served by reference, not by compiled kernels" in done.stderr


def test_an_op_without_a_kernel_of_its_own_is_not_timed():
    """As after an incomplete build: the library loads, but one op falls back to its default, the reference."""
    library = torch.library.Library("quantops", "FRAGMENT")
    library.define("only_the_default(Tensor t) -> Tensor")
    library.impl("only_the_default", lambda t: t.clone(), "CompositeExplicitAutograd")
    try:
        with pytest.raises(SystemExit, match="only_the_default has no CPU kernel"):
            measure.check_served(lambda: torch.ops.quantops.only_the_default(torch.ones(2)), "cpu")
        with pytest.raises(SystemExit, match="calls no op of quantops"):
            measure.check_served(lambda: torch.ones(2) + 1, "cpu")
    finally:
        library._destroy()


@needs_library
def test_peers_that_take_too_long_or_are_missing_are_named():
    def slow(x):
        def function(bits=8):
            while True:
                pass

        return function

    def missing(x):
        raise registry.Absent("no such library")

    case = _case(peers={"slow": Peer(slow, compiles=True), "missing": Peer(missing), "lists": Peer(slow, lists=False)})
    row = run.measure_one(case, "tiny", "float32", _plan(compile_seconds=0.1, compile_all=True))
    assert row["absent"]["missing"] == "no such library" and "more than 0.1 s" in row["absent"]["slow"]
    assert row["absent"].keys() == {"slow", "missing", "lists"} and not row["ratio"]


@needs_library
def test_a_run_is_taken_up_where_it_stopped(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    two = [*QUICK, "--no-peers", "--cases", "absmax,encode", "--out", str(path)]
    assert main(["run", *two, "--seconds", "0"]) == store.UNFINISHED and not path.exists()
    assert main(["run", *two[:-4], "--cases", "absmax", "--out", str(path)]) == 0
    before = json.loads(path.read_text())["rows"]
    assert main(["run", *two, "--resume"]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [r["case"] for r in rows] == ["absmax", "encode"] and rows[0] == before[0]
    monkeypatch.setattr("bench.machine.sources", lambda: "other code")
    assert main(["run", *two, "--resume", "--cases", "absmax"]) == 0
    assert [r["case"] for r in json.loads(path.read_text())["rows"]] == ["absmax"]


def test_a_damaged_result_is_named_and_a_result_is_whole_at_any_time(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    for damaged in ('{"machine": {}, "ro', "[" * 100_000, "[1]", "\xff"):
        path.write_text(damaged, "latin-1")
        with pytest.raises(SystemExit, match=r"bench: .*r.json (is damaged|holds no result)"):
            store.read_json(path)
    state.write(path, {"rows": [1]})
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        state.write(path, {"rows": [1, 2]})
    assert store.read_json(path) == {"rows": [1]} and list(tmp_path.iterdir()) == [path]


@needs_library
def test_resuming_from_a_cut_result_names_it(tmp_path):
    path = tmp_path / "r.json"
    path.write_text('{"machine": {"de')
    with pytest.raises(SystemExit, match=r"r.json is damaged"):
        main(["run", *QUICK, "--no-peers", "--cases", "absmax", "--out", str(path), "--resume"])


@pytest.mark.parametrize("module, command", [("quantops", "demo"), ("bench", "small")])
def test_an_interrupt_shows_no_traceback(module, command):
    program = (
        f"import sys, runpy, quantops.demo, bench.ops.small; sys.argv = ['x', '{command}']\n"
        "def stop(*a): raise KeyboardInterrupt\n"
        f"quantops.demo.run = bench.ops.small.small = stop\n"
        f"runpy.run_module('{module}', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert done.returncode == 130 and "interrupted" in done.stdout and "Traceback" not in done.stderr, done.stderr


@needs_library
def test_what_memory_does_not_hold_is_left_out_by_name(tmp_path, monkeypatch, capsys):
    """A peer beside a case that fits, then the case; none of them is made in full."""
    monkeypatch.setattr(room, "LARGE", 1 << 10)
    monkeypatch.setattr(machine, "has_thread_caches", lambda: False)
    case = next(c for c in registry.cases() if c.name == "msq step")
    plenty = room.Room(case, shapes.shapes_of("tiny"), torch.float32)
    made = sum(t.numel() for t in plenty.x.w)
    assert plenty.kept > 3 * 4 * made and plenty.peak > 2 * 4 * made  # w, its gradient, the copy; q, its gradient
    assert plenty.factor == sum(map(math.prod, shapes.shapes_of("tiny"))) / made
    needs = plenty.factor * (plenty.kept + plenty.peak)
    monkeypatch.setattr(room, "available", lambda: 1.01 * needs / room.SHARE)
    row = run.measure_one(case, "tiny", "float32", _plan())
    assert row["absent"]["eager"] == "needs 0 GiB of memory, 0 are there" and "eager" not in row["ratio"]
    monkeypatch.setattr(room, "available", lambda: 0.99 * needs / room.SHARE)
    path = tmp_path / "ops-cpp.json"
    for _ in range(2):  # what was left out is not tried again
        assert main(["run", *QUICK, "--cases", "msq step", "--out", str(path), "--resume"]) == 0
    data = json.loads(path.read_text())
    assert not data["rows"] and [(r["case"], r["workload"]) for r in data["left_out"]] == [("msq step", "tiny")]
    assert capsys.readouterr().out.count("GiB of memory") == 1


@needs_library
def test_large_rows_run_in_processes_without_thread_caches(tmp_path, monkeypatch):
    """Another process takes the same result up: its rows, and its exit status."""
    monkeypatch.setattr(room, "LARGE", 1 << 10)
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    started, path = [], tmp_path / "r.json"
    monkeypatch.setattr(
        run,
        "subprocess",
        types.SimpleNamespace(
            run=lambda command, env: (
                started.append((command, env)) or types.SimpleNamespace(returncode=store.UNFINISHED)
            )
        ),
    )
    assert main(["run", *QUICK, "--cases", "absmax", "--out", str(path)]) == store.UNFINISHED
    ((command, env),) = started
    assert not json.loads(path.read_text())["rows"]
    monkeypatch.setattr(room, "LARGE", 1 << 27)
    for name, value in machine.WITHOUT_THREAD_CACHES.items():
        assert env[name] == value
        monkeypatch.setenv(name, value)
    assert not machine.has_thread_caches() and main(command[command.index("bench") + 1 :]) == 0
    assert [r["case"] for r in json.loads(path.read_text())["rows"]] == ["absmax"]


def test_cases_are_chosen_by_name():
    assert run._wanted("absmax,categorical hard, 8 gates,encode") == ["absmax", "categorical hard, 8 gates", "encode"]
    assert run._wanted(None) == [case.name for case in registry.cases()]
    with pytest.raises(SystemExit, match="expected cases of .*absmax; .*, got absmin"):
        run._wanted("absmax,absmin")


def test_large_categorical_weights_are_checked_in_part(monkeypatch):
    from bench.ops import categorical

    monkeypatch.setattr(categorical, "PIECE", 1 << 10)
    for case in (c for c in registry.cases() if c.family == "categorical"):
        x = case.inputs([(64, 64), (40, 64)], torch.float32, "cpu")
        results = case.run(x)
        results[1].view(-1)[1 << 10] += 1  # the second piece of the second weight
        assert not case.check(results, x)
        monkeypatch.setattr(categorical, "MOST_CHECKED", x.numel // 2)  # every other piece
        assert categorical._checked(x) == (
            {0: [slice(0, 1024), slice(2048, 3072)], 1: [slice(0, 1024), slice(2048, 3072)]},
            False,
        )
        assert case.check(results, x)
        results[1].view(-1)[0] += 1
        assert not case.check(results, x)
        monkeypatch.undo()
        monkeypatch.setattr(categorical, "PIECE", 1 << 10)


# Measuring.


def test_functions_take_turns_in_random_order():
    order = []
    calls = {name: (lambda name=name: order.append(name) or 1.0) for name in "abc"}
    times = measure.interleave(calls, budget=60, most=30)
    rounds = [order[i : i + 3] for i in range(3, len(order), 3)]  # the first ones warm up
    assert len(rounds) == 30 and all(sorted(r) == ["a", "b", "c"] for r in rounds) and len({*map(tuple, rounds)}) > 1
    assert all(len(t) == 30 for t in times.values())


def test_the_copy_moves_the_bytes_of_the_op(monkeypatch):
    w = [torch.ones(10), torch.ones(6)]
    half = types.SimpleNamespace(source=w, target=[t.new_zeros(t.shape, dtype=torch.bfloat16) for t in w], numel=16)
    copied = []
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: copied.extend(t.copy_(s) for t, s in zip(to, of)))
    copy, factor = registry.copier(half, bytes_per_element=12)  # it moves 4 + 2, and 6 more of other memory
    copy()
    assert factor == 1 and all((t == 1).all() for t in copied) and len(copied) == 3
    assert all(t is s for t, s in zip(copied, half.target)) and copied[-1].nbytes == 6 * 16 // 2
    copy, factor = registry.copier(half, bytes_per_element=12, scaled=True)
    assert factor == 2 and len(copied) == 3
    twice = types.SimpleNamespace(source=w * 2, target=[torch.zeros_like(t) for t in w * 2], numel=16)
    assert registry.copier(twice, bytes_per_element=12)[1] == 12 / 16  # one read and two writes, of 4 bytes each


def test_peak_and_saved_bytes():
    w = torch.ones(1000, requires_grad=True)
    assert measure.saved_bytes(lambda: w * w, [w]) == 0
    assert measure.saved_bytes(lambda: (w.exp() * w).sum(), [w]) == 4000  # exp(w), kept by exp and by the product
    assert 8000 <= measure.peak_bytes(lambda: (w.detach() + 1) + 1, "cpu") < 9000
    assert measure.launches(lambda: w.detach() + 1, "cpu") == 2


def test_time_box():
    with pytest.raises(measure.TookTooLong), measure.time_box(0.05):
        while True:
            pass
    with pytest.raises(measure.TookTooLong), measure.time_box(0.05):
        try:
            while True:
                pass
        except BaseException as error:
            raise ValueError("a compiler's own error") from error
    with pytest.raises(ValueError, match="not late"), measure.time_box(5):
        raise ValueError("not late")


# Comparing and reporting.


def _rewrite(path, to, change):
    data = json.loads(path.read_text())
    change(data)
    to.write_text(json.dumps(data))
    return to


def test_compare(result, tmp_path, capsys):
    def slower(data):
        row = next(row for row in data["rows"] if row["case"] == "absmax" and row["dtype"] == "float32")
        row["share_of_copy"][row["headline"]] /= 1.5

    worse = _rewrite(result, tmp_path / "worse.json", slower)
    assert main(["compare", str(result), str(result)]) == 0
    assert main(["compare", str(result), str(worse)]) == 1
    assert "slower  1.50x   absmax, tiny float32" in capsys.readouterr().out
    assert main(["compare", str(worse), str(result)]) == 0
    assert main(["compare", str(result), str(worse), "--ratio", "1.6"]) == 0
    empty = _rewrite(result, tmp_path / "empty.json", lambda data: data.update(rows=[]))
    with pytest.raises(SystemExit, match="no row in common"):
        main(["compare", str(result), str(empty)])


def test_report(result, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    _rewrite(result, tmp_path / "ops-cpp.json", lambda data: None)

    def triton(data):
        data["machine"]["implementation"] = "triton"
        for row in data["rows"]:
            row["share_of_copy"] = dict.fromkeys(row["share_of_copy"], 0.123)
            row["workload"] = "resnet50"

    _rewrite(result, tmp_path / "ops-triton.json", triton)
    page = tmp_path / "README.md"
    page.write_text(f"before\n{report.BEGIN}\nthe old one\n{report.END}\nafter\n")
    assert main(["report", str(tmp_path), "--into", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "the old one" not in text
    assert "| absmax | **0.12** |" in text, "both implementations are in one table, and a missed target is bold"
    assert "Triton: ops run at 0.80 of a copy or more: resnet50 | **no**" in text
    device_page = (tmp_path / "report.md").read_text()
    assert "not compiled by default" in device_page or "measured on single weights" in device_page
    for name in ("roofline", "memory"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG" and f"({name}.png)" in device_page
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="expected one"):
        main(["report", str(tmp_path), "--into", str(page)])


def test_headline_draws_from_the_results_alone(result, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "one").mkdir()
    _rewrite(result, tmp_path / "one" / "ops-cpp.json", lambda data: None)
    page = tmp_path / "README.md"
    page.write_text(f"before\n{headline.BEGIN}\nold\n{headline.END}\nafter\n")
    assert main(["headline", str(tmp_path / "one"), "--into", str(page), "--plots", str(tmp_path / "plots")]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "\nold\n" not in text
    assert json.loads((tmp_path / "one" / "ops-cpp.json").read_text())["machine"]["device"] in text
    assert not (tmp_path / "plots").exists()  # neither a large step nor the long networks are in these results
    with pytest.raises(SystemExit, match="no results"):
        main(["headline", str(tmp_path / "plots")])


def test_headline_of_the_committed_results():
    found, folders = report.devices(), tables.folders()
    text = headline.table(found, folders)
    assert 3 <= text.count("\n| ") <= headline.MOST_ROWS + 1, text
    assert text in (state.ROOT / "README.md").read_text(), "README.md: run python -m bench headline --into README.md"


def test_of_several_devices_the_latest_is_told_whole(result, tmp_path):
    for name, date in (("early", "2026-01-01"), ("late", "2026-01-02")):
        (tmp_path / name).mkdir()
        _rewrite(
            result,
            tmp_path / name / "ops-cpp.json",
            lambda data, name=name, date=date: data["machine"].update(device=f"the {name} one", date=date),
        )
    page = tmp_path / "README.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    assert main(["report", str(tmp_path / "early"), str(tmp_path / "late"), "--into", str(page)]) == 0
    late, early = page.read_text().split("the early one")
    assert "the late one" in late and "an eager call" in late
    assert "| target |" in early and "an eager call" not in early
    assert "an eager call" in (tmp_path / "early" / "report.md").read_text()


def test_trainings_of_lists_have_gradients_of_all_weights(monkeypatch):
    """What bench/ops/calls.py times does the work that its name says."""
    found, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: found.append(grad(*args)))
    for call in calls._trainings(3, "cpu").values():
        call()
    assert len(found) == 5 and all(len(grads) == 3 for grads in found)
    base, nothing, quantized, nothing_too, penalized = map(torch.cat, found)
    assert all(torch.equal(base, same) for same in (nothing, quantized, nothing_too))
    signs = penalized - base  # of the LSBs of each weight
    assert (signs - signs.round()).abs().max() < 1e-6 and signs.round().unique().tolist() == [-1, 0, 1]
