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


def copier(w, bytes_per_weight):
    """A function that copies as many bytes (read + written) as an op over ``w`` moves, and the factor of its time.

    One weight is copied as a whole; a list by torch._foreach_copy_, whose time is then scaled to the bytes.
    """
    if len(w) == 1:
        count = max(1, int(w[0].numel() * bytes_per_weight / 8))
        source, target = torch.rand(count, device=w[0].device), torch.empty(count, device=w[0].device)
        return lambda: target.copy_(source), 1.0
    source = [torch.rand(t.shape, device=t.device) for t in w]
    target = [torch.empty_like(t) for t in source]
    return lambda: torch._foreach_copy_(target, source), bytes_per_weight / 8
