"""Training by every method, on a few images; the bit-level peers on toy weights; the tables. No speed, no accuracy."""

import io
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import quantops
from bench import models
from bench.__main__ import main
from bench.training import bitlevel, costs, data, methods, recipes, tables, train

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
pytest.importorskip("tqdm", reason="needs tqdm")
if quantops.info()["devices"]["cpu"]["implementation"] != "cpp":
    pytest.skip("training is measured with compiled kernels alone", allow_module_level=True)

CLASSES, BATCH = 3, 8
needs_cpq = [pytest.mark.skipif(not hasattr(quantops, "CPQConfig"), reason="this version has no CPQConfig")]
METHODS = [
    pytest.param(name, marks=needs_cpq if recipes.RECIPES[name].method is methods.CPQ else [])
    for name in recipes.GROUPS["all"]
]


def pictures(count, seed=0, size=32):
    """(count, size, size, 3) bytes, and labels in order of class."""
    generator = np.random.default_rng(seed)
    labels = np.sort(np.arange(count) % CLASSES).astype(np.uint8)
    noise = generator.integers(0, 100, (count, size, size, 3))
    return (noise + 60 * labels[:, None, None, None]).astype(np.uint8), labels


def jpeg(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    return file.getvalue()


def arrays(train_count=24, test_count=9):
    """What a good file has."""
    found = {}
    for part, count, seed in (("train", train_count, 0), ("test", test_count, 1)):
        images, labels = pictures(count, seed)
        files = [jpeg(image) for image in images]
        found[f"{part}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        found[f"{part}_offsets"] = np.cumsum([0, *map(len, files)])
        found[f"{part}_labels"] = labels
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, **arrays())
    return path


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


# Images.


def test_npz_holds_the_decoded_images(file, tmp_path):
    found, raw = data.load(file, cache=tmp_path / "cache"), arrays()
    assert found.classes == CLASSES and found.train.x.shape == (24, 3, 32, 32) and found.train.x.dtype == torch.uint8
    blob, ends = raw["test_jpeg"], raw["test_offsets"]
    expected = np.asarray(Image.open(io.BytesIO(blob[ends[4] : ends[5]].tobytes())))
    assert torch.equal(found.test.x[4], torch.tensor(expected).permute(2, 0, 1))
    assert found.test.y.tolist() == raw["test_labels"].tolist()
    assert len(list((tmp_path / "cache").iterdir())) == 1
    again = data.load(file, cache=tmp_path / "cache")
    assert torch.equal(again.train.x, found.train.x) and torch.equal(again.test.y, found.test.y)


def test_folders(tmp_path):
    images, labels = pictures(60, size=20)
    for i, (image, label) in enumerate(zip(images, labels)):
        folder = tmp_path / "all" / f"class {label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02}.png")
    found = data.load(tmp_path / "all", size=20)
    assert (len(found.train.y), len(found.test.y), found.classes) == (54, 6, CLASSES)
    assert torch.equal(found.test.x[0], torch.tensor(images[0]).permute(2, 0, 1))
    assert data.load(tmp_path / "all").train.x.shape == (54, 3, 32, 32)
    (tmp_path / "two").mkdir()
    for part in ("train", "test"):
        (tmp_path / "two" / part).symlink_to(tmp_path / "all")
    found = data.load(tmp_path / "two", size=20)
    assert len(found.train.y) == len(found.test.y) == 60 and torch.equal(found.train.x, found.test.x)


def test_subset_is_balanced_and_fixed(file):
    images = data.load(file).train
    part = images.subset(13)
    assert sorted(torch.bincount(part.y).tolist()) == [4, 4, 5]
    assert torch.equal(part.x, images.subset(13).x) and not torch.equal(part.x, images.subset(13, seed=1).x)


def test_augmentation_crops_and_flips():
    x = torch.randint(256, (40, 3, 6, 6), dtype=torch.uint8)
    made = data.augment(x, torch.Generator().manual_seed(0), pad=2)
    flipped = set()
    for image, got in zip(F.pad(x, (2,) * 4), made):
        crops = [
            (flip, image[:, i : i + 6, j : j + 6].flip(2) if flip else image[:, i : i + 6, j : j + 6])
            for i in range(5)
            for j in range(5)
            for flip in (False, True)
        ]
        found = [flip for flip, crop in crops if torch.equal(crop, got)]
        assert found
        flipped.add(found[0])
    assert flipped == {False, True}
    assert torch.equal(made, data.augment(x, torch.Generator().manual_seed(0), pad=2))


