"""MSQ training: forward and gradients against the reference, stash, cache, compile, penalty, controller, resume."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from cases import Calls
from torch import nn
from torch.utils.checkpoint import checkpoint

from quantops import reference
from quantops.convert import quantize_
from quantops.hessian import hessian_trace
from quantops.methods.msq import MSQConfig, MSQController, add_penalty_grad_, penalty
from quantops.nn import quantized
from quantops.report import bit_report

pytestmark = pytest.mark.usefixtures("one_thread")
FUSES = pytest.mark.parametrize("fuse", ["model", "layer"])
SCALES = pytest.mark.parametrize("scale, per_row", [("absmax", False), ("absmax", True), (1.5, False), (1.5, True)])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.mid = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 12))
        self.head = nn.Linear(12, 5)

    def features(self, x):
        return self.mid(self.conv(x).relu().flatten(1)).relu()

    def forward(self, x):
        return self.head(self.features(x))


def make(dtype=torch.float32, **config):
    torch.manual_seed(0)
    model = Net().to(dtype)
    return quantize_(model, MSQConfig(**{"bits": 5, **config}))


def data(dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 6, 6, generator=g).to(dtype), torch.randint(0, 5, (8,), generator=g)


def originals(model):
    return {name: owner.original for name, owner, _ in quantized(model)}


def grads(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


def objective(model, x, y, strength=0.0):
    loss = F.cross_entropy(model(x), y)
    return loss + strength * penalty(model) if strength else loss


def loss_of(model, strength=0.0, seed=1, dtype=torch.float32):
    return objective(model, *data(dtype, seed), strength)


def one_step(model, strength=0.0, **kwargs):
    model.zero_grad()
    loss_of(model, strength, **kwargs).backward()
    return grads(model)


def scale_of(w, scale, per_row):
    if scale == "absmax":
        return reference.absmax(w.detach(), per_row=per_row)
    return reference.absmean(w.detach(), per_row=per_row) * scale


def inside(w, scale, per_row):
    s = scale_of(w, scale, per_row)
    return w.detach().abs() <= (s.reshape(-1, *[1] * (w.dim() - 1)) if per_row else s)


def set_bits(model, bits, k=1):
    for _, _, p in quantized(model):
        p.set_precision(bits, k)


# Forward and gradients


@FUSES
@SCALES
@pytest.mark.parametrize("kind", ["loss", "decoupled"])
@pytest.mark.parametrize("cache", [False, True])
def test_forward_is_the_reference_and_gradients_are_straight_through(fuse, scale, per_row, kind, cache):
    model = make(fuse=fuse, scale=scale, per_row=per_row, penalty=kind, cache=cache)
    got = one_step(model, 0.0)
    plain = Net()
    plain.load_state_dict({k.replace("parametrizations.weight.original", "weight"): v
                           for k, v in model.state_dict().items() if not k.endswith((".bits", ".k"))})
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
    model = make(fuse=fuse, cache=cache, scale=scale, per_row=per_row, overrides={"mid.*": {"k": 2}, "head": {"k": 0}})
    loss_of(model)
    total = penalty(model)
    expected = sum(reference.msq(owner.original.detach(), scale_of(owner.original, scale, per_row), 5, p.k)[1]
                   for _, owner, p in quantized(model))
    assert torch.allclose(total, expected, rtol=1e-5) and total > 0
    total.backward()
    for name, owner, p in quantized(model):
        w = owner.original
        b = reference.lsb(w.detach(), scale_of(w, scale, per_row), 5, p.k)
        assert torch.equal(w.grad, b.sign().float() * inside(w, scale, per_row)), name
    assert originals(model)["head"].grad.abs().max() == 0


@FUSES
def test_penalty_reads_no_weight_after_a_forward(fuse):
    model = make(fuse=fuse)
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
    model = make(fuse=fuse, cache=cache)
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
    assert changed != expected.item() and changed == penalty(make_like(model)).item()


def make_like(model):
    """The same weights and bits in a model that has no history."""
    return copy.deepcopy(model)


@FUSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@SCALES
def test_decoupled_gradients_equal_the_loss_term_bit_for_bit(fuse, dtype, scale, per_row):
    coupled = one_step(make(dtype, fuse=fuse, scale=scale, per_row=per_row), 0.03, dtype=dtype)
    model = make(dtype, fuse=fuse, scale=scale, per_row=per_row, penalty="decoupled")
    with Calls() as calls:
        one_step(model, dtype=dtype)
        before = grads(model)
        add_penalty_grad_(model, 0.03)
    assert calls.counts["add_lsb_grad_"] == 1
    assert ("uniform_backward" in calls.counts) == (scale != "absmax")  # with absmax the backward is the identity
    assert same(coupled, grads(model)) and not same(before, coupled)


def test_decoupled_penalty_gives_weights_without_grad_one_and_leaves_frozen_ones():
    model = make(penalty="decoupled")
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
    model = make(fuse=fuse)
    for name in ("conv", "mid.0"):
        originals(model)[name].requires_grad_(False)
    with Calls() as calls:
        got = one_step(model, 0.1)
    assert got["conv.parametrizations.weight.original"] is None and not model.conv.weight.requires_grad
    assert calls.counts["msq"] == (2 if fuse == "model" else 4)  # frozen layers are a list of their own
    assert torch.equal(got["head.parametrizations.weight.original"],
                       one_step(make(fuse=fuse), 0.1)["head.parametrizations.weight.original"])


@FUSES
@pytest.mark.parametrize("cache", [False, True])
def test_nothing_is_saved_for_backward_but_parameters_and_scalars(fuse, cache):
    model = make(fuse=fuse, cache=cache)
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
    model = make()
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
    set_bits(model, 3)
    assert len(model.head.weight.unique()) <= 8 < len(q.unique())


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}])
def test_optimizer_steps_are_seen(options):
    """Fused optimizers do not bump version counters."""
    model = make(cache=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, **options)
    one_step(model)
    q, first = model.head.weight, penalty(model).item()
    optimizer.step()
    assert not torch.equal(model.head.weight, q)
    model(data()[0])
    assert not torch.equal(model.head.weight, q) and penalty(model) != first
    assert torch.equal(model.head.weight, copy.deepcopy(model).head.weight)


def test_stash_fits_grad_mode_and_inference_mode():
    model = make()
    with torch.no_grad():
        model(data()[0])
        assert not model.head.weight.requires_grad
    assert model.head.weight.requires_grad
    with torch.inference_mode():
        model(data()[0])
    one_step(model, 0.1)
    assert same(one_step(make(), 0.1), grads(model))


def test_a_part_called_alone_or_after_backward_works():
    model, layered = make(), make(fuse="layer")
    for m in (model, layered):
        one_step(m)
        m.features(data()[0]).sum().backward()  # no optimizer step in between: the same q, its graph used before
        m.features(data()[0]).sum().backward()
    assert same(grads(model), grads(layered))


@FUSES
@pytest.mark.parametrize("cache", [False, True])
def test_deepcopy_is_independent(fuse, cache):
    model = make(fuse=fuse, cache=cache)
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
        model = make(fuse=fuse, cache=cache)
        one_step(model)
        q = model.head.weight
        model.to(dtype)
        assert all(p.slot.result is None for _, _, p in quantized(model))  # the old q need not stay in memory
        assert q.dtype == torch.float32 and model.head.weight.dtype == dtype
        assert model.head.parametrizations.weight[0].bits.dtype == torch.int32
        assert same(one_step(model, 0.1, dtype=dtype), one_step(make_like(model), 0.1, dtype=dtype))


@FUSES
@pytest.mark.parametrize("cache", [False, True])
def test_autocast_emits_its_dtype(fuse, cache):
    model = make(fuse=fuse, cache=cache)
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


class Checkpointed(Net):
    reentrant = False

    def features(self, x):
        return checkpoint(super().features, x, use_reentrant=self.reentrant)


@FUSES
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("kind", ["loss", "decoupled"])
def test_non_reentrant_checkpoint(fuse, cache, kind):
    strength = 0.1 if kind == "loss" else 0.0
    expected = one_step(make(fuse=fuse, penalty=kind), strength)
    for whole in (False, True):
        torch.manual_seed(0)
        model = quantize_(Net() if whole else Checkpointed(), MSQConfig(bits=5, fuse=fuse, cache=cache, penalty=kind))
        x, y = data()
        for _ in range(2):
            model.zero_grad()
            out = checkpoint(model, x, use_reentrant=False) if whole else model(x)
            loss = F.cross_entropy(out, y)
            (loss + strength * penalty(model) if strength else loss).backward()
            assert same(grads(model), expected)


def test_reentrant_checkpoint_with_layers():
    expected = one_step(make(fuse="layer"), 0.1)
    torch.manual_seed(0)
    model = quantize_(Checkpointed(), MSQConfig(bits=5, fuse="layer"))
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
    cached, plain = make(fuse=fuse, cache=True, penalty=kind), make(fuse=fuse, penalty=kind)
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
    model = make(fuse=fuse, cache=True)
    state = copy.deepcopy(model.state_dict())

    def changes():
        set_bits(model, 3)
        yield "bits"
        set_bits(model, 3, 2)
        yield "k"
        with torch.no_grad():
            originals(model)["head"].mul_(0.9)
        yield "weight"
        model.load_state_dict(state)
        yield "load_state_dict"
        model.load_state_dict({k: v.clone() + 1 if k.endswith("bits") else v.clone() for k, v in state.items()},
                              assign=True)
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
    cached, plain = make(torch.float64, cache=True), make(torch.float64)
    loss_of(cached, dtype=torch.float64)
    first, second = (hessian_trace(loss_of(m, 0.1, dtype=torch.float64), originals(m).values(), 3)
                     for m in (cached, plain))
    assert torch.equal(first, second) and first.abs().min() > 0


# torch.compile


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def counting(backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend(backend)


@FUSES
@pytest.mark.parametrize("kind", ["loss", "decoupled"])
def test_compiled_step_is_one_graph_for_all_bits_and_equals_eager(fuse, kind, fresh_compiler):
    strength = 0.03 if kind == "loss" else 0.0
    compiled, eager = make(fuse=fuse, penalty=kind), make(fuse=fuse, penalty=kind)
    backend = counting("aot_eager")
    step = torch.compile(objective, fullgraph=True, backend=backend)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (compiled, eager)]
    for bits in range(8, 1, -1):
        for m, fn, optimizer in zip((compiled, eager), (step, objective), optimizers):
            set_bits(m, bits)
            optimizer.zero_grad()
            loss = fn(m, *data(), strength)
            loss.backward()
            if kind == "decoupled":
                add_penalty_grad_(m, 0.03)
            optimizer.step()
        assert same(grads(compiled), grads(eager)), bits
    assert backend.frame_count == 1
    assert same(compiled.state_dict(), eager.state_dict())


@FUSES
def test_compiler_merges_the_penalty_with_the_forward(fuse, fresh_compiler):
    graphs = []

    def keep(graph, inputs):
        from functorch.compile import make_boxed_func

        graphs.append([n.target.__name__ for n in graph.graph.nodes if str(n.target).startswith("quantops")])
        return make_boxed_func(graph)

    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition as partition

    model = make(fuse=fuse)
    backend = aot_autograd(fw_compiler=keep, partition_fn=partition)
    torch.compile(objective, fullgraph=True, backend=backend)(model, *data(), 0.1).backward()
    times = 1 if fuse == "model" else 4
    assert sorted(graphs[0]) == ["absmax.default"] * times + ["msq.default"] * times
    assert graphs[1] == ["uniform_backward.default"] * times
    assert all(p.slot.traced is None for _, _, p in quantized(model))  # nothing leaks out of the graph


@FUSES
def test_compiled_model_with_the_penalty_outside(fuse, fresh_compiler):
    model, eager = make(fuse=fuse), make(fuse=fuse)
    backend = counting("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for bits in (8, 5, 2):
        set_bits(model, bits), set_bits(eager, bits)
        x, y = data()
        model.zero_grad()
        (F.cross_entropy(compiled(x), y) + 0.1 * penalty(model)).backward()
        expected = one_step(eager, 0.1)
        assert all(torch.allclose(v, expected[k], rtol=1e-6, atol=1e-8) for k, v in grads(model).items())
        model(x)  # eager and compiled calls may alternate
        assert all(p.slot.traced is None for _, _, p in quantized(model))
    # torch traces the hooks of a module apart from its forward.
    assert backend.frame_count == (2 if fuse == "model" else 1)


def test_a_failed_forward_leaves_nothing_for_compiled_parts(fresh_compiler):
    model = make()
    compiled = torch.compile(model, backend="eager")
    compiled(data()[0])
    with pytest.raises(Exception, match="shape|size|dim"):
        compiled(torch.randn(8, 1, 9, 9))
    set_bits(model, 2)
    part = torch.compile(model.features, backend="eager", fullgraph=True)
    assert torch.equal(part(data()[0]), make_like(model).features(data()[0]))


def test_inductor(fresh_compiler):
    model, eager = make(), make()
    step = torch.compile(objective, fullgraph=True)
    for bits in (8, 2):
        set_bits(model, bits), set_bits(eager, bits)
        model.zero_grad()
        step(model, *data(), 0.03).backward()
        expected = one_step(eager, 0.03)
        assert all(torch.allclose(v, expected[k], rtol=1e-4, atol=1e-6) for k, v in grads(model).items())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_optimizer_is_seen_by_the_cache(fresh_compiler):
    for options in ({"foreach": True}, {"fused": True}):
        model = make(cache=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, **options)
        step = torch.compile(optimizer.step, backend="aot_eager")
        for _ in range(2):
            one_step(model)
            q = model.head.weight.detach().clone()
            step()
            model(data()[0])
            assert not torch.equal(q, model.head.weight), options


# Controller


def test_decision_follows_the_equations():
    model = make(bits=6, first=7)
    control = MSQController(model, 8.0, threshold=0.55, strength=0.01, samples=3)
    names = ("mid.0", "mid.2", "head")
    traces = hessian_trace(loss_of(model), [originals(model)[n] for n in names], 3, seed=0).tolist()
    before = {name: w.detach().clone() for name, w in originals(model).items()}
    entry = control.step(lambda: loss_of(model))
    rows = {row["name"]: row for row in entry["layers"]}
    assert tuple(rows) == names  # conv has fixed bits
    omegas = {n: r["omega"] for n, r in rows.items()}
    mean = sum(omegas.values()) / 3
    for name, row in rows.items():
        w = before[name]
        k = 2 if omegas[name] < mean else 1
        _, _, nonzero, sq_error = reference.msq(w, reference.absmax(w), 6, k)
        assert row["k"] == k and row["bits"] == 6
        assert row["beta"] == int(nonzero) / w.numel()
        assert row["sq_error"] == pytest.approx(float(sq_error), rel=1e-5)
        assert row["omega"] == pytest.approx(row["trace"] * row["sq_error"], rel=1e-6)
        assert row["trace"] == traces[names.index(name)]
        pruned = k if row["beta"] < 0.55 else 0
        assert (row["pruned"], row["bits_after"]) == (pruned, 6 - pruned)
    assert {r["k"] for r in rows.values()} == {1, 2} and 0 < sum(r["pruned"] > 0 for r in rows.values())
    assert {n: int(p.bits) for n, _, p in quantized(model)} == {"conv": 7, **{n: r["bits_after"] for n, r in
                                                                               rows.items()}}
    assert entry["compression"] == bit_report(model).compression == control.compression
    assert json.loads(json.dumps(control.log)) == control.log


def silent(model):
    """Makes every weight representable with two bits, so that beta is 0 down to two bits."""
    with torch.no_grad():
        for w in originals(model).values():
            w.copy_(torch.randint(-2, 2, w.shape, generator=torch.Generator().manual_seed(3)) * 0.25)
            w.view(-1)[0] = -0.5
    return model


def test_stops_at_the_target_in_order_of_omega():
    model = make(bits=8)
    control = MSQController(model, 4.15, threshold=1.0, strength=0.01, samples=4, seed=1)
    entry = control.step(lambda: loss_of(model))
    assert control.done and control.strength == 0.0 and entry["done"] and control.compression >= 4.15
    order = sorted(entry["layers"], key=lambda r: r["omega"])
    assert order != entry["layers"]
    pruned = [r["pruned"] > 0 for r in order]
    last = pruned.index(False)
    assert 0 < last and not any(pruned[last:])  # a prefix in order of Omega
    row = order[last - 1]  # without the last one pruned the target was not reached
    p = {n: p for n, _, p in quantized(model)}[row["name"]]
    p.set_precision(row["bits"], 0)
    assert control.compression < 4.15
    p.set_precision(row["bits_after"], 0)
    assert control.step(lambda: loss_of(model)) is None and len(control.log) == 1


def test_min_bits_limits_k_and_interval_counts_steps():
    model = silent(make(bits=4))
    control = MSQController(model, 32 / 3, threshold=0.5, strength=0.02, interval=3, min_bits=3, hessian=False)
    calls = []
    assert [control.step(lambda: calls.append(1)) is None for _ in range(3)] == [True, True, False]
    assert not calls  # no Hessian, no loss
    assert {(int(p.bits), int(p.k)) for _, _, p in quantized(model)} == {(3, 0)} and control.done
    row = control.log[0]["layers"][0]
    assert row["omega"] is None and row["trace"] is None and row["k"] == 1 and control.log[0]["step"] == 3
    model = silent(make(bits=5))
    control = MSQController(model, 32 / 2, threshold=0.5, strength=0.02, min_bits=2)
    while not control.done:
        assert control.strength == 0.02
        control.step(lambda: loss_of(model))
        for _, _, p in quantized(model):
            assert int(p.bits) >= 2 and int(p.k) <= max(0, int(p.bits) - 2)
    assert {int(p.bits) for _, _, p in quantized(model)} == {2}


def test_dropping_silent_bits_changes_no_value():
    model = silent(make(bits=8))
    out = model(data()[0])
    control = MSQController(model, 16, threshold=0.01, strength=0.01)
    while not control.done:
        control.step()
    assert bit_report(model).average_bits == 2 and torch.equal(model(data()[0]), out)


def test_layers_above_the_threshold_keep_their_bits():
    model = make(bits=8)
    control = MSQController(model, 8, threshold=1e-3, strength=0.01)
    for _ in range(3):
        control.step(lambda: loss_of(model))
    assert not control.done and {int(p.bits) for _, _, p in quantized(model)} == {8}
    traces = [entry["layers"][0]["trace"] for entry in control.log]
    assert len(set(traces)) == 3  # the same weights and batch, other draws


@pytest.mark.parametrize("options, text", [
    ({"target": 33}, "target: 33.0 is out of reach, min_bits = 1 .* allow 32"), ({"target": 1}, "target: "),
    ({"target": 12, "min_bits": 3}, "target: 12.0 is out of reach"), ({"interval": 0}, "interval: .*got 0"),
    ({"threshold": 0.0}, "threshold: "), ({"threshold": 1.5}, "threshold: "), ({"strength": -1}, "strength: "),
    ({"strength": float("nan")}, "strength: "), ({"samples": 0}, "samples: "), ({"min_bits": 0}, "min_bits: "),
    ({"hessian": 1}, "hessian: "), ({"seed": -1}, "seed: "),
])
def test_controller_errors(options, text):
    with pytest.raises(ValueError, match=text):
        MSQController(make(), **{"target": 8, "threshold": 0.1, "strength": 0.1, **options})


def test_controller_needs_layers_to_prune():
    with pytest.raises(ValueError, match="Net has none"):
        MSQController(Net(), 8, threshold=0.1, strength=0.1)
    with pytest.raises(ValueError, match="all of them have fixed bits"):
        MSQController(make(overrides={"*": {"prune": False}}), 8, threshold=0.1, strength=0.1)
    model = make()
    originals(model)["mid.2"].requires_grad_(False)
    with pytest.raises(ValueError, match="mid.2: expected a weight that requires grad"):
        MSQController(model, 8, threshold=0.1, strength=0.1)
    model = make()
    control = MSQController(model, 8, threshold=0.1, strength=0.1)
    with pytest.raises(ValueError, match="loss_fn: the Hessian trace of conv is nan"):
        control.step(lambda: loss_of(model) * float("nan"))
    assert control.log == [] and {int(p.bits) for _, _, p in quantized(model)} == {5}


@pytest.mark.parametrize("fuse, cache, kind", [("model", False, "loss"), ("layer", False, "loss"),
                                               ("model", True, "decoupled")])
def test_resume_is_bit_for_bit(fuse, cache, kind, tmp_path):
    def start():
        model = make(bits=8, fuse=fuse, cache=cache, penalty=kind)
        return (model, torch.optim.AdamW(model.parameters(), lr=0.01),
                MSQController(model, 12, interval=2, threshold=0.6, strength=1e-3, samples=2, seed=5))

    def train(model, optimizer, control, steps):
        for i in steps:
            optimizer.zero_grad()
            loss_of(model, control.strength if kind == "loss" else 0.0, i).backward()
            if kind == "decoupled":
                add_penalty_grad_(model, control.strength)
            optimizer.step()
            control.step(lambda: loss_of(model, 0.0, i))

    whole = start()
    train(*whole, range(12))
    first = start()
    train(*first, range(6))
    torch.save([part.state_dict() for part in first], tmp_path / "checkpoint.pt")
    torch.rand(100)  # the global random state plays no part
    second = start()
    for part, state in zip(second, torch.load(tmp_path / "checkpoint.pt", weights_only=True)):
        part.load_state_dict(state)
    train(*second, range(6, 12))
    assert same(whole[0].state_dict(), second[0].state_dict())
    assert whole[2].state_dict() == second[2].state_dict() and len(whole[2].log) > 2
    assert len({row["bits_after"] for row in whole[2].log[-1]["layers"]} | {8}) > 1  # bits were dropped
    for a, b in zip(whole[1].state_dict()["state"].values(), second[1].state_dict()["state"].values()):
        assert same(a, b)


def test_load_state_dict_checks_the_layers():
    control = MSQController(make(), 8, threshold=0.1, strength=0.1)
    state = control.state_dict()
    for bad, text in (({**state, "names": ["conv"]}, r"expected the layers \['conv', 'mid.0'.*got \['conv'\]"),
                      ({**state, "version": 2}, "version 1"), ({}, "missing")):
        with pytest.raises(ValueError, match=text):
            control.load_state_dict(bad)
    assert control.state_dict() == state


def test_training_drops_bits_and_learns():
    """The scheme as a whole: a separable problem, from 8 bits to 4 on average, at full accuracy."""
    torch.manual_seed(0)
    x = torch.randn(128, 1, 6, 6)
    y = (x[:, 0, :3].sum((1, 2)) > 0).long() + 2 * (x[:, 0, 3:].sum((1, 2)) > 0).long()
    model = make(bits=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    control = MSQController(model, 8, interval=10, threshold=0.5, strength=5e-3, samples=2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if not control.done:
            loss = loss + control.strength * penalty(model)
        loss.backward()
        optimizer.step()
        control.step(lambda: F.cross_entropy(model(x), y))
    assert control.done and bit_report(model).compression >= 8
    assert (model(x).argmax(1) == y).float().mean() > 0.95


# Report


def test_bit_report():
    model = make(bits=6, first=8, overrides={"mid.2": {"bits": 4, "k": 2}})
    report = bit_report(model)
    assert [(r.name, r.bits, r.k) for r in report.rows] == [("conv", 8, 0), ("mid.0", 6, 1), ("mid.2", 4, 2),
                                                           ("head", 6, 1)]
    for row, (name, w) in zip(report.rows, originals(model).items()):
        _, _, nonzero, sq_error = reference.msq(w.detach(), reference.absmax(w), row.bits, row.k)
        assert (row.shape, row.numel) == (tuple(w.shape), w.numel()) and row.beta == int(nonzero) / w.numel()
        assert row.sq_error == pytest.approx(float(sq_error), rel=1e-5) and row.scale == float(reference.absmax(w))
    used = 36 * 8 + 768 * 6 + 144 * 4 + 60 * 6
    assert report.average_bits == pytest.approx(used / 1008) and report.compression == pytest.approx(32 * 1008 / used)
    lines = str(report).splitlines()
    assert len(lines) == 7 and len({len(line) for line in lines[:-1]}) == 1 and "mid.2" in lines[4]
    assert "compression" in lines[-1]
    pruned = bit_report(make(bits=0, k=0))
    assert pruned.compression == float("inf") and str(pruned)
