"""What is left in float is told: by a warning of quantize_, and by the report."""

import warnings

import pytest
import torch
from torch import nn

from quantops import CPQConfig, MSQConfig, TruncQuantConfig, bit_report, penalty, quantize_
from quantops.layers import is_linear_or_conv


class Text(nn.Module):
    """An embedding, attention, whose in_proj_weight is a Parameter of its own, and a head."""

    def __init__(self):
        super().__init__()
        self.embedding, self.attention = nn.Embedding(50, 8), nn.MultiheadAttention(8, 2)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 50)


def test_quantize_warns_of_what_it_leaves():
    with pytest.warns(UserWarning) as found:
        model = quantize_(Text(), MSQConfig(bits=4), is_linear_or_conv)
    assert len(found) == 1 and found[0].filename == __file__
    text = str(found[0].message)
    assert text.startswith(
        "quantize_: 43.9% of the weights in matrices are quantized, in float stay embedding.weight "
        "(Embedding was not chosen), attention.in_proj_weight (MultiheadAttention was not chosen);"
    ), text
    report = bit_report(model)
    assert [(v.name, v.matrix) for v in report.left] == [
        ("embedding.weight", True),
        ("attention.in_proj_weight", True),
        ("attention.in_proj_bias", False),
        ("attention.out_proj.bias", False),
        ("norm.weight", False),
        ("norm.bias", False),
        ("head.bias", False),
    ]
    quantized, left = 64 + 400, 400 + 192 + 24 + 8 + 8 + 8 + 50
    assert report.compression == 8
    assert report.whole_compression == pytest.approx(32 * (quantized + left) / (4 * quantized + 32 * left))
    assert "in float embedding.weight: 50x8, Embedding was not chosen" in str(report)


@pytest.mark.parametrize("config", [MSQConfig(act_bits=4), TruncQuantConfig(), CPQConfig(act_bits=4)])
def test_a_network_that_is_quantized_as_a_whole_has_no_warning(config):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = quantize_(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Linear(4, 4)), config)
    if isinstance(config, MSQConfig):
        model(torch.randn(2, 1, 6, 6))
    names = [v.name for v in bit_report(model).left]
    assert names == ["0.bias", "1.weight", "1.bias", "3.bias"] and not any(v.matrix for v in bit_report(model).left)


def test_many_that_are_left_are_counted():
    model = nn.Sequential(*(nn.Embedding(5, 3) for _ in range(9)), nn.Linear(2, 2))
    with pytest.warns(UserWarning, match=r"5.weight \(Embedding was not chosen\) and 3 more"):
        quantize_(model, MSQConfig(), is_linear_or_conv)


@pytest.mark.parametrize("config", [TruncQuantConfig(), CPQConfig(), CPQConfig(dropbits="fixed")])
def test_the_penalty_is_0_where_a_method_has_none(config):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        r = penalty(quantize_(nn.Sequential(nn.Linear(3, 3)).to(dtype), config))
        assert r.item() == 0 and r.dim() == 0
        assert r.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    with pytest.raises(ValueError, match="Linear has none"):
        penalty(nn.Linear(3, 3))


@pytest.mark.parametrize("config", [MSQConfig(), TruncQuantConfig(bits=(4,)), CPQConfig()], ids=["m", "t", "c"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_report_names_the_layer_whose_weight_is_not_finite(config, value):
    model = quantize_(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), config)
    with torch.no_grad():
        model[2].parametrizations.weight.original[1, 2] = value
    with pytest.raises(ValueError, match=r"^2: expected finite values in its weight of shape \(3, 4\), got NaN or inf"):
        bit_report(model)
