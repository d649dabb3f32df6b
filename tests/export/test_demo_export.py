"""The demo's last lines: its network in onnxruntime, or a sentence where a package is missing."""

import sys

import pytest
import torch

import quantops as Q

pytest.importorskip("sklearn")


def test_the_demo_checks_its_network_in_onnxruntime(tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from quantops.demo.digits import Digits, Net
    from quantops.demo.onnx_check import export_and_check

    torch.manual_seed(0)
    data, model = Digits(), Q.quantize_(Net(), Q.MSQConfig(bits=2, act_bits=4))
    model(data.x)
    assert export_and_check(model, data, tmp_path / "net.onnx") and model.training
    said = capsys.readouterr().out
    assert "net.onnx" in said and "on 450 images" in said and "0 classes differ" in said
    assert (tmp_path / "net.onnx").stat().st_size < 56_224 * 4 / 2  # a weight has 4 of 32 bits here
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export_and_check(model, data, tmp_path / "none.onnx") and not (tmp_path / "none.onnx").exists()
    assert "needs onnxruntime: pip install 'quantops[export]'" in capsys.readouterr().out
