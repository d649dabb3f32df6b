"""One file for a whole model: what was saved comes back, into plain and into quantized models, at any width."""

import copy
import json
import os
import sys

import pytest
import torch
from torch import nn

import quantops as Q
from exported import Kinds
from quantops import inverse
from quantops.__main__ import main
from quantops.modelfile import STATE

safetensors = pytest.importorskip("safetensors")
pytestmark = pytest.mark.filterwarnings("ignore:.*of the weights in matrices")


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm, self.act = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
        self.fc, self.out = nn.Linear(96, 8), nn.Linear(8, 3)
        self.register_buffer("mean", torch.randn(2, 1, 1))

    def forward(self, x):
        return self.out(self.act(self.fc(self.act(self.norm(self.conv(x - self.mean))).flatten(1))))


CONFIGS = {
    "msq": Q.MSQConfig(bits=4, scale="absmax", act_bits=4),
    "msq input": Q.MSQConfig(bits=3, grid="sign", per_row=True, act_bits=8, act="input", act_scale="tracked", last=8),
    "msq mean": Q.MSQConfig(bits=2, overrides={"fc": {"bits": 0, "k": 0}}),
    "msq sign, mean": Q.MSQConfig(bits=3, k=0, grid="sign", scale=2.8),
    "msq mean, rows": Q.MSQConfig(bits=5, scale=3.5, per_row=True, grid="full"),
    "truncquant mean": Q.TruncQuantConfig(bits=(4, 2)),
    "msq full": Q.MSQConfig(bits=2, grid="full", overrides={"fc": {"bits": 0, "k": 0}}),
    "truncquant": Q.TruncQuantConfig(bits=(8, 4, 1), scale="absmax", act_bits="weights", first="skip"),
    "truncquant tanh": Q.TruncQuantConfig(
        bits=(5, 2), base_bits=8, rule="round_clamp", scale="absmax", companding="tanh"
    ),
    "truncquant paper": Q.TruncQuantConfig.paper(bits=(8, 2), first="quantize", last="quantize"),
    "truncquant tanh, two means, rows": Q.TruncQuantConfig(
        bits=(8, 2), companding="tanh", scale=2.5, out_scale="absmean", per_row=True
    ),
    "truncquant nearest": Q.TruncQuantConfig(bits=(4,), rule="nearest", per_row=True),
    "cpq": Q.CPQConfig(bits=3, per_row=True, act_bits=3),
    "dropbits": Q.CPQConfig(bits=4, dropbits="learned"),
}
X = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(3))


def trained(config):
    """A quantized model after two steps, evaluated, with norms that have moved."""
    model = Q.quantize_(Net(), config)
    model(X)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(2):
        if isinstance(config, Q.TruncQuantConfig):
            Q.joint_step(model, lambda out: out.square().mean(), X)
        else:
            model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_plain_model_becomes_the_evaluated_one(name, tmp_path):
    model = trained(CONFIGS[name])
    Q.save_model(model, tmp_path / "m")
    plain = Net(seed=1).eval()
    assert Q.load_model(tmp_path / "m", plain) is plain
    assert torch.equal(plain(X), model(X)) and not any("parametrizations" in k for k, _ in plain.named_modules())
    want = Q.plain_model(model)
    assert [k for k, _ in plain.named_parameters()] == [k for k, _ in want.named_parameters()]
    assert plain.state_dict().keys() == want.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), want.state_dict().values()))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_quantized_model_is_what_was_saved_and_trains_on(name, tmp_path):
    model = trained(CONFIGS[name])
    Q.save_model(model, tmp_path / "m")
    other = Q.quantize_(Net(seed=1), CONFIGS[name])
    Q.load_model(tmp_path / "m", other)
    assert torch.equal(other.eval()(X), model(X))
    for key, w in Q.to_int(other).items():
        assert torch.equal(w.codes, Q.to_int(model)[key].codes)
    prepared = Q.prepare(Net(seed=2), tmp_path / "m", fuse="layer")
    assert torch.equal(prepared.eval()(X), model(X))
    other.train()(X).sum().backward()
    assert all(p.grad is not None for p in other.parameters() if p.requires_grad and p.dim() != 1)