def test_batches_are_every_image_once(file):
    images = data.load(file).train
    order = torch.randperm(24, generator=torch.Generator().manual_seed(5))
    labels = [y for _, y in data.batches(images, 5, torch.Generator().manual_seed(5))]
    assert torch.equal(torch.cat(labels), images.y[order[:20]])
    x = data.normalise(images.x)
    assert torch.allclose(x[3, 1, 4, 7] * data.STD[1] + data.MEAN[1], images.x[3, 1, 4, 7] / 255)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"train_labels": None}, "no array train_labels"),
        ({"train_jpeg": np.zeros(9, np.float32)}, "train_jpeg: expected a row of uint8"),
        ({"test_offsets": np.arange(10)}, "test_offsets: expected increasing integers from 0 to the"),
        ({"test_offsets": np.zeros(0, np.int64)}, "test_offsets"),
        ({"test_labels": np.zeros(4, np.int64)}, "test_labels: expected 9 integers"),
        ({"test_labels": np.zeros(9)}, "test_labels: expected 9 integers"),
        (
            {
                "test_jpeg": np.arange(100, dtype=np.uint8),
                "test_offsets": np.array([0, 100]),
                "test_labels": np.zeros(1, np.int64),
            },
            "image 0 is none that Pillow can read",
        ),
    ],
)
def test_bad_files(tmp_path, change, words):
    found = {**arrays(), **change}
    np.savez(tmp_path / "bad.npz", **{k: v for k, v in found.items() if v is not None})
    with pytest.raises(ValueError, match=words):
        data.load(tmp_path / "bad.npz")


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="no file or folder"):
        data.load(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match="is not an .npz file"):
        data.load(tmp_path / "text.npz")
    with pytest.raises(ValueError, match="folders of images, one per class, found 0"):
        data.load(tmp_path)


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
    model = models.ResNet20(10)
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
            recipes.RECIPES["dropbits"].method(models.ResNet20(10), 10, **settings | {"search": search})


def test_msq_goes_on_with_the_nearest_rule_at_its_bits():
    model = models.ResNet20(10)
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
            recipes.RECIPES["msq-nearest"].method(models.ResNet20(10), 20, **settings | options)


def test_resume_skips_what_is_done_and_stops_in_time(file, tmp_path, capsys):
    options = ["--method", "float", "--epochs", "1", "--seed", "0,1", "--resume"]
    assert run(file, tmp_path, *options, "--seconds", "0") == train.UNFINISHED
    assert not list(tmp_path.glob("*.json"))
    assert run(file, tmp_path, *options) == 0
    written = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.json")}
    assert len(written) == 2
    assert run(file, tmp_path, *options, "--seconds", "0") == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.json")} == written


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
        (["--method", "float,msq", "--label", "x"], "label: expected one method"),
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
    model = models.ResNet20()
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


# Bit-level training.


def layer(kind, weight, bits, **more):
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight.data = weight.clone()
    parametrize.register_parametrization(made, "weight", kind(made.weight, bits, **more), unsafe=True)
    return made, made.parametrizations.weight[0]


def integers(bits, shape=(6, 10), seed=0):
    """Integers of which one is the largest there is."""
    w = torch.randint(-(2**bits) + 1, 2**bits, shape, generator=torch.Generator().manual_seed(seed)).float()
    w[0, 0] = 2**bits - 1
    return w


def test_planes_are_binary_digits():
    w = torch.tensor([5.0, -6.0, 0.0])
    planes = bitlevel.planes_of(w, 3)
    assert planes.tolist() == [[[1, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 1, 0]], [[1, 0, 0], [0, 1, 0]]]


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_bsq_weights_are_those_of_the_integers(bits):
    w = integers(bits)
    made, p = layer(bitlevel.BSQWeight, w * 0.37, bits)
    assert torch.equal(made.weight, w * p.step)
    torch.testing.assert_close(made.weight, w * 0.37)
    assert set(bitlevel.planes(made).unique().tolist()) == {0.0, 1.0} and bitlevel.planes(made).shape == (bits, 2, 60)


def test_bsq_gradients_are_straight_through():
    made, p = layer(bitlevel.BSQWeight, torch.randn(4, 5), 3)
    grad = torch.randn(4, 5)
    (made.weight * grad).sum().backward()
    expected = torch.stack([torch.stack([2.0**b * grad.flatten(), -(2.0**b) * grad.flatten()]) for b in range(3)])
    torch.testing.assert_close(bitlevel.planes(made).grad, expected * p.step.detach())
    torch.testing.assert_close(p.scale.grad, (grad * made.weight).sum().detach() / p.scale.detach())


