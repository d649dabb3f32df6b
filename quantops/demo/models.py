"""What of GPT-2, Mixtral, Qwen2 (tied), BERT, ViT, ConvNeXt and an LSTM is quantized, by one line for all of them:
``python -m quantops.demo.models`` prints the report of each. Small, of random weights, without downloads."""

import torch
import transformers as hf
from torch import nn

import quantops as Q

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 32}
IMAGE = {"image_size": 8, "patch_size": 4, "num_labels": 4}
IDS = {"input_ids": torch.arange(16).view(2, 8)}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8)}


class Tagger(nn.Module):
    """An LSTM between an embedding and a head."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, 16), nn.Linear(48, 8)
        self.lstm = nn.LSTM(16, 24, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, input_ids):
        return self.head(self.lstm(self.embedding(input_ids))[0])


def networks():
    """{name: (function that makes a model, a batch)}."""
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32}
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2}
    convnext = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, **IMAGE, "patch_size": 2}
    tied = {"tie_word_embeddings": True}
    bert = {"vocab_size": 64, "max_position_embeddings": 32}
    return {
        "GPT-2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2, bos_token_id=0, eos_token_id=0)), IDS),
        "Mixtral": (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL, **TEXT, **moe)), IDS),
        "Qwen2": (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SMALL, **TEXT, **tied)), IDS),
        "BERT": (lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL, **bert)), IDS),
        "ViT": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**SMALL, **IMAGE)), PIXELS),
        "ConvNeXt": (lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(**convnext)), PIXELS),
        "LSTM": (Tagger, IDS),
    }


def main(config=None):
    """{name: report of the model}, and prints them."""
    reports = {}
    for name, (make, batch) in networks().items():
        torch.manual_seed(0)
        model = Q.quantize_(make(), config or Q.MSQConfig(bits=4, per_row=True))
        with torch.no_grad():
            model.eval()(**batch)
        reports[name] = Q.bit_report(model)
        print(f"\n{name}\n{reports[name]}")
    return reports


if __name__ == "__main__":
    main()
