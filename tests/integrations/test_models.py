"""Models of transformers: which weights are quantized, and that what is tied, saved and loaded stays what it is."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import quantops as Q
from quantops.nn import quantized
from quantops.owners import owners
from zoo import bert, convnext, gpt2, gpt_oss, images, llama, mixtral, qwen2, t5, tokens, vit

TEXT = [gpt2, mixtral, gpt_oss, qwen2, llama, bert, t5]
TIED = [gpt2, qwen2, bert, t5]
CONFIGS = [
    Q.MSQConfig(bits=6, per_row=True),
    Q.CPQConfig(bits=4, per_row=True),
    Q.TruncQuantConfig(bits=(8, 4), per_row=True),
]


def batch_of(make):
    return images() if make in (vit, convnext) else tokens()


def logits(model, make):
    torch.manual_seed(3)
    return model.eval()(**batch_of(make)).logits


@pytest.mark.parametrize("make", [*TEXT, vit, convnext])
def test_every_weight_matrix_of_its_blocks_is_quantized(make):
    model = Q.quantize_(make(), Q.MSQConfig(bits=4, per_row=True))
    left = [v.name for v in Q.bit_report(model).left if v.matrix]
    lookups = ("embeddings", "embed", "wpe", "wte", "bias", "token", "gate", "router")  # positions, routers, biases
    assert all(any(part in name for part in lookups) for name in left), left
    if make not in TIED:
        assert Q.bit_report(make.__name__ and model).whole_compression > 1.5
    (model(**batch_of(make)).loss + 1e-3 * Q.penalty(model)).backward()
    for name, owner, _ in quantized(model):
        assert owner.original.grad is not None and bool(owner.original.grad.isfinite().all()), name


@pytest.mark.parametrize("make", [gpt2, mixtral, gpt_oss])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_rows_are_the_outputs_of_each_layer(make, config):
    model = Q.quantize_(make(), config)
    weights = Q.to_int(model.eval())
    with torch.no_grad():
        reads = {f"{path}.{name}": owner() for path, name, owner in owners(model)}
    for name, v in weights.items():
        rows = (1,) if make is gpt2 and "c_" in name else (0, 2) if make is gpt_oss else (0, 1)
        rows = rows if v.whole is not None else (0,)
        assert v.rows == rows and v.scale.numel() == torch.Size([v.shape[d] for d in rows]).numel(), name
        assert torch.equal(v.dequantize(), reads[name]), name
        assert torch.equal((v.levels * v.step_of_each).to(v.dtype), reads[name]), name
    assert sum(v.whole is not None for v in weights.values()) == (8 if make is gpt2 else 4)


@pytest.mark.parametrize("make", [gpt2, mixtral])
@pytest.mark.parametrize("fuse", ["model", "layer"])
def test_scales_of_outputs_are_those_of_the_transposed_weight(make, fuse):
    model = Q.quantize_(make(), Q.MSQConfig(bits=3, per_row=True, fuse=fuse, penalty="decoupled", scale=2.0))
    model(**tokens()).loss.backward()
    before = {name: owner.original.grad.clone() for name, owner, _ in quantized(model)}
    Q.add_penalty_grad_(model, 0.5)
    for name, owner, _ in quantized(model):
        w = owner.original.detach()
        turn = (lambda t: t.t()) if "c_" in name else (lambda t: t.flatten(0, -2))
        scale = 2.0 * Q.absmean(turn(w).contiguous(), per_row=True)
        assert torch.equal(turn(owner().detach()), Q.round_clamp(turn(w).contiguous(), scale, 3)), name
        sign = Q.lsb(turn(w).contiguous(), scale, 3).sign() * (turn(w).abs() <= scale[:, None])
        assert torch.allclose(turn(owner.original.grad - before[name]), 0.5 * sign, atol=1e-6), name


@pytest.mark.parametrize("make", TIED)
def test_both_ends_of_a_tied_weight_see_one_quantized_weight(make):
    model = Q.quantize_(make(), Q.MSQConfig(bits=4))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert torch.equal(head.weight, embedding.weight) and head.weight.unique().numel() <= 16
    assert head.parametrizations.weight.original is embedding.parametrizations.weight.original
    model.tie_weights()
    assert head.parametrizations.weight.original is embedding.parametrizations.weight.original
    names = [name for name, _ in model.named_parameters()]
    assert len([n for n in names if n.endswith("original")]) == len(quantized(model))
    before = logits(model, make)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, make), before)
    plain = Q.plain_model(model)
    assert torch.equal(logits(plain, make), before)
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    chosen = Q.quantize_(make(), Q.MSQConfig(bits=4, tied="chosen"))
    assert chosen.get_input_embeddings().weight is chosen.get_output_embeddings().parametrizations.weight.original
    chosen.tie_weights()
    assert type(chosen.get_input_embeddings()).__name__ == "Embedding"
    assert torch.equal(logits(Q.unquantize_(model), make), logits(make(), make))


@pytest.mark.parametrize("make", [gpt2, mixtral, gpt_oss, llama, qwen2, bert, t5, vit, convnext])
@pytest.mark.parametrize("config", CONFIGS[:2], ids=lambda c: type(c).__name__)
def test_saved_models_are_float_models_and_quantized_ones(make, config, tmp_path):
    model = Q.quantize_(make(), config)
    model(**batch_of(make)).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    expected = logits(model, make)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)  # the float weights that were trained
    for key, value in Q.float_state_dict(model).items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert not torch.equal(logits(loaded, make), expected)
    assert torch.equal(logits(Q.prepare(loaded, tmp_path), make), expected)
    again = Q.prepare(make(), str(tmp_path / "model.safetensors"))
    assert torch.equal(logits(again, make), expected)
    back = make()
    back.load_state_dict(Q.float_state_dict(again))
    assert Q.bit_report(again).rows == Q.bit_report(model).rows


@pytest.mark.parametrize("make", TIED)
def test_integer_files_of_tied_models(make, tmp_path):
    model = Q.quantize_(make(), Q.MSQConfig(bits=4))
    expected = logits(model, make)
    Q.save_int(model, tmp_path / "w.safetensors")
    plain = make()
    plain.load_state_dict(Q.float_state_dict(model))
    Q.load_int(tmp_path / "w.safetensors", plain)
    assert torch.equal(logits(plain, make), expected)
    untied = make(tie_word_embeddings=False)
    untied.load_state_dict(Q.float_state_dict(model))
    Q.load_int(tmp_path / "w.safetensors", untied)
    assert torch.equal(untied.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("make", [gpt2, qwen2])
def test_resizing_says_what_to_do(make):
    model = Q.quantize_(make(), Q.MSQConfig(bits=4))
    before = logits(model, make)
    with pytest.raises(RuntimeError, match="to resize a layer .resize_token_embeddings., take quantops.unquantize_"):
        model.resize_token_embeddings(80)
    assert torch.equal(logits(model, make), before)
    Q.unquantize_(model).resize_token_embeddings(80)
    Q.quantize_(model, Q.MSQConfig(bits=4))
    assert logits(model, make).shape[-1] == 80 and model.lm_head.weight.unique().numel() <= 16


@pytest.mark.parametrize("make", [gpt2, qwen2])
def test_trainer_checkpoints_resume(make, tmp_path):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return {key: value[i % 4] for key, value in tokens().items()}

    def trainer(model, steps):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
            lr_scheduler_type="constant", disable_tqdm=True,
        )  # fmt: skip
        return Trainer(model=model, args=arguments, train_dataset=Rows())

    whole, part = (Q.quantize_(make(resid_pdrop=0.0), Q.MSQConfig(bits=4)) for _ in range(2))
    trainer(whole, 4).train()
    trainer(part, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = whole.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in part.state_dict().items())
    rebuilt = Q.prepare(make(), tmp_path / "checkpoint-4")
    assert torch.equal(logits(rebuilt, make), logits(whole, make))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4").lm_head.weight.shape == (64, 32)


@pytest.mark.parametrize("make", [gpt2, mixtral])
def test_a_pickled_model_is_the_model(make, tmp_path):
    model = Q.quantize_(make(), Q.MSQConfig(bits=4))
    torch.save(model, tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(other, make), logits(model, make))
    other.tie_weights()
    assert set(other.state_dict()) == set(model.state_dict())


def test_initialization_reaches_the_float_weights():
    model = Q.quantize_(gpt2(), Q.MSQConfig(bits=4))
    layer = model.transformer.h[0].mlp.c_fc
    layer._is_hf_initialized = False
    before = layer.parametrizations.weight.original.detach().clone()
    model._init_weights(layer)
    after = layer.parametrizations.weight.original
    assert not torch.equal(after, before) and after.std().item() == pytest.approx(0.02, rel=0.1)


def test_the_script_of_all_reports(capsys):
    from quantops.demo.models import main

    reports = main()
    assert list(reports) == ["GPT-2", "Mixtral", "Qwen2", "BERT", "ViT", "ConvNeXt", "LSTM"]
    printed = capsys.readouterr().out
    assert all(f"\n{name}\n{report}" in printed for name, report in reports.items())
    part = {
        name: sum(r.numel for r in v.rows) / sum(p.numel for p in (*v.rows, *(e for e in v.left if e.matrix)))
        for name, v in reports.items()
    }
    assert all(v > 0.85 for v in part.values()), part  # the rest are embeddings of words and of places, and routers
    assert part["GPT-2"] > 0.95 and part["Mixtral"] > 0.9
