"""Models of transformers: the training loop of a user, with the penalty and the report."""

import pytest

from quantops import MSQConfig, bit_report, penalty, quantize_
from zoo import images, llama, tokens, vit


@pytest.mark.parametrize("make, batch", [(llama, tokens), (vit, images)])
def test_a_step_reaches_every_quantized_weight(make, batch):
    model = quantize_(make(), MSQConfig(bits=6))
    (model(**batch()).loss + 1e-3 * penalty(model)).backward()
    names = [row.name for row in bit_report(model).rows]
    assert len(names) >= 12
    for name in names:
        owner = model.get_submodule(name).parametrizations.weight
        assert owner.original.grad.abs().sum() > 0, name
