"""MSQ training: forward and gradients against the reference, stash, cache, penalty, report."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from cases import Calls
from networks import Net, data, grads, loss_of, make_msq, one_step, originals, same, set_precision
from quantops import MSQConfig, absmean, add_penalty_grad_, bit_report, hessian_trace, penalty, reference
from quantops.nn import quantized

pytestmark = pytest.mark.usefixtures("one_thread")
FUSES = pytest.mark.parametrize("fuse", ["model", "layer"])
SCALES = pytest.mark.parametrize("scale, per_row", [("absmax", False), ("absmax", True), (1.5, False), (1.5, True)])


def scale_of(w, scale, per_row):
    if scale == "absmax":
        return reference.absmax(w.detach(), per_row=per_row)
    return reference.absmean(w.detach(), per_row=per_row) * scale


def inside(w, scale, per_row):
    s = scale_of(w, scale, per_row)
    return w.detach().abs() <= (s.reshape(-1, *[1] * (w.dim() - 1)) if per_row else s)


# Forward and gradients


@FUSES
@SCALES
@pytest.mark.parametrize("kind", ["loss", "decoupled"])
@pytest.mark.parametrize("cache", [False, True])
def test_forward_is_the_reference_and_gradients_are_straight_through(fuse, scale, per_row, kind, cache):
    model = make_msq(fuse=fuse, scale=scale, per_row=per_row, penalty=kind, cache=cache)
    got = one_step(model, 0.0)
    plain = Net()
    plain.load_state_dict(
        {
            k.replace("parametrizations.weight.original", "weight"): v
            for k, v in model.state_dict().items()
            if not k.endswith((".bits", ".k", "_extra_state"))
        }
    )
    for name, w in originals(model).items():
        q = reference.round_clamp(w.detach(), scale_of(w, scale, per_row), 5)
        assert torch.equal(model.get_submodule(name).weight, q) and not torch.equal(q, w)
        with torch.no_grad():
            plain.get_submodule(name).weight.copy_(q)
    loss_of(plain).backward()
    clamped = 0
    for name, w in originals(model).items():
        mask = inside(w, scale, per_row)
        plain.get_submodule(name).weight.grad.mul_(mask)
        clamped += int((~mask).sum())
    assert (clamped == 0) == (scale == "absmax")
    assert same({k.replace("parametrizations.weight.original", "weight"): v for k, v in got.items()}, grads(plain))


def test_the_scale_that_is_recommended_for_2_bits():
    """2.8 mean|w|: within 2 % of the least squared error of normal weights, at most 0.4 of that with max|w|."""
    w = torch.randn(200_000, generator=torch.Generator().manual_seed(0))

    def quantized_with(scale):
        return reference.round_clamp(w, scale_of(w, scale, False), 2)

    def error(scale):
        return float((quantized_with(scale) - w).square().sum())

    assert error(2.8) < 1.02 * min(error(f / 10) for f in range(15, 60))
    assert error(2.8) < 0.4 * error("absmax") and (quantized_with("absmax") == 0).float().mean() > 0.5


@FUSES
@pytest.mark.parametrize("cache", [False, True])
@SCALES
def test_penalty_value_and_gradient(fuse, cache, scale, per_row):
    model = make_msq(
        fuse=fuse, cache=cache, scale=scale, per_row=per_row, overrides={"mid.*": {"k": 2}, "head": {"k": 0}}
    )
    loss_of(model)
    total = penalty(model)
    expected = sum(
        reference.msq(owner.original.detach(), scale_of(owner.original, scale, per_row), 5, p.k)[1]
        for _, owner, p in quantized(model)
    )
    assert torch.allclose(total, expected, rtol=1e-5) and total > 0
    total.backward()
    for name, owner, p in quantized(model):
        w = owner.original
        b = reference.lsb(w.detach(), scale_of(w, scale, per_row), 5, p.k)
        assert torch.equal(w.grad, b.sign().float() * inside(w, scale, per_row)), name
    assert originals(model)["head"].grad.abs().max() == 0


@FUSES
def test_penalty_reads_no_weight_after_a_forward(fuse):
    model = make_msq(fuse=fuse)
    with Calls() as calls:
        (loss_of(model) + penalty(model)).backward()
    times = 1 if fuse == "model" else 4
    assert calls.counts == {"absmax": times, "msq": times, "uniform_backward": times}
    with Calls() as calls:  # without the penalty the backward pass calls nothing
        loss_of(model).backward()
    assert calls.counts == {"absmax": times, "msq": times}


@FUSES
@pytest.mark.parametrize("cache", [False, True])
def test_penalty_without_a_usable_forward_is_computed_again(fuse, cache):
    model = make_msq(fuse=fuse, cache=cache)
    expected = penalty(model)  # no forward at all
    loss_of(model, 1.0).backward()
    penalty(model).backward()  # that forward's graph is used up
    with torch.no_grad():
        loss_of(model)
    r = penalty(model)
    assert r.requires_grad and r == expected.item()
    loss_of(model)
    with torch.no_grad():
        for w in originals(model).values():
            w.mul_(torch.linspace(0.5, 1, w.shape[-1]))
    changed = penalty(model)
    assert changed != expected.item() and changed == penalty(copy.deepcopy(model)).item()


@FUSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@SCALES
def test_decoupled_gradients_equal_the_loss_term_bit_for_bit(fuse, dtype, scale, per_row):
    coupled = one_step(make_msq(dtype, fuse=fuse, scale=scale, per_row=per_row), 0.03, dtype=dtype)
    model = make_msq(dtype, fuse=fuse, scale=scale, per_row=per_row, penalty="decoupled")
    with Calls() as calls:
        one_step(model, dtype=dtype)
        before = grads(model)
        add_penalty_grad_(model, 0.03)
    assert calls.counts["add_lsb_grad_"] == 1
    assert ("uniform_backward" in calls.counts) == (scale != "absmax")  # with absmax the backward is the identity
    assert same(coupled, grads(model)) and not same(before, coupled)


@FUSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@SCALES
def test_a_strength_in_units_of_the_gradient(fuse, dtype, scale, per_row):
    config = dict(fuse=fuse, scale=scale, per_row=per_row, penalty="decoupled", penalty_unit="gradient")
    model = make_msq(dtype, **config)
    one_step(model, dtype=dtype)
    w = originals(model)
    before = {name: t.grad.clone() for name, t in w.items()}
    add_penalty_grad_(model, 0.5)
    for name, t in w.items():
        t, g = t.detach(), before[name]
        b = reference.lsb(t, scale_of(t, scale, per_row), 5, 1).sign() * inside(t, scale, per_row)
        got, acc = w[name].grad, torch.float64 if dtype == torch.float64 else torch.float32
        expected = g.to(acc) + 0.5 * absmean(g) * b
        assert torch.equal(got, expected.to(dtype)) and not torch.equal(got, g)
    # Whatever the loss is multiplied by, the penalty is the same part of it.
    larger = make_msq(dtype, **config)
    (1024 * loss_of(larger, dtype=dtype)).backward()
    add_penalty_grad_(larger, 0.5)
    assert all(torch.equal(1024 * w[name].grad, t.grad) for name, t in originals(larger).items())


def test_units_of_the_gradient_need_that_gradient():
    with pytest.raises(ValueError, match="penalty_unit: .*penalty='decoupled'.*got 'gradient' with penalty='loss'"):
        MSQConfig(penalty_unit="gradient")
    model = make_msq(penalty="decoupled", penalty_unit="gradient")
    add_penalty_grad_(model, 0.5)  # no task, no penalty
    assert all(t.grad is None for t in originals(model).values())
    head = originals(model)["head"]
    head.grad = torch.ones_like(head)
    add_penalty_grad_(model, 0.5)
    assert head.grad.ne(1).any() and originals(model)["conv"].grad is None
    plain = make_msq(penalty="decoupled")
    assert penalty(model).item() == penalty(plain).item()


def test_decoupled_penalty_gives_weights_without_grad_one_and_leaves_frozen_ones():
    model = make_msq(penalty="decoupled")
    w = originals(model)
    w["conv"].requires_grad_(False)
    add_penalty_grad_(model, torch.tensor(0.5))
    assert w["conv"].grad is None
    b = reference.lsb(w["head"].detach(), reference.absmax(w["head"]), 5, 1)
    assert torch.equal(w["head"].grad, 0.5 * b.sign().float())
    with pytest.raises(ValueError, match="strength: .*-1"):
        add_penalty_grad_(model, -1)
    for call in (lambda m: add_penalty_grad_(m, 1.0), penalty, bit_report):
        with pytest.raises(ValueError, match="Net has none"):
            call(Net())


@FUSES
def test_frozen_layers_get_no_gradient_and_stay_quantized(fuse):
    model = make_msq(fuse=fuse)
    for name in ("conv", "mid.0"):
        originals(model)[name].requires_grad_(False)
    with Calls() as calls:
        got = one_step(model, 0.1)
    assert got["conv.parametrizations.weight.original"] is None and not model.conv.weight.requires_grad
    assert calls.counts["msq"] == (2 if fuse == "model" else 4)  # frozen layers are a list of their own
    assert torch.equal(
        got["head.parametrizations.weight.original"],
        one_step(make_msq(fuse=fuse), 0.1)["head.parametrizations.weight.original"],
    )


@FUSES
@pytest.mark.parametrize("cache", [False, True])
def test_nothing_is_saved_for_backward_but_parameters_and_scalars(fuse, cache):
    model = make_msq(fuse=fuse, cache=cache)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        if fuse == "model":
            quantized(model)[0][2].group(model, ())
        total = sum(model.get_submodule(name).weight.sum() for name in originals(model)) + penalty(model)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    extra = [t for t in saved if t.untyped_storage().data_ptr() not in parameters]
    assert len(saved) > len(extra) and sum(t.numel() for t in extra) <= 3 * 4  # scale, bits, k per layer
    total.backward()


# Validity of the q of the last forward (fuse="model")


def test_reads_after_the_forward_return_the_same_tensor_until_something_changes():
    model = make_msq()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    one_step(model)
    with Calls() as calls:
        q = model.head.weight
        assert q is model.head.weight
        with torch.no_grad():
            assert q is model.head.weight
    assert not calls.counts
    optimizer.step()
    assert model.head.weight is not q and not torch.equal(model.head.weight, q)
    model(data()[0])
    q = model.head.weight
    set_precision(model, 3)
    assert len(model.head.weight.unique()) <= 8 < len(q.unique())


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}])
def test_optimizer_steps_are_seen(options):
    """Fused optimizers do not bump version counters."""
    model = make_msq(cache=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, **options)
    one_step(model)
    q, first = model.head.weight, penalty(model).item()
    optimizer.step()
    assert not torch.equal(model.head.weight, q)
    model(data()[0])
    assert not torch.equal(model.head.weight, q) and penalty(model) != first
    assert torch.equal(model.head.weight, copy.deepcopy(model).head.weight)


def test_stash_fits_grad_mode_and_inference_mode():
    model = make_msq()
    with torch.no_grad():
        model(data()[0])
        assert not model.head.weight.requires_grad
    assert model.head.weight.requires_grad
    with torch.inference_mode():
        model(data()[0])
    one_step(model, 0.1)
    assert same(one_step(make_msq(), 0.1), grads(model))


def test_a_part_called_alone_or_after_backward_works():
    model, layered = make_msq(), make_msq(fuse="layer")
    for m in (model, layered):
        one_step(m)
        m.features(data()[0]).sum().backward()  # no optimizer step in between: the same q, its graph used before
        m.features(data()[0]).sum().backward()
    assert same(grads(model), grads(layered))


@FUSES
@pytest.mark.parametrize("cache", [False, True])
def test_deepcopy_is_independent(fuse, cache):
    model = make_msq(fuse=fuse, cache=cache)
    one_step(model, 0.1)
    twin = copy.deepcopy(model)
    assert same(one_step(twin, 0.1), one_step(model, 0.1))
    with torch.no_grad():
        for w in originals(twin).values():
            w.zero_()
    assert twin(data()[0]).abs().sum() != model(data()[0]).abs().sum()
    assert twin.head.weight.abs().max() == 0 < model.head.weight.abs().max()
    groups = {id(p.group) for m in (model, twin) for _, _, p in quantized(m)}
    assert len(groups) == (2 if fuse == "model" else 8)


@FUSES
@pytest.mark.parametrize("cache", [False, True])
def test_dtype_moves(fuse, cache):
    for dtype in (torch.float64, torch.bfloat16):
        model = make_msq(fuse=fuse, cache=cache)
        one_step(model)
        q = model.head.weight
        model.to(dtype)
        assert all(p.slot.result is None for _, _, p in quantized(model))  # the old q need not stay in memory
        assert q.dtype == torch.float32 and model.head.weight.dtype == dtype
        assert model.head.parametrizations.weight[0].bits.dtype == torch.int32
        assert same(one_step(model, 0.1, dtype=dtype), one_step(copy.deepcopy(model), 0.1, dtype=dtype))


@FUSES
@pytest.mark.parametrize("cache", [False, True])
def test_autocast_emits_its_dtype(fuse, cache):
    model = make_msq(fuse=fuse, cache=cache)
    x, y = data()
    model(x)
    assert model.head.weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model.head.weight.dtype == torch.bfloat16  # the float32 q of the last forward does not fit
        with Calls() as calls:
            loss = F.cross_entropy(model(x), y) + 0.1 * penalty(model)
        assert model.head.weight.dtype == torch.bfloat16 and penalty(model).dtype == torch.float32
    if not cache:
        assert calls.counts["msq"] == (1 if fuse == "model" else 4)
    loss.backward()
    w = originals(model)["head"]
    assert w.grad.dtype == torch.float32
    assert torch.equal(model.head.weight, reference.round_clamp(w.detach(), reference.absmax(w), 5))


@FUSES
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("kind", ["loss", "decoupled"])
def test_non_reentrant_checkpoint(fuse, cache, kind):
    strength = 0.1 if kind == "loss" else 0.0
    expected = one_step(make_msq(fuse=fuse, penalty=kind), strength)
    for whole in (False, True):
        model = make_msq(fuse=fuse, cache=cache, penalty=kind)
        model.reentrant = None if whole else False
        x, y = data()
        for _ in range(2):
            model.zero_grad()
            out = checkpoint(model, x, use_reentrant=False) if whole else model(x)
            loss = F.cross_entropy(out, y)
            (loss + strength * penalty(model) if strength else loss).backward()
            assert same(grads(model), expected)


def test_reentrant_checkpoint_with_layers():
    expected = one_step(make_msq(fuse="layer"), 0.1)
    model = make_msq(fuse="layer")
    model.reentrant = True
    x, y = data()
    loss = F.cross_entropy(model(x.requires_grad_()), y) + 0.1 * penalty(model)
    loss.backward()
    got = grads(model)
    # The penalty's gradient arrives in another order than in one backward pass.
    assert all(torch.allclose(got[k], expected[k], rtol=1e-5, atol=1e-7) for k in got)


# Cache


@FUSES
@pytest.mark.parametrize("kind", ["loss", "decoupled"])
def test_cache_quantizes_once_per_optimizer_step(fuse, kind):
    strength = 0.01 if kind == "loss" else 0.0
    cached, plain = make_msq(fuse=fuse, cache=True, penalty=kind), make_msq(fuse=fuse, penalty=kind)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (cached, plain)]
    op, times = "msq" if kind == "loss" else "round_clamp", 1 if fuse == "model" else 4
    for _ in range(3):
        with Calls() as calls:
            for seed in range(4):
                loss_of(cached, strength, seed).backward()
            with torch.no_grad():
                cached(data()[0])  # evaluation takes the same q
        assert calls.counts[op] == calls.counts["absmax"] == times and "lsb_stats" not in calls.counts
        for seed in range(4):
            loss_of(plain, strength, seed).backward()
        assert same(grads(cached), grads(plain))
        for o in optimizers:
            o.step()
            o.zero_grad()
    assert same(cached.state_dict(), plain.state_dict())


@FUSES
def test_cache_sees_every_change(fuse):
    model = make_msq(fuse=fuse, cache=True)
    state = copy.deepcopy(model.state_dict())

    def changes():
        set_precision(model, 3)
        yield "bits"
        set_precision(model, 3, 2)
        yield "k"
        with torch.no_grad():
            originals(model)["head"].mul_(0.9)
        yield "weight"
        model.load_state_dict(state)
        yield "load_state_dict"
        model.load_state_dict(
            {k: v.clone() + 1 if k.endswith("bits") else v.clone() for k, v in state.items()}, assign=True
        )
        yield "load_state_dict with assign"
        originals(model)["head"].data = torch.randn(5, 12)
        yield "data"
        model.double().float()
        yield "to"
        for bits in (4, 3):  # new tensors, of the same version
            model.head.parametrizations.weight[0].bits = torch.tensor(bits, dtype=torch.int32)
            yield "a buffer replaced"

    one_step(model)
    for what in changes():
        with Calls() as calls:
            out = model(data()[0])
        assert calls.counts.get("msq"), what
        assert torch.equal(out, copy.deepcopy(model)(data()[0])), what
        with Calls() as calls:
            model(data()[0])
        assert not calls.counts, what


def test_cached_graph_is_differentiable_twice():
    cached, plain = make_msq(torch.float64, cache=True), make_msq(torch.float64)
    loss_of(cached, dtype=torch.float64)
    first, second = (
        hessian_trace(loss_of(m, 0.1, dtype=torch.float64), originals(m).values(), 3) for m in (cached, plain)
    )
    assert torch.equal(first, second) and first.abs().min() > 0


# Report


def test_bit_report():
    model = make_msq(bits=6, first=8, overrides={"mid.2": {"bits": 4, "k": 2}})
    report = bit_report(model)
    assert [(r.name, r.bits, r.k) for r in report.rows] == [
        ("conv", 8, 0),
        ("mid.0", 6, 1),
        ("mid.2", 4, 2),
        ("head", 6, 1),
    ]
    for row, w in zip(report.rows, originals(model).values()):
        _, _, nonzero, sq_error = reference.msq(w.detach(), reference.absmax(w), row.bits, row.k)
        assert (row.shape, row.numel) == (tuple(w.shape), w.numel()) and row.beta == int(nonzero) / w.numel()
        assert row.sq_error == pytest.approx(float(sq_error), rel=1e-5) and row.scale == float(reference.absmax(w))
    used = 36 * 8 + 768 * 6 + 144 * 4 + 60 * 6
    assert report.average_bits == pytest.approx(used / 1008) and report.compression == pytest.approx(32 * 1008 / used)
    lines = str(report).splitlines()
    assert len(lines) == 8 and len({len(line) for line in lines[:-2]}) == 1 and "mid.2" in lines[4]
    assert "compression" in lines[-2] and "of the whole model, with 33 parameters in float" in lines[-1]
    pruned = bit_report(make_msq(bits=0, k=0))
    assert pruned.compression == float("inf") and str(pruned)
