"""The network that tests of TruncQuant's training share, and its steps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from networks import data
from quantops import TruncQuantConfig, joint_loss, joint_step, quantize_, set_bits
from quantops.nn import quantized

FUSES = pytest.mark.parametrize("fuse", ["model", "layer"])
STEPS = pytest.mark.parametrize("kind", ["loss", "step"])
WIDTHS = (8, 4, 2, 1)
RULES = [
    {},
    {"rule": "nearest"},
    {"companding": "tanh", "out_scale": "absmean"},
    {"scale": 2.5, "per_row": True},
    {"bits": (5, 3), "base_bits": 11, "out_scale": "absmean", "per_row": True},
]


class Net(nn.Module):
    reentrant = None

    def __init__(self, affine=True):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4, affine=affine)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, momentum=0.3)
        self.fc1, self.bn3, self.fc2 = nn.Linear(24, 9), nn.BatchNorm1d(9), nn.Linear(9, 5)

    def features(self, x):
        x = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return self.bn3(self.fc1(x.flatten(1))).relu()

    def forward(self, x):
        if self.reentrant is None:
            return self.fc2(self.features(x))
        return self.fc2(checkpoint(self.features, x, use_reentrant=self.reentrant))


TANH = {"scale": "absmax", "companding": "tanh", "out_scale": "absmean", "scale_grad": True}  # as in .paper()


def make(dtype=torch.float32, affine=True, **config):
    """With max|w|, so that of one width the backward pass is the identity."""
    torch.manual_seed(0)
    return quantize_(Net(affine).to(dtype), TruncQuantConfig(**{"scale": "absmax", **config}))


def loss_of(model, seed=1, dtype=torch.float32):
    x, y = data(dtype, seed)
    return F.cross_entropy(model(x), y)


def joint(model, kind="loss", seed=1, dtype=torch.float32, **options):
    """A joint step that ends with gradients."""
    x, y = data(dtype, seed)
    if kind == "step":
        return joint_step(model, lambda out: F.cross_entropy(out, y), x, **options)
    result = joint_loss(model, lambda out: F.cross_entropy(out, y), x, **options)
    result.loss.backward()
    return result


def separately(model, seed=1, dtype=torch.float32, weights=None):
    """The same by steps at one width each, before one backward pass."""
    widths = quantized(model)[0][2].model_widths
    total = 0.0
    for i, m in enumerate(widths):
        set_bits(model, m)
        total = total + (weights[i] if weights else 1.0) * loss_of(model, seed, dtype)
    set_bits(model)
    total.backward()
    return total


def objective(model, x, y):
    return joint_loss(model, lambda out: F.cross_entropy(out, y), x, distill=0.5).loss
