"""What CPQConfig offers beside its defaults: an offset, relaxed samples, gates of groups of rows and in evaluation."""

import copy

import pytest
import torch

import quantops
from networks import LEARNED, data, loss_of, make_cpq, originals, quantizers, scales, set_gates
from quantops import bit_report, finish_dropbits, reference, to_int
from quantops.methods import gates
from quantops.methods.relaxed import relaxed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("per_row", [False, True])
def test_an_offset_shifts_the_grid_and_learns(per_row):
    model = make_cpq(offset=True, per_row=per_row)
    p, w = quantizers(model)["head"], originals(model)["head"]
    with torch.no_grad():
        p.beta.copy_(0.03 * torch.arange(1, 1 + p.beta.numel()))
    alpha, sigma = (v.detach() for v in scales(p))
    beta = p.beta.detach().reshape(-1, 1).clone().requires_grad_()
    shifted = (w.detach() - beta).requires_grad_()
    q = reference.categorical(shifted.detach(), alpha, sigma, 4) + beta.detach()
    assert torch.equal(model.head.weight, q)
    model.head.weight.square().sum().backward()
    of_q = 2 * q
    of_x = reference.categorical_backward(of_q, shifted.detach(), alpha, sigma, 4, grad_of="soft", mode="hard")[0]
    expected = (of_q - of_x).sum(1) if per_row else (of_q - of_x).sum().reshape(1)
    torch.testing.assert_close(p.beta.grad, expected)
    with pytest.raises(ValueError, match=r"head|mid|conv.*offset=False"):
        to_int(model)
    row = bit_report(model).rows[-1]
    assert row.sq_error == pytest.approx(float((q - w).detach().double().square().sum()), rel=1e-5)


def test_an_offset_with_a_cache_has_its_gradients():
    models = [make_cpq(offset=True, cache=cache) for cache in (False, True)]
    for _ in range(2):  # the second forward of the cached model takes what the first one left
        for model in models:
            loss_of(model).backward()
    a, b = ({n: v.grad for n, v in m.named_parameters()} for m in models)
    assert all(torch.equal(a[n], b[n]) for n in a) and quantizers(models[0])["head"].beta.grad.abs().sum() > 0


@pytest.mark.parametrize("gated", [False, True])
def test_relaxed_samples_sharpen_to_draws(gated):
    torch.manual_seed(0)
    w, alpha, sigma = (
        torch.tensor([-0.9, 0.0, 0.37, 5.0]).double(),
        torch.ones(1).double(),
        0.4 * torch.ones(1).double(),
    )
    z = torch.tensor([1.0, 1.0, 0.3]).double() if gated else None
    many = w.expand(20000, 4)
    q = relaxed(many, alpha, sigma, torch.tensor(3), 3, 1e-3, z)
    assert ((q - q.round()).abs() < 0.1).double().mean() > 0.99
    expected = reference.categorical(w, alpha, sigma, 3, mode="soft", gates=z)
    assert (q.mean(0) - expected).abs().max() < 0.03
    # Fewer bits than classes; and at a high temperature all classes count alike.
    assert relaxed(many, alpha, sigma, torch.tensor(2), 3, 1e-3).round().unique().tolist() == [-2, -1, 0, 1]
    assert (relaxed(many, alpha, sigma, torch.tensor(3), 3, 1e4, z) + 0.5).abs().max() < 0.01
    of_groups = relaxed(w.reshape(4, 1), alpha.expand(4), sigma.expand(4), torch.tensor(3), 3, 1e-3, torch.ones(2, 3))
    assert of_groups.shape == (4, 1)


def test_relaxed_samples_train_and_are_not_evaluated():
    model = make_cpq(mode="sample", temperature=0.5, dropbits="learned")
    first, second = model(data()[0]), model(data()[0])
    assert not torch.equal(first, second)
    loss_of(model).backward()
    assert all(v.grad.abs().sum() > 0 for n, v in model.named_parameters() if "log_" in n)
    hard = make_cpq(dropbits="learned").eval()
    hard.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(data()[0]), hard(data()[0]))
    with pytest.raises(ValueError, match="temperature: expected None, or mode='sample'"):
        quantops.CPQConfig(temperature=0.5)
    with pytest.raises(ValueError, match="temperature: expected a number in"):
        quantops.CPQConfig(mode="sample", temperature=0.0)
    with pytest.raises(ValueError, match="bits: expected an integer 1..8"):
        quantops.CPQConfig(mode="sample", grad="winner", temperature=1.0, bits=9)


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
@pytest.mark.parametrize("per_row", [False, True])
def test_groups_of_rows_draw_gates_for_themselves(rows, per_row):
    model = make_cpq(dropbits="learned", nonzero=0.5, gate_rows=rows, per_row=per_row)
    names, found = list(quantizers(model)), list(quantizers(model).values())
    w = [t.detach() for t in originals(model).values()]
    torch.manual_seed(5)
    z = gates.drawn(found, w, torch.float32)
    assert [v.shape[0] for v in z] == [-(-len(t) // rows) for t in w]
    torch.manual_seed(5)
    model(data()[0])
    for name, p, t, of_layer in zip(names, found, w, z):
        alpha, sigma = (v.detach() for v in scales(p))
        q = model.get_submodule(name).weight
        for i, (part, got) in enumerate(zip(t.split(rows), q.split(rows))):
            a, s = (v[i * rows : (i + 1) * rows] if per_row else v for v in (alpha, sigma))
            assert torch.equal(got, reference.categorical(part, a, s, 4, gates=of_layer[i].detach()))
    loss_of(model).backward()
    assert all(p.log_a.grad.shape == p.log_a.shape for p in found)
    assert originals(model)["head"].grad.shape == w[-1].shape
    with pytest.raises(ValueError, match="gate_rows: expected an integer 1"):
        quantops.CPQConfig(dropbits="fixed", gate_rows=0)


@pytest.mark.parametrize("fuse", ["model", "layer"])
@pytest.mark.parametrize("dropbits", ["fixed", "learned"])
def test_deterministic_gates_evaluate(fuse, dropbits, tmp_path):
    model = make_cpq(fuse=fuse, dropbits=dropbits, evaluate="gate", nonzero=0.9)
    if dropbits == "learned":
        set_gates(model, LEARNED)
    model.eval()
    before = model(data()[0])
    for p, w, q in zip(
        quantizers(model).values(),
        originals(model).values(),
        (model.get_submodule(n).weight for n in quantizers(model)),
    ):
        alpha, sigma = (v.detach() for v in scales(p))
        z = torch.cat([torch.ones(1), (torch.sigmoid(p.log_a.detach()) * 1.2 - 0.1).clamp(0, 1)])
        assert torch.equal(q, reference.categorical(w.detach(), alpha, sigma, 4, gates=z))
        assert int(p.bits_that_stay()) == 1 + int((z[1:] > 0).int().cumprod(0).sum())
    for name, v in to_int(model).items():
        assert torch.equal(v.dequantize(), model.get_submodule(name.removesuffix(".weight")).weight)
    report = finish_dropbits(model)
    assert torch.equal(model(data()[0]), before) and torch.equal(model.train()(data()[0]), before)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = make_cpq(fuse=fuse, dropbits=dropbits, evaluate="gate")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other(data()[0]), before) and bit_report(other).rows == report.rows
    assert torch.equal(copy.deepcopy(model)(data()[0]), before)
    with pytest.raises(RuntimeError, match="evaluate="):
        make_cpq(dropbits=dropbits).load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="evaluate: expected one of"):
        quantops.CPQConfig(evaluate="mean")
