"""Exports read back by the tools that they are for."""

import copy
import os

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

import quantops as Q
from exported import CONFIGS, Experts, Kinds, Net, made, run
from quantops import decompositions, export
from quantops.export.onnx import integer_type

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore")


def with_weights(proto, names):
    """The model with its dequantized weights as further outputs."""
    proto = copy.deepcopy(proto)
    for name in names:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return proto


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "truncquant tanh only"])
def test_onnx_is_the_evaluated_model(name, tmp_path):
    model, x = made(CONFIGS[name])
    proto = export.onnx(model, x, tmp_path / "model.onnx")
    assert onnx.load(tmp_path / "model.onnx") == proto
    weights = Q.to_int(model)
    assert len(weights) == 4
    _, *values = run(with_weights(proto, weights), x)
    for (key, w), value in zip(weights.items(), values):
        assert torch.equal(value, w.dequantize()), key
    stored = {t.name: t for t in proto.graph.initializer}
    for key, w in weights.items():
        bits, kind = integer_type(w.level_range, 21)
        assert key not in stored and stored[f"{key}.levels"].data_type == getattr(onnx.TensorProto, kind)
        assert len(stored[f"{key}.levels"].raw_data) == -(-w.levels.numel() * bits // 8)
    for count in (1, 5):  # another batch than it was exported with
        y = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))
        got, want = run(proto, y)[0], model(y).detach()
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize(
    "config", [Q.MSQConfig(bits=8), Q.TruncQuantConfig(bits=(4, 2), batch_norm=False)], ids=["msq", "truncquant"]
)
def test_onnx_of_linear_layers_on_sequences(config, tmp_path):
    """Where onnxruntime has a MatMul of its own for integers, which float32 activations are asked of."""
    torch.manual_seed(0)
    model = Q.quantize_(nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)), config).eval()
    proto = export.onnx(model, torch.randn(2, 5, 64), tmp_path / "model.onnx")
    x = torch.randn(3, 5, 64)
    got, want = run(proto, x)[0], model(x).detach()
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("bits", [4, 2, 1])
def test_onnx_at_a_width(bits, tmp_path):
    model, x = made(CONFIGS["truncquant"])
    got = run(export.onnx(model, x, tmp_path / "model.onnx", bits=bits), x)[0]
    Q.set_bits(model, bits)
    want = model(x).detach()
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_weights_of_other_names_rows_and_layers(tmp_path):
    torch.manual_seed(0)
    experts, x = nn.Sequential(nn.Linear(6, 8), Experts()), torch.randn(4, 6)
    for model, args, names in ((Kinds(), torch.arange(12).reshape(2, 6), Kinds.names), (experts, x, None)):
        Q.quantize_(model, Q.MSQConfig(bits=4, per_row=True), names)
        proto = export.onnx(model.eval(), args, tmp_path / "model.onnx")
        want = model(args).detach()
        assert (run(proto, args)[0] - want).abs().max() <= 1e-5 * want.abs().max()
        levels = [t for t in proto.graph.initializer if t.name.endswith(".levels")]
        assert len(levels) == len(Q.to_int(model)) and {t.data_type for t in levels} == {onnx.TensorProto.INT4}


def test_integer_types_by_opset():
    assert [integer_type((-2, 1), opset)[0] for opset in (18, 21, 25)] == [8, 4, 2]
    assert [integer_type((-15, 15), opset)[0] for opset in (18, 21, 25)] == [8, 8, 8]
    assert [integer_type((-255, 255), opset)[0] for opset in (18, 21)] == [32, 16]
    with pytest.raises(ValueError, match="levels: expected integers of 32 bits"):
        integer_type((0, 2**31), 21)


@pytest.mark.parametrize("opset", [18, 25])
def test_other_opsets(opset, tmp_path):
    model, x = made(CONFIGS["msq 2 per row"])
    proto = export.onnx(model, x, tmp_path / "model.onnx", opset=opset)
    kinds = {t.data_type for t in proto.graph.initializer if t.name.endswith(".levels")}
    assert kinds == {onnx.TensorProto.INT8 if opset == 18 else onnx.TensorProto.INT2}
    want = model(x).detach()
    assert (run(proto, x)[0] - want).abs().max() <= 1e-5 * want.abs().max()