@pytest.mark.parametrize("low, most, bits", [(0, 255, 8), (2, 63, 4), (3, 8, 1), (0, 3, 2), (0, 0, 0)])
def test_bsq_adjustment_drops_planes_and_changes_no_weight(low, most, bits):
    w = integers(8)
    made, p = layer(bitlevel.BSQWeight, w * 0.1, 8)
    kept = (w.abs().clamp(max=most).int() >> low << low).float() * w.sign()
    bitlevel.planes(made).data.copy_(bitlevel.planes_of(kept, 8))
    before, unit = made.weight.detach().clone(), float(p.unit)
    bitlevel.set_planes(made, p.adjust(bitlevel.planes(made)))
    assert p.bits == bits and bitlevel.planes(made).shape == (bits, 2, 60)
    assert torch.equal(made.weight, before) and float(p.unit) == unit * 2 ** (low if bits else 0)
    made.weight.sum().backward()
    assert bitlevel.planes(made).grad.shape == (bits, 2, 60)


def test_bsq_adjustment_rounds_and_grows():
    """Planes anywhere in [0, 2]: the rounded weights stay, and one more bit is there where they need it."""
    made, p = layer(bitlevel.BSQWeight, torch.randn(6, 10), 3)
    bitlevel.planes(made).data.uniform_(0, 2, generator=torch.Generator().manual_seed(0))
    bitlevel.planes(made).data[:, :, 0] = torch.tensor([2.0, 0.0])
    before = made.weight.detach().clone()
    bitlevel.set_planes(made, p.adjust(bitlevel.planes(made)))
    assert p.bits == 4 and torch.equal(made.weight, before)
    assert set(bitlevel.planes(made).unique().tolist()) == {0.0, 1.0}


def test_group_lasso():
    """By the definition; planes that are 0 have a gradient of 0, not NaN."""
    a, b = torch.rand(3, 2, 5), torch.rand(2, 2, 15)
    a[1] = 0
    a.requires_grad_()
    got = bitlevel.group_lasso([(3, a), (2, b)])
    expected = 5 / 20 * 3 * sum(a[i].square().sum().sqrt() for i in (0, 2)) + 15 / 20 * 2 * sum(
        b[i].square().sum().sqrt() for i in range(2)
    )
    torch.testing.assert_close(got, expected)
    got.backward()
    assert torch.equal(a.grad[1], torch.zeros(2, 5)) and (a.grad[0] > 0).all()


def test_bsq_finetunes_at_the_bits_it_found():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 3))
    given = model[0].weight.detach().abs().mean()
    method = methods.BSQ(model, 10, bits=8, strength=0.1, adjustments=2, search=0.4)
    assert sum(p.numel() for p in model.parameters() if p.dim() == 3) == 16 * 52
    w = bitlevel.planes(model[0])
    w.data[4:] = 0
    assert not method.after_step(1, None, None) and method.after_step(2, None, None)
    assert method.widths() == {"0": (40, 4), "1": (12, 8)} and method.penalty() is not None
    before = model[0].weight.detach().clone()
    assert method.after_step(4, None, None) and method.penalty() is None and not method.after_step(6, None, None)
    torch.testing.assert_close(model[0].weight, before)
    assert sum(p.numel() for p in model.parameters()) == 52 + 7 + 2  # and a step each
    assert len(model[0].weight.unique()) <= 31
    assert method.average_bits() == (40 * 4 + 12 * 8) / 52 and [e["step"] for e in method.log] == [2, 4]
    model[0].weight.sum().backward()
    fixed, u = model[0].parametrizations.weight[0], model[0].parametrizations.weight.original
    torch.testing.assert_close(u.grad, torch.ones(4, 10) * fixed.gain)
    torch.testing.assert_close(u.detach() * fixed.gain, before)
    torch.testing.assert_close(u.abs().mean().detach(), given)  # however small the steps have become
    torch.testing.assert_close(fixed.step.grad, torch.zeros(()), atol=1e-4, rtol=0)  # u is on the levels
    with torch.no_grad():
        u[0], u[1, 0] = 100.0, 0.4 * fixed.step
    fixed.step.grad = None
    model[0].weight[:2].sum().backward()
    levels = u.detach() / fixed.step.detach()
    over = 15 * 10 + float(levels[1, 1:].sum() - levels[:2].sum())  # of the levels over u/step
    torch.testing.assert_close(float(fixed.step.grad), over * float(fixed.gain) * (40 * 15) ** -0.5, rtol=1e-4, atol=0)
    method.after_step(7, None, None)
    torch.testing.assert_close(u[0].min().item(), 15 * fixed.step.item())


