"""Small models with random weights, of the kinds that people train; nothing is downloaded."""

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

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


SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TEXT = dict(num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=32)


def gpt2(**config):
    """Conv1D layers, whose outputs are dim 1; the head is the embedding."""
    torch.manual_seed(0)
    small = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=32)
    return GPT2LMHeadModel(GPT2Config(**{**small, "bos_token_id": 0, "eos_token_id": 0, **config}))


def mixtral(**config):
    """Experts in tensors of 3 dims, (experts, out, in)."""
    torch.manual_seed(0)
    more = dict(num_local_experts=4, num_experts_per_tok=2)
    return MixtralForCausalLM(MixtralConfig(**{**SMALL, **TEXT, **more, **config}))


def gpt_oss(**config):
    """Experts (experts, in, out)."""
    torch.manual_seed(0)
    more = dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    return GptOssForCausalLM(GptOssConfig(**{**SMALL, **TEXT, **more, **config}))


def qwen2(**config):
    """The head is the embedding."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**{**SMALL, **TEXT, "tie_word_embeddings": True, **config}))


def bert(**config):
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**{**SMALL, "vocab_size": VOCABULARY, "max_position_embeddings": 32, **config}))


def t5(**config):
    torch.manual_seed(0)
    small = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCABULARY)
    return T5ForConditionalGeneration(T5Config(**{**small, "decoder_start_token_id": 0, **config}))


def convnext(**config):
    torch.manual_seed(0)
    small = dict(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, image_size=8, num_labels=4)
    return ConvNextForImageClassification(ConvNextConfig(**{**small, **config}))


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
