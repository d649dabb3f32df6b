"""Family ``categorical``: draws. Run as test_categorical.py is, for the kernels that serve the CPU."""

import functools
import itertools
import sys

import pytest
import torch

import quantops as Q
import quantops.reference.categorical
from cases import EXHAUSTIVE
from categorical_cases import KINDS, inputs, make_gates

ref = sys.modules["quantops.reference.categorical"]


def test_philox_known_answers():
    """Of Random123: counter 0 and key 0, and those of all ones."""
    words = ref.philox(0, torch.tensor([0]))
    assert [f"{int(w):08x}" for w in words] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    first = [f"{int(w):08x}" for w in ref.philox(-1, torch.tensor([5]))]
    again = [f"{int(w):08x}" for w in ref.philox(2**63 - 1, torch.tensor([5]))]
    assert first != again  # all 64 bits of the key count


@pytest.mark.parametrize("kind", KINDS)
def test_draws_equal_reference(kind):
    """The same class on every backend; only a draw within the rounding of exp and log from an edge may differ."""
    generator = torch.Generator().manual_seed(6)
    count, wrong, total = 5000 if EXHAUSTIVE else 300, 0, 0
    for bits, signed, ratio in itertools.product(
        *(((1, 3, 8, 16), (True, False), (100, 3, 0.1)) if EXHAUSTIVE else ((4,), (True, False), (3,)))
    ):
        gates = make_gates(kind, bits, torch.float32, generator)
        x, alpha, sigma = inputs(count, bits, signed, ratio, gates, generator, torch.float32, beyond=50)
        q = Q.categorical(x, alpha, sigma, bits, gates=gates, signed=signed, mode="sample", seed=11)
        want = ref.categorical(x, alpha, sigma, bits, gates=gates, signed=signed, mode="sample", seed=11)
        wrong, total = wrong + int((q != want).sum()), total + count
    assert wrong <= 2e-4 * total, (wrong, total)


def chi_square_bound(freedom):
    """Below this in all but one of a million cases (Wilson and Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.75 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize("gates", [None, [1.0, 0.6, 0.5]])
@pytest.mark.parametrize("signed", [True, False])
def test_frequencies_of_draws(signed, gates):
    """Chi-square against r of the 2^b classes, for x in the grid, on its edge and outside."""
    count = 200_000 if EXHAUSTIVE else 4000
    gates = None if gates is None else torch.tensor(gates)
    low, high = ref.levels(3, signed)[-1]
    for value, ratio in itertools.product((0.1, 1.5, 3.6), (3.0, 0.5)) if EXHAUSTIVE else [(1.5, 0.5)]:
        x = torch.full((count,), value)
        q = Q.categorical(x, 1.0, 1 / ratio, 3, gates=gates, signed=signed, mode="sample", seed=5)
        index = torch.arange(low, high + 1).double()
        weight = (
            torch.ones(8).double()
            if gates is None
            else ref.cumulative_gates(gates, 3)[[ref.level_of(int(i), signed) - 1 for i in index]]
        )
        r = weight * (torch.sigmoid((index + 0.5 - value) * ratio) - torch.sigmoid((index - 0.5 - value) * ratio))
        expected = r / r.sum() * count
        found = torch.bincount((q - low).long(), minlength=8).double()
        assert found.sum() == count
        usual = expected > 5
        rest = count - expected[usual].sum()
        terms = ((found - expected)[usual] ** 2 / expected[usual]).sum()
        if rest > 5:
            terms = terms + (count - found[usual].sum() - rest) ** 2 / rest
        assert terms < chi_square_bound(max(int(usual.sum()) - 1 + int(rest > 5), 1)), (value, ratio, found, expected)


@pytest.mark.parametrize("sigma", (3, 1e4, 1e6, 1e9))
def test_draws_of_classes_that_are_equally_likely(sigma):
    """Where sigma hides all differences: four classes, a quarter each, and the same ones on every backend."""
    count = 100_000 if EXHAUSTIVE else 1000
    for dtype in (torch.float32, torch.float64):
        x = torch.linspace(-2, 1, count, dtype=dtype)
        q = Q.categorical(x, 1.0, sigma, 2, mode="sample", seed=5)
        want = ref.categorical(x, 1.0, sigma, 2, mode="sample", seed=5)
        assert (q != want).sum() <= 2e-4 * count
        if sigma > 3:
            terms = (torch.bincount((q + 2).long(), minlength=4) - count / 4).double() ** 2 / (count / 4)
            assert terms.sum() < chi_square_bound(3), terms


def test_draws_depend_on_seed_and_place_alone():
    x = torch.randn(6, 50)
    args = 0.7, 0.5, 4
    draw = functools.partial(Q.categorical, mode="sample")
    q = draw(x, *args, seed=3)
    assert torch.equal(q, draw(x, *args, seed=torch.tensor([3]))) and not torch.equal(q, draw(x, *args, seed=4))
    assert not torch.equal(q, draw(x, *args, seed=3 + 2**32))
    parts = Q.foreach.categorical([x[:2], x[2:]], [0.7, 0.7], [0.5, 0.5], 4, mode="sample", seed=3)
    assert torch.equal(q, torch.cat(parts))  # a list is counted through
    assert torch.equal(q, draw(x.double(), *args, seed=3).float())
    assert torch.equal(q, draw(x.t().contiguous().t(), *args, seed=3))  # not dense by rows: row-major order
    image = torch.randn(2, 3, 4, 5)
    last = image.to(memory_format=torch.channels_last)
    moved = image.permute(0, 2, 3, 1).contiguous()
    assert torch.equal(draw(last, *args, seed=3), draw(moved, *args, seed=3).permute(0, 3, 1, 2))
