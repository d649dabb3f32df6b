"""Lightning: the trainer's loop on a quantized LightningModule."""

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cases import Calls
from quantops import MSQConfig, penalty, quantize_


class Net(lightning.LightningModule):
    """``parts``: training_step calls the layers itself, and not the forward of the module."""

    def __init__(self, parts):
        super().__init__()
        self.parts, self.calls, self.losses = parts, [], []
        self.encoder, self.head = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8)), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(x).relu())

    def training_step(self, batch, index):
        x, y = batch
        with Calls() as calls:
            out = self.head(self.encoder(x).relu()) if self.parts else self(x)
            loss = F.cross_entropy(out, y) + 1e-3 * penalty(self)
        self.calls.append(calls.counts)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch, index):
        return self.head(self.encoder(batch[0]).relu())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches(count=4):
    torch.manual_seed(1)
    found = [(torch.randn(8, 6), torch.randint(0, 3, (8,))) for _ in range(count)]
    return torch.utils.data.DataLoader(found, batch_size=None)


def fit(model, loader, **options):
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(**{"max_epochs": 1, "accelerator": "cpu", **quiet, **options})
    trainer.fit(model, loader, batches(1))
    return model


def make(parts, **config):
    torch.manual_seed(0)
    return quantize_(Net(parts), MSQConfig(bits=6, **config))


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_a_lightning_module_as_root_is_quantized_in_one_call(options):
    whole, parts, layers = (
        fit(make(p, fuse=f), batches(), **options) for p, f in ((0, "model"), (1, "model"), (1, "layer"))
    )
    for model in (whole, parts):
        # While gradients accumulate q stays, and the penalty alone is computed again.
        lists = [counts.get("msq", 0) + counts.get("lsb_stats", 0) for counts in model.calls]
        assert lists == [1] * 4 and model.calls[0]["msq"] == 1
        assert torch.equal(torch.stack(model.losses), torch.stack(layers.losses))
    assert all(counts["msq"] == 3 for counts in layers.calls)
    for p, q, r in zip(whole.parameters(), parts.parameters(), layers.parameters()):
        assert torch.equal(p, q) and torch.equal(p, r)


def test_layers_in_another_dtype_than_the_others_do_not_compute_all_again():
    model = make(True)
    x = torch.randn(2, 6)
    with Calls() as calls:
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                x16 = model.encoder(x)
            model.head(x16.float())
    assert calls.counts["msq"] == 4  # all layers in bfloat16, and the head's alone three times


def test_a_checkpointed_part_of_a_lightning_module():
    model, twin = make(True), make(True)
    x = torch.randn(2, 6)
    torch.utils.checkpoint.checkpoint(lambda v: model.head(model.encoder(v)), x, use_reentrant=False).sum().backward()
    twin.head(twin.encoder(x)).sum().backward()
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.equal(p.grad, q.grad)
