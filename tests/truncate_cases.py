"""Widths, gradients and rules that tests of family ``truncate`` go through."""

import itertools

import torch
import torch._dynamo.testing

import quantops as Q
from cases import EXHAUSTIVE, scales
from quantops import reference as ref

RULES = ref.uniform.RULES
COMPANDINGS, TANH = (ref.truncate.__globals__[name] for name in ("COMPANDINGS", "tanh"))
KINDS = list(itertools.product(RULES, COMPANDINGS)) if EXHAUSTIVE else [("floor", None), ("nearest", "tanh")]


def expected_layout(w, out):
    return out.stride() == w.stride() if Q.layout.dense_rows(w) else out.is_contiguous()


def widths_of(w, count, seed=0):
    """(bits, base_bits): some distinct widths of some base width for each weight."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(count, 17, (len(w),), generator=generator, dtype=torch.int32)
    each = [1 + torch.randperm(int(n), generator=generator)[:count] for n in base]
    return torch.stack(each, 1).to(torch.int32), base


def gradients(w, count, dtype, unused=()):
    """Gradients of all widths, some of them not there."""
    generator = torch.Generator().manual_seed(3)
    g = [torch.randn(t.shape, generator=generator).to(dtype) for _ in range(count) for t in w]
    return [t.new_empty(0) if i in unused else t for i, t in enumerate(g)]


def with_or_without(w, per_row, rule):
    """An out_scale for two rules of three."""
    return None if rule == "nearest" else scales(w, per_row, seed=7)


def row(values, i):
    return None if values is None else values[i]
