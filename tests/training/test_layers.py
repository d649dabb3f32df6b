"""Every kind of layer: which of its parameters are quantized, and which of their dims are rows."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import quantops as Q
from quantops.layers import KINDS, kind_of, matrices, rows_of
from quantops.nn import quantized
from quantops.owners import owners

CONFIGS = [
    Q.MSQConfig(bits=4, per_row=True, scale="absmax"),
    Q.CPQConfig(bits=3, per_row=True),
    Q.TruncQuantConfig(bits=(8, 3), per_row=True),
]
METHODS = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)


class Experts(nn.Module):
    """x @ w of every expert, w (experts, out, in) or (experts, in, out)."""

    def __init__(self, is_transposed):
        super().__init__()
        self.num_experts, self.is_transposed = 3, is_transposed
        self.up = nn.Parameter(torch.randn((3, 4, 5) if is_transposed else (3, 5, 4)))
        self.up_bias = nn.Parameter(torch.zeros(3, 5))

    def forward(self, x):
        w = self.up if self.is_transposed else self.up.transpose(1, 2)
        return torch.stack([x @ w[i] + self.up_bias[i] for i in range(3)])


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


LAYERS = {
    "linear": (lambda: nn.Linear(4, 5), (2, 4), {"weight": (0,)}),
    "conv": (lambda: nn.Conv2d(4, 5, 3), (2, 4, 5, 5), {"weight": (0,)}),
    "conv transpose": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5), {"weight": (1,)}),
    "attention": (lambda: Attention(8, 2), (3, 2, 8), {"in_proj_weight": (0,), "out_proj.weight": (0,)}),
    "lstm": (
        lambda: nn.LSTM(4, 5, 2, bidirectional=True, proj_size=3),
        (3, 2, 4),
        {f"weight_{k}_l{i}{end}": (0,) for i in (0, 1) for end in ("", "_reverse") for k in ("ih", "hh", "hr")},
    ),
    "gru": (lambda: nn.GRU(4, 5), (3, 2, 4), {"weight_ih_l0": (0,), "weight_hh_l0": (0,)}),
    "cell": (lambda: nn.GRUCell(4, 5), (2, 4), {"weight_ih": (0,), "weight_hh": (0,)}),
    "experts": (lambda: Experts(False), (2, 4), {"up": (0, 1)}),
    "experts transposed": (lambda: Experts(True), (2, 4), {"up": (0, 2)}),
}
KIND = pytest.mark.parametrize("kind", LAYERS)


def run(model, x):
    out = model(x)
    return out[0] if isinstance(out, tuple) else out


def same(a, b, kind):
    """Equal; but the sums of matrices that lie in another way have another order."""
    return torch.allclose(a, b, atol=1e-5) if kind == "experts transposed" else torch.equal(a, b)


def made(kind, config, **options):
    torch.manual_seed(0)
    make, shape, rows = LAYERS[kind]
    plain, x = make(), torch.randn(shape)
    model = Q.quantize_(copy.deepcopy(plain), config, **options)
    return plain, model.eval(), x, rows


@METHODS
@KIND
def test_rows_are_the_outputs(kind, config):
    plain, model, x, rows = made(kind, config)
    weights = Q.to_int(model)
    assert {name: v.rows for name, v in weights.items()} == rows
    for name, v in weights.items():
        layer, _, parameter = name.rpartition(".")
        read = getattr(model.get_submodule(layer), parameter)
        assert v.shape == read.shape and v.scale.numel() == torch.Size([v.shape[d] for d in v.rows]).numel()
        assert torch.equal(v.dequantize(), read) and torch.equal(v.levels * v.step_of_each, read)
        rest = [d for d in range(read.dim()) if d not in v.rows]
        by_row = read.permute(*v.rows, *rest).flatten(0, len(v.rows) - 1)
        assert all(row.unique().numel() <= 2**v.bits for row in by_row)
        if isinstance(config, Q.MSQConfig):  # each row reaches its own maximum, but for what the dyadic grid lacks
            w = plain.get_parameter(name).detach().permute(*v.rows, *rest).flatten(0, len(v.rows) - 1)
            assert torch.equal(v.scale, w.flatten(1).abs().amax(1))


@METHODS
@KIND
@pytest.mark.parametrize("fuse", ["model", "layer"])
def test_forward_and_gradients_are_those_of_the_plain_layer_with_q(kind, config, fuse):
    plain, model, x, rows = made(kind, dataclasses.replace(config, fuse=fuse))
    with torch.no_grad():
        for path, parameter, owner in owners(model):
            getattr(plain.get_submodule(path), parameter).copy_(owner())
    expected = run(plain, x)
    out = run(model, x)
    assert same(out, expected, kind)
    for y in (expected, out):
        y.square().sum().backward()
    if isinstance(config, Q.MSQConfig):  # whose backward is the identity
        for name, owner, p in quantized(model):
            full = name if p.parameter != "weight" else f"{name}.weight".removeprefix(".")
            torch.testing.assert_close(owner.original.grad, plain.get_parameter(full).grad)
    assert same(run(Q.plain_model(model), x), out, kind)
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), x), out)
    assert torch.equal(run(copy.deepcopy(model), x), out)


@KIND
def test_cached_q_has_a_graph_for_each_pass(kind):
    _, model, x, _ = made(kind, Q.MSQConfig(bits=4, per_row=True, cache=True, scale=2.0))
    _, other, _, _ = made(kind, Q.MSQConfig(bits=4, per_row=True, scale=2.0))
    for m in (model, other):
        for _ in range(3):
            (run(m, x).square().sum() + 0.1 * Q.penalty(m)).backward()
    for (name, a, _), (_, b, _) in zip(quantized(model), quantized(other), strict=True):
        torch.testing.assert_close(a.original.grad, b.original.grad, msg=name)


@KIND
def test_decoupled_penalties_are_those_of_the_loss(kind):
    grads = []
    for penalty in ("loss", "decoupled"):
        _, model, x, _ = made(kind, Q.MSQConfig(bits=4, per_row=True, penalty=penalty))
        loss = run(model, x).square().sum()
        (loss + 0.5 * Q.penalty(model) if penalty == "loss" else loss).backward()
        if penalty == "decoupled":
            Q.add_penalty_grad_(model, 0.5)
        grads.append([owner.original.grad for _, owner, _ in quantized(model)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@KIND
def test_joint_steps_train_all_widths(kind):
    _, model, x, _ = made(kind, Q.TruncQuantConfig(bits=(8, 3), per_row=True))
    Q.joint_step(model, lambda out: (out[0] if isinstance(out, tuple) else out).square().sum(), x)
    grads = {name: owner.original.grad.clone() for name, owner, _ in quantized(model)}
    model.zero_grad()
    for bits in (8, 3):
        Q.set_bits(model, bits)
        run(model, x).square().sum().backward()
    for name, owner, _ in quantized(model):
        torch.testing.assert_close(owner.original.grad, grads[name])


@KIND
def test_files_hold_every_kind(kind, tmp_path):
    pytest.importorskip("safetensors")
    plain, model, x, rows = made(kind, Q.MSQConfig(bits=4, per_row=True))
    Q.save_int(model, tmp_path / "w.safetensors")
    Q.load_int(tmp_path / "w.safetensors", plain)
    assert same(run(plain.eval(), x), run(model, x), kind)
    weights = Q.load_int(tmp_path / "w.safetensors", bits=2)
    assert {name: v.rows for name, v in weights.items()} == rows
    for name, v in Q.to_int(model).items():
        assert torch.equal(weights[name].dequantize(), v.dequantize(2))


@KIND
def test_parameters_keep_their_order_and_come_back(kind):
    plain, model, x, _ = made(kind, Q.MSQConfig(bits=4))
    names = [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in Q.unquantize_(model).named_parameters()] == names
    assert torch.equal(run(model, x), run(plain.eval(), x))
    assert not any(vars(m).get("_quantizers") or m._load_state_dict_pre_hooks for m in model.modules())


def test_an_optimizer_knows_a_recurrent_layer_of_one_layer_by_the_order_of_its_parameters():
    plain = nn.LSTM(3, 4)
    model = Q.quantize_(copy.deepcopy(plain), Q.MSQConfig())
    short = [name.replace("parametrizations.", "").replace(".original", "") for name, _ in model.named_parameters()]
    assert short == [name for name, _ in plain.named_parameters()]


def test_any_parameter_by_name():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16)
    Q.quantize_(model, Q.MSQConfig(bits=3, overrides={"*in_proj*": {"bits": 5}}), ["self_attn.*weight", "norm1.weight"])
    assert [(r.name, r.bits) for r in Q.bit_report(model).rows] == [
        ("self_attn.in_proj_weight", 5),
        ("self_attn.out_proj", 3),
        ("norm1", 3),
    ]
    chosen = Q.quantize_(nn.LSTM(3, 4), Q.MSQConfig(), lambda name, m: ("weight_hh_l0",))
    assert [name for name, _, _ in quantized(chosen)] == ["weight_hh_l0"]
    with pytest.raises(ValueError, match="filter_fn: matches none"):
        Q.quantize_(nn.LSTM(3, 4), Q.MSQConfig(), ["weight"])
    with pytest.raises(ValueError, match="nothing: expected a module with a parameter 'nothing', got LSTM"):
        Q.quantize_(nn.LSTM(3, 4), Q.MSQConfig(), lambda name, m: ("nothing",))
    with pytest.raises(TypeError, match="filter_fn: expected a function .* got int"):
        Q.quantize_(nn.LSTM(3, 4), Q.MSQConfig(), 3)


def test_every_setting_may_differ_by_layer():
    make = lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))  # noqa: E731
    settings = {
        Q.MSQConfig: {"grid": "sign", "scale": 2.5, "per_row": True, "bits": 3},
        Q.TruncQuantConfig: {"rule": "nearest", "scale": 2.5, "per_row": True, "companding": "tanh"},
        Q.CPQConfig: {"sigma": 0.3, "mode": "soft", "per_row": True, "start": "range"},
    }
    for method, values in settings.items():
        torch.manual_seed(0)
        model, x = Q.quantize_(make(), method(overrides={"1": values})), torch.randn(4, 6)
        torch.manual_seed(0)
        whole = {**values, "bits": (8, 4, 2, 1)} if method is Q.TruncQuantConfig else values
        all_so, none_so = Q.quantize_(make(), method(**whole)), Q.quantize_(make(), method())
        none_so.load_state_dict(Q.float_state_dict(all_so), strict=False)
        for m in (model, all_so, none_so):
            m(x)
        model.load_state_dict(Q.float_state_dict(all_so), strict=False)
        fresh = Q.prepare(make(), model.state_dict())
        for i, expected in enumerate((none_so, all_so, none_so)):
            assert torch.equal(model[i].weight, expected[i].weight), (method, i)
            assert torch.equal(fresh[i].weight, model[i].weight)
        assert not torch.equal(all_so[0].weight, none_so[0].weight)
    with pytest.raises(ValueError, match="1: grid: expected one of"):
        Q.quantize_(make(), Q.MSQConfig(overrides={"1": {"grid": "even"}}))
    with pytest.raises(ValueError, match=r"overrides\['1'\]: expected one of .*, got 'penalty'"):
        Q.MSQConfig(overrides={"1": {"penalty": "loss"}})


def test_rows_can_be_set():
    model = Q.quantize_(nn.Linear(4, 5), Q.MSQConfig(per_row=True, overrides={"model": {"rows": 1}}))
    assert Q.to_int(model)["weight"].scale.shape == (4,)
    assert torch.equal(Q.to_int(model)["weight"].dequantize(), model.weight)
    for rows in (2, -1, (0, 0), (), "0", True):
        with pytest.raises(ValueError, match="model: rows: expected a dim of 0..1, or some of them"):
            Q.quantize_(nn.Linear(4, 5), Q.MSQConfig(per_row=True, overrides={"model": {"rows": rows}}))


def test_the_table_is_that_of_the_docstring():
    import quantops.layers

    assert len(KINDS) == 9 and all(isinstance(k.rows, tuple) for k in KINDS)
    for module, parameter, rows in (
        (nn.Conv1d(1, 1, 1), "weight", (0,)),
        (nn.Embedding(3, 3), "weight", (0,)),
        (nn.ConvTranspose1d(1, 1, 1), "weight", (1,)),
        (Experts(False), "up", (0, 1)),
        (Experts(True), "up", (0, 2)),
    ):
        assert parameter in matrices(module) and rows_of(module, parameter) == rows
        assert type(module).__name__.removesuffix("1d") in quantops.layers.__doc__ + "Experts"
    assert kind_of(nn.LayerNorm(3)) is None and matrices(nn.LayerNorm(3)) == ("weight",)


@pytest.mark.parametrize("leave", [True, False])
def test_torchs_own_removal_leaves_no_hook(leave):
    model = Q.quantize_(nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3)), Q.MSQConfig(bits=3))
    group = quantized(model)[0][2].group
    for layer, name in ((model[0], "weight"), (model[1], "weight_ih_l0"), (model[1], "weight_hh_l0")):
        assert model._forward_pre_hooks and model._forward_hooks
        q = getattr(layer, name).detach().clone()
        parametrize.remove_parametrizations(layer, name, leave_parametrized=leave)
        assert torch.equal(getattr(layer, name), q) == leave
    assert not group.layers
    for m in model.modules():
        assert not (m._forward_pre_hooks or m._forward_hooks or m._load_state_dict_pre_hooks)
        assert "_quantizers" not in vars(m) and not type(m).__name__.startswith("Parametrized")
    assert model(torch.randn(2, 3))[0].shape == (2, 3)


class Uncast(nn.Module):
    """Layers that autocast does not cast, one of which shares its weight, and one that it casts."""

    def __init__(self):
        super().__init__()
        self.table, self.bag, self.pair = nn.Embedding(5, 4), nn.EmbeddingBag(5, 4, mode="sum"), nn.Bilinear(4, 4, 4)
        self.mid, self.head = nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
        self.head.weight, self.share = self.table.weight, nn.Parameter(torch.rand(2, 3))

    def forward(self, x):
        a, b = self.table(x).sum(1), self.bag(x, per_sample_weights=self.share)
        assert a.dtype == b.dtype == torch.float32
        return self.head(self.mid(self.pair(a, b)))


IDS = torch.tensor([[0, 1, 2], [3, 4, 4]])
AUTOCAST = torch.autocast("cpu", torch.bfloat16)


@METHODS
@pytest.mark.parametrize("how", [{}, {"fuse": "layer"}, {"cache": True}], ids=str)
def test_under_autocast_layers_have_the_dtype_of_the_plain_ones(how, config):
    chosen = ["*weight"] if how else ["bag.weight", "pair.weight", "mid.weight", "head.weight"]
    model = Q.quantize_(Uncast(), dataclasses.replace(config, **how), chosen).eval()
    plain = Q.plain_model(model)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, AUTOCAST:
            out = model(IDS)
            assert torch.equal(out, plain(IDS)) and out.dtype == model.mid.weight.dtype == torch.bfloat16
            assert model.pair.weight.dtype == model.table.weight.dtype == torch.float32
        assert model(IDS).dtype == torch.float32
    out.float().sum().backward()
    assert all(owner.original.grad is not None for _, _, owner in owners(model))
    torch.compiler.reset()  # of the models of the other cases
    with AUTOCAST:
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(IDS), out)


def test_under_autocast_joint_steps_give_every_layer_its_width():
    model, found = Q.quantize_(Uncast(), Q.TruncQuantConfig(bits=(8, 1)), ["*weight"]), []

    def loss(out):
        found.append([owner().dtype for _, _, owner in owners(model)])
        assert len(model.pair.weight.unique()) <= 2 if len(found) == 2 else len(model.pair.weight.unique()) > 2
        return out.float().square().sum()

    with AUTOCAST:
        Q.joint_step(model, loss, IDS)
    assert found == 2 * [[torch.float32 if "mid" not in name else torch.bfloat16 for name, _, _ in owners(model)]]


def test_compiled_layers_see_q():
    for kind in ("attention", "experts"):
        _, model, x, _ = made(kind, Q.MSQConfig(bits=4, per_row=True))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))


def test_a_read_within_the_forward_asks_hooks_masks_and_the_cache_of_torch():
    """None is passed by, though a read asks the quantizer first."""
    model = Q.quantize_(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), Q.MSQConfig(bits=3))
    x, seen = torch.randn(2, 6), []
    hook = model[0].parametrizations.weight.register_forward_hook(lambda m, args, q: seen.append(q))
    model(x)
    assert len(seen) == 1
    hook.remove()
    hook = model[0].parametrizations.weight[0].register_forward_hook(lambda m, args, q: 0 * q)
    torch.testing.assert_close(model(x), model[1](model[0].bias).expand(2, 4))
    hook.remove()
    parametrize.register_parametrization(model[1], "weight", Zeroed())
    assert torch.equal(model(x), model[1].bias.expand(2, 4))
    with parametrize.cached():
        assert model[0].weight is model[0].weight
        model(x)


class Zeroed(nn.Module):
    """A mask of zeros."""

    def forward(self, w):
        return 0 * w