@pytest.mark.parametrize("make", [nn.GELU, lambda: nn.GELU("tanh"), nn.SiLU], ids=["gelu", "gelu_tanh", "silu"])
def test_what_is_fused_in_front_comes_back(make, tmp_path):
    """In the whole file, and beside integer weights."""

    def net(seed=0):
        model = Net(seed)
        model.act = make()
        return model

    config = Q.MSQConfig(bits=4, act_bits=4)
    model = Q.quantize_(net(), config)
    model(X)
    model.eval()
    Q.save_model(model, tmp_path / "m")
    for other in (net(1).eval(), Q.quantize_(net(1), config).eval()):
        assert torch.equal(Q.load_model(tmp_path / "m", other)(X), model(X)) and other.act.front == model.act.front
    Q.save_int(model, tmp_path / "i")
    found = Q.load_activation_scales(tmp_path / "i")["act"]
    assert found["front"] == model.act.front and found["signed"]
    codes = Q.encode(make()(X), found["scale"], 4)
    assert (Q.decode(codes, found["scale"], 4) != model.act(X)).sum() <= 2  # h is not torch's in the last places


@pytest.mark.parametrize("name", CONFIGS)
def test_with_floats_training_goes_on(name, tmp_path):
    config = CONFIGS[name]
    model = trained(config)
    Q.save_model(model, tmp_path / "m", floats=True)
    other = Q.load_model(tmp_path / "m", Q.quantize_(Net(seed=1), config))
    assert model.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    plain = Q.load_model(tmp_path / "m", Net(seed=1).eval())
    assert torch.equal(plain(X), model(X))


def test_any_width(tmp_path):
    model = trained(CONFIGS["truncquant"])
    Q.save_model(model, tmp_path / "m")
    other = Q.quantize_(Net(seed=1), CONFIGS["truncquant"]).eval()
    for bits in (8, 4, 1):
        Q.set_bits(model, bits)
        want = model(X)
        assert torch.equal(Q.load_model(tmp_path / "m", Net(seed=1).eval(), bits=bits)(X), want)
        assert torch.equal(Q.load_model(tmp_path / "m", other, bits=bits)(X), want)
    for target in (Net(), other):
        with pytest.raises(ValueError, match="m: bits: expected one of the widths 8, 4, 1 .*got 3"):
            Q.load_model(tmp_path / "m", target, bits=3)

    shared = trained(Q.TruncQuantConfig(bits=(8, 4), batch_norm=False))
    Q.save_model(shared, tmp_path / "s")
    plain = Q.load_model(tmp_path / "s", Net(seed=1).eval(), bits=3)  # no norm knows of widths
    assert torch.equal(plain.fc.weight, Q.to_int(shared)["fc.weight"].dequantize(3))
    msq = trained(CONFIGS["msq"])
    Q.save_model(msq, tmp_path / "q")
    assert torch.equal(Q.load_model(tmp_path / "q", Net(), bits=2).fc.weight, Q.to_int(msq)["fc.weight"].dequantize(2))
    with pytest.raises(ValueError, match="bits: expected None, since the weights of a quantized model"):
        Q.load_model(tmp_path / "q", Q.quantize_(Net(), CONFIGS["msq"]), bits=2)


def test_dtypes_and_tied_tensors(tmp_path):
    model = trained(Q.MSQConfig(bits=4)).bfloat16()
    model.half_buffer = nn.Parameter(torch.randn(3, dtype=torch.float16))
    Q.save_model(model, tmp_path / "m")
    plain = Net(seed=1).bfloat16().eval()
    plain.half_buffer = nn.Parameter(torch.zeros(3, dtype=torch.float16))
    Q.load_model(tmp_path / "m", plain)
    assert torch.equal(plain(X.bfloat16()), model(X.bfloat16()))
    assert torch.equal(plain.half_buffer, model.half_buffer)


