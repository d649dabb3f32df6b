"""What a user could run instead of quantops, on lists of weights."""

import torch

from quantops.reference import paper


def eager(w, bits, k):
    """The papers' chain of tensor ops, weight by weight: lists q and penalties."""
    return zip(*(paper.msq(t, bits, k)[:2] for t in w))


def _compiled_list():
    return torch.compile(lambda w, bits, k: [paper.msq(t, bits, k) for t in w], dynamic=False)


def compiled_list():
    """The whole list in one graph of torch.compile: the strongest peer."""
    fn = _compiled_list()
    return lambda w, bits, k: zip(*(r[:2] for r in fn(w, bits, k)))


def compiled_each():
    """torch.compile weight by weight: one graph per shape."""
    fn = torch.compile(paper.msq, dynamic=False)
    return lambda w, bits, k: zip(*(fn(t, bits, k)[:2] for t in w))


def fake_quantize(w, bits, k):
    """torch's own fake quantizer with a scale of max|w|: less than MSQ, no LSBs, no penalty."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    q = [torch.fake_quantize_per_tensor_affine(t, (t.detach().abs().max() / high), torch.zeros(
        1, dtype=torch.int32, device=t.device), low, high) for t in w]
    return q, None


class _FloorSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        return torch.floor(v)

    @staticmethod
    def backward(ctx, grad):
        return grad


def truncate(w, scale, bits, base_bits):
    """Truncation to one width as TruncQuant's public code chains it: base code, shift, dequantization."""
    u = torch.clamp(w * (0.5 / scale) + 0.5, 0, 1)
    code = torch.clamp(_FloorSTE.apply(u * 2**base_bits), max=2**base_bits - 1)
    code = _FloorSTE.apply(code / 2 ** (base_bits - bits))
    return ((2 * code - (2**bits - 1)) * (scale / (2**bits - 1))).to(w.dtype)


def copier(source, target, bytes_per_weight):
    """A copy of the op's own weights to its own results, and the factor from its bytes to those of the op.

    The same memory, since its bandwidth depends on where the pages lie: other buffers were up to twice as fast.
    """
    factor = bytes_per_weight / (source[0].element_size() + target[0].element_size())
    if len(source) == 1:
        return lambda: target[0].copy_(source[0]), factor
    return lambda: torch._foreach_copy_(target, source), factor
