"""Quantized activations in ONNX: integers, the values of the torch model, by export.onnx and by torch.onnx.export."""

import pytest
import torch
from torch import nn

import quantops as Q
from exported import CONFIGS, Net, made, run
from quantops import export

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore")


class Smooth(nn.Module):
    """Every front but the ReLU, by modules and by what configs put in their place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 4, 3), nn.GELU("tanh"), nn.Conv2d(4, 4, 1), nn.SiLU()
        )

    def forward(self, x):
        return self.net(x)


class PerChannel(nn.Module):
    """Quantizers that configs do not make: per channel, with an offset, of 7 bits."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            Q.UniformActivation(7, scale="clip", channels=8, signed=True),
            nn.Conv2d(8, 4, 3),
            Q.UniformActivation(4, offset=True, channels=4),
            nn.Conv2d(4, 2, 3),
            Q.UniformActivation(5, rule="nearest", scale=2.0),
        )

    def forward(self, x):
        return self.net(x)


def weighted(name, module):
    return isinstance(module, (nn.Conv2d, nn.Linear))


# name: (network, config, opset, exact, types of QuantizeLinear)
CASES = {
    "unsigned, 4 bits": (Net, Q.MSQConfig(bits=4, act_bits=4), 21, True, {"UINT4"}),
    "unsigned, 6 bits": (Net, Q.MSQConfig(bits=4, act_bits=6, act_scale="clip"), 18, False, {"UINT8"}),
    "inputs, 3 bits": (Net, Q.CPQConfig(bits=4, act_bits=3, act="input"), 18, False, {"INT8", "UINT8"}),
    "floor codes": (Net, Q.TruncQuantConfig(bits=(8, 4), act_bits=8, act="input"), 21, True, {"INT16", "UINT8"}),
    "per channel, divided": (PerChannel, Q.MSQConfig(bits=4), 18, False, {"INT8", "UINT8"}),
    "gelu and silu": (Smooth, Q.MSQConfig(bits=4, act_bits=4), 21, True, {"INT4"}),
    "gelu and silu, divided": (Smooth, Q.TruncQuantConfig(bits=(8, 4), act_bits=7), 18, False, {"INT8"}),
    "per channel": (PerChannel, Q.MSQConfig(bits=4), 21, True, {"INT8", "UINT4"}),
}


def types_of_codes(proto):
    """Names of the types that QuantizeLinear gives."""
    stored = {t.name: t.data_type for t in proto.graph.initializer}
    found = set()
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            given = [a.i for a in node.attribute if a.name == "output_dtype"]
            found.add(onnx.TensorProto.DataType.Name(given[0] if given else stored[node.input[2]]))
    return found


@pytest.mark.parametrize("case", CASES)
def test_activations_are_integers(case, tmp_path):
    network, config, opset, exact, types = CASES[case]
    torch.manual_seed(0)
    model = Q.quantize_(network(), config, weighted)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 8, 8, generator=g)
    model(x)
    proto = export.onnx(model.eval(), x, tmp_path / "model.onnx", opset=opset, exact=exact)
    assert types_of_codes(proto) == types
    steps = {node.input[1] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    assert steps <= {t.name for t in proto.graph.initializer}  # constants
    y = torch.randn(40, 3, 8, 8, generator=g)
    got, want = run(proto, y)[0], model(y).detach()
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_what_an_opset_has_no_integers_for_leaves_as_float_ops(tmp_path):
    torch.manual_seed(0)
    model = Q.quantize_(Net(), Q.MSQConfig(bits=4, act_bits=12), weighted)
    x = torch.randn(2, 3, 8, 8)
    model(x)
    for opset, types in ((18, set()), (21, {"UINT16"})):
        proto = export.onnx(model.eval(), x, tmp_path / "model.onnx", opset=opset)
        assert types_of_codes(proto) == types
        want = model(x).detach()
        assert (run(proto, x)[0] - want).abs().max() <= 1e-5 * want.abs().max()


GRADIENTS = {  # scales that are functions of the weights
    "msq, gradient": Q.MSQConfig(bits=4, scale_grad=True),
    "truncquant, paper": Q.TruncQuantConfig.paper(bits=(4, 2)),
}


@pytest.mark.parametrize("name", ["msq 3 sign", "truncquant", "cpq, activations", "dropbits", *GRADIENTS])
def test_torch_onnx_export_by_itself(name):
    model, x = made({**CONFIGS, **GRADIENTS}[name])
    proto = torch.onnx.export(model, (x,), dynamo=True, verbose=False).model_proto
    want = model(x).detach()
    assert (run(proto, x)[0] - want).abs().max() <= 1e-5 * want.abs().max()
    assert torch.equal(model(x), want)  # the ops are ops again
