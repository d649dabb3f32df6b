"""What quantops promises of its speed and memory, and whether a result keeps it."""

from typing import NamedTuple

from bench.ops.registry import COPY, OURS
from bench.ops.shapes import CALL

LARGE = ("16M", "64M", "256M")  # single weights that no cache holds
LISTS = ("resnet50", "deit_small")
CACHED = "64K"  # a single weight that a core's second cache holds, with what most ops make of it
COMPILED = ("compiled", "compiled list")
SHARE = {"cpu": 0.80, "cuda": 0.90}  # of a copy, large weights
SHARE_OF_LISTS = 0.80
# Cases with targets of their own, where more is computed than a copy hides: shares of a copy of large weights.
OWN = {
    "categorical hard": {"cpu": 1 / 1.3, "cuda": 0.85},
    "categorical hard, 8 gates": {"cpu": 1 / 2.5, "cuda": 0.85},
    "categorical soft, 4 bits": {"cuda": 0.85},
    "categorical backward": {},  # a part of the step, which has one
    "categorical step": {"cpu": 1 / 1.6},
    "categorical step, soft gradient, 4 bits": {},  # nothing is promised of it
}
MSQ_STEP = {"1M": 2.5, "16M": 1.4}  # times a copy, float32 on a CPU: the scale is one more read of w than its bytes
KEPT = 0.05  # bytes per weight: scales and penalties, one per tensor or row
CALL_MICROSECONDS = 5.0
STEP = 1.03


class Verdict(NamedTuple):
    """A target against a result: ``worst`` of all figures it is about, and where."""

    target: str
    figures: int
    missed: int
    worst: float
    where: str

    @property
    def met(self):
        return self.missed == 0


def _verdict(target, figures, missed, worst):
    """``figures``: [(value, where)]; ``missed``: value -> bool; ``worst``: min or max."""
    if not figures:
        return []
    value, where = worst(figures)
    return [Verdict(target, len(figures), sum(missed(v) for v, _ in figures), value, where)]


def share(row):
    """The share of a copy in the regime that counts."""
    return row["share_of_copy"][row["headline"]]


def kept(row, name=OURS):
    """Bytes per weight that autograd keeps for backward, beyond the parameters."""
    return row["saved_bytes"][name] / row["numel"]


def limit(row, kind):
    """The share of a copy that a row is to reach, or None."""
    if row["case"] in OWN:
        return OWN[row["case"]].get(kind) if row["workload"] in LARGE and row["dtype"] == "float32" else None
    if row["trains"]:
        return None
    return SHARE[kind] if row["workload"] in LARGE else SHARE_OF_LISTS if row["workload"] in LISTS else None


class Reason(NamedTuple):
    """Why an op misses its share of a copy on a CPU, measured: how fast it is where memory has no part in it.

    seconds: per weight of a tensor in one core's caches, at the least (10th percentile), what a call takes whatever its
    size taken off, over the gain of all threads. copy: seconds per weight of the copy of the same bytes from memory, by
    all threads. A share larger than ``most`` = copy / seconds cannot be had by any order of the memory accesses.
    """

    row: dict
    share: float
    limit: float
    seconds: float
    copy: float

    @property
    def most(self):
        return self.copy / self.seconds

    @property
    def arithmetic(self):
        """Whether the op takes too long even from cache."""
        return self.most < self.limit


def reasons(result):
    """A Reason for every row that misses its share of a copy, where it can be told: not where the op was faster from
    memory than from caches, in a disturbed run."""
    kind, gain, found = result["machine"]["kind"], result.get("gain_of_threads"), []
    if kind != "cpu" or not gain:
        return found
    rows = {(r["case"], r["workload"], r["dtype"]): r for r in result["rows"]}
    for r in result["rows"]:
        cached, call = (rows.get((r["case"], w, r["dtype"])) for w in (CACHED, CALL))
        least = limit(r, kind)
        if least is None or share(r) >= least or not cached or not call:
            continue
        if r["bytes_per_weight"] * cached["numel"] > result["machine"]["second_level_cache_bytes"]:
            continue
        taken = cached["times"]["warm"][OURS]["p10"] - call["times"]["warm"][OURS]["p10"]
        copy = r["copy_factor"] * r["times"]["warm"][COPY]["median"] / r["numel"]
        why = Reason(r, share(r), least, taken / cached["numel"] / gain, copy)
        if why.share <= why.most:
            found.append(why)
    return found


