"""Files: whole or not at all, with the rights and the place of those they replace; bad ones are a ValueError."""

import copy
import json
import os
import stat
import subprocess
import sys

import pytest
import torch
from torch import nn

import quantops
from quantops import intfile
from quantops.__main__ import main
from quantops.files import write_whole
from quantops.intfile import load_int, save_int
from quantops.intweight import IntWeight

pytest.importorskip("safetensors")
WEIGHTS = {"w": IntWeight.from_codes(torch.randint(0, 16, (6, 20)), torch.ones(()), 4)}


@pytest.fixture(params=[True, False], ids=["nameless", "named"])
def nameless(request, monkeypatch):
    """On file systems that have files without a name, and on those that have not."""
    if not request.param:
        monkeypatch.delattr(os, "O_TMPFILE")


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("nameless")
def test_a_file_has_the_rights_of_the_umask_or_of_the_old_one(tmp_path):
    path = tmp_path / "w.safetensors"
    for mask, want in ((0o022, 0o644), (0o027, 0o640), (0o077, 0o600)):
        path.unlink(missing_ok=True)
        before = os.umask(mask)
        try:
            save_int(WEIGHTS, path)
        finally:
            os.umask(before)
        assert mode(path) == want
    for want in (0o640, 0o604, 0o444):
        path.chmod(want)
        save_int(WEIGHTS, path)
        assert mode(path) == want and os.listdir(tmp_path) == [path.name]


@pytest.mark.usefixtures("nameless")
def test_the_target_of_a_symbolic_link_is_replaced(tmp_path):
    (tmp_path / "store").mkdir()
    link, target = tmp_path / "latest", tmp_path / "store" / "run 7"
    link.symlink_to(target)
    for _ in range(2):  # the target is made, then replaced
        save_int(WEIGHTS, link)
        assert link.is_symlink() and not target.is_symlink() and list(load_int(target)) == ["w"]
    assert os.listdir(target.parent) == [target.name]


@pytest.mark.usefixtures("nameless")
def test_the_longest_name_that_a_folder_takes(tmp_path):
    path = tmp_path / ("w" * 255)
    save_int(WEIGHTS, path)
    assert list(load_int(path)) == ["w"] and os.listdir(tmp_path) == [path.name]
    with pytest.raises(OSError, match="too long"):
        save_int(WEIGHTS, tmp_path / ("w" * 256))
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.usefixtures("nameless")
def test_contents_are_on_the_disk_before_the_name_and_the_name_after(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd, f=os.fsync: (done.append("file" if stat.S_ISREG(os.fstat(fd).st_mode) else "folder"), f(fd)),
    )
    monkeypatch.setattr(os, "replace", lambda a, b, f=os.replace: (done.append("name"), f(a, b)))
    save_int(WEIGHTS, tmp_path / "w")
    assert done == ["file", "name", "folder"]


