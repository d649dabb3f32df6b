"""UniformActivation, where configs put it, and calibration."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

import quantops as Q
from networks import same, state
from quantops import UniformActivation

pytestmark = pytest.mark.usefixtures("one_thread")


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU6(),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def data(seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(16, 3, 6, 6, generator=g), torch.randint(0, 5, (16,), generator=g)


def loss_of(model, x, y):
    return nn.functional.cross_entropy(model(x), y)


def train(model, steps=10):
    x, y = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        if any(hasattr(m, "base_bits") for m in model.modules()):
            losses.append(Q.joint_step(model, lambda out: nn.functional.cross_entropy(out, y), x).loss.detach())
        else:
            losses.append(loss_of(model, x, y))
            losses[-1].backward()
        optimizer.step()
    return [float(v.detach()) for v in losses]


CONFIGS = {
    "msq": Q.MSQConfig(bits=4, act_bits=4),
    "msq, input, tracked": Q.MSQConfig(bits=4, act_bits=3, act="input", act_scale="tracked"),
    "msq, clip": Q.MSQConfig(bits=4, act_bits=4, act_scale="clip"),
    "msq, fixed": Q.MSQConfig(bits=4, act_bits=4, act_scale=1.0),
    "msq, overrides": Q.MSQConfig(
        bits=4, act_bits=4, act="input", act_outputs=("7",), overrides={"0": {"act_bits": None}, "3": {"act_bits": 8}}
    ),
    "cpq, input": Q.CPQConfig(act_bits=4, act="input"),
    "truncquant": Q.TruncQuantConfig(act_bits=4),
    "truncquant, weights": Q.TruncQuantConfig(act_bits="weights", act_shared=True, act_scale="clip"),
    "truncquant, each": Q.TruncQuantConfig(act_bits="weights"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_networks_train_save_copy_and_become_plain(name):
    config = CONFIGS[name]
    model = Q.quantize_(net(), config)
    losses = train(model)
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    x, _ = data(2)
    out = model(x)
    fresh = Q.quantize_(net(), config).eval()
    fresh.load_state_dict(model.state_dict())
    for other in (fresh, copy.deepcopy(model), Q.plain_model(model)):
        assert torch.equal(other(x), out)
    report = Q.bit_report(model)
    assert len(report.activations) == (3 if config.act == "input" else 2) and "activations" in str(report)
    assert all(a.scale > 0 and a.bits in (3, 4, 8) for a in report.activations)


def test_what_is_replaced():
    model = Q.quantize_(net(), CONFIGS["msq"])
    assert (
        type(model[2]) is type(model[5]) is UniformActivation and model[2].front == "relu" and model[2].signed is False
    )
    model = Q.quantize_(net(), CONFIGS["msq, overrides"])
    assert not hasattr(model[0], "input_quantizer") and int(model[3].input_quantizer.bits) == 8
    train(model, 1)
    assert model[7].output_quantizer.signed and not model[7].input_quantizer.signed
    skipped = Q.quantize_(net(), Q.MSQConfig(act_bits=4, act="input", first="skip"))
    assert not hasattr(skipped[0], "input_quantizer")
    assert Q.unquantize_(model) is model and hasattr(model[3], "input_quantizer")


def test_quantized_again_each_input_has_one_quantizer():
    model, count = Q.quantize_(net(), CONFIGS["msq, overrides"]), []
    Q.quantize_(Q.unquantize_(model), CONFIGS["msq, overrides"])
    for m in (model[3].input_quantizer, model[7].output_quantizer):
        m.register_forward_hook(lambda *args: count.append(0))
    train(model, 1)
    assert len(count) == 2


class Named(nn.Linear):
    def forward(self, x):  # as transformers' Conv1D has it
        return super().forward(x)


class Passing(nn.Linear):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("kind, name", [(nn.Linear, "input"), (Named, "x"), (Passing, "input")])
def test_layers_called_by_keyword(kind, name):
    torch.manual_seed(0)
    model, x = Q.quantize_(nn.Sequential(kind(4, 3)), Q.MSQConfig(act_bits=3, act="input")), torch.randn(5, 4)
    out = model(x)
    for m in (model, pickle.loads(pickle.dumps(model))):
        assert torch.equal(m[0](**{name: x}), out)
    assert torch.equal(torch.compile(lambda x: model[0](**{name: x}), fullgraph=True, backend="eager")(x), out)
    with pytest.raises(TypeError, match=f"{kind.__name__}: expected its input first or as {name}=, got y"):
        model[0](y=x)


def test_attention_has_no_quantizer_that_is_never_called():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = Q.quantize_(layer, Q.MSQConfig(act_bits=4, act="input"))
    model(torch.randn(2, 3, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert {row.name for row in Q.bit_report(model).activations} == {
        "linear1.input_quantizer",
        "linear2.input_quantizer",
    }


def smooth_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.Conv2d(4, 4, 3),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(16, 12),
        nn.GELU(approximate="tanh"),
        nn.Linear(12, 5),
    )


@pytest.mark.parametrize(
    "config",
    [
        Q.MSQConfig(bits=4, act_bits=4),
        Q.MSQConfig(bits=4, act_bits=4, act_scale="tracked", act_keep="bits"),
        Q.TruncQuantConfig(bits=(8, 4), act_bits="weights", act_scale="clip"),
        Q.CPQConfig(act_bits=4),
    ],
    ids=["msq", "msq, tracked", "truncquant", "cpq"],
)
def test_gelu_and_silu_are_replaced(config):
    """They are fused, keep their input alone, and their codes are signed by the first batch."""
    model, x = Q.quantize_(smooth_net(), config), data()[0]
    acts = [model[i] for i in (2, 4, 7)]
    assert [type(m) for m in acts] == [UniformActivation] * 3
    assert [m.front for m in acts] == ["gelu", "silu", "gelu_tanh"] and {m.keep for m in acts} == {"input"}
    assert [m.signed for m in acts] == [None] * 3 and "front='gelu'" in repr(acts[0])
    losses = train(model, 12)
    assert losses[-1] < 0.97 * losses[0] and all(m.signed for m in acts)
    out = model.eval()(x)
    fresh = Q.quantize_(smooth_net(), config).eval()
    fresh.load_state_dict(model.state_dict())
    for other in (fresh, copy.deepcopy(model), Q.plain_model(model)):
        assert torch.equal(other(x), out)
    silent = Q.quantize_(net(), config)
    with pytest.raises(RuntimeError, match="front"):
        silent[2].load_state_dict(acts[0].state_dict())
    unsigned = Q.quantize_(smooth_net(), dataclasses.replace(config, act_signed=False))
    assert not any(unsigned[i].signed for i in (2, 4, 7))


@pytest.mark.parametrize("front, like", [("gelu", nn.GELU()), ("gelu_tanh", nn.GELU("tanh")), ("silu", nn.SiLU())])
def test_values_are_those_behind_the_front(front, like):
    x = 2 * torch.randn(4000, generator=torch.Generator().manual_seed(0))
    for settings in ({"scale": "tracked"}, {"scale": "clip"}, {}, {"offset": True}):
        fused, plain = UniformActivation(6, front=front, **settings), UniformActivation(6, **settings)
        for _ in range(2):
            q, want = fused(x), plain(like(x))
        for a, b in zip(fused.values(), plain.values()):
            torch.testing.assert_close(a, b)
        assert fused.signed == plain.signed == (not settings.get("offset"))
        assert torch.equal(fused.negative, plain.negative)
        torch.testing.assert_close(q, want, rtol=0, atol=1.01 * float(plain.values()[0].detach()) / 32)
        assert int((q - want).abs().gt(1e-5).sum()) <= 20
        found = Q.calibrate(nn.Sequential(fused), [x, -x])["0"]
        torch.testing.assert_close(found, Q.calibrate(nn.Sequential(plain), [like(x), like(-x)])["0"])
        assert Q.activation_scales(nn.Sequential(fused))["0"]["front"] == front


def test_a_transformer_layer_evaluates_its_quantized_gelu():
    """torch's own fused kernel would leave it out."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.GELU(), batch_first=True)
    model = Q.quantize_(nn.Sequential(layer, nn.Linear(8, 2)), Q.MSQConfig(bits=8, act_bits=2))
    x = torch.randn(3, 5, 8)
    model(x)
    assert model[0].activation_relu_or_gelu == 0
    seen = []
    model[0].activation.register_forward_hook(lambda m, args, out: seen.append(out.unique().numel()))
    with torch.no_grad():
        model.eval()(x)
    assert len(seen) == 1 and seen[0] <= 4


