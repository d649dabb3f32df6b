"""DropBits: gates, learned bits in evaluation, reports and integers, the penalty."""

import copy
import math

import pytest
import torch
from torch import nn

import quantops
from cases import Calls
from networks import LEARNED, Net, data, loss_of, make_cpq, originals, quantizers, same, scales, set_gates, state
from quantops import bit_report, finish_dropbits, penalty, quantize_, reference, to_int
from quantops.methods.gates import SHIFT, hard_concrete

pytestmark = pytest.mark.usefixtures("one_thread")
FUSES = pytest.mark.parametrize("fuse", ["model", "layer"])


def test_gates_are_hard_concrete():
    torch.manual_seed(0)
    log_a = torch.tensor([-3.0, -0.5, 0.0, 1.0, 4.0], dtype=torch.float64)
    z = hard_concrete(log_a, torch.rand(200000, 5, dtype=torch.float64))
    assert z.min() == 0 and z.max() == 1
    p = torch.sigmoid(log_a - SHIFT)
    assert ((z != 0).double().mean(0) - p).abs().max() < 4e-3
    one = torch.sigmoid(log_a - 2 / 3 * math.log(11))  # S((logit u + log_a)/b) 1.2 - 0.1 >= 1
    assert ((z == 1).double().mean(0) - one).abs().max() < 4e-3
    assert torch.equal(z.median(0).values > 0, p > 0.5)


@pytest.mark.parametrize("dropbits", ["fixed", "learned"])
def test_dropped_bits_drop_those_above(dropbits):
    model = make_cpq(dropbits=dropbits, nonzero=0.5, min_bits=2, bits=5, mode="sample", sigma=4.0)
    if dropbits == "learned":
        with torch.no_grad():
            for p in quantizers(model).values():
                p.log_a.fill_(SHIFT)
    counts = dict.fromkeys(range(2, 6), 0)
    for _ in range(300):
        model(data()[0])
        alpha = scales(quantizers(model)["mid.0"])[0]
        j = (model.mid[0].weight / alpha).round()
        bits = max(1 + (-j.min()).long().sub(1).item().bit_length(), 1 + j.max().long().item().bit_length())
        counts[bits] += 1
    # Bits 3, 4 and 5 each stay in half the draws: 2 bits in 1/2, 3 in 1/4, 4 and 5 in 1/8.
    for bits, expected in ((2, 150), (3, 75), (4, 37.5), (5, 37.5)):
        assert abs(counts[bits] - expected) < 4 * expected**0.5, counts


@pytest.mark.parametrize(
    "options", [{"dropbits": "learned"}, {"mode": "sample"}, {"dropbits": "fixed", "gate_rows": 2}]
)
def test_what_is_drawn_for_a_weight_with_other_rows_first_is_followed(options):
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.Conv2d(6, 4, 3))
    quantize_(model, quantops.CPQConfig(per_row=True, **options))
    for _ in range(2):  # the second finds the graph of the first used up
        model(torch.randn(2, 4, 5, 5)).sum().backward()
        assert len(quantizers(model)["0"].group.drawn) == 1


def test_fixed_gates_are_no_parameters_and_all_bits_stay():
    model = make_cpq(dropbits="fixed", nonzero=0.2)
    assert not any(name.endswith("log_a") for name, _ in model.named_parameters())
    assert {r.bits for r in bit_report(model).rows} == {4}
    assert penalty(model).item() == 0