@pytest.mark.usefixtures("nameless")
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "w"
    path.write_bytes(b"old")
    for error in (OSError("full"), KeyboardInterrupt()):

        def write(file, error=error):
            file.write(b"a part")
            raise error

        with pytest.raises(type(error)):
            write_whole(path, write)
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [path.name]


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="no files without a name here")
def test_a_killed_save_leaves_nothing(tmp_path):
    program = (
        "import os, signal, sys; from quantops.files import write_whole; "
        "write_whole(sys.argv[1], lambda f: (f.write(b'x' * 99999), f.flush(), os.kill(os.getpid(), 9)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "w"], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert run.returncode == -9 and os.listdir(tmp_path) == []


def test_places_that_are_no_files_are_errors(tmp_path):
    for path in (tmp_path, os.devnull):
        with pytest.raises(OSError, match="expected a regular file or a free name"):
            save_int(WEIGHTS, path)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    with pytest.raises(FileNotFoundError, match="absent"):
        save_int(WEIGHTS, tmp_path / "absent" / "w")
    with pytest.raises(OSError, match="expected a regular file or a free name"):
        save_int(WEIGHTS, f"{tmp_path}/w/")
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        save_int(WEIGHTS, tmp_path / "a")
    assert {p.name: p.is_symlink() for p in tmp_path.iterdir()} == {"a": True, "b": True}


def test_a_folder_that_cannot_be_flushed_is_an_error_before_the_old_file_goes(tmp_path, monkeypatch):
    """As one that may be written to and not read."""
    path = tmp_path / "w"
    path.write_bytes(b"old")

    def opened(name, flags, *more, real=os.open):
        if name == os.path.realpath(tmp_path) and flags == os.O_RDONLY:
            raise PermissionError(13, "Permission denied", name)
        return real(name, flags, *more)

    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(PermissionError):
        save_int(WEIGHTS, path)
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["w"]


def rewritten(path, change):
    """Applies ``change`` to the text of the metadata "weights" of a file."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as f:
        tensors, metadata = {k: f.get_tensor(k) for k in f.keys()}, dict(f.metadata())  # noqa: SIM118
    metadata["weights"] = change(metadata["weights"])
    save_file(tensors, path, metadata)


def entry(**changes):
    def change(text):
        about = json.loads(text)
        about["w"].update(changes)
        return json.dumps(about)

    return change


INSANE = {
    "infinite checksum": entry(crc32=[float("inf")] * 5),
    "no checksum at all": entry(crc32=None),
    "fraction as checksum": entry(crc32=[1.5] * 5),
    "nested too deep": lambda text: "[" * 100_000,
    "nested too deep, an entry": lambda text: text.replace('"dyadic"', "[" * 900 + "]" * 900),
    "an integer of 5000 digits": lambda text: text.replace('"bits": 4', '"bits": 1' + "0" * 5000),
    "0 bits, shape 2^66": entry(bits=0, shape=[2**66]),
    "0 bits, shape 2^60": entry(bits=0, shape=[2**60]),
    "0 bits, none of 2^60": entry(bits=0, shape=[2**60, 0]),
    "0 bits, 2^60 by three": entry(bits=0, shape=[2**20] * 3),
    "a negative dim": entry(shape=[-6, -20]),
    "a fraction of a row": entry(shape=[6.0, 20]),
    "true rows": entry(shape=[True, 120]),
    "a hundred dims": entry(shape=[1] * 100 + [6, 20]),
    "dtype is a list": entry(dtype=["float32"]),
    "grid is a dict": entry(grid={}),
    "an unknown setting": entry(zero_point=3),
    "bits true": entry(bits=True),
    "a name of half a character": lambda text: text.replace('"w"', '"\\ud800"'),
}


@pytest.mark.parametrize("kind", INSANE)
def test_a_file_that_is_not_sane_is_a_value_error_with_its_path(tmp_path, kind):
    path = tmp_path / "x.safetensors"
    save_int(WEIGHTS, path)
    rewritten(path, INSANE[kind])
    for bits in (None, 2):
        with pytest.raises(ValueError, match="x.safetensors: ") as error:
            load_int(path, bits=bits)
        assert len(str(error.value)) < 1000


def test_a_scale_of_a_strange_dtype(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_int(WEIGHTS, path)
    with safe_open(path, framework="pt") as f:
        tensors, metadata = {k: f.get_tensor(k) for k in f.keys()}, dict(f.metadata())  # noqa: SIM118
    for dtype in (torch.int64, torch.bool, torch.bfloat16, torch.float8_e4m3fn):
        save_file({**tensors, "w.scale": torch.ones(()).to(dtype)}, path, metadata)
        with pytest.raises(ValueError, match="x.safetensors: w: expected a scale of float32 or float64"):
            load_int(path)


def test_models_without_memory_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    model = quantops.quantize_(nn.Sequential(nn.Linear(20, 6)), quantops.MSQConfig())
    save_int(model, path)
    with torch.device("meta"):
        plain = nn.Sequential(nn.Linear(20, 6))
    with pytest.raises(ValueError, match=r"0.weight: expected a parameter with memory.*to_empty"):
        load_int(path, plain)
    with pytest.raises(ValueError, match=r"0.weight: expected a parameter with memory"):
        load_int(path, nn.Sequential(nn.LazyLinear(6)))
    load_int(path, plain.to_empty(device="cpu"))
    assert torch.equal(plain[0].weight, model[0].weight)
    with pytest.raises(ValueError, match="0: expected a weight with values, got one on the meta device"):
        save_int(model.to("meta"), path)
    with pytest.raises(ValueError, match="w: expected codes with values, got some on the meta device"):
        save_int({"w": IntWeight(WEIGHTS["w"].packed.to("meta"), torch.ones(()))}, path)
    assert list(load_int(path)) == ["0.weight"]


def test_show_tells_what_a_file_holds(tmp_path, capsys, monkeypatch):
    path = tmp_path / "x.safetensors"
    weights = {
        "a.weight": WEIGHTS["w"],
        "b": IntWeight.from_codes(
            torch.zeros(7, 3, dtype=torch.int32),
            torch.ones(7, dtype=torch.float64),
            0,
            grid="full",
            signed=False,
            dtype=torch.float64,
            fixed=True,
        ),
    }
    save_int(weights, path)
    monkeypatch.setattr(sys, "argv", ["quantops", "show", str(path)])
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[0].split()) == "a.weight 6x20 4 bits dyadic float32 1 scale 64 bytes"
    assert lines[0].endswith("1 scale   64 bytes") and lines[1].endswith("7 scales  56 bytes")
    assert "0 bits fixed" in lines[1] and "full unsigned" in lines[1]
    assert lines[2] == ("2 weights, 141 elements, 120 bytes: 6.81 bits each with the scales; format quantops-int 2")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(SystemExit, match="quantops: .*x.safetensors: not a whole safetensors file"):
        main()
    monkeypatch.setattr(sys, "argv", ["quantops", "show", str(tmp_path / "absent")])
    with pytest.raises(SystemExit, match="quantops: .*absent: no such file"):
        main()
    monkeypatch.setattr(sys, "argv", ["quantops", "show", str(tmp_path)])
    with pytest.raises(SystemExit, match="quantops: .*: expected a file, got a folder"):
        main()


def test_scales_of_activations_go_with_the_weights(tmp_path, capsys, monkeypatch):
    path, x = tmp_path / "x.safetensors", torch.randn(8, 6).relu()
    made = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    for config in (
        quantops.MSQConfig(bits=4, act_bits=4),
        quantops.CPQConfig(bits=3, act_bits=4),
        quantops.TruncQuantConfig(bits=(8, 4), act_bits="weights", act="input", batch_norm=False),
    ):
        model = quantops.quantize_(copy.deepcopy(made), config)
        model(x)
        save_int(model.eval(), path)
        assert list(load_int(path, copy.deepcopy(made))) == ["0.weight", "2.weight"]
        found = quantops.load_activation_scales(path)
        assert len(found) == (2 if config.act == "input" else 1)
        for name, v in found.items():
            y = torch.rand(50, 6) - 0.2
            codes = quantops.encode(y, v["scale"].reshape(()), v["bits"], rule=v["rule"], signed=v["signed"])
            grid = "dyadic" if v["rule"] == "round_clamp" else "full"
            q = quantops.decode(codes, v["scale"].reshape(()), v["bits"], grid=grid, signed=v["signed"])
            assert torch.equal(q, model.get_submodule(name)(y).detach()), name
    monkeypatch.setattr(sys, "argv", ["quantops", "show", str(path)])
    assert main() == 0
    assert "0.input_quantizer  activation  8 bits  floor unsigned  1 scale" in capsys.readouterr().out
    save_int(WEIGHTS, path)
    assert quantops.load_activation_scales(path) == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda v: {**v, "scale": v["scale"] * float("nan")},
        lambda v: {**v, "scale": v["scale"] * float("inf")},
        lambda v: {**v, "scale": -v["scale"]},
        lambda v: {**v, "scale": v["scale"].to(torch.int64)},
        lambda v: {**v, "scale": v["scale"][:0]},
        lambda v: {**v, "scale": v["scale"].expand(2, 3)},
        lambda v: {**v, "offset": torch.ones(2)},
        lambda v: {**v, "offset": torch.full((1,), float("nan"))},
    ],
)
def test_scales_that_no_activation_has(tmp_path, change, monkeypatch):
    """Neither written nor, with a checksum that is right, read."""
    path = tmp_path / "x.safetensors"
    model = quantops.quantize_(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), quantops.MSQConfig(bits=4, act_bits=4))
    model(torch.randn(8, 6))
    bad = {name: change(v) for name, v in quantops.activation_scales(model).items()}
    monkeypatch.setattr(intfile, "activation_scales", lambda model: bad)
    with pytest.raises(ValueError, match="^1: expected .* finite"):
        save_int(model, path)
    assert not path.exists()
    with monkeypatch.context() as unchecked:
        unchecked.setattr(intfile, "_check_scales", lambda name, about: None)
        save_int(model, path)
    for call in (load_int, quantops.load_activation_scales):
        with pytest.raises(ValueError, match="x.safetensors: 1: expected .* finite"):
            call(path)


def test_files_do_not_depend_on_the_default_device(tmp_path):
    path = tmp_path / "x.safetensors"
    model = quantops.quantize_(nn.Sequential(nn.Linear(20, 6)), quantops.MSQConfig(bits=3))
    other = quantops.quantize_(nn.Sequential(nn.Linear(20, 6)), quantops.MSQConfig(bits=3))
    with torch.device("meta"):
        save_int(model, path)
        weight = load_int(path)["0.weight"]
        quantops.save_model(model, path)
        quantops.load_model(path, other)
    assert torch.equal(weight.dequantize(), model[0].weight) and torch.equal(other[0].weight, model[0].weight)


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.safetensors", "a.index.json"])
def test_checkpoints_that_are_damaged_are_value_errors_with_their_path(tmp_path, name):
    model = quantops.quantize_(nn.Sequential(nn.Linear(6, 5)), quantops.MSQConfig(bits=4))
    torch.save(model.state_dict(), tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for data in (b"", b"abc", b"[]", whole[: len(whole) // 2]):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"/{name}: (not a whole checkpoint|expected JSON with a weight_map)"):
            quantops.prepare(nn.Sequential(nn.Linear(6, 5)), tmp_path / name)
    with pytest.raises(FileNotFoundError, match="absent"):
        quantops.prepare(nn.Sequential(nn.Linear(6, 5)), tmp_path / "absent")


@pytest.mark.parametrize("kind", ["scale", "bits", "rule", "nothing"])
def test_damaged_scales_of_activations(tmp_path, kind):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    model = quantops.quantize_(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), quantops.MSQConfig(bits=4, act_bits=4))
    model(torch.randn(8, 6))
    save_int(model, path)
    with safe_open(path, framework="pt") as f:
        tensors, metadata = {k: f.get_tensor(k) for k in f.keys()}, dict(f.metadata())  # noqa: SIM118
    if kind == "scale":
        tensors["1.act_scale"] *= 2
    elif kind == "nothing":
        del tensors["1.act_scale"]
    else:
        change = {"bits": ('"bits": 4', '"bits": 5'), "rule": ('"round_clamp"', '["floor"]')}[kind]
        metadata["activations"] = metadata["activations"].replace(*change)
    save_file(tensors, path, metadata)
    for call in (load_int, quantops.load_activation_scales):
        with pytest.raises(ValueError, match="x.safetensors: 1: "):
            call(path)