def test_inputs_are_signed_by_what_comes_in():
    model = Q.quantize_(net(), Q.MSQConfig(act_bits=4, act="input"))
    train(model, 1)
    assert [a.signed for a in Q.bit_report(model).activations] == [True, False, False]
    forced = Q.quantize_(net(), Q.MSQConfig(act_bits=4, act="input", act_signed=False))
    train(forced, 1)
    first = Q.bit_report(forced).activations[0]
    x, _ = data()
    assert not first.signed and first.negative == pytest.approx(float((x < 0).float().mean()))
    assert "of what comes in is negative" in str(Q.bit_report(forced))


def test_codes_stand_for_what_comes_out():
    model = Q.quantize_(net(), Q.MSQConfig(act_bits=4, act="input"))
    train(model, 2)
    scales = Q.activation_scales(model)
    x, _ = data(3)
    s = scales["0.input_quantizer"]
    codes = Q.encode(x, s["scale"], s["bits"], rule=s["rule"], signed=s["signed"])
    assert torch.equal(Q.decode(codes, s["scale"], s["bits"], signed=s["signed"]), model[0].input_quantizer(x))


@pytest.mark.parametrize("scale", ["step", "clip", "tracked"])
def test_where_values_start(scale):
    x = torch.randn(5000)
    act = UniformActivation(2, scale=scale, front="relu")
    act(x)
    end = float(act.values()[0].detach())
    if scale == "tracked":
        assert end == float(x.max())
    else:  # where the squared error is least

        def error(s):
            return float((Q.quantize_activation(x, torch.tensor(s), 2, front="relu") - x.relu()).square().sum())

        least = min(error(float(x.max()) * i / 400) for i in range(20, 401))
        assert end < float(x.max()) and error(end) < 1.03 * least
    act(3 * x)
    assert float(act.values()[0]) == pytest.approx(1.2 * end if scale == "tracked" else end, rel=1e-5)
    act.eval()
    act(9 * x)  # static
    assert float(act.values()[0]) == pytest.approx(1.2 * end if scale == "tracked" else end, rel=1e-5)
    dead = UniformActivation(2, scale=scale, front="relu")
    dead(torch.full((3,), -1.0))
    assert dead.values()[0] == 1


