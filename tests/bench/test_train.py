"""Training by every method, on a few images; the tables. No speed, no accuracy."""

import json

import pytest
import torch

import quantops
from bench import store
from bench.__main__ import main
from bench.training import costs, methods, recipes, tables, train
from quantops.demo.resnet20 import ResNet20

pytest.importorskip("tqdm", reason="needs tqdm")
if quantops.info()["devices"]["cpu"]["implementation"] != "cpp":
    pytest.skip("training is measured with compiled kernels alone", allow_module_level=True)

BATCH = 8
needs_cpq = [pytest.mark.skipif(not hasattr(quantops, "CPQConfig"), reason="this version has no CPQConfig")]
METHODS = [
    pytest.param(name, marks=needs_cpq if recipes.RECIPES[name].method is methods.CPQ else [])
    for name in recipes.GROUPS["all"]
]


def run(file, folder, *more):
    """The exit status of a training of 2 steps an epoch."""
    return main(
        [
            "train",
            "--data",
            str(file),
            "--folder",
            str(folder),
            "--save",
            str(folder / "weights"),
            "--batch",
            str(BATCH),
            "--subset",
            str(2 * BATCH),
            "--device",
            "cpu",
            *more,
        ]
    )


def result(folder, name="*"):
    (found,) = folder.glob(f"{name}-seed*.json")
    return json.loads(found.read_text())


# The loop.


@pytest.mark.parametrize("method", METHODS)
def test_two_steps(file, tmp_path, method):
    assert run(file, tmp_path, "--method", method, "--epochs", "1") == 0
    found = result(tmp_path)
    settings = json.loads(json.dumps(recipes.RECIPES[method].settings))  # tuples are lists there
    assert found["label"] == method and found["configuration"]["settings"] == settings
    assert len(found["epochs"]) == 1 and found["epochs"][0]["loss"] > 0
    assert all(0 <= v <= 100 for v in found["accuracy"].values())
    assert (found["compression"] is None) == (recipes.RECIPES[method].method is methods.Float)
    assert not list(tmp_path.glob("*.pt")) and len(list((tmp_path / "weights").iterdir())) == 1


RESUMED = {
    "float": [],
    "msq": ["--set", "decisions=3", "--set", "prune=0.99", "--set", "threshold=1.0", "--set", "sample_size=4"],
    "msq-decoupled": ["--set", "decisions=3", "--set", "threshold=1.0", "--set", "hessian=False"],
    "msq-nearest": ["--set", "bits=3", "--set", "threshold=1.0"],  # the bits are found in the first epoch
    "truncquant": [],
    "dropbits": ["--set", "search=0.25"],  # gates are gone before the interruption
    "bsq": ["--set", "adjustments=3", "--set", "search=1.0"],
    "csq": ["--set", "search=0.5"],
}


