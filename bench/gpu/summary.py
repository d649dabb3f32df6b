"""The short table at the end of ``make gpu``, of whatever results are in its folder."""

from bench import state

MOST_STALLS = 2


def table(folder):
    """What became of every command, then the figures, as text."""
    lines = []
    commands = state.read(folder / "gpu.json").get("commands", {})
    for stage in dict.fromkeys(name.split(": ")[0] for name in commands):
        of = {name.removeprefix(f"{stage}: "): c for name, c in commands.items() if name.startswith(f"{stage}: ")}
        passed = sum(c["result"] == "passed" for c in of.values())
        others = "".join(
            f"; {name}: {c['result']}" + f" ({c['why']})" * ("why" in c)
            for name, c in of.items()
            if c["result"] != "passed"
        )
        lines.append(f"{stage:9} {passed} of {len(of)} passed{others}")
    for path in sorted(folder.glob("ops-*.json")):
        lines += ["", *_ops(path.stem, state.read(path))]
    lines += _variants({path.stem.removeprefix("variant-"): state.read(path) for path in folder.glob("variant-*.json")})
    for path in sorted(folder.glob("steps-*.json")):
        lines += ["", *_steps(path.stem, state.read(path))]
    return "\n".join([*lines, *_counters(state.read(folder / "ncu.json"))])


def _shares(result):
    """{(case, workload, dtype): share of a copy}."""
    return {(r["case"], r["workload"], r["dtype"]): r["share_of_copy"][r["headline"]] for r in result["rows"]}


def _variants(results):
    """Shares of a copy: a line for each case, a column for each variant."""
    found = {name: _shares(result) for name, result in sorted(results.items())}
    if found:
        yield f"\n{'variants':42}" + "".join(f"{name[:12]:>13}" for name in found)
    for row in dict.fromkeys(key for shares in found.values() for key in shares):
        cells = (shares.get(row) for shares in found.values())
        yield f"{' '.join(row):42}" + "".join(f"{'' if v is None else f'{v:.2f}':>13}" for v in cells)


def _ops(name, result):
    """Shares of a copy: a line for each case, a column for each workload and dtype."""
    columns, found = list(dict.fromkeys((r["workload"], r["dtype"]) for r in result["rows"])), _shares(result)
    head = "".join(f"{w[:10] + ('' if d == 'float32' else ' bf16'):>16}" for w, d in columns)
    yield f"{name}, share of a copy of the same bytes, commit {result['machine']['commit']}"
    yield f"{'':26}{head}"
    for case in dict.fromkeys(r["case"] for r in result["rows"]):
        cells = (found.get((case, *column)) for column in columns)
        yield f"{case[:26]:26}" + "".join(f"{'' if v is None else f'{v:.2f}':>16}" for v in cells)


def _steps(name, result):
    yield f"{name}, times the first one's"
    for row in result["rows"]:
        ratios = "   ".join(f"{label} {ratio:.3f}" for label, ratio in row["ratio"].items())
        yield f"{row['network']:18} {1e3 * row['times'][row['base']]['median']:8.1f} ms   {ratios}"
        yield from (f"{'':18} {label}: {why}" for label, why in row["absent"].items())


def _counters(result):
    for row in result.get("kernels", ()):
        waits = "   ".join(f"{k} {v:.1f}" for k, v in list(row["warps waiting per issue"].items())[:MOST_STALLS])
        figures = "   ".join(f"{k} {v}" for k, v in row.items() if k not in ("kernel", "warps waiting per issue"))
        yield f"{row['kernel'][:60]}: {figures}   waiting: {waits}"
