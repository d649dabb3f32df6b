"""Which rows miss their targets, and the reasons that are given."""

from bench.ops import registry, targets
from bench.ops.registry import COPY, OURS


def _row(**changes):
    return {
        "case": "c",
        "workload": "16M",
        "dtype": "float32",
        "numel": 100,
        "trains": False,
        "keeps": 0.0,
        "headline": "warm",
        "share_of_copy": {"warm": 0.9},
        "ratio": {},
        **changes,
    }


def test_targets():
    machine = {"kind": "cpu", "implementation": "cpp"}
    rows = [
        _row(),
        _row(share_of_copy={"warm": 0.5}, case="slow"),
        _row(workload="64K", share_of_copy={"warm": 0.1}),
        _row(trains=True, share_of_copy={"warm": 0.1}, saved_bytes={OURS: 3}, ratio={"compiled": 0.8}),
    ]
    found = targets.of_ops({"machine": machine, "rows": rows, "call_microseconds": {"ops.x": 6.0, "clone": 9.0}})
    large, compiled, kept, call = found
    assert (large.met, large.missed, large.figures, large.worst) == (False, 1, 2, 0.5) and "slow" in large.where
    assert not compiled.met and compiled.worst == 0.8
    assert kept.met and kept.worst == 0.03 and not call.met and call.figures == 1
    assert targets.table(found).count("**no**") == 3
    own = [_row(case="categorical hard", share_of_copy={"warm": v}) for v in (0.78, 0.70)]
    own += [_row(case="categorical hard", workload="64K"), _row(case="categorical soft, 4 bits")]
    found = targets.of_ops({"machine": machine, "rows": own, "call_microseconds": {}})
    verdict = found[0]
    assert verdict.target == "categorical hard takes 1.30x of a copy or less"
    assert (verdict.figures, verdict.missed, verdict.worst) == (2, 1, 1 / 0.70)
    assert targets.OWN.keys() | {"msq step"} <= {c.name for c in registry.cases()}
    steps = [
        _row(case="msq step", trains=True, workload=w, dtype=d, share_of_copy={"warm": v})
        for w, d, v in (("1M", "float32", 0.41), ("16M", "float32", 0.8), ("1M", "bfloat16", 0.1))
    ]
    small, large = targets.of_ops({"machine": machine, "rows": steps, "call_microseconds": {}})
    assert small.target == "msq step at 1M takes 2.50x of a copy or less" and large.met
    assert (small.figures, small.missed, small.worst) == (1, 0, 1 / 0.41)
    assert targets.of_steps({"machine": machine, "rows": []}) == []
    row = {
        "network": "resnet50",
        "base": "unquantized",
        "ratio": {"unquantized": 1.0, "quantops": 1.05, "quantops decoupled": 1.02, "eager chain": 2.0},
    }
    (verdict,) = targets.of_steps({"machine": {"kind": "cuda"}, "rows": [row]})
    assert verdict.met and verdict.worst == 1.02


def test_reasons_of_what_misses():
    """A copy of 16M weights from memory takes 10 ns a weight."""

    def rows(name, share, cached):
        def row(workload, numel, seconds):
            times = {"warm": {OURS: {"p10": seconds}, COPY: {"median": 1e-8 * numel / 2}}}
            return _row(
                case=name,
                workload=workload,
                numel=numel,
                share_of_copy={"warm": share},
                times=times,
                copy_factor=2,
                bytes_per_weight=8,
            )

        return [row("64", 64, 1e-6), row("64K", 1 << 16, 1e-6 + cached * (1 << 16)), row("16M", 1 << 24, 1.0)]

    machine = {"kind": "cpu", "second_level_cache_bytes": 1 << 20}
    every = [
        *rows("much arithmetic", 0.6, 3e-8),
        *rows("little", 0.6, 1e-8),
        *rows("met", 0.9, 3e-8),
        *rows("faster from memory", 0.7, 3e-8),
    ]
    much, little = targets.reasons({"machine": machine, "gain_of_threads": 2.0, "rows": every})
    assert much.row["case"] == "much arithmetic" and much.arithmetic and abs(much.most - 10 / 15) < 1e-6
    assert little.row["case"] == "little" and not little.arithmetic and abs(little.most - 2) < 1e-6
    (less,) = targets.reasons({"machine": machine, "gain_of_threads": 1.0, "rows": rows("little", 0.6, 1.5e-8)})
    assert less.arithmetic and abs(less.most - 10 / 15) < 1e-6  # threads of one core
    machine["second_level_cache_bytes"] = 1 << 18
    assert targets.reasons({"machine": machine, "gain_of_threads": 2.0, "rows": every}) == []
    assert targets.reasons({"machine": machine, "rows": every}) == []