@pytest.mark.parametrize(
    "method, more",
    [
        *RESUMED.items(),
        ("dropbits", ["--set", "search=0.75"]),
        ("csq", ["--set", "search=0.75"]),
        ("bsq", ["--set", "adjustments=2", "--set", "search=0.5"]),
        ("float", ["--amp"]),
    ],
)
def test_resumed_equals_uninterrupted(file, tmp_path, monkeypatch, method, more):
    """Interrupted after the first of two epochs: the same weights and decisions, bit for bit."""
    options = ["--method", method, "--epochs", "2", "--seed", "3", *more]
    assert run(file, tmp_path / "whole", *options) == 0

    save = train.Run.save

    def interrupted(self):
        save(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "save", interrupted)
        assert run(file, tmp_path / "parts", *options) == 130
    assert not list((tmp_path / "parts").glob("*.json"))
    assert run(file, tmp_path / "parts", *options, "--resume") == 0
    a, b = (result(tmp_path / name) for name in ("whole", "parts"))
    for key in ("accuracy", "log", "average_bits", "trainable_parameters"):
        assert a[key] == b[key], key
    assert [e["loss"] for e in a["epochs"]] == [e["loss"] for e in b["epochs"]]
    a, b = (torch.load(tmp_path / name / "weights" / f"{method}-seed3.pt") for name in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_gates_learn_at_their_rate_until_the_search_ends():
    model = ResNet20(10)
    settings = recipes.RECIPES["dropbits"].settings
    method = recipes.RECIPES["dropbits"].method(model, 10, **settings | {"search": 0.2})
    gates = [p for name, p in model.named_parameters() if name.endswith("log_a")]
    assert gates and all(method.rate(p) == (10.0 if any(p is g for g in gates) else 1.0) for p in model.parameters())
    method.penalty().backward()
    assert method.after_step(1, None, None) is False and method.drops
    assert method.after_step(2, None, None) is True and method.penalty() is None
    assert method.log[0]["step"] == 2 and not any(p.requires_grad for p in gates)
    for search in (0, 1.5):
        with pytest.raises(ValueError, match=r"search: expected a part of the steps, in \(0, 1\]"):
            recipes.RECIPES["dropbits"].method(ResNet20(10), 10, **settings | {"search": search})


def test_msq_goes_on_with_the_nearest_rule_at_its_bits():
    model = ResNet20(10)
    settings = recipes.RECIPES["msq-nearest"].settings | {"bits": 4, "threshold": 1.0}
    method = recipes.RECIPES["msq-nearest"].method(model, 20, **settings)
    parameters, x, y = list(model.parameters()), torch.randn(8, 3, 32, 32), torch.arange(8)
    for step in range(2):
        assert method.found is None and method.strength > 0
        method.after_step(step + 1, x, y)
    assert set(method.found.values()) == {2} and method.average_bits() == 2 and method.strength == 0
    assert all(a is b for a, b in zip(parameters, model.parameters()))
    weight = model.conv.parametrizations.weight.original
    step = 1.87 * weight.abs().mean() / 3
    torch.testing.assert_close(model.conv.weight.unique(), step * torch.tensor([-3.0, -1, 1, 3]))
    for options, words in (({"nearest": "big"}, "scale: "), ({"target": None}, "nearest: expected None")):
        with pytest.raises(ValueError, match=words):
            recipes.RECIPES["msq-nearest"].method(ResNet20(10), 20, **settings | options)


def test_resume_skips_what_is_done_and_stops_in_time(file, tmp_path, capsys):
    options = ["--method", "float", "--epochs", "1", "--seed", "0,1", "--resume"]
    assert run(file, tmp_path, *options, "--seconds", "0") == train.UNFINISHED
    assert not list(tmp_path.glob("*.json"))
    assert run(file, tmp_path, *options) == 0
    written = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.json")}
    assert len(written) == 2
    assert run(file, tmp_path, *options, "--seconds", "0") == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.json")} == written


def test_processes_share_the_runs_and_change_nothing(file, tmp_path):
    options = ["--method", "float,msq", "--epochs", "1", "--seed", "0,1", "--label", "{method}-short"]
    assert run(file, tmp_path / "one", *options) == 0
    assert run(file, tmp_path / "two", *options, "--processes", "2") == 0
    one, two = (store.read_runs(tmp_path / name) for name in ("one", "two"))
    assert list(one) == [f"{m}-short-seed{s}" for m in ("float", "msq") for s in (0, 1)] == list(two)
    for name in one:
        assert one[name]["accuracy"] == two[name]["accuracy"]
        assert one[name]["epochs"][0]["loss"] == pytest.approx(two[name]["epochs"][0]["loss"], rel=1e-4)
    assert run(file, tmp_path / "two", *options, "--processes", "2", "--resume", "--seconds", "0") == 0
    assert run(file, tmp_path / "three", *options, "--processes", "2", "--seconds", "0") == train.UNFINISHED
    with_error = ["--method", "float", "--epochs", "1", "--processes", "2", "--init", "absent.pt"]
    assert run(file, tmp_path / "three", *with_error) == 1


def test_gathered_results_are_the_same_and_done(file, tmp_path):
    folder, options = tmp_path / "train", ["--method", "float", "--epochs", "1", "--resume"]
    assert run(file, folder, *options, "--seed", "0,1") == 0
    before = store.read_runs(folder)
    assert list(before) == ["float-seed0", "float-seed1"]
    assert main(["tables", str(tmp_path), "--gather"]) == 0
    assert store.read_runs(folder) == before and not list(folder.glob("*.json"))
    assert run(file, folder, *options, "--seed", "0,1", "--seconds", "0") == 0  # nothing is left to do
    assert run(file, folder, *options, "--seed", "2") == 0
    assert main(["tables", str(tmp_path), "--gather"]) == 0
    assert {k: v for k, v in store.read_runs(folder).items() if k in before} == before
    assert len((tmp_path / "train.json").read_text().splitlines()) == 3 + 4  # a run is a line


def test_a_checkpoint_of_other_options_is_refused(file, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Run, "write", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(file, tmp_path, "--method", "float", "--epochs", "1") == 130
    with pytest.raises(SystemExit, match="written by a run with other options"):
        run(file, tmp_path, "--method", "float", "--epochs", "1", "--resume", "--lr", "0.5")


def test_a_damaged_checkpoint_is_named(file, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Run, "write", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    options = ["--method", "float", "--epochs", "1"]
    assert run(file, tmp_path, *options) == 130
    (path,) = tmp_path.glob("*.pt")
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-50], whole[:200] + b"\xff" * 900 + whole[1100:]):
        path.write_bytes(damaged)
        with pytest.raises(SystemExit, match=r"bench: resume: .*\.pt (is damaged|holds no state)"):
            run(file, tmp_path, *options, "--resume")
    torch.save({"configuration": ""}, path)
    with pytest.raises(SystemExit, match=r"bench: resume: .*\.pt holds no state of a run"):
        run(file, tmp_path, *options, "--resume")
    with pytest.raises(SystemExit, match=r"bench: init: .*\.pt is damaged"):
        path.write_bytes(whole[:100])
        run(file, tmp_path, *options, "--init", str(path))


@pytest.mark.parametrize(
    "more, words",
    [
        (["--method", "nothing"], "method: expected some of float, msq"),
        (["--method", "float", "--epochs", "0"], "epochs: expected at least 1"),
        (["--method", "float", "--seed", "one"], "seed: expected integers"),
        (["--method", "float", "--subset", "25"], r"subset: expected 1..24 images, got 25"),
        (["--method", "float", "--subset", "3"], "subset: expected at least one batch of 8"),
        (["--method", "float,msq", "--label", "x"], r"label: expected {method} in it"),
        (["--method", "float", "--processes", "0"], "processes: expected at least 1"),
        (
            ["--method", "msq", "--set", "strengh=1"],
            "set: expected SETTING=VALUE with a setting of msq, bits, k, target",
        ),
        (["--method", "float", "--set", "bits=1"], "which has none"),
        (["--method", "float", "--init", "absent.pt"], "init: absent.pt is no state dict"),
        (["--method", "float", "--data", "absent.npz"], "no file or folder absent.npz"),
    ],
)
def test_bad_options(file, tmp_path, more, words):
    with pytest.raises(SystemExit, match=words):
        run(file, tmp_path, *(["--epochs", "1"] if "--epochs" not in more else []), *more)
    assert not list(tmp_path.iterdir())


def test_init_takes_the_names_of_torchvision(tmp_path):
    model = ResNet20()
    back = {"conv.": "conv1.", "bn.": "bn1."}

    def name(key):
        head = next((h for h in back if key.startswith(h)), None)
        if head:
            return back[head] + key.removeprefix(head)
        if key.startswith("blocks."):
            _, i, rest = key.split(".", 2)
            return f"layer{int(i) // 3 + 1}.{int(i) % 3}.{rest.replace('down.', 'downsample.')}"
        return key

    weights = {name(k): v for k, v in model.state_dict().items()}
    assert "layer2.0.downsample.1.running_var" in weights and "layer3.2.bn2.weight" in weights
    torch.save(weights, tmp_path / "init.pt")
    loaded = train.initialised(10, 1, tmp_path / "init.pt").state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="no state dict of this resnet20"):
        train.initialised(11, 1, tmp_path / "init.pt")