def test_two_calls_of_quantize_and_a_part_of_a_model(tmp_path):
    def made(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)))

    model = made(0)
    Q.quantize_(model[2], Q.CPQConfig(bits=2), lambda name, m: name == "1")
    Q.quantize_(model, Q.MSQConfig(bits=4), lambda name, m: name in ("0", "2.0"))
    Q.save_model(model.eval(), tmp_path / "m")
    x = torch.randn(3, 6)
    assert torch.equal(Q.load_model(tmp_path / "m", made(1))(x), model(x))
    Q.unquantize_(model)
    with pytest.raises(ValueError, match="model: expected weights quantized by quantops.quantize_"):
        Q.save_model(model, tmp_path / "n")
    assert os.listdir(tmp_path) == ["m"]


def test_models_that_do_not_fit_stay_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(inverse, "HALVINGS", 1)  # too few to find a mean
    Q.save_model(trained(CONFIGS["msq"]), tmp_path / "m")
    Q.save_model(trained(CONFIGS["msq mean"]), tmp_path / "mean")
    wide, absent = Net(), Net()
    wide.fc = nn.Linear(96, 9)
    del absent.out
    more = Net()
    more.extra = nn.Parameter(torch.zeros(3))
    cases = [
        ("m", wide, "m: fc.weight: the file has shape"),
        ("m", absent, "m: out.weight: the model has no parameter"),
        ("m", more, "m: model: the file and the model differ in extra"),
        ("m", Q.quantize_(Net(), Q.MSQConfig(bits=4, scale="absmax")), "differ in act"),
        ("m", Q.quantize_(Net(), Q.MSQConfig(bits=4, act_bits=4)), "settings .*scale=2.8"),
        (
            "m",
            Q.quantize_(Net(), Q.MSQConfig(bits=4, scale="absmax", act_bits=4, act_scale="clip")),
            "differ in .*clip",
        ),
        ("mean", Q.quantize_(Net(), CONFIGS["msq mean"]), r"no float weights are known .*floats=True"),
    ]
    for file, model, text in cases:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=text):
            Q.load_model(tmp_path / file, model)
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
        Q.load_model(tmp_path / "m", {})
    with pytest.raises(FileNotFoundError):
        Q.load_model(tmp_path / "none", Net())
    with torch.device("meta"):
        meta = Net()
    with pytest.raises(ValueError, match="expected a parameter with memory"):
        Q.load_model(tmp_path / "m", meta)
    with pytest.raises(ValueError, match="m: conv.weight: expected a weight with memory, got one on the meta"):
        Q.load_model(tmp_path / "m", trained(CONFIGS["msq"]).to("meta"))