def test_where_values_start_in_each_channel_and_for_each_width():
    size = torch.tensor([1.0, 10.0, 1e-3]).view(1, 3, 1, 1)
    x = torch.randn(4, 3, 31, 17) * size
    act = UniformActivation(2, signed=True, channels=3)
    act(x)
    ends = act.values()[0].detach() / size.flatten()
    assert (ends > 1).all() and (ends < 2.5).all()  # of normal values, of about 1.5 to 2 of their deviation
    widths = UniformActivation(widths=(8, 2), shared=False, signed=True)
    Q.calibrate(widths, [x])
    ends = [float(row) for row in (widths.step.detach() * torch.tensor([[2.0**7], [2.0]])).flatten()]
    assert ends[1] < 0.7 * ends[0]
    one = UniformActivation(widths=(8, 2), scale="clip", signed=True)
    Q.calibrate(one, [x])
    assert float(one.clip.detach()) == pytest.approx(ends[0])  # that of the widest


def test_a_percentile_leaves_outliers_out():
    x = torch.cat([torch.rand(9990), torch.full((10,), 100.0)])
    act = UniformActivation(4, scale="tracked", percentile=99.0)
    act(x)
    assert 0.9 < float(act.values()[0]) < 1.01


def test_lsq_plus_and_channels():
    x = torch.randn(8, 3, 5, 5) * torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1)
    act = UniformActivation(8, offset=True, channels=3)
    q = act(x)
    q.square().sum().backward()
    low, high = x.amin((0, 2, 3)), x.amax((0, 2, 3))
    torch.testing.assert_close(act.offset.detach()[0], low)
    torch.testing.assert_close(act.values()[0].detach(), high - low)  # least error, with 256 levels
    assert float((q - x).abs().max()) < float((high - low).max()) / 200 and act.step.grad.shape == (1, 3)
    assert act.offset.grad.abs().sum() >= 0 and not act.signed


