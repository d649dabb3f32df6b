"""torch.utils.checkpoint of parts of quantized models: gradients are those without, whatever runs between."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from quantops import CPQConfig, MSQConfig, TruncQuantConfig, penalty, quantize_

pytestmark = pytest.mark.usefixtures("one_thread")
FUSES = pytest.mark.parametrize("fuse", ["model", "layer"])
REENTRANT = pytest.mark.parametrize("reentrant", [False, True])
CONFIGS = {
    "msq": MSQConfig,
    "msq, mean": lambda **o: MSQConfig(bits=3, scale=2.8, **o),
    "truncquant": lambda **o: TruncQuantConfig(companding="tanh", **o),
    "cpq": CPQConfig,
    "cached": lambda **o: CPQConfig(cache=True, **o),
}
DRAWN = {"dropbits": {"dropbits": "learned"}, "sample": {"mode": "sample"}}


class Net(nn.Module):
    """reentrant: None, or how two parts are checkpointed. amp: whether autocast begins inside of them."""

    reentrant, amp = None, False

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def part(self, layer, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.amp):
            return torch.relu(layer(x)).float()

    def forward(self, x):
        for layer in (self.a, self.b):
            x = (
                self.part(layer, x)
                if self.reentrant is None
                else checkpoint(self.part, layer, x, use_reentrant=self.reentrant)
            )
        return self.c(x)


def evaluated(model, x):
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()


def without_graph(model, x):
    with torch.no_grad():
        model(x)


def under_autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        model(x)


BETWEEN = {
    "nothing": lambda model, x: None,
    "no_grad": without_graph,
    "evaluation": evaluated,
    "autocast": under_autocast,
    "another": lambda model, x: model(2 * x).sum(),
}


def gradients(config, reentrant, between, regular=False, **settings):
    """Those of a step, with the same draws every time."""
    torch.manual_seed(0)
    model, x = quantize_(Net(), config), torch.randn(4, 8).requires_grad_()
    model.reentrant = reentrant
    for name, value in settings.items():
        setattr(model, name, value)
    torch.manual_seed(3)
    out = model(x)
    loss = out.square().sum() + (0.1 * penalty(model) if regular else 0)
    more = BETWEEN[between](model, x)
    (loss if more is None else loss + more).backward()
    return [x.grad, *(p.grad for p in model.parameters())]


@FUSES
@REENTRANT
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("config", CONFIGS)
def test_whatever_runs_between_forward_and_backward(config, between, reentrant, fuse):
    config = CONFIGS[config](fuse=fuse)
    regular = isinstance(config, MSQConfig)
    for a, b in zip(*(gradients(config, r, between, regular) for r in (None, reentrant)), strict=True):
        torch.testing.assert_close(a, b)


@FUSES
@REENTRANT
def test_autocast_that_begins_inside_the_part(fuse, reentrant):
    config = MSQConfig(scale=2.8, fuse=fuse)
    for a, b in zip(*(gradients(config, r, "no_grad", True, amp=True) for r in (None, reentrant)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("kind", DRAWN)
def test_layers_draw_the_same_again(kind, between):
    config = CPQConfig(fuse="layer", **DRAWN[kind])
    for reentrant in (False, True):
        for a, b in zip(*(gradients(config, r, between) for r in (None, reentrant)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", DRAWN)
def test_what_is_drawn_for_a_whole_pass_is_found_again_or_refused(kind):
    config = CPQConfig(**DRAWN[kind])
    for a, b in zip(*(gradients(config, r, "nothing") for r in (None, False)), strict=True):
        torch.testing.assert_close(a, b)
    for reentrant, between in ((True, "nothing"), *((False, k) for k in BETWEEN if k != "nothing")):
        with pytest.raises(RuntimeError, match='take fuse="layer"'):
            gradients(config, reentrant, between)


def test_weights_that_changed_before_the_backward_pass_are_an_error():
    torch.manual_seed(0)
    model, x = quantize_(Net(), MSQConfig(scale=2.8)), torch.randn(4, 8)
    model.reentrant, model.amp = False, True  # so that layers compute their own q
    loss = model(x).sum()
    with torch.no_grad():
        model.a.parametrizations.weight.original.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place after the forward pass"):
        loss.backward()


@pytest.mark.parametrize("config", CONFIGS)
def test_a_read_after_the_backward_pass_has_a_graph(config):
    model, x = quantize_(Net(), CONFIGS[config]()), torch.randn(4, 8)
    model(x).sum().backward()
    model.a.weight.sum().backward()
    torch.autograd.grad(model.a(x).sum(), model.a.parametrizations.weight.original)
