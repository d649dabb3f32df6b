"""A batch norm per width: its statistics, its conversion, its errors."""

import pytest
import torch
from torch import nn

from networks import state
from quantops import MultiBatchNorm, TruncQuantConfig, quantize_, set_bits
from quantops.nn import quantized
from truncquant_networks import Net, joint, loss_of, make

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_batch_norm_per_width_keeps_its_own_statistics():
    model = make()
    start = state(model)
    set_bits(model, 2)
    for seed in range(3):
        loss_of(model, seed).backward()
    after = state(model)
    for name in ("bn1", "bn2", "bn3"):
        norm = model.get_submodule(name)
        assert isinstance(norm, MultiBatchNorm) and norm.num_batches_tracked.tolist() == [0, 0, 3, 0]
        for part in ("running_mean", "running_var", "weight", "bias"):
            old, new = start[f"{name}.{part}"], after[f"{name}.{part}"]
            assert new.shape == (4, norm.features)
            moved = [not torch.equal(a, b) for a, b in zip(old, new)]
            assert moved == [False, False, "running" in part, False]
        assert [g.abs().max() > 0 for g in norm.weight.grad] == [False, False, True, False]


def test_optimizers_made_before_and_shared_norms():
    torch.manual_seed(0)
    model = Net()
    model.again = model.bn3
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    quantize_(model, TruncQuantConfig())
    assert model.again is model.bn3 and isinstance(model.bn3, MultiBatchNorm)
    before = state(model)
    joint(model)
    optimizer.step()
    assert all(not torch.equal(before[k], p) for k, p in model.named_parameters())
    shared = make(batch_norm=False)
    assert isinstance(shared.bn1, nn.BatchNorm2d)
    joint(shared)
    assert int(shared.bn1.num_batches_tracked) == 4


@pytest.mark.parametrize(
    "norm, text", [(nn.LazyBatchNorm1d(), "bn3: expected a batch norm with values, got LazyBatchNorm1d")]
)
def test_norms_that_cannot_be_converted_leave_the_model_untouched(norm, text):
    model = Net()
    model.bn3 = norm
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=text):
        quantize_(model, TruncQuantConfig())
    assert dict(model.named_modules()) == modules and not quantized(model)
    quantize_(model, TruncQuantConfig(batch_norm=False))