def test_half_precision_weights_are_cast_once(tmp_path):
    model, x = made(CONFIGS["msq 4"], torch.float16)
    proto = export.onnx(model, x, tmp_path / "model.onnx")
    proto = copy.deepcopy(proto)
    w = Q.to_int(model)["fc.weight"].dequantize()
    proto.graph.output.append(onnx.helper.make_tensor_value_info("fc.weight", onnx.TensorProto.FLOAT16, None))
    assert torch.equal(run(proto, x)[1], w) and w.dtype == torch.float16


def test_errors_write_nothing(tmp_path):
    path = tmp_path / "model.onnx"
    model, x = made(CONFIGS["msq 4"])
    wide = made(CONFIGS["msq 4"], torch.float64)[0]
    for call, error, text in (
        (lambda: export.onnx(model.train(), x, path), ValueError, "model: expected a model in evaluation mode"),
        (lambda: export.onnx(Net().eval(), x, path), ValueError, "model: expected weights quantized"),
        (lambda: export.onnx(model.eval(), x, path, bits=4), ValueError, "bits: expected None"),
        (lambda: export.onnx(model.eval(), x, path, opset=12), ValueError, "opset: expected 18..[0-9]+, got 12"),
        (
            lambda: export.onnx(model.eval(), x[:1], path),
            ValueError,
            r"args: expected 2 or more in dim 0 .*\(1, 3, 8, 8\)",
        ),
        (lambda: export.to_aten(model), TypeError, "program: expected a torch.export.ExportedProgram, .* got Net"),
        (lambda: export.onnx(x, x, path), TypeError, "model: expected a torch.nn.Module, got Tensor"),
        (lambda: export.onnx(wide, x.double(), path), ValueError, "conv1.weight: expected"),
        (lambda: export.onnx(model.eval(), x, tmp_path / "none" / "model.onnx"), FileNotFoundError, "none"),
    ):
        with pytest.raises(error, match=text):
            call()
    assert os.listdir(tmp_path) == []


