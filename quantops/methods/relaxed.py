"""Relaxed Quantization's samples (arXiv 1810.01875): all classes at once, softened by a Gumbel temperature."""

import torch
import torch.nn.functional as F


def relaxed(w, alpha, sigma, bits, classes, temperature, gates=None):
    """q = sum_i z_i alpha i,  z = softmax((log r + G) / temperature) over i = -2^(n-1)..2^(n-1) - 1, n = ``bits``.

    G is Gumbel noise, r are the classes' probabilities, see :func:`quantops.categorical`. In plain PyTorch: each weight
    takes 2^``classes`` numbers, several times. ``alpha``, ``sigma``: one, or one for each row of w; ``gates``: None, or
    (classes,), or (groups, classes) for groups of as many rows as there are in the first of them; ``bits``: a 0-dim
    tensor, at most ``classes``.
    """
    dtype = alpha.dtype
    index = torch.arange(-(2 ** (classes - 1)), 2 ** (classes - 1), device=w.device)
    size = torch.where(index < 0, -index - 1, index)
    level = (size.unsqueeze(-1) >= 2 ** torch.arange(classes, device=w.device)).sum(-1)  # 0 for -1 and 0
    alpha, sigma = (v.reshape(-1, *[1] * w.dim()) for v in (alpha, sigma))
    x = w.to(dtype).unsqueeze(-1)
    # log of S(a) - S(b), less a constant, where neither underflows.
    log_r = F.logsigmoid((alpha * (index + 0.5) - x) / sigma) + F.logsigmoid((x - alpha * (index - 0.5)) / sigma)
    if gates is not None:
        weight = gates.clamp(min=0).cumprod(-1).clamp(min=torch.finfo(dtype).tiny).log()[..., level]
        if weight.dim() > 1:
            rows = -(-len(w) // len(weight))
            weight = weight.repeat_interleave(rows, 0)[: len(w)].reshape(len(w), *[1] * (w.dim() - 1), -1)
        log_r = log_r + weight
    log_r = log_r.masked_fill(level >= bits, -torch.inf)
    noise = -torch.empty_like(log_r).exponential_().log()
    return (torch.softmax((log_r + noise) / temperature, -1) * (alpha * index)).sum(-1)