def test_learned_values_stay_positive():
    act = UniformActivation(4, scale="clip", front="relu")
    x = torch.rand(100)
    act(x)
    with torch.no_grad():
        act.clip.fill_(-5.0)
    assert float(act.values()[0]) == pytest.approx(float(act.start) / 1024)
    act(x).sum().backward()
    assert float(act.clip.grad) > 0


def test_calibration():
    model, x = Q.quantize_(net(), Q.MSQConfig(act_bits=4)), data()[0]
    before, modes = state(model), [m.training for m in model.modules()]
    with pytest.raises(RuntimeError, match="evaluated before it has a scale"):
        model.eval()(x)
    model.train()
    scales = Q.calibrate(model, [x, (x, None), data(2)[0]], steps=2)
    assert list(scales) == ["2", "5"] and [m.training for m in model.modules()] == modes
    after = state(model)
    assert all(torch.equal(before[k], after[k]) for k in before if "running" in k or "weight" in k)
    model.eval()(x)
    alone = Q.quantize_(net(), Q.MSQConfig(act_bits=4))
    Q.calibrate(alone, [x])
    assert same(state(alone), after)  # the same batch twice
    again = Q.calibrate(model, [3 * x])
    assert float(again["2"]) > float(scales["2"])
    wide = Q.quantize_(net(), CONFIGS["truncquant, each"])
    Q.calibrate(wide, [x])
    assert all(wide[2].started) and wide[2].place == 0
    for n in (8, 1):
        Q.set_bits(wide, n)
        assert wide.eval()(x).isfinite().all() and int(wide[2].bits) == n


def test_truncquant_selects_the_width_of_activations():
    model = Q.quantize_(net(), CONFIGS["truncquant, weights"])
    train(model, 1)
    x = torch.rand(200)
    for n in (8, 4, 2, 1):
        Q.set_bits(model, n)
        assert int(model[2].bits) == n and model[2](x * 100).unique().numel() <= 2**n
    Q.set_bits(model)
    assert int(model[2].bits) == 8


@pytest.mark.parametrize("make", [net, smooth_net])
def test_compile(fresh_compiler, make):
    from torch._dynamo.testing import CompileCounterWithBackend

    backend = CompileCounterWithBackend("aot_eager")
    model, eager = (Q.quantize_(make(), Q.MSQConfig(act_bits=4)) for _ in range(2))
    x, y = data()
    loss_of(model, x, y), loss_of(eager, x, y)
    step = torch.compile(loss_of, fullgraph=True, backend=backend)
    for seed in (2, 3):
        a, b = step(model, *data(seed)), loss_of(eager, *data(seed))
        a.backward(), b.backward()
        torch.testing.assert_close(a, b)
    for p, q in zip(model.parameters(), eager.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    assert backend.frame_count == 1


def test_only_bits_are_kept_beyond_what_the_next_layer_keeps():
    conv, last = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 2, 3)

    def kept(nonlinear):
        found = {}

        def pack(t):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = last(nonlinear(conv(torch.ones(4, 2, 20, 20))))
        del out
        return sum(found.values())

    elements, float_one = 4 * 8 * 18 * 18, kept(nn.ReLU())
    for scale, bits in (("clip", 1), ("tracked", 1), (1.0, 1), ("step", 8)):
        act = UniformActivation(4, scale=scale, front="relu")
        act(torch.rand(10))
        assert elements * bits // 8 <= kept(act) - float_one <= elements * bits // 8 + 64


