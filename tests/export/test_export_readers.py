"""QONNX, torchao and compressed-tensors read what was exported for them, bit for bit."""

import json
import os
import sys

import pytest
import torch
from torch import nn

import quantops as Q
from exported import CONFIGS, Net, made
from quantops import export
from quantops.export.trained import signed_bits

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "name, bits",
    [
        ("msq 4", None),
        ("msq 2 per row", None),
        ("msq 0", None),
        ("msq 4 full", None),
        ("truncquant", 1),
        ("truncquant", 2),
        ("cpq per row", None),
        ("cpq, activations", None),
    ],
)
def test_qonnx(name, bits, tmp_path):
    pytest.importorskip("qonnx")
    pytest.importorskip("onnxscript")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    model, x = made(CONFIGS[name])
    export.qonnx(model, x, tmp_path / "model.onnx", bits=bits)
    if bits:
        Q.set_bits(model, bits)
    read = ModelWrapper(str(tmp_path / "model.onnx")).transform(InferShapes())
    values = execute_onnx(read, {read.graph.input[0].name: x.numpy()}, return_full_exec_context=True)
    for key, w in Q.to_int(model).items():
        assert torch.equal(torch.from_numpy(values[key]), w.dequantize(bits)), key
    kinds = {node.op_type for node in read.graph.node}
    assert ("BipolarQuant" in kinds) == (bits == 1) and ("Quant" in kinds) == (bits != 1)
    inputs = {node.input[0] for node in read.graph.node if node.op_type == "Quant"}
    assert any(not key.endswith(".float") for key in inputs) == ("activations" in name)
    got = torch.from_numpy(values[read.graph.output[0].name])
    torch.testing.assert_close(got, model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["msq 4", "msq 4 full", "msq 2 per row", "cpq per row"])
def test_torchao(name):
    torchao = pytest.importorskip("torchao.quantization")
    model, x = made(CONFIGS[name])
    served = export.torchao(model)
    w = Q.to_int(model)["fc.weight"]
    assert isinstance(served.fc.weight, torchao.IntxUnpackedToInt8Tensor)
    assert torch.equal(served.fc.weight.dequantize(), w.dequantize())
    assert served.fc.weight.target_dtype == getattr(torch, f"int{signed_bits(w)}")
    assert torch.equal(served(x), model(x))
    half = made(CONFIGS[name], torch.bfloat16)[0]
    assert torch.equal(export.torchao(half).fc.weight.dequantize(), Q.to_int(half)["fc.weight"].dequantize())
    assert not hasattr(served.fc, "parametrizations") and hasattr(model.fc, "parametrizations")


def llama(config, tied=False):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )
    return Q.quantize_(model, config, lambda name, m: isinstance(m, nn.Linear) and (tied or name != "lm_head")).eval()


@pytest.mark.parametrize(
    "config, tied",
    [
        (Q.MSQConfig(bits=4), False),
        (Q.MSQConfig(bits=4), True),
        (Q.MSQConfig(bits=3, per_row=True), False),
        (Q.CPQConfig(bits=2), False),
        (Q.TruncQuantConfig(bits=(4, 2), batch_norm=False), False),
    ],
    ids=["msq 4", "msq 4, tied", "msq 3 per row", "cpq 2", "truncquant 4"],
)
def test_compressed_tensors_is_what_transformers_loads(config, tied, tmp_path):
    pytest.importorskip("compressed_tensors")
    model = llama(config, tied)
    export.compressed_tensors(model, tmp_path)
    import transformers

    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.arange(12).reshape(1, -1)
    want = model(ids).logits
    torch.testing.assert_close(read(ids).logits, want, rtol=1e-5, atol=1e-6)
    q = {name: w.dequantize() for name, w in Q.to_int(model).items()}
    for name, m in read.named_modules():
        if f"{name}.weight" in q:
            assert torch.equal(m.weight, q[f"{name}.weight"]), name
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["format"] == "pack-quantized" and "lm_head" in said["ignore"]


def test_what_a_target_cannot_hold(tmp_path):
    pytest.importorskip("torchao.quantization")
    pytest.importorskip("compressed_tensors")
    wide = made(CONFIGS["truncquant"])[0]
    half = made(CONFIGS["msq 4"], torch.bfloat16)[0]
    acts = made(Q.MSQConfig(bits=4, act_bits=4))[0]
    convolutions = Q.quantize_(nn.Sequential(nn.Conv2d(1, 1, 1)), Q.MSQConfig()).eval()
    for call, text in (
        (lambda: export.torchao(wide), "fc.weight: torchao has integers of at most 8 bits, .*full grid of 8 bits"),
        (lambda: export.compressed_tensors(wide, tmp_path / "x"), "fc.weight: compressed-tensors has integers"),
        (lambda: export.compressed_tensors(half, tmp_path / "x"), "fc.weight: expected float32, got torch.bfloat16"),
        (lambda: export.compressed_tensors(acts, tmp_path / "x"), "act: expected float activations, .* got quantized"),
        (lambda: export.torchao(Net().eval()), "model: expected weights quantized by quantops.quantize_"),
        (lambda: export.compressed_tensors(Net().eval(), tmp_path / "x"), "model: expected weights quantized"),
        (lambda: export.compressed_tensors(wide.train(), tmp_path / "x"), "model: expected a model in evaluation"),
        (lambda: export.torchao(convolutions), "model: expected quantized nn.Linear layers"),
        (lambda: export.compressed_tensors(convolutions, tmp_path / "x"), "model: expected quantized nn.Linear layers"),
        (lambda: export.torchao(wide.train()), "model: expected a model in evaluation mode"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    assert os.listdir(tmp_path) == []


def test_a_missing_library_names_the_extra(monkeypatch, tmp_path):
    model, x = made(CONFIGS["msq 4"])
    for library, extra, call in (
        ("onnx", "export", lambda: export.onnx(model, x, tmp_path / "x")),
        ("onnxscript", "export", lambda: export.onnx(model, x, tmp_path / "x")),
        ("onnx", "export", lambda: export.qonnx(model, x, tmp_path / "x")),
        ("qonnx.core.modelwrapper", "export", lambda: export.qonnx(model, x, tmp_path / "x")),
        ("torchao.quantization", "export", lambda: export.torchao(model)),
        ("compressed_tensors", "export", lambda: export.compressed_tensors(model, tmp_path / "x")),
        ("safetensors.torch", "io", lambda: Q.save_model(model, tmp_path / "x")),
        ("safetensors.torch", "io", lambda: Q.load_model(tmp_path / "x", model)),
    ):
        with monkeypatch.context() as missing:
            missing.setitem(sys.modules, library, None)
            with pytest.raises(ImportError, match=rf"pip install 'quantops\[{extra}\]'"):
                call()
    assert os.listdir(tmp_path) == []
