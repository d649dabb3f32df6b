"""CategoricalActivation: values, gradients, what is kept, layouts, state, compile, errors."""

import math

import pytest
import torch
from torch import nn

from networks import Net, close, data, grads, make_cpq, objective, same, state
from quantops import CategoricalActivation, CPQConfig, quantize_, reference
from quantops.positive import positive

pytestmark = pytest.mark.usefixtures("one_thread")


ACTS = pytest.mark.parametrize("bits, grad", [(1, "soft"), (2, "soft"), (4, "winner"), (4, "soft"), (8, "soft")])


def activation(bits, grad="soft", dtype=torch.float32, sigma=0.5):
    act = CategoricalActivation(bits, grad=grad, sigma=sigma, dtype=dtype)
    act(torch.randn(50, generator=torch.Generator().manual_seed(9)).to(dtype))
    return act


@ACTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_activations_are_the_unsigned_quantizer(bits, grad, dtype):
    act = activation(bits, grad, dtype)
    alpha = positive(act.alpha_start, act.log_alpha)
    for shape in ((), (0,), (7,), (3, 5, 8, 8)):
        x = 3 * torch.randn(shape).to(dtype)
        q = act(x)
        assert torch.equal(q, reference.categorical(x, alpha, 1.0, bits, signed=False)) and q.dtype == dtype
        with torch.no_grad():
            assert torch.equal(act(x), q)
    assert (q.unique().numel() == 2**bits or bits == 8) and q.min() == 0