@pytest.mark.parametrize(
    "config",
    [
        Q.MSQConfig(act_bits=4, act="input", act_keep="input"),
        Q.TruncQuantConfig(act_bits="weights", act="input", act_keep="input", batch_norm=False),
        Q.CPQConfig(act_bits=4, act="input", act_keep="input"),
    ],
)
def test_configs_say_what_is_kept(config):
    model = Q.quantize_(net(), config)
    acts = [m for m in model.modules() if isinstance(m, UniformActivation)]
    assert acts and {m.keep for m in acts} == {"input"}
    model(data()[0]).sum().backward()
    assert all(p.grad is not None for m in acts for p in m.parameters())


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: UniformActivation(17), r"bits: expected an integer 0\.\.16, got 17"),
        (lambda: UniformActivation(rule="ceil"), "rule: "),
        (lambda: UniformActivation(scale="lsq"), "scale: expected one of"),
        (lambda: UniformActivation(scale=0.0), "scale: .*got 0.0"),
        (lambda: UniformActivation(scale=True), "scale: "),
        (lambda: UniformActivation(front="relu", signed=True), "front, offset: "),
        (lambda: UniformActivation(front="relu", offset=True), "front, offset: "),
        (lambda: UniformActivation(front="tanh"), "front: expected one of None, 'relu', 'gelu'"),
        (lambda: UniformActivation(front="gelu", keep="residual"), "keep: expected 'input' with front='gelu'"),
        (lambda: UniformActivation(percentile=0), "percentile: "),
        (lambda: UniformActivation(momentum=2), "momentum: "),
        (lambda: UniformActivation(keep="bits"), "keep: expected 'input' or 'residual'"),
        (lambda: UniformActivation(channels=0), "channels: "),
        (lambda: UniformActivation(widths=(8, 0), shared=False), "widths: "),
        (lambda: Q.MSQConfig(act_bits=0), "act_bits: "),
        (lambda: Q.MSQConfig(act_bits=4, act="gelu"), "act: "),
        (lambda: Q.MSQConfig(act_bits=4, act_scale="max"), "act_scale: "),
        (lambda: Q.CPQConfig(act_bits=9), "act_bits: .*1..8"),
        (lambda: Q.MSQConfig(act_bits=4, act_signed=1), "act_signed: "),
        (
            lambda: Q.MSQConfig(act_bits=4, act_keep="bits"),
            "act_keep, with act_scale='step': expected one of .*got 'bits'",
        ),
        (lambda: Q.MSQConfig(act_bits=4, act_keep="all"), "act_keep"),
        (lambda: Q.CPQConfig(act_bits=4, act_keep="input"), "act_keep: expected None with act='relu'"),
        (lambda: Q.MSQConfig(act_outputs=("a",)), "act_outputs: expected act_bits"),
        (lambda: Q.MSQConfig(act_bits=4, act_outputs="qkv"), "act_outputs: expected a tuple"),
        (lambda: Q.TruncQuantConfig(act_bits="all"), "act_bits: "),
        (lambda: Q.TruncQuantConfig(act_bits=4, act_shared=True), "act_shared: expected False"),
        (lambda: UniformActivation(widths=(4, 2)), "shared: expected False"),
        (lambda: Q.MSQConfig(act_bits="weights"), "act_bits: "),
        (lambda: Q.MSQConfig(act_bits=4, overrides={"0": {"act_bits": 3}}), "'0'.*act_bits: expected act='input'"),
        (lambda: Q.MSQConfig(act_bits=4, act="input", overrides={"0": {"act_bits": 99}}), "'0'.*act_bits: .*got 99"),
    ],
)
def test_bad_settings(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    "config, text",
    [
        (Q.MSQConfig(act_bits=4), "act_bits: expected modules of nn.ReLU.*Sequential has none"),
        (Q.MSQConfig(act_bits=4, act="input", act_outputs=("x*",)), r"act_outputs: 'x\*' matches none"),
    ],
)
def test_models_that_do_not_fit_are_left_alone(config, text):
    plain = nn.Sequential(nn.Linear(2, 2))
    before = list(plain.state_dict())
    with pytest.raises(ValueError, match=text):
        Q.quantize_(plain, config)
    assert list(plain.state_dict()) == before and not plain[0]._forward_pre_hooks


