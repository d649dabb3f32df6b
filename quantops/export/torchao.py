"""torchao: linear weights as its integer tensors, which its own kernels serve."""

import torch

from quantops.export.trained import check_fits, need, signed_bits, trained


def torchao(model: torch.nn.Module, bits: int | None = None) -> torch.nn.Module:
    """A plain copy of the evaluated model whose linear weights are torchao's IntxUnpackedToInt8Tensor.

    Levels are int8 with a target of as many bits as they need, the step is the scale (per tensor or per row), the zero
    point is 0: ``weight.dequantize()`` is q, bit for bit, which is verified. torchao has such tensors for linear
    layers; other layers (convolutions) have q as plain floats. ``bits``: of TruncQuant, the width.

    Raises ImportError without torchao (``pip install 'quantops[export]'``), and ValueError for a model without
    quantized linear layers, for levels of more than 8 bits, and should torchao's arithmetic ever not give q exactly.
    """
    quantization = need("torchao.quantization")
    plain, weights = trained(model, bits)
    layers = {
        name: m for name, m in plain.named_modules() if type(m) is torch.nn.Linear and f"{name}.weight" in weights
    }
    if not layers:
        raise ValueError("model: expected quantized nn.Linear layers, which alone torchao has integer tensors for")
    for name, layer in layers.items():
        w, q = weights[f"{name}.weight"], layer.weight
        check_fits("torchao", f"{name}.weight", w, 8)
        rows = w.step.numel() > 1
        scale = w.step.to(torch.float32).reshape((-1, 1) if rows else (1, 1))
        packed = quantization.IntxUnpackedToInt8Tensor(
            w.levels.to(torch.int8),
            scale,
            torch.zeros_like(scale, dtype=torch.int8),
            getattr(torch, f"int{max(signed_bits(w), 1)}"),
            (1, q.shape[1]) if rows else tuple(q.shape),
            q.dtype,
            None,
        )
        if not torch.equal(packed.dequantize(), q):
            raise ValueError(f"{name}.weight: torchao does not give the {q.dtype} weight exactly")
        layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    return plain