def test_torch_onnx_export_of_an_aten_graph():
    model, x = made(CONFIGS["msq 4"])
    program = export.to_aten(torch.export.export(model, (x,)))
    proto = torch.onnx.export(program, dynamo=True, verbose=False).model_proto
    want = model(x).detach()
    assert (run(proto, x)[0] - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("strict, train", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("name", ["msq 8", "truncquant tanh only", "cpq per row"])
def test_exported_programs_and_their_aten_form(name, strict, train):
    model, x = made(CONFIGS[name])
    model.train(train)
    want = copy.deepcopy(model)(x)
    program = torch.export.export(model, (x,), strict=strict)
    assert any("quantops" in str(n.target) for n in program.graph.nodes)
    assert torch.equal(copy.deepcopy(program).module()(x), want)
    plain = export.to_aten(program)
    assert not any("quantops" in str(n.target) for n in plain.graph.nodes)
    assert torch.equal(plain.module()(x), want)


@pytest.mark.parametrize("strict, train", [(True, True), (True, False)])
@pytest.mark.parametrize(
    "config",
    [
        Q.MSQConfig(bits=4, act_bits=4, act="input", act_scale="tracked"),
        Q.TruncQuantConfig(bits=(8, 4), act_bits="weights"),
        Q.CPQConfig(bits=4, act_bits=4, dropbits="learned"),
    ],
    ids=["msq", "truncquant", "cpq"],
)
def test_exported_programs_of_quantized_activations(config, strict, train):
    model, x = made(config)
    model.train(train)
    program = torch.export.export(model, (x,), strict=strict)
    torch.manual_seed(0)
    want = copy.deepcopy(model)(x)
    torch.manual_seed(0)  # what is drawn
    assert torch.equal(program.module()(x), want)


def test_a_mean_may_differ_in_its_last_place():
    model, x = made(CONFIGS["truncquant tanh"])
    got = export.to_aten(torch.export.export(model, (x,))).module()(x)
    torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("evaluate, train", [("threshold", True), ("gate", True), ("gate", False)])
def test_what_has_no_aten_form_says_so(evaluate, train):
    model, x = made(Q.CPQConfig(bits=4, dropbits="learned", evaluate=evaluate))
    program = torch.export.export(model.train(train), (x,))
    with pytest.raises(ValueError, match=r"expected classes without gates .*; export quantops.plain_model\(model\)"):
        export.to_aten(program)
    plain = export.to_aten(torch.export.export(Q.plain_model(model).eval(), (x,)))  # what it says to do
    assert torch.equal(plain.module()(x), model.eval()(x))


def test_what_is_drawn_has_no_aten_form():
    model, x = made(Q.CPQConfig(bits=4, mode="sample"))
    program = torch.export.export(model.train(), (x,))
    with pytest.raises(Exception, match=r"expected mode 'hard' without gates .*call model.eval\(\)"):
        export.to_aten(program)


def test_decompositions_of_every_op_that_they_have():
    """Bit for bit, with bits as data."""
    g = torch.Generator().manual_seed(0)
    w, s = [torch.randn(4, 6, generator=g), torch.randn(5, generator=g)], [torch.tensor(1.5), torch.tensor(2.0)]
    n, k = torch.tensor([4, 2], dtype=torch.int32), torch.tensor([1, 1], dtype=torch.int32)
    ops, f32 = torch.ops.quantops, torch.float32
    codes = ops.encode(w, s, n, 0, 0, True)
    packed = ops.pack(codes, [4, 2], 0)
    calls = {
        "absmax": (w, True),
        "absmean": (w, False),
        "round_clamp": (w, s, n, 0, True, False, f32),
        "msq": (w, s, n, k, 0, False, f32),
        "lsb": (w, s, n, k, 2),
        "lsb_stats": (w, s, n, k, 1, False),
        "uniform_backward": (w, torch.ones(2), w, s, n, k, 0, True, True),
        "encode": (w, s, n, 1, 1, True),
        "decode": (codes, s, n, 0, True, f32),
        "truncate": (w, s, [], n.view(1, 2), n + 2, 1, True, False, False, f32),
        "own_scale": (w, False, True),
        "own_scale_backward": (w, s, s, False),
        "truncate_backward": (w, w, s, s, n.view(1, 2), n + 2, 1, True, False, True),
        "pack": (codes, [4, 2], 1),
        "unpack": (packed, [4, 6, 5], [2, 1], [4, 2], n, 0),
        "decode_packed": (packed, [4, 6, 5], [2, 1], [4, 2], s, n, 0, 0, True, f32),
        "categorical": (w, s, s, n, [], None, 0, 0, True, f32),
        "activation": (w[0], s[0], None, n[:1], 0, True, 0, 1, 0, f32),
        "categorical_activation": (w[0], s[0], s[0], n[:1], 1, f32),
    }
    found = decompositions.table()
    assert {op._opname for op in found} == set(calls)
    for name, args in calls.items():
        leaves, spec = tree_flatten(args)
        places = [i for i, v in enumerate(leaves) if isinstance(v, torch.Tensor)]

        op = getattr(ops, name).default

        def call(*tensors, _op=op, _leaves=leaves, _places=places, _spec=spec):
            given = dict(zip(_places, tensors))
            return _op(*tree_unflatten([given.get(i, v) for i, v in enumerate(_leaves)], _spec))

        tensors = [leaves[i] for i in places]
        graph = make_fx(call, decomposition_table=found, tracing_mode="fake")(*tensors)
        assert not any("quantops" in str(v.target) for v in graph.graph.nodes), name
        pairs = zip(tree_flatten(graph(*tensors))[0], tree_flatten(getattr(ops, name)(*args))[0], strict=True)
        assert all(torch.equal(got, want) for got, want in pairs), name