def test_errors_of_calls():
    with pytest.raises(ValueError, match="model: expected modules of UniformActivation"):
        Q.calibrate(net(), [data()[0]])
    with pytest.raises(ValueError, match="batches: expected at least one batch"):
        Q.calibrate(Q.quantize_(net(), Q.MSQConfig(act_bits=4)), [])
    lstm = Q.quantize_(nn.Sequential(nn.LSTM(3, 4)), Q.MSQConfig(act_bits=4, act="input", act_outputs=("0",)))
    with pytest.raises(TypeError, match="act_outputs: expected modules that give a tensor, .*LSTM gave tuple"):
        lstm(torch.rand(2, 3))
    act = UniformActivation(channels=3)
    with pytest.raises(ValueError, match=r"x: expected 3 channels in dim 1, got shape \(4, 2\)"):
        act(torch.rand(4, 2))
    with pytest.raises(TypeError, match="x: expected one of float32"):
        act(torch.ones(3, dtype=torch.int64))
    for bad in (float("nan"), float("inf")):
        module, x = UniformActivation(4), torch.ones(4)
        x[2] = bad
        with pytest.raises(ValueError, match="x: expected finite values to take a scale from, got NaN or infinity"):
            module(x)
        assert not any(module.started) and module(torch.ones(4)).isfinite().all()  # the module is as it was
        model = nn.Sequential(nn.Linear(4, 3), module)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ValueError, match="batches: expected finite values .* NaN or infinity at 1"):
            Q.calibrate(model, [torch.ones(2, 4), x.expand(2, 4)])
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    for batches, options, error, text in (
        (3, {}, TypeError, "batches: expected an iterable of inputs, such as .*, got int"),
        ({"x": torch.ones(2, 4)}, {}, TypeError, "batches: expected an iterable of inputs, such as .*, got dict"),
        ([torch.ones(2, 4), ()], {}, TypeError, r"batches: expected inputs, got \(\) as batch 1"),
        ([torch.ones(2, 4)], {"steps": 0}, ValueError, "steps: expected an integer 1"),
    ):
        with pytest.raises(error, match=text):
            Q.calibrate(model, batches, **options)


@pytest.mark.parametrize("scale", [2.0, "clip", "step", "tracked"])
def test_offsets_start_with_the_first_batch(scale):
    m = UniformActivation(4, scale=scale, offset=True)
    x = torch.rand(1000) - 3
    q = m(x)
    assert m.offset.item() == x.min() and len(q.unique()) > 7
    bits, signed, end, negative = m.report()
    assert not signed and negative == 0 and -2.1 < end < -0.9
    other = UniformActivation(4, scale=scale, offset=True)
    other.load_state_dict(m.state_dict())
    assert torch.equal(other.eval()(x), m.eval()(x))


