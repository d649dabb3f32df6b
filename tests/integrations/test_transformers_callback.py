"""quantops.integrations.transformers in the Trainer."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainingArguments

from quantops import MSQConfig, MSQController, bit_report, penalty, quantize_
from quantops.integrations.transformers import MSQCallback
from quantops.nn import quantized
from zoo import llama, tokens

pytestmark = pytest.mark.filterwarnings("ignore")


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows=8):
        self.batch = tokens(rows)

    def __len__(self):
        return len(self.batch["input_ids"])

    def __getitem__(self, i):
        return {k: v[i] for k, v in self.batch.items()}


def make(**options):
    model = quantize_(llama(), MSQConfig(bits=8, penalty="decoupled"))
    options = {"threshold": 0.6, "strength": 1e-3, "interval": 2, "samples": 1, **options}
    return model, MSQController(model, 12, **options)


def trainer_of(model, controller, folder, steps, **options):
    quiet = dict(report_to="none", disable_tqdm=True, use_cpu=True, logging_steps=1, save_strategy="no", seed=3)
    small = dict(per_device_train_batch_size=4, max_steps=steps, learning_rate=0.05, optim="sgd")
    args = TrainingArguments(str(folder), **{**quiet, **small, "lr_scheduler_type": "constant", **options})
    return MSQCallback(controller).add_to(Trainer(model, args, train_dataset=Rows()))


def test_it_is_the_loop_that_one_would_write(tmp_path):
    model, controller = make(strength=0.05)
    one_batch = {"per_device_train_batch_size": 8, "max_grad_norm": 0.0}
    trainer_of(model, controller, tmp_path, 4, **one_batch).train()
    twin = quantize_(llama(), MSQConfig(bits=8))
    own = MSQController(twin, 12, threshold=0.6, strength=0.05, interval=2, samples=1)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    for _ in range(4):
        loss = twin(**tokens(8)).loss
        (loss + own.strength * penalty(twin)).backward()
        optimizer.step()
        optimizer.zero_grad()
        own.step(lambda: twin(**tokens(8)).loss)
    assert [r["bits_after"] for r in controller.log[-1]["layers"]] == [r["bits_after"] for r in own.log[-1]["layers"]]
    assert any(row["pruned"] for row in own.log[0]["layers"])
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert torch.allclose(p, q, atol=1e-6), name


def test_bits_beta_and_compression_reach_the_loggers(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    model, controller = make()
    trainer = trainer_of(model, controller, tmp_path, 4, report_to="tensorboard")
    trainer.train()
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    told = {e.step: e.value for e in events.Scalars("train/quantops/compression")}
    assert sorted(told) == [1, 2, 3, 4] and told[1] == 4
    assert told[4] == pytest.approx(bit_report(model).compression) and told[4] > 4
    for name, _, p in quantized(model):
        assert events.Scalars(f"train/quantops/bits/{name}")[-1].value == int(p.bits)
        beta = controller.log[-1]["layers"][[n for n, _, _ in quantized(model)].index(name)]["beta"]
        assert events.Scalars(f"train/quantops/beta/{name}")[-1].value == pytest.approx(beta)
    assert trainer.state.log_history[3]["quantops/compression"] == controller.compression


def test_resume_is_bit_for_bit(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2, "optim": "adamw_torch"}
    options["learning_rate"] = 0.01
    whole, control = make()
    trainer_of(whole, control, tmp_path / "a", 6, **options).train()
    first, first_control = make()
    trainer_of(first, first_control, tmp_path / "b", 3, **options).train()
    saved = json.loads((tmp_path / "b" / "checkpoint-3" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["MSQCallback"]["attributes"]["saved"]["steps"] == 3
    second, second_control = make()
    trainer_of(second, second_control, tmp_path / "b", 6, **options).train(resume_from_checkpoint=True)
    assert second_control.state_dict() == control.state_dict() and len(control.log) == 3
    assert any(row["pruned"] for entry in control.log for row in entry["layers"])
    for (name, a), b in zip(whole.state_dict().items(), second.state_dict().values()):
        assert torch.equal(a, b), name


def test_errors_come_before_training(tmp_path):
    with pytest.raises(TypeError, match="controller: expected an MSQController, got int"):
        MSQCallback(3)
    model, controller = make()
    other, _ = make()
    with pytest.raises(ValueError, match="one of the model that is trained"):
        trainer_of(other, controller, tmp_path, 1).train()
    callback = MSQCallback(controller)
    callback.inputs = (), {"input_ids": tokens()["input_ids"]}
    with pytest.raises(TypeError, match="LlamaForCausalLM returns no loss"):
        callback._loss(model)
