"""Lightning: the trainer's loop on a quantized LightningModule."""

import lightning
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from cases import Calls
from quantops import MSQConfig, MSQController, penalty, quantize_
from quantops.integrations.lightning import MSQCallback


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


# The callback


class Plain(Net):
    def __init__(self):
        super().__init__(False)
        self.drop = nn.Dropout(0.1)

    def training_step(self, batch, index):
        loss = F.cross_entropy(self(self.drop(batch[0])), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def start(**options):
    torch.manual_seed(0)
    model = quantize_(Plain(), MSQConfig(bits=8, penalty="decoupled"))
    options = {"threshold": 0.55, "strength": 0.01, "interval": 2, "samples": 1, **options}
    return model, MSQController(model, 12, **options)


def test_the_callback_trains_logs_and_resumes_bit_for_bit(tmp_path):
    def run(epochs, checkpoint=None, state=None, **options):
        model, controller = start()
        loaders = batches(6), batches(1)
        torch.manual_seed(5)
        if state is not None:  # Lightning leaves the random state, of dropout, to the caller
            torch.set_rng_state(state)
        quiet = dict(enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, logger=False)
        options = {**quiet, "accelerator": "cpu", "log_every_n_steps": 1, "accumulate_grad_batches": 2, **options}
        trainer = lightning.Trainer(max_epochs=epochs, callbacks=[MSQCallback(controller)], **options)
        trainer.fit(model, *loaders, ckpt_path=checkpoint)
        return model, controller, trainer

    logger = TensorBoardLogger(tmp_path, name="", version="logs")
    whole, control, trainer = run(3, logger=logger)
    assert any(row["pruned"] for entry in control.log for row in entry["layers"]) and len(control.log) == 4
    assert control.state_dict()["steps"] == trainer.global_step == 9
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    told = [e.value for e in events.Scalars("quantops/compression")]
    assert len(told) == 9 and told[0] == 4 and told[-1] == pytest.approx(control.compression) and told[-1] > 4
    for row in control.log[-1]["layers"]:
        assert events.Scalars(f"quantops/bits/{row['name']}")[-1].value == row["bits_after"]
        assert events.Scalars(f"quantops/beta/{row['name']}")[-1].value == pytest.approx(row["beta"])
    _, _, trainer = run(1)
    state = torch.get_rng_state()
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    model, controller, _ = run(3, tmp_path / "first.ckpt", state)
    assert controller.state_dict() == control.state_dict()
    for (name, a), b in zip(whole.state_dict().items(), model.state_dict().values()):
        assert torch.equal(a, b), name


def test_errors_of_the_callback():
    with pytest.raises(TypeError, match="controller: expected an MSQController, got Plain"):
        MSQCallback(Plain())
    model, controller = start()
    other, _ = start()
    with pytest.raises(ValueError, match="one of the module that is trained"):
        fit(other, batches(), callbacks=[MSQCallback(controller)])
    model.automatic_optimization = False
    with pytest.raises(ValueError, match="loss_fn: expected one with manual optimization"):
        fit(model, batches(), callbacks=[MSQCallback(controller)])
