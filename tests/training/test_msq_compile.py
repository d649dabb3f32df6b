"""MSQ under torch.compile: one graph while bits change, equal to eager."""

import copy

import pytest
import torch
import torch.nn.functional as F

from networks import data, grads, make_msq, noting, objective, one_step, same, set_precision
from quantops import add_penalty_grad_, penalty
from quantops.nn import quantized

pytestmark = pytest.mark.usefixtures("one_thread")
FUSES = pytest.mark.parametrize("fuse", ["model", "layer"])


def counting(backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend(backend)


@FUSES
@pytest.mark.parametrize("kind", ["loss", "decoupled"])
def test_compiled_step_is_one_graph_for_all_bits_and_equals_eager(fuse, kind, fresh_compiler):
    strength = 0.03 if kind == "loss" else 0.0
    compiled, eager = make_msq(fuse=fuse, penalty=kind), make_msq(fuse=fuse, penalty=kind)
    backend = counting("aot_eager")
    step = torch.compile(objective, fullgraph=True, backend=backend)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (compiled, eager)]
    for bits in range(8, 1, -1):
        for m, fn, optimizer in zip((compiled, eager), (step, objective), optimizers):
            set_precision(m, bits)
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
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition as partition

    model = make_msq(fuse=fuse)
    backend = aot_autograd(fw_compiler=noting(graphs), partition_fn=partition)
    torch.compile(objective, fullgraph=True, backend=backend)(model, *data(), 0.1).backward()
    times = 1 if fuse == "model" else 4
    assert sorted(graphs[0]) == ["absmax.default"] * times + ["msq.default"] * times
    assert graphs[1] == ["uniform_backward.default"] * times
    assert all(p.slot.traced is None for _, _, p in quantized(model))  # nothing leaks out of the graph


@FUSES
def test_compiled_model_with_the_penalty_outside(fuse, fresh_compiler):
    model, eager = make_msq(fuse=fuse), make_msq(fuse=fuse)
    backend = counting("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for bits in (8, 5, 2):
        set_precision(model, bits), set_precision(eager, bits)
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
    model = make_msq()
    compiled = torch.compile(model, backend="eager")
    compiled(data()[0])
    with pytest.raises(Exception, match="shape|size|dim"):
        compiled(torch.randn(8, 1, 9, 9))
    set_precision(model, 2)
    part = torch.compile(model.features, backend="eager", fullgraph=True)
    assert torch.equal(part(data()[0]), copy.deepcopy(model).features(data()[0]))


def test_inductor(fresh_compiler):
    model, eager = make_msq(), make_msq()
    step = torch.compile(objective, fullgraph=True)
    for bits in (8, 2):
        set_precision(model, bits), set_precision(eager, bits)
        model.zero_grad()
        step(model, *data(), 0.03).backward()
        expected = one_step(eager, 0.03)
        assert all(torch.allclose(v, expected[k], rtol=1e-4, atol=1e-6) for k, v in grads(model).items())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_optimizer_is_seen_by_the_cache(fresh_compiler):
    for options in ({"foreach": True}, {"fused": True}):
        model = make_msq(cache=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, **options)
        step = torch.compile(optimizer.step, backend="aot_eager")
        for _ in range(2):
            one_step(model)
            q = model.head.weight.detach().clone()
            step()
            model(data()[0])
            assert not torch.equal(q, model.head.weight), options
