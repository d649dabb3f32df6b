"""Models of transformers: the training loop of a user, with the penalty and the report."""

import pytest
import torch

from quantops import (
    MSQConfig,
    MSQController,
    TruncQuantConfig,
    bit_report,
    joint_loss,
    joint_step,
    penalty,
    quantize_,
    set_bits,
)
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


@pytest.mark.parametrize("make, batch", [(llama, tokens), (vit, images)])
def test_the_controller_takes_traces_through_attention(make, batch):
    model, eager = (quantize_(make(), MSQConfig(bits=6)) for _ in range(2))
    assert model.config._attn_implementation == "sdpa"
    eager.set_attn_implementation("eager")
    rows, expected = (
        MSQController(m, 8, threshold=0.9, strength=1e-3, samples=2).step(lambda: m(**batch()).loss)["layers"]
        for m in (model, eager)
    )
    assert [r["name"] for r in rows] == [r["name"] for r in expected]
    largest = max(abs(r["trace"]) for r in expected)
    for row, other in zip(rows, expected):
        assert row["trace"] == pytest.approx(other["trace"], abs=1e-5 * largest)
    assert len({r["k"] for r in rows}) == 2  # Omega is above its mean in some layers


@pytest.mark.parametrize("joint", [joint_loss, joint_step])
def test_joint_steps_take_a_batch_and_the_loss_of_the_model(joint):
    model, twin = (quantize_(llama(), TruncQuantConfig(bits=(6, 2))) for _ in range(2))
    result = joint(model, None, kwargs=tokens())
    if joint is joint_loss:
        result.loss.backward()
    for m in (6, 2):
        set_bits(twin, m)
        loss = twin(**tokens()).loss
        assert result.losses[m] == loss.detach()
        loss.backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m: f"{name}: {m}")
    result = joint(model, None, kwargs=tokens(), distill=0.5, teacher=llama()(**tokens()))
    assert result.loss > 0