def _where(row):
    return f"{row['case']}, {row['workload']} {row['dtype']}"


def of_ops(result):
    """Verdicts on a result of ``python -m bench run``."""
    kind, rows, found = result["machine"]["kind"], result["rows"], []
    for names, least in ((LARGE, SHARE[kind]), (LISTS, SHARE_OF_LISTS)):
        of = [r for r in rows if r["workload"] in names and not r["trains"] and r["case"] not in OWN]
        measured = ", ".join(n for n in names if any(r["workload"] == n for r in of))
        found += _verdict(
            f"ops run at {least:.2f} of a copy or more: {measured}",
            [(share(r), _where(r)) for r in of],
            lambda v, least=least: v < least,
            min,
        )
    for case in OWN:
        figures = [(1 / share(r), _where(r)) for r in rows if r["case"] == case and limit(r, kind)]
        if figures:
            most = 1 / OWN[case][kind]
            found += _verdict(
                f"{case} takes {most:.2f}x of a copy or less", figures, lambda v, most=most: v > most, max
            )
    for workload, most in MSQ_STEP.items() if kind == "cpu" else ():
        figures = [
            (1 / share(r), _where(r))
            for r in rows
            if (r["case"], r["workload"], r["dtype"]) == ("msq step", workload, "float32")
        ]
        found += _verdict(
            f"msq step at {workload} takes {most:.2f}x of a copy or less", figures, lambda v, most=most: v > most, max
        )
    figures = [(r["ratio"][peer], f"{_where(r)}, {peer}") for r in rows for peer in COMPILED if peer in r["ratio"]]
    found += _verdict("torch.compile takes 1.00x of quantops' time or more", figures, lambda v: v < 1, min)
    figures = [(kept(r) - r["keeps"], _where(r)) for r in rows if "saved_bytes" in r and r["workload"] != CALL]
    found += _verdict(
        f"bytes per weight kept for backward beyond what the op needs: only scales, < {KEPT}",
        figures,
        lambda v: v >= KEPT,
        max,
    )
    if result["machine"]["implementation"] in ("cpp", "cuda"):  # of Triton, Python is a part
        calls = [(v, name) for name, v in result.get("call_microseconds", {}).items() if name.startswith("ops.")]
        found += _verdict(
            f"an op's call takes {CALL_MICROSECONDS:.0f} microseconds or less",
            calls,
            lambda v: v > CALL_MICROSECONDS,
            max,
        )
    return found


def of_steps(result):
    """Verdicts on a result of ``python -m bench steps``: the better of the two ways to take the penalty."""
    if result["machine"]["kind"] == "cpu":  # promised of GPUs
        return []
    figures = []
    for row in result["rows"]:
        ours = [v for label, v in row["ratio"].items() if label.startswith(OURS)]
        if row["network"] in LISTS and ours and row["base"].startswith("unquantized"):
            figures.append((min(ours), f"{row['network']}, against {row['base']}"))
    return _verdict(
        f"a step, penalty in the loss or decoupled, takes {STEP}x of the unquantized one or less",
        figures,
        lambda v: v > STEP,
        max,
    )


def table(verdicts):
    """Markdown."""
    lines = ["| target | met | worst | where | figures |", "|---|---|---|---|---|"]
    for v in verdicts:
        met = "yes" if v.met else f"**no**, {v.missed} miss it"
        lines.append(f"| {v.target} | {met} | {v.worst:.2f} | {v.where} | {v.figures} |")
    return "\n".join(lines)
