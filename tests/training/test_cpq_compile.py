"""CPQ under torch.compile: one graph, equal to eager, its own draws."""

import pytest
import torch

from networks import close, data, grads, make_cpq, objective, one_step, state
from quantops import finish_dropbits

pytestmark = pytest.mark.usefixtures("one_thread")
FUSES = pytest.mark.parametrize("fuse", ["model", "layer"])


@pytest.mark.parametrize(
    "fuse, kind",
    [
        ("layer", {}),
        ("model", {"mode": "soft", "dropbits": "learned", "per_row": True}),
        ("model", {"mode": "sample", "dropbits": "fixed"}),
        ("layer", {"grad": "winner", "dropbits": "learned"}),
    ],
)
def test_compiled_step_is_one_graph_and_equals_eager(fuse, kind, fresh_compiler):
    from torch._dynamo.testing import CompileCounterWithBackend

    strength = 0.1 if kind.get("dropbits") == "learned" else 0.0
    compiled, eager = make_cpq(fuse=fuse, **kind), make_cpq(fuse=fuse, **kind)
    backend = CompileCounterWithBackend("aot_eager")
    step = torch.compile(objective, fullgraph=True, backend=backend)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (compiled, eager)]
    for seed in range(3):
        for m, fn, optimizer in zip((compiled, eager), (step, objective), optimizers):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            fn(m, *data(seed=seed), strength).backward()
            optimizer.step()
        assert close(grads(compiled), grads(eager), 1e-5)
    assert backend.frame_count == 1 and close(state(compiled), state(eager), 1e-5)
    compiled.eval(), eager.eval()
    assert torch.allclose(step(compiled, *data()), objective(eager, *data()))
    if fuse == "model" and "dropbits" in kind:
        finish_dropbits(compiled), finish_dropbits(eager)
        losses = []
        for m, fn in ((compiled.train(), step), (eager.train(), objective)):
            torch.manual_seed(3)
            losses.append(fn(m, *data()))
        assert torch.allclose(*losses)


@FUSES
def test_compiled_forwards_draw_each_their_own(fuse, fresh_compiler):
    model = make_cpq(fuse=fuse, mode="sample", dropbits="fixed")
    twice = torch.compile(lambda x: (model(x), model(x)), fullgraph=True, backend="aot_eager")
    first, second = twice(data()[0])
    assert not torch.equal(first, second) and not torch.equal(first, twice(data()[0])[0])


def test_inductor(fresh_compiler):
    model, eager = make_cpq(act_bits=3), make_cpq(act_bits=3)
    one_step(model), one_step(eager)  # activations start with the first batch
    step = torch.compile(objective, fullgraph=True)
    model.zero_grad()
    step(model, *data()).backward()
    assert close(grads(model), one_step(eager), 1e-4)
