"""The networks whose steps are timed, and the ways to train them, which are one training."""

import pytest
import torch

from bench import models
from bench.ops import compare, shapes, steps


@pytest.mark.parametrize("name", ["resnet20", "resnet50", "deit_small"])
def test_models_have_the_shapes_that_are_measured(name):
    with torch.device("meta"):
        model = steps.NETWORKS[name].build()
    got = [tuple(m.weight.shape) for m in steps.quantized_layers(model).values()]
    assert sorted(got) == sorted(shapes.LISTS[name])


def test_the_transformer_list():
    with torch.device("meta"):
        model = models.Blocks(depth=1)
    assert [tuple(m.weight.shape) for m in steps.quantized_layers(model).values()] == shapes.LISTS["transformer_1b"][:4]
    assert sum(torch.Size(s).numel() for s in shapes.LISTS["transformer_1b"]) > 1e9


@pytest.fixture
def small_network(monkeypatch):
    small = steps.Network(lambda: models.Blocks(128, 1, 256), (1, 8, 128), (1, 8, 128), images=False)
    monkeypatch.setitem(steps.NETWORKS, "small", small)


def test_all_ways_to_train_several_widths_are_one_training(small_network):
    training, grads = steps.Training("small", "cpu"), []
    for label in ("quantops joint_loss", "quantops joint_step"):
        training.optimizer.zero_grad()
        steps.JOINT[label](training.model).backward(training)
        grads.append([p.grad.clone() for p in training.model.parameters()])
    for (name, _), a, b in zip(training.model.named_parameters(), *grads):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=lambda text: f"{name}: {text}")
    # The chain has the same forward pass, which is checked below; its slope is 2^m / (2^m - 1) where ours is 1.
    kinds = {k: v for k, v in steps.JOINT.items() if not v.compiles}
    row = steps.measure_network("small", "cpu", kinds, 60, 0.01)
    assert row["ratio"][steps.JOINT_BASE] == 1 and row["ratio"].keys() == kinds.keys() and not row["absent"]
    assert "quantops joint_step" not in row["saved_bytes"]
    assert row["saved_bytes"]["eager chain"] > row["saved_bytes"]["quantops joint_loss"]


def test_all_ways_to_train_are_one_training(small_network):
    training, grads = steps.Training("small", "cpu"), {}
    for label in ("quantops", "quantops decoupled", "eager chain"):
        variant = steps.VARIANTS[label](training.model)
        ours, shared = ({id(p) for p in m.parameters()} for m in (training.model, variant.model))
        assert ours == shared, "the Parameters are not shared"
        training.optimizer.zero_grad()
        training.loss(variant).backward()
        variant.after()
        grads[label] = [p.grad.clone() for p in training.model.parameters()]
    for label in ("quantops decoupled", "eager chain"):
        for (name, w), a, b in zip(training.model.named_parameters(), grads["quantops"], grads[label]):
            # The chain gives no gradient where its code was clamped, in the last half bin: it differentiates the clamp.
            free = w < w.abs().max() * (1 - 2**-steps.BITS)
            torch.testing.assert_close(
                a[free], b[free], rtol=1e-3, atol=1e-5, msg=lambda text: f"{label}, {name}: {text}"
            )
    kinds = {k: v for k, v in steps.VARIANTS.items() if not v.compiles}
    row = steps.measure_network("small", "cpu", kinds, 60, 0.01)
    assert row["ratio"][steps.BASE] == 1 and row["ratio"].keys() == kinds.keys() and not row["absent"]
    assert row["saved_bytes"]["eager chain"] > row["saved_bytes"]["quantops"] >= row["saved_bytes"][steps.BASE]


def test_compare_steps():
    row = {"network": "n", "ratio": {"unquantized": 1.0, "quantops": 1.25, "eager chain": 4.0}}
    assert compare.figures({"rows": [row]}) == {"n, quantops": 1.25}