# Costs and tables.


def test_bit_level_training_holds_16_times_the_weights():
    ways = {name: costs.Training(costs.WAYS[name], "cpu", 2, False) for name in (costs.BASE, tables.OURS, "BSQ", "CSQ")}
    for way in ways.values():
        way.step()
    held = {name: train.training_bytes(way.model, way.optimizer) for name, way in ways.items()}
    plain = sum(p.nbytes for p in ResNet20().parameters())
    assert costs.state_bytes(held[tables.OURS]) == costs.state_bytes(held[costs.BASE]) == 3 * plain
    assert costs.state_bytes(held["BSQ"]) >= 12 * costs.state_bytes(held[tables.OURS])
    weights = sum(m.weight.numel() for n, m in ResNet20().named_modules() if quantops.is_linear_or_conv(n, m))
    others = sum(p.numel() for p in ResNet20().parameters()) - weights
    assert held["BSQ"]["trainable_parameters"] == 16 * weights + others + 22  # a scale for each layer
    assert held["CSQ"]["trainable_parameters"] == 16 * weights + others + 22 * 9  # and 8 gates


def test_costs_and_tables(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(costs, "WAYS", {k: v for k, v in costs.WAYS.items() if k != "compiled MSQ"})
    monkeypatch.setattr(costs.measure, "interleave", lambda calls, *_, **__: {k: [f(), f()] for k, f in calls.items()})
    assert main(["costs", "--device", "cpu", "--batch", "2", "--out", str(tmp_path / "costs-cpp.json")]) == 0
    for more in (["--method", "qat,separate-8,separate-2"], ["--method", "msq,float,details-dyadic"]):
        assert run(file, tmp_path / "train", "--epochs", "1", *more) == 0
    assert run(file, tmp_path / "train", "--epochs", "2", "--method", "msq", "--label", "msq-long") == 0
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    capsys.readouterr()
    assert main(["tables", str(tmp_path), "--into", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith(f"{tables.END}\nafter\n") and "\nold\n" not in text
    assert capsys.readouterr().out.strip() in text
    found, least = (result(tmp_path / "train", name)["accuracy"]["final"] for name in ("msq", "float"))
    alone = {m: f"{result(tmp_path / 'train', f'separate-{m}')['accuracy']['final']:.2f}" for m in (8, 2)}
    for cell in (
        "| BSQ | float32 | C++ |",
        "| 15.9x |",
        f"| {found:.2f} | {least - found:.2f} | 4.00 | 8.00 |",
        f"| {least:.2f} |  |  |  |",
        "| msq-long | 2 x 16 | 1 |",
        "| qat, norms re-estimated | 1 x 16 | 1 |",
        f"| separate networks | 1 x 16 | 1 | {alone[8]} |  | {alone[2]} |  |",
        "- msq (MSQ, arXiv 2507.22349): a scale of 2.8",
        r"| details-dyadic | 2 | round-clamp rule, constant bits: max\|w\|, a constant | 1 x 16 | 1 |",
    ):
        assert cell in text, cell
    (row,) = (line for line in text.splitlines() if line.startswith("| msq-long |"))
    assert row.split(" | ")[5] == ""  # no float network was trained for as long
    assert text.index("| msq-long |") < text.index("| float | 1 x 16 |") < text.index("| msq | 1 x 16 |")
    with pytest.raises(SystemExit, match="no results"):
        main(["tables", str(tmp_path / "train" / "weights")])
