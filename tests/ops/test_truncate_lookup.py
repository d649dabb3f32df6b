"""Family ``truncate``: narrow widths of bfloat16, which C++ kernels look up in a register where the CPU has AVX-512."""

import pytest
import torch

import quantops as Q
from cases import same
from quantops import reference as ref


@pytest.mark.parametrize("rule", ref.uniform.RULES)
def test_narrow_widths_of_long_rows(rule):
    """Long rows of bfloat16, whose narrow widths the CPU looks up: with NaN, which no table has, and without."""
    w = torch.randn(2, 2 * 2048 + 37).bfloat16()
    w[:, :3] = torch.tensor([float("inf"), -float("inf"), -0.0])
    w[1, 2048] = float("nan")
    scale = torch.tensor([1.1, 0.7])
    for base in (5, 8, 16):
        widths = [n for n in (16, 8, 6, 5, 4, 3, 2, 1) if n <= base]
        for n, q in zip(widths, Q.truncate(w, scale, widths, base_bits=base, rule=rule)):
            assert same(q, ref.truncate(w, scale, n, base_bits=base, rule=rule)), (base, n)