def test_bsq_finetunes_layers_without_bits():
    model = nn.Sequential(nn.Linear(3, 2))
    method = methods.BSQ(model, 2, bits=2, strength=0.1, adjustments=1, search=0.5)
    bitlevel.planes(model[0]).data.zero_()
    assert method.after_step(1, None, None) and method.widths() == {"0": (6, 0)}
    model[0](torch.ones(1, 3)).sum().backward()
    assert torch.equal(model[0].weight, torch.zeros(2, 3))
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_csq_starts_at_the_weights_and_ends_binary():
    w = integers(5)
    made, p = layer(bitlevel.CSQWeight, w * 0.2, 5)
    torch.testing.assert_close(made.weight, w * 0.2)
    with torch.no_grad():
        p.gates[1] = -0.5
        bitlevel.planes(made)[0, 0, 3] = 0.0
    hot = []
    for beta in (1.0, 30.0, 1000.0):
        p.beta.fill_(beta), p.beta_gates.fill_(beta)
        hot.append(made.weight.detach().clone())
    p.harden(bitlevel.planes(made))
    planes = bitlevel.planes(made).detach()
    digits = (planes[:, 0] > 0).float() - (planes[:, 1] > 0).float()
    powers = torch.tensor([1.0, 0.0, 4.0, 8.0, 16.0])
    hard = (powers @ digits).view(6, 10) * (p.scale * p.unit).detach()
    assert p.bits == 4
    torch.testing.assert_close(made.weight.detach(), hard, rtol=1e-6, atol=0)
    errors = [float((v - hard).abs().flatten()[torch.arange(60) != 3].max()) for v in hot]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-6


def test_csq_gradients():
    """All of them by autograd through the definition, in float64."""
    made, p = layer(bitlevel.CSQWeight, torch.randn(4, 5), 3)
    made.double()
    p.beta.fill_(1.7), p.beta_gates.fill_(0.8)
    grad = torch.randn(4, 5, dtype=torch.float64)
    (made.weight * grad).sum().backward()
    planes, gates, scale = (t.detach().clone().requires_grad_() for t in (bitlevel.planes(made), p.gates, p.scale))
    soft, powers = torch.sigmoid(1.7 * planes), 2.0 ** torch.arange(3, dtype=torch.float64)
    w = scale / 7 * ((powers * torch.sigmoid(0.8 * gates))[:, None] * (soft[:, 0] - soft[:, 1])).sum(0)
    torch.testing.assert_close(made.weight.detach().flatten(), w.detach())
    (w * grad.flatten()).sum().backward()
    for got, expected in ((bitlevel.planes(made), planes), (p.gates, gates), (p.scale, scale)):
        torch.testing.assert_close(got.grad, expected.grad)


def test_csq_chooses_bits_for_good():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 3))
    method = methods.CSQ(model, 10, bits=8, target=2.0, strength=0.1, hottest=200.0, search=0.5)
    first, second = (m.parametrizations.weight[0] for m in model)
    with torch.no_grad():
        first.gates[:6] = -1.0
    # budget: strength * (average bits - target) * the sum of all gates
    average = (40 * 2 + 12 * 8) / 52
    kept = 6 * torch.sigmoid(torch.tensor(-1.0)) + 10 * torch.sigmoid(torch.tensor(1.0))
    torch.testing.assert_close(method.penalty(), 0.1 * (average - 2.0) * kept)
    assert not method.after_step(4, None, None) and method.after_step(5, None, None) and method.penalty() is None
    assert bitlevel.planes(model[0]).shape == (2, 2, 40) and first.powers.tolist() == [64.0, -64.0, 128.0, -128.0]
    assert float(second.beta_gates) == np.float32(bitlevel.HARD) and method.average_bits() == average
    method.after_step(10, None, None)
    torch.testing.assert_close(float(first.beta), 200.0)
    method.finish()
    assert len(model[0].weight.unique()) <= 7  # -192, -128, -64, 0, ... times the step


@pytest.mark.parametrize("kind", [bitlevel.BSQWeight, bitlevel.CSQWeight])
def test_bits_are_summed_in_float32_under_autocast(kind):
    made, _ = layer(kind, integers(8) * 0.01, 8)
    with torch.autocast("cpu", torch.bfloat16):
        w = made.weight
    assert w.dtype == torch.float32 and torch.equal(w, made.weight)


# Costs and tables.


def test_bit_level_training_holds_16_times_the_weights():
    ways = {name: costs.Training(costs.WAYS[name], "cpu", 2, False) for name in (costs.BASE, tables.OURS, "BSQ", "CSQ")}
    for way in ways.values():
        way.step()
    held = {name: train.training_bytes(way.model, way.optimizer) for name, way in ways.items()}
    plain = sum(p.nbytes for p in models.ResNet20().parameters())
    assert costs.state_bytes(held[tables.OURS]) == costs.state_bytes(held[costs.BASE]) == 3 * plain
    assert costs.state_bytes(held["BSQ"]) >= 12 * costs.state_bytes(held[tables.OURS])
    weights = sum(m.weight.numel() for n, m in models.ResNet20().named_modules() if quantops.is_linear_or_conv(n, m))
    others = sum(p.numel() for p in models.ResNet20().parameters()) - weights
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
