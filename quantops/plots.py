"""Pictures of a training: what the controller's log tells."""


def plot_decisions(log, path):
    """Bits, beta and compression over the steps of an MSQController's log, to a file."""
    if not log:
        raise ValueError("log: expected at least one decision, got none yet")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install 'quantops[demo]'") from error
    steps = [entry["step"] for entry in log]
    names = [row["name"] for row in log[0]["layers"]]
    figure = Figure(figsize=(8, 9), layout="constrained")  # of no backend and no window
    bits, beta, size = figure.subplots(3, 1, sharex=True)
    for i, name in enumerate(names):
        rows = [entry["layers"][i] for entry in log]
        bits.step([0, *steps], [rows[0]["bits"], *(row["bits_after"] for row in rows)], where="post", label=name)
        beta.plot(steps, [row["beta"] for row in rows], marker=".", label=name)
    size.step([0, *steps], [log[0]["compression_before"], *(e["compression"] for e in log)], where="post", color="k")
    for axes, label in ((bits, "bits"), (beta, "beta"), (size, "compression")):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    size.set_xlabel("training step")
    if len(names) <= 20:
        figure.legend(*bits.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path)
