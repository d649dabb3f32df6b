"""LoRA (peft) on quantized models, and quantizers on models that have adapters."""

import copy

import peft
import pytest
import torch

from quantops import MSQConfig, TruncQuantConfig, bit_report, quantize_
from quantops.nn import quantized
from zoo import llama, tokens

pytestmark = pytest.mark.filterwarnings("ignore:quantize_")
LORA = dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])


def adapted(model, **options):
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(**LORA, **options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape) * 0.05)
    return model


def floats(model):
    return {name: owner.original for name, owner, _ in quantized(model)}


def copies(tensors):
    return {name: t.detach().clone() for name, t in tensors.items()}


@pytest.mark.parametrize(
    "config", [MSQConfig(bits=5), MSQConfig(bits=5, fuse="layer"), TruncQuantConfig(bits=(6, 3))], ids=str
)
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unload_adds_the_adapter_to_the_float_weight(config, safe):
    base = quantize_(llama(), config)
    # A safe merge reads the weight, which is q, and sets the sum; the other one adds to what is there.
    own = copies(floats(base))
    before = copies({name: base.get_submodule(name).weight for name in own}) if safe else own
    model = adapted(base)
    model(**tokens())  # what is kept of a forward must not be taken for the merged weight
    deltas = {
        name.removeprefix("base_model.model."): m.get_delta_weight("default")
        for name, m in model.named_modules()
        if hasattr(m, "get_delta_weight")
    }
    assert len(deltas) == 6
    merged = model.merge_and_unload(safe_merge=safe)
    after = floats(merged)
    assert after.keys() == before.keys()
    for name, w in after.items():
        assert torch.equal(w, before[name] + deltas[name].detach() if name in deltas else own[name]), name
    fresh = llama()
    fresh.load_state_dict({**fresh.state_dict(), **{f"{name}.weight": w for name, w in after.items()}})
    expected = quantize_(fresh, config).eval()
    assert torch.equal(merged.eval()(**tokens()).logits, expected(**tokens()).logits)
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_adapters_train_on_the_quantized_weights_and_unmerge():
    base = quantize_(llama(), MSQConfig(bits=4))
    before = copies(floats(base))
    model = adapted(base)
    model(**tokens()).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained) == 12 and all("lora_" in name for name in trained)
    model.merge_adapter()
    model.unmerge_adapter()
    for w, old in zip(floats(model).values(), before.values()):
        assert torch.allclose(w, old, atol=1e-6)


def test_quantize_after_lora_leaves_adapters_alone_unless_asked():
    model = adapted(llama())
    names = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    asked = quantize_(copy.deepcopy(model), MSQConfig(bits=8), lambda name, m: isinstance(m, torch.nn.Linear))
    assert {name for name, _, _ in quantized(asked)} == names and any("lora_A" in name for name in names)
    quantize_(model, MSQConfig(bits=5))
    chosen = {name for name, _, _ in quantized(model)}
    assert chosen == {name for name in names if "lora_" not in name}
    assert any(name.endswith("q_proj.base_layer") for name in chosen)
    left = {v.name: v.why for v in bit_report(model).left}
    assert left["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"] == "of an adapter"
    delta = model.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight("default")
    before = copies(floats(model))
    merged = floats(model.merge_and_unload())
    assert torch.equal(
        merged["model.layers.0.self_attn.q_proj"],
        before["base_model.model.model.layers.0.self_attn.q_proj.base_layer"] + delta,
    )