@FUSES
def test_learned_bits_in_evaluation_reports_and_integers(fuse):
    model = make_cpq(fuse=fuse, dropbits="learned")
    set_gates(model, LEARNED)
    for train in (True, False):
        model.train(train)
        report = bit_report(model)
        assert [r.bits for r in report.rows] == [4, 2, 1, 3]
        assert [v.bits for v in to_int(model).values()] == [4, 2, 1, 3]
    for row, (name, w) in zip(report.rows, originals(model).items()):
        alpha, sigma = scales(quantizers(model)[name])
        q = reference.categorical(w.detach(), alpha, sigma, row.bits)
        assert torch.equal(model.get_submodule(name).weight, q) and (row.k, row.beta) == (0, 0)
        assert row.sq_error == pytest.approx(float((q - w).detach().double().square().sum()), rel=1e-5)
        assert row.scale == float(alpha.detach()) * 2 ** (row.bits - 1)
    with torch.no_grad():
        originals(model)["head"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        bit_report(model)


def test_penalty_is_the_expected_number_of_gates():
    model = make_cpq(
        dropbits="learned", first=3, overrides={"mid.0": {"dropbits": "fixed"}, "mid.2": {"dropbits": None}}
    )
    r = penalty(model)
    p = quantizers(model)["head"]
    assert r.shape == () and r.item() == pytest.approx(torch.sigmoid(p.log_a - SHIFT).sum().item(), rel=1e-6)
    r.backward()
    chance = torch.sigmoid(p.log_a.detach() - SHIFT)
    torch.testing.assert_close(p.log_a.grad, chance * (1 - chance))
    assert all(v.grad is None for k, v in model.named_parameters() if not k.endswith("log_a"))
    with pytest.raises(ValueError, match="expected weights quantized by quantops.quantize_"):
        penalty(Net())
    both = nn.ModuleList([make_cpq(dropbits="learned"), quantize_(Net(), quantops.MSQConfig())])
    assert torch.equal(penalty(both), penalty(both[0]) + penalty(both[1]))


@FUSES
@pytest.mark.parametrize("dropbits", ["fixed", "learned"])
def test_finishing_changes_nothing_that_is_evaluated(fuse, dropbits, tmp_path):
    model = make_cpq(fuse=fuse, dropbits=dropbits)
    if dropbits == "learned":
        set_gates(model, LEARNED)
    expected = [4, 2, 1, 3] if dropbits == "learned" else [4] * 4
    before = model.eval()(data()[0])
    report = finish_dropbits(model)
    assert [r.bits for r in report.rows] == expected and torch.equal(model(data()[0]), before)
    model.train()
    assert torch.equal(model(data()[0]), before)  # no more draws
    with Calls() as calls:
        loss_of(model).backward()
    assert calls.counts["categorical"] == (1 if fuse == "model" else 4)
    if dropbits == "learned":
        assert penalty(model) == 0 and quantizers(model)["head"].log_a.grad is None
        (loss_of(model) + penalty(model)).backward()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = make_cpq(fuse=fuse, dropbits=dropbits)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert [r.bits for r in bit_report(other).rows] == expected and torch.equal(other(data()[0]), before)
    assert torch.equal(copy.deepcopy(model)(data()[0]), before)
    finish_dropbits(other)
    assert same(state(other), state(model))
    other.load_state_dict(make_cpq(fuse=fuse, dropbits=dropbits).state_dict())  # and gates are back
    assert quantizers(other)["head"].draws and {r.bits for r in bit_report(other).rows} == {4}
    assert quantizers(other)["head"].log_a.requires_grad == (dropbits == "learned")
    for bad in (Net(), make_cpq()):
        with pytest.raises(ValueError, match=r"CPQConfig\(dropbits=...\), Net has none"):
            finish_dropbits(bad)


def test_the_penalty_takes_bits_away_and_the_loss_keeps_them():
    finals = {}
    for strength in (0.0, 0.5):
        model = make_cpq(dropbits="learned", bits=6, nonzero=0.6, sigma=0.5)
        optimizer = torch.optim.Adam([p for name, p in model.named_parameters() if name.endswith("log_a")], lr=0.1)
        for seed in range(30):
            optimizer.zero_grad()
            loss_of(model, strength, seed).backward()
            optimizer.step()
        finals[strength] = bit_report(model).average_bits
    assert finals[0.5] < 2 < finals[0.0]
