"""What follows ops beside autograd: torch.func, forward-mode derivatives, torch.jit.trace and torch.fx."""

import pytest
import torch
from torch.autograd import forward_ad

import quantops as Q

W, V = torch.randn(3, 4), torch.randn(3, 4)
QUANTIZERS = {
    "round_clamp": lambda w: Q.round_clamp(w, None, 4),
    "msq": lambda w: Q.msq(w, 1.0, 4).penalty,
    "truncate": lambda w: Q.truncate(w, 1.0, 4),
    "categorical": lambda w: Q.categorical(w, 0.3, 0.1, 4),
}


def _dual(fn, w, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(fn(forward_ad.make_dual(w, v))).tangent


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize(
    "derivative",
    [
        lambda f: torch.func.jvp(f, (W,), (V,)),
        lambda f: torch.func.jacfwd(f)(W),
        lambda f: torch.func.linearize(f, W),
        lambda f: _dual(f, W, V),
        lambda f: _dual(f, W.clone().requires_grad_(), V),
    ],
)
def test_forward_mode_is_refused(name, derivative):
    """It once gave zeros."""
    with pytest.raises(NotImplementedError, match=f"{name}: forward-mode derivatives"):
        derivative(QUANTIZERS[name])


@pytest.mark.parametrize("name", QUANTIZERS)
def test_reverse_mode_of_torch_func_is_refused(name):
    for derivative in (torch.func.grad(lambda w: QUANTIZERS[name](w).sum()), torch.func.jacrev(QUANTIZERS[name])):
        with pytest.raises(NotImplementedError, match=f"{name}: torch.func transforms .*use torch.autograd.grad"):
            derivative(W)


def _model(**settings):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    return Q.quantize_(net, Q.MSQConfig(bits=4, **settings))


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("fuse", ["model", "layer"])
def test_derivatives_of_a_model_with_respect_to_its_input(cache, fuse):
    model, x = _model(cache=cache, fuse=fuse), W.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.allclose(torch.func.grad(lambda v: model(v).sum())(W), expected)
    assert torch.allclose(torch.func.jvp(lambda v: model(v).sum(), (W,), (V,))[1], (expected * V).sum(), atol=1e-6)
    assert torch.allclose(torch.func.vmap(model)(W), model(W))
    with pytest.raises(NotImplementedError, match="torch.func transforms.*cache=True" if cache else "torch.func tran"):
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (W,)).sum())(dict(model.named_parameters()))


@pytest.mark.parametrize("config", [Q.MSQConfig(), Q.TruncQuantConfig(), Q.CPQConfig(dropbits="fixed")])
def test_forward_mode_of_weights_is_refused_by_all_methods(config):
    model = Q.quantize_(torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 4)), config)
    w = model[0].parametrizations.weight.original.detach()
    with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
        torch.func.jvp(
            lambda v: torch.func.functional_call(model, {"0.parametrizations.weight.original": v}, (W,)),
            (w,),
            (torch.ones_like(w),),
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "trace",
    [
        lambda: torch.jit.trace(_model(), (W,)),
        lambda: torch.jit.trace(_model(fuse="layer"), (W,)),
        lambda: torch.jit.trace(QUANTIZERS["msq"], (W,)),
        lambda: torch.fx.symbolic_trace(QUANTIZERS["categorical"]),
    ],
)
def test_tracers_that_cannot_record_the_ops_are_told_so(trace):
    with pytest.raises(NotImplementedError, match="use torch.export or torch.compile"):
        trace()


MODELS = [
    Q.MSQConfig(),
    Q.MSQConfig(fuse="layer", act_bits=4),
    Q.TruncQuantConfig(scale="absmax", companding="tanh"),
    Q.TruncQuantConfig(act_bits="weights"),
    Q.CPQConfig(),
    Q.CPQConfig(act_bits=4, dropbits="learned"),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("config", MODELS, ids=str)
def test_models_are_recorded_right_or_not_at_all(config):
    torch.manual_seed(0)
    layers = torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.ReLU(), torch.nn.Linear(5, 2)
    model = Q.quantize_(torch.nn.Sequential(*layers), config)
    model(W)
    for training in (True, False):
        with pytest.raises(NotImplementedError, match="use torch.export or torch.compile"):
            torch.jit.trace(model.train(training), (W,))
    try:
        traced = torch.fx.symbolic_trace(model)
    except NotImplementedError as error:
        assert "use torch.export or torch.compile" in str(error)
        assert config.act_bits or isinstance(config, Q.TruncQuantConfig)
    else:
        assert torch.equal(traced(W), model(W))