def changed(path, change):
    """The file with ``change(tensors, metadata)`` applied."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as f:
        tensors, metadata = {k: f.get_tensor(k) for k in f.keys()}, dict(f.metadata())  # noqa: SIM118
    change(tensors, metadata)
    bad = path.with_name("bad")
    save_file(tensors, bad, metadata)
    return bad


def config(**settings):
    def change(tensors, metadata):
        found = json.loads(metadata["config"])
        found["calls"][0]["config"].update(settings)
        metadata["config"] = json.dumps(found)

    return change


DAMAGED = {
    "a bias": lambda t, m: t[STATE + "fc.bias"].add_(1),
    "a scale of activations": lambda t, m: t[STATE + "act.step"].mul_(2),
    "a plane": lambda t, m: t["fc.weight.planes"].bitwise_xor_(1),
    "no bias": lambda t, m: t.pop(STATE + "fc.bias"),
    "one more": lambda t, m: t.update(more=torch.ones(3)),
    "state is no JSON": lambda t, m: m.update(state="{"),
    "no config": lambda t, m: m.pop("config"),
    "config nested too deep": lambda t, m: m.update(config="[" * 100_000),
    "another version": lambda t, m: m.update(version="2"),
    "another format": lambda t, m: m.update(format="quantops-int"),
    "another class": config(**{"class": "os.system"}),
    "a setting that is not": config(nothing=3),
    "a setting out of range": config(bits=99),
    "overrides of a list": config(overrides=[]),
    "layers that are not": lambda t, m: m.update(config=m["config"].replace('"fc"', '"fd"')),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_a_value_error_with_its_path(kind, tmp_path):
    Q.save_model(trained(CONFIGS["msq"]), tmp_path / "m")
    bad, model = changed(tmp_path / "m", DAMAGED[kind]), Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="bad: ") as error:
        Q.load_model(bad, model)
    assert len(str(error.value)) < 1000
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    data = (tmp_path / "m").read_bytes()
    for cut in (0, 7, len(data) // 2, len(data) - 1):
        bad.write_bytes(data[:cut])
        with pytest.raises(ValueError, match="bad: "):
            Q.load_model(bad, model)


def test_show(tmp_path, monkeypatch, capsys):
    Q.save_model(trained(CONFIGS["truncquant"]), tmp_path / "m")
    monkeypatch.setattr(sys, "argv", ["quantops", "show", str(tmp_path / "m")])
    assert main() == 0
    said = capsys.readouterr().out
    for text in ("fc.weight 8x96 8 bits full", "norm.running_mean 3x6 F32", "TruncQuantConfig(", "quantops-model 1"):
        assert text in " ".join(said.split()), said
    with pytest.raises(ValueError, match="expected the format 'quantops-int' of quantops, got 'quantops-model'"):
        Q.load_int(tmp_path / "m")


@pytest.mark.parametrize("config", [Q.MSQConfig(bits=4, per_row=True), Q.CPQConfig(bits=3)], ids=["msq", "cpq"])
def test_weights_of_other_names_rows_and_layers(config, tmp_path):
    model, ids = Kinds(), torch.arange(12).reshape(2, 6)
    Q.quantize_(model, config, Kinds.names)
    Q.save_model(model.eval(), tmp_path / "m")
    want = model(ids)
    for floats in (False, True):
        Q.save_model(model, tmp_path / "m", floats=floats)
        assert torch.equal(Q.load_model(tmp_path / "m", Kinds(1).eval())(ids), want)
        assert torch.equal(Q.load_model(tmp_path / "m", Q.quantize_(Kinds(1), config, Kinds.names).eval())(ids), want)


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


def replaced(model, name, module):
    setattr(model, name, module)
    return model


def sliced(**settings):
    model = small()
    Q.quantize_(model[0:1], Q.TruncQuantConfig(bits=(8, 4), batch_norm=False, fuse="layer", **settings))
    return model


def part_again(model):
    Q.quantize_(replaced(model, "4", nn.Linear(4, 3)), Q.CPQConfig(bits=3), ["4.weight"])
    return model


MSQ, WIDTHS = Q.MSQConfig(bits=4, act_bits=4), Q.TruncQuantConfig(bits=(8, 4))
CHANGED = {
    "a slice": (sliced, "0.weight are quantized by no call"),
    "a slice beside a call": (lambda: Q.quantize_(sliced(), MSQ, ["2.weight"]), "0.weight are quantized by no call"),
    "a layer": (lambda: replaced(Q.quantize_(small(), MSQ), "4", nn.Linear(4, 3)), "4.weight were .*not any more"),
    "a layer quantized again": (lambda: part_again(Q.quantize_(small(), WIDTHS)), "4.weight were .*and by another"),
    "a ReLU": (lambda: replaced(Q.quantize_(small(), MSQ), "1", nn.ReLU()), "which 1 would become"),
    "a norm": (lambda: replaced(Q.quantize_(small(), WIDTHS), "3", nn.BatchNorm1d(4)), "which 3 would become"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_model_that_no_call_describes_is_not_written(name, tmp_path):
    make, text = CHANGED[name]
    model = make()
    with pytest.raises(ValueError, match=text):
        Q.save_model(model, tmp_path / "m")
    assert not os.listdir(tmp_path)


def test_what_is_skipped_or_tied_is_described(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mid, self.head = nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.mid(self.embed(x)))

    ids = torch.arange(8)
    for settings in ({}, {"first": "skip"}, {"last": "skip"}, {"tied": "chosen"}):
        for chosen in (["*.weight"], ["mid.weight", "head.weight"]):
            model, other = (Q.quantize_(Tied(), Q.MSQConfig(bits=4, **settings), chosen) for _ in range(2))
            Q.save_model(model, tmp_path / "m", floats=True)
            assert torch.equal(Q.load_model(tmp_path / "m", other)(ids), model(ids)), (settings, chosen)


CHAINS = {
    "relu": MSQ,
    "input": Q.MSQConfig(bits=4, act_bits=8, act="input"),
    "tracked": Q.MSQConfig(bits=4, act_bits=8, act="input", act_scale="tracked", act_signed=True),
    "output": Q.MSQConfig(bits=4, act_bits=3, act_scale=2.0, act_outputs=("0", "4")),
    "widths": Q.TruncQuantConfig(bits=(8, 4), batch_norm=False, act_bits="weights", act_scale="clip"),
    "cpq": Q.CPQConfig(bits=3, act_bits=3),
}


@pytest.mark.parametrize("name", CHAINS)
def test_activations_that_unquantize_left_come_back(name, tmp_path):
    config = Q.TruncQuantConfig(bits=(8, 4), batch_norm=False)
    x, model = torch.randn(16, 4), Q.quantize_(small(), CHAINS[name])
    for bits in (8, 4):
        model(x)
        if name == "widths":
            Q.set_bits(model, bits)
    model(x)
    Q.quantize_(Q.unquantize_(model), config)
    model.eval()
    Q.save_model(model, tmp_path / "m")
    for bits in (8, 4):
        Q.set_bits(model, bits)
        assert torch.equal(Q.load_model(tmp_path / "m", small(1).eval(), bits)(x), model(x))
    Q.set_bits(model)
    Q.save_model(model, tmp_path / "m", floats=True)
    prepared = Q.prepare(small(1), tmp_path / "m")
    assert [k for k, _ in prepared.named_parameters()] == [k for k, _ in model.named_parameters()]
    made, state = prepared.state_dict(), model.state_dict()
    assert made.keys() == state.keys() and all(torch.equal(made[k], state[k]) for k in state)
    assert torch.equal(prepared.eval()(x), model(x))
    prepared.train()(x).sum().backward()


def test_activations_that_do_not_fit(tmp_path):
    model = Q.quantize_(small(), MSQ)
    model(torch.randn(8, 4))
    Q.save_model(Q.quantize_(Q.unquantize_(model), Q.MSQConfig()), tmp_path / "m")
    with pytest.raises(ValueError, match="m: model: 1: expected a quantizer of activations .*relu, got GELU"):
        Q.load_model(tmp_path / "m", replaced(small(), "1", nn.GELU()))
    damage = {
        "expected a list of activations": {},
        "activations of name, class": [3],
        "one of UniformActivation": [{"name": "1", "class": "os.system", "settings": {}}],
        "one of UniformActivation.*got 1": [{"name": 1, "class": [], "settings": {}}],
        "1: expected a dict of settings": [{"name": "1", "class": "UniformActivation", "settings": []}],
        "config: 1: .*nothing": [
            {"name": "1", "class": "UniformActivation", "settings": {"front": "relu", "nothing": 3}}
        ],
        "config: 1: bits: expected": [
            {"name": "1", "class": "UniformActivation", "settings": {"front": "relu", "bits": 99}}
        ],
    }
    for text, found in damage.items():

        def change(tensors, metadata, found=found):
            metadata["config"] = json.dumps({**json.loads(metadata["config"]), "activations": found})

        with pytest.raises(ValueError, match=text):
            Q.load_model(changed(tmp_path / "m", change), small())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["msq mean", "truncquant mean", "cpq"])
def test_other_dtypes_come_back_with_floats_and_into_plain_models(name, dtype, tmp_path):
    model = Q.quantize_(Net().to(dtype), CONFIGS[name])
    x = X.to(dtype)
    model(x)
    model.eval()
    Q.save_model(model, tmp_path / "m")
    assert torch.equal(Q.load_model(tmp_path / "m", Net(1).to(dtype).eval())(x), model(x))
    Q.save_model(model, tmp_path / "m", floats=True)
    other = Q.load_model(tmp_path / "m", Q.quantize_(Net(1).to(dtype), CONFIGS[name]))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