def test_calibrate_decides_the_sign_again():
    m = nn.Sequential(UniformActivation(4, scale="tracked"))
    for sign, x in ((False, torch.rand(100)), (True, torch.randn(1000) - 1), (False, torch.rand(100))):
        Q.calibrate(m, [x])
        assert m[0].signed is sign
    fixed = nn.Sequential(UniformActivation(4, scale="tracked", signed=False))
    Q.calibrate(fixed, [torch.randn(1000)])
    assert fixed[0].signed is False


@pytest.mark.parametrize("scale", ["clip", "step", "tracked"])
def test_batches_without_elements_leave_values_alone(scale):
    m, x = UniformActivation(4, scale=scale), torch.randn(50, 3)
    assert m(x[:0]).shape == (0, 3) and not m.started[0]
    m(x)
    before = m.values()[0].clone()
    assert m(x[:0]).shape == (0, 3) and torch.equal(m.values()[0], before)
    Q.calibrate(nn.Sequential(m), [x[:0], x])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act", ["relu", "input"])
@pytest.mark.parametrize("scale", ["clip", "step", "tracked"])
def test_models_that_are_cast_later(scale, act, dtype, tmp_path):
    """Numbers of quantizers stay in the dtype of arithmetic, so that nothing is rounded."""
    m, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(20, 4)
    Q.quantize_(m, Q.MSQConfig(act_bits=4, act=act, act_scale=scale)).to(dtype)(x.to(dtype))
    Q.calibrate(m, [x.to(dtype)])
    values = {name: a["scale"] for name, a in Q.activation_scales(m).items()}
    Q.save_int(m, tmp_path / "file.safetensors")
    m.float().to(dtype)
    assert all(torch.equal(a["scale"], values[name]) for name, a in Q.activation_scales(m).items())
    assert all(v.dtype == torch.float32 for v in values.values())
    assert m.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("act", ["relu", "input"])
@pytest.mark.parametrize("config", [Q.MSQConfig, Q.CPQConfig])
def test_an_encoder_evaluates_padded_batches(config, act):
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.ReLU(), batch_first=True)
    m, x = nn.TransformerEncoder(layer, 2), torch.randn(2, 5, 8)
    padded = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    Q.quantize_(m, config(act_bits=4, act=act))(x, src_key_padding_mask=padded)
    want = m.eval()(x, src_key_padding_mask=padded)
    with torch.no_grad():
        got = m(x, src_key_padding_mask=padded)
    torch.testing.assert_close(got[~padded], want[~padded])


class Prompt(nn.Module):
    """Weights alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self):
        return self.weight


def test_layers_without_a_float_input_have_no_quantizer_in_front():
    m = nn.ModuleDict({"e": nn.Embedding(10, 4), "p": Prompt(), "l": nn.Linear(4, 3)})
    Q.quantize_(m, Q.MSQConfig(act_bits=4, act="input"), ["*weight"])
    assert [n for n, k in m.named_modules() if isinstance(k, UniformActivation)] == ["l.input_quantizer"]
    m["l"](torch.cat([m["e"](torch.tensor([1, 2])), m["p"]()])).sum().backward()


def test_an_encoder_that_was_quantized_anew_evaluates_padded_batches_from_its_file(tmp_path):
    make = lambda: nn.TransformerEncoder(  # noqa: E731
        nn.TransformerEncoderLayer(8, 2, 16, activation=nn.ReLU(), batch_first=True), 1
    )
    m, x, padded = make(), torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    Q.quantize_(m, Q.MSQConfig(act_bits=4))(x)
    Q.quantize_(Q.unquantize_(m), Q.MSQConfig()).eval()
    Q.save_model(m, tmp_path / "m")
    loaded = Q.load_model(tmp_path / "m", make().eval())
    with torch.no_grad():  # plain attention is torch's fused one here, which sums in another order
        got, want = (each(x, src_key_padding_mask=padded) for each in (loaded, m))
    torch.testing.assert_close(got[~padded], want[~padded])
