"""Small models with random weights, of the kinds that people train; nothing is downloaded."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

VOCABULARY = 64


def llama(**config):
    torch.manual_seed(0)
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    more = dict(num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=32)
    return LlamaForCausalLM(LlamaConfig(**{**small, **more, **config}))


def vit(**config):
    torch.manual_seed(0)
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    more = dict(image_size=8, patch_size=4, num_channels=3, num_labels=4)
    return ViTForImageClassification(ViTConfig(**{**small, **more, **config}))


def tokens(rows=4, length=8, seed=1):
    """A batch for a language model, whose labels are its inputs."""
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def images(rows=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(rows, 3, 8, 8, generator=g),
        "labels": torch.randint(0, 4, (rows,), generator=g),
    }
