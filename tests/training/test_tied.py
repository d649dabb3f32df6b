"""Parameters that layers share: one quantized weight for all, or for those that were chosen."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import quantops as Q
from quantops.convert import unquantize_
from quantops.nn import quantized

CONFIGS = [Q.MSQConfig(bits=3, scale="absmax"), Q.CPQConfig(bits=3), Q.TruncQuantConfig(bits=(8, 3))]
METHODS = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
X = torch.arange(12).reshape(3, 4)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.mid, self.head = nn.Embedding(12, 6), nn.Linear(6, 6), nn.Linear(6, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.mid(self.embedding(x)).relu())


@METHODS
@pytest.mark.parametrize("fuse", ["model", "layer"])
def test_both_ends_see_one_quantized_weight(config, fuse):
    plain, model = Tied(), Q.quantize_(Tied(), dataclasses.replace(config, fuse=fuse))
    w = model.head.parametrizations.weight.original
    assert model.embedding.parametrizations.weight.original is w
    assert [name for name, _, _ in quantized(model)] == ["mid", "head"]
    assert [name for name, _ in model.named_parameters() if "log_" not in name] == [
        "embedding.parametrizations.weight.original",
        "mid.parametrizations.weight.original",
        "mid.bias",
    ]
    with torch.no_grad():
        q = model.head.weight.clone()
        assert torch.equal(model.embedding.weight, q) and not torch.equal(q, w)
        plain.embedding.weight.copy_(q)
        plain.mid.weight.copy_(model.mid.weight)
    model.eval(), plain.eval()
    out, expected = model(X), plain(X)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    if isinstance(config, Q.MSQConfig):
        torch.testing.assert_close(w.grad, plain.embedding.weight.grad)
    served = Q.plain_model(model)
    assert torch.equal(served(X), out) and served.head.weight is served.embedding.weight
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), Q.prepare(Tied(), model.state_dict())):
        assert torch.equal(other.eval()(X), out)
        assert other.head.parametrizations.weight.original is other.embedding.parametrizations.weight.original
        unquantize_(other) if not isinstance(config, Q.TruncQuantConfig) else None
    again = unquantize_(model)
    assert again.head.weight is again.embedding.weight is w and torch.equal(again(X), Tied()(X))


def test_one_call_for_all():
    from cases import Calls

    model = Q.quantize_(Tied(), Q.MSQConfig())
    with Calls() as calls:
        model(X)
    assert calls.counts == {"msq": 1, "absmean": 1}


@METHODS
def test_one_end_is_left_out_by_choice(config):
    model = Q.quantize_(Tied(), dataclasses.replace(config, tied="chosen"))
    w = model.head.parametrizations.weight.original
    assert model.embedding.weight is w and not parametrize.is_parametrized(model.embedding)
    assert not torch.equal(model.head.weight, w)
    both = Q.quantize_(Tied(), dataclasses.replace(config, tied="chosen"), lambda n, m: hasattr(m, "weight"))
    assert torch.equal(both.head.weight, both.embedding.weight)
    assert [name for name, _, _ in quantized(both)] == ["embedding", "mid"]
    rebuilt = Q.prepare(Tied(), both.state_dict())
    assert torch.equal(rebuilt.head.weight, both.embedding.weight)


def test_two_layers_that_share_a_weight():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    Q.quantize_(model, Q.MSQConfig(bits=3))
    assert torch.equal(model[0].weight, model[1].weight) and [name for name, _, _ in quantized(model)] == ["0"]
    assert Q.bit_report(model).whole_compression == pytest.approx(32 * 24 / (3 * 16 + 32 * 8))


def test_joint_steps_give_both_ends_their_width():
    model, x = Q.quantize_(Tied(), Q.TruncQuantConfig(bits=(8, 2))), X
    seen = []

    def loss(out):
        seen.append((model.head.weight.detach().clone(), model.embedding.weight.detach().clone()))
        return out.square().sum()

    Q.joint_step(model, loss, x)
    assert len(seen) == 2 and all(torch.equal(a, b) for a, b in seen) and not torch.equal(*(a for a, _ in seen))
    assert model.head.parametrizations.weight.original.grad.abs().sum() > 0


def test_files_name_those_that_share(tmp_path):
    pytest.importorskip("safetensors")
    model, plain = Q.quantize_(Tied(), Q.MSQConfig(bits=3)).eval(), Tied()
    Q.save_int(model, tmp_path / "w.safetensors")
    assert Q.to_int(model)["head.weight"].shared == ("embedding.weight",)
    Q.load_int(tmp_path / "w.safetensors", plain)
    assert torch.equal(plain(X), model(X)) and plain.head.weight is plain.embedding.weight
    untied = Tied()
    untied.head.weight = nn.Parameter(torch.zeros(12, 6))
    Q.load_int(tmp_path / "w.safetensors", untied)
    assert torch.equal(untied(X), model(X))
    left_out = Q.quantize_(Tied(), Q.MSQConfig(bits=3, tied="chosen"))
    Q.save_int(left_out, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="one parameter for it and embedding.weight, which the file does not have"):
        Q.load_int(tmp_path / "w.safetensors", plain)


def _assigned(model):
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)


def _emptied(model):
    state = copy.deepcopy(model.state_dict())
    model.to("meta").to_empty(device="cpu").load_state_dict(state)


@METHODS
@pytest.mark.parametrize("untie", [_assigned, _emptied])
def test_ends_that_torch_has_untied_are_two_weights(config, untie, tmp_path):
    model = Q.quantize_(Tied(), config).eval()
    untie(model)
    lists = [layer.parametrizations.weight for layer in (model.embedding, model.head)]
    with torch.no_grad():
        lists[0].original.mul_(-0.5)
    plain = Q.plain_model(model)
    assert torch.equal(plain(X), model(X)) and not torch.equal(plain.embedding.weight, plain.head.weight)
    text = (
        "embedding.weight: expected one Parameter for it and head.weight, .*embedding.parametrizations.weight.original "
        "= head.parametrizations.weight.original makes them one again"
    )
    for use in (Q.to_int, lambda m: Q.save_int(m, tmp_path / "w.safetensors")):
        with pytest.raises(ValueError, match=text):
            use(model)
    lists[0].original = lists[1].original
    assert Q.to_int(model)["head.weight"].shared == ("embedding.weight",)
    plain = Q.plain_model(model)
    assert torch.equal(plain(X), model(X)) and plain.embedding.weight is plain.head.weight


def test_an_end_that_lost_its_quantizer_says_so():
    model = Q.quantize_(Tied(), Q.MSQConfig(bits=3))
    parametrize.remove_parametrizations(model.head, "weight", leave_parametrized=False)
    with pytest.raises(RuntimeError, match="head, which shares this weight, is not quantized any more"):
        model(X)
    parametrize.remove_parametrizations(model.embedding, "weight", leave_parametrized=False)
    model(X)


def test_compiled():
    model = Q.quantize_(Tied(), Q.MSQConfig(bits=3))
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(X), model(X))
