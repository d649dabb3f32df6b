"""GPT-2 by TruncQuant at 8, 4 and 2 bits, from random weights, on the bytes of a text, in the Trainer of transformers:
``python -m quantops.demo.gpt2_truncquant FILE``."""

import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import quantops as Q


class JointTrainer(Trainer):
    """Trains all widths of each batch; evaluates the width that is set."""

    def compute_loss(self, model, inputs, return_outputs=False, **more):
        if model.training:
            return Q.joint_loss(model, None, kwargs=inputs).loss
        return super().compute_loss(model, inputs, return_outputs, **more)


def rows(text, length):
    """Pieces of a text, as the Trainer takes them."""
    tokens = torch.tensor(list(text[: len(text) // length * length])).view(-1, length)
    return [{"input_ids": row, "labels": row} for row in tokens]


def main(file, folder="gpt2", length=128, steps=2000, batch=16, **config):
    """{bits: loss of the last tenth of the text}."""
    text = Path(file).read_bytes()
    cut = len(text) * 9 // 10
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=length, bos_token_id=0, eos_token_id=0, **config))
    Q.quantize_(model, Q.TruncQuantConfig(bits=(8, 4, 2)))
    args = TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=batch, learning_rate=5e-4)
    trainer = JointTrainer(model, args, train_dataset=rows(text[:cut], length), eval_dataset=rows(text[cut:], length))
    trainer.train()
    Q.save_int(model, f"{folder}/gpt2.safetensors")  # its 8-bit planes open at any width
    losses = {}
    for bits in (8, 4, 2):
        Q.set_bits(model, bits)
        losses[bits] = trainer.evaluate()["eval_loss"]
    return losses


if __name__ == "__main__":
    print(main(sys.argv[1], n_layer=4, n_head=4, n_embd=256))
