"""compressed-tensors: the checkpoint format that vLLM and transformers load."""

import json
import os
from typing import Any

import torch

from quantops.calibration import activations
from quantops.export.trained import check_fits, need, signed_bits, trained
from quantops.files import write_whole
from quantops.types import Path


def compressed_tensors(model: torch.nn.Module, folder: Path, bits: int | None = None) -> None:
    """Writes ``folder``/model.safetensors and config.json in the format "pack-quantized".

    Weights of linear layers are levels of as many bits as they need, packed into int32, with the step as scale (per
    tensor or per output channel), symmetric; every other tensor of the plain model is written as it is (quantized
    convolutions and embeddings, and a head that shares the weight of one, as q). config.json is the model's own
    (transformers), with a quantization_config. ``AutoModel.from_pretrained(folder)`` reads it, and vLLM takes this
    format. ``bits``: of TruncQuant, the width.

    Raises ImportError without compressed-tensors (``pip install 'quantops[export]'``), and ValueError for a model
    without quantized linear layers, one with quantized activations, for levels of more than 8 bits, and for weights
    that are not float32: the format's scales have the weight's dtype, and a rounded step gives another weight.
    """
    need("compressed_tensors")
    import safetensors.torch
    from compressed_tensors.compressors.pack_quantized import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    plain, weights = trained(model, bits)
    linear = {name: m for name, m in plain.named_modules() if type(m) is torch.nn.Linear}
    found = {name: weights[f"{name}.weight"] for name in linear if f"{name}.weight" in weights}
    layers = {name: w for name, w in found.items() if not w.shared}  # a packed one has no weight to tie
    if not layers:
        raise ValueError("model: expected quantized nn.Linear layers with weights of their own, which alone are packed")
    acts = [name for name, _ in activations(plain)]
    if acts:
        raise ValueError(
            f"{acts[0]}: expected float activations, which alone this format runs, got quantized ones; "
            "quantops.export.onnx has integers for them"
        )
    state = dict(plain.state_dict())
    groups: dict[Any, Any] = {}
    for name, w in layers.items():
        check_fits("compressed-tensors", f"{name}.weight", w, 8)
        if w.dtype != torch.float32:
            raise ValueError(f"{name}.weight: expected float32, got {w.dtype}: call model.float() first")
        count, rows = max(signed_bits(w), 1), w.step.numel() > 1
        del state[f"{name}.weight"]
        state[f"{name}.weight_packed"] = pack_to_int32(w.levels.to(torch.int8).cpu(), count)
        state[f"{name}.weight_scale"] = w.step.reshape((-1, 1) if rows else (1,))
        state[f"{name}.weight_shape"] = torch.tensor(w.shape)
        groups.setdefault((count, "channel" if rows else "tensor"), []).append(name)
    schemes = {
        f"group_{i}": QuantizationScheme(
            targets=names,
            weights=QuantizationArgs(num_bits=count, symmetric=True, strategy=strategy),
            format="pack-quantized",
        )
        for i, ((count, strategy), names) in enumerate(groups.items())
    }
    quantization = QuantizationConfig(
        config_groups=schemes,
        format="pack-quantized",
        quantization_status="compressed",
        ignore=[name for name in linear if name not in layers],
    )
    config = plain.config.to_dict() if hasattr(plain, "config") and hasattr(plain.config, "to_dict") else {}
    config["quantization_config"] = quantization.model_dump(mode="json")
    text = json.dumps(config, indent=2, default=str)
    tensors = {key: t.detach().cpu().contiguous().clone() for key, t in state.items()}
    os.makedirs(folder, exist_ok=True)
    weights_file = safetensors.torch.save(tensors, {"format": "pt"})
    write_whole(os.path.join(folder, "model.safetensors"), lambda file: file.write(weights_file))
    write_whole(os.path.join(folder, "config.json"), lambda file: file.write(text.encode()))