@ACTS
def test_activation_gradients_are_those_of_the_quarter_of_the_cell(bits, grad):
    torch.manual_seed(0)
    act = activation(bits, grad, torch.float64)
    alpha = (act.alpha_start * act.log_alpha.exp()).item()
    top = 2**bits - 1
    x = (torch.rand(4000, 1, dtype=torch.float64) * (top + 4) - 2) * alpha
    x.requires_grad_()
    g = torch.randn_like(x)
    act(x).backward(g)
    v = x.detach() / alpha
    j = v.round().clamp(0, top)
    near = alpha * (j + ((4 * (v - j)).floor().clamp(-2, 1) + 0.5) / 4)
    scales = torch.tensor([[alpha], [alpha / 2]], dtype=torch.float64)
    far = torch.where(v < -0.25, -1e9, torch.where(v >= top + 0.25, 1e9, near))
    expected = reference.categorical_backward(g, far, *scales, bits, signed=False, grad_of=grad)
    torch.testing.assert_close(x.grad, expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(act.log_alpha.grad, expected[1] * alpha, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(act.log_sigma.grad, expected[2] * alpha / 2, rtol=1e-9, atol=1e-9)
    assert (x.grad[(v < -0.25) | (v > top + 0.25)].abs() < 1e-9).all() and x.grad.abs().max() > 0
    inside = (v > 1) & (v < top - 1)
    if grad == "soft" and bits > 2:  # close to the exact ones, and on the average equal to them
        exact = reference.categorical_backward(
            torch.ones_like(x), x.detach(), *scales, bits, signed=False, grad_of=grad
        )[0]
        assert ((x.grad / g - exact)[inside].abs() < 0.1).all()
        assert abs((x.grad / g)[inside].mean() - exact[inside].mean()) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_keep_two_bits_per_element_beyond_what_the_next_layer_keeps(dtype):
    conv, act, last = nn.Conv2d(2, 8, 3).to(dtype), activation(4), nn.Conv2d(8, 2, 3).to(dtype)

    def kept(nonlinear, scale_parameters=()):
        found = {}

        def pack(t):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = last(nonlinear(conv(torch.ones(4, 2, 20, 20, dtype=dtype))))
        del out
        return sum(found.values())

    elements = 4 * 8 * 18 * 18
    extra = kept(act) - kept(nn.ReLU())
    assert 0 < extra <= elements // 4 + 64, extra


@ACTS
def test_activations_of_nan_infinities_and_layouts(bits, grad):
    act = activation(bits, grad)
    x = torch.tensor([float("nan"), math.inf, -math.inf, 1e30, -1e30, 0.0], requires_grad=True)
    q = act(x)
    top = (positive(act.alpha_start, act.log_alpha) * (2**bits - 1)).item()
    assert q[0].isnan() and q[1:].tolist() == [top, 0, top, 0, 0]
    q[1:].sum().backward()
    assert x.grad[1:].isfinite().all() and x.grad[[1, 2, 3, 4]].abs().max() < 1e-6
    a = torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    b = a.detach().contiguous().requires_grad_()
    g = torch.randn(2, 3, 5, 5)
    act(a).backward(g), act(b).backward(g)
    assert torch.equal(a.grad, b.grad) and torch.equal(act(a), act(b))


def test_activations_start_with_the_first_batch_and_keep_it(tmp_path):
    act, x = CategoricalActivation(4), torch.randn(1000)
    act(x)
    assert act.alpha_start.item() == pytest.approx(2 * x.relu().mean().item() / 15**0.5, rel=1e-6)
    act(10 * x)
    other = CategoricalActivation(4)
    assert act.alpha_start.item() < 0.5 and other.alpha_start == 0
    other.load_state_dict(act.state_dict())
    assert torch.equal(other(10 * x), act(10 * x))
    fresh = CategoricalActivation(4)
    fresh.load_state_dict(CategoricalActivation(4).state_dict())
    fresh(x)
    assert torch.equal(fresh.alpha_start, act.alpha_start)
    for bad in (-1.0, math.nan, math.inf):
        dead = CategoricalActivation(2)
        dead(torch.full((3,), bad))
        assert dead.alpha_start == 1


def test_relus_become_activations():
    model = Net()
    model.again = model.relu
    quantize_(model, CPQConfig(act_bits=3, grad="winner"))
    assert isinstance(model.mid[1], CategoricalActivation) and model.again is model.relu is not model.mid[1]
    assert model.relu.grad == "winner" and int(model.relu.bits) == 3
    out = model.mid[1](torch.randn(100))
    assert out.unique().numel() <= 8
    before = list(nn.Sequential(nn.Linear(2, 2)).state_dict())
    plain = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="act_bits: expected modules of nn.ReLU, nn.ReLU6, .* Sequential has none"):
        quantize_(plain, CPQConfig(act_bits=4))
    assert list(plain.state_dict()) == before


def test_activations_compile(fresh_compiler):
    from torch._dynamo.testing import CompileCounterWithBackend

    backend = CompileCounterWithBackend("aot_eager")
    model, eager = make_cpq(act_bits=3), make_cpq(act_bits=3)
    step = torch.compile(objective, fullgraph=True, backend=backend)
    for seed in range(4):
        step(model, *data(seed=seed)).backward(), objective(eager, *data(seed=seed)).backward()
    assert close(grads(model), grads(eager), 1e-5) and same(state(model), state(eager))
    assert backend.frame_count == 2  # the first batch, from which alpha starts, is a graph of its own


@pytest.mark.parametrize(
    "options, text",
    [
        ({"bits": 0}, "bits: expected an integer 1..8, got 0"),
        ({"bits": 9}, "bits: .*got 9"),
        ({"grad": "ste"}, "grad: "),
        ({"sigma": 0}, "sigma: .*got 0"),
        ({"sigma": True}, "sigma: "),
    ],
)
def test_activation_errors(options, text):
    with pytest.raises(ValueError, match=text):
        CategoricalActivation(**options)
    with pytest.raises(TypeError, match="x: expected one of float32"):
        CategoricalActivation()(torch.ones(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        CategoricalActivation()([1.0])


def test_a_first_batch_without_elements_starts_nothing():
    m = CategoricalActivation(4)
    assert m(torch.empty(0, 3)).shape == (0, 3) and not m.started
    m(torch.rand(5, 3))
    assert m.started and m.alpha_start != 1
