"""TruncQuant under torch.compile: one graph, whichever widths."""

import pytest
import torch

from networks import close, data, grads, noting, same, state
from quantops import set_bits
from truncquant_networks import FUSES, STEPS, TANH, WIDTHS, joint, loss_of, make, objective

pytestmark = pytest.mark.usefixtures("one_thread")


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@FUSES
def test_set_bits_recompiles_nothing(fuse, fresh_compiler):
    model, eager = make(fuse=fuse), make(fuse=fuse)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    counts = []
    for m in (8, 2, 1, 4, 8):
        set_bits(compiled, m), set_bits(eager, m)
        loss_of(compiled).backward(), loss_of(eager).backward()
        counts.append(graphs())
    assert set(counts) == {counts[0]} and close(grads(model), grads(eager)) and same(state(model), state(eager))
    model.eval(), eager.eval(), compiled.eval()
    with torch.no_grad():
        compiled(data()[0])
        before = graphs()
        for m in WIDTHS:
            set_bits(model, m), set_bits(eager, m)
            assert torch.equal(compiled(data()[0]), eager(data()[0]))
    assert graphs() == before


@STEPS
def test_joint_steps_of_a_compiled_model_run_one_graph(kind, fresh_compiler):
    model, eager = make(), make()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        joint(compiled, kind, seed), joint(eager, kind, seed)
    assert graphs() == 1 and close(grads(model), grads(eager)) and same(state(model), state(eager))


@FUSES
@pytest.mark.parametrize("config", [{}, TANH], ids=["default", "tanh"])
def test_compiled_joint_loss_is_one_graph_with_one_read_of_the_weights(fuse, config, fresh_compiler):
    ops = []
    from torch._dynamo.backends.common import aot_autograd

    model, eager = make(fuse=fuse, **config), make(fuse=fuse, **config)
    step = torch.compile(objective, fullgraph=True, backend=aot_autograd(fw_compiler=noting(ops)))
    for seed in range(2):
        step(model, *data(seed=seed)).backward()
        objective(eager, *data(seed=seed)).backward()
    assert close(grads(model), grads(eager), 1e-5) and same(state(model), state(eager)) and graphs() == 1
    scales = ["own_scale.default"] * 2 if config else ["absmax.default"]
    assert sorted(ops[0]) == [*scales, "truncate.default"]
    assert sorted(ops[1]) == [*["own_scale_backward.default"] * (2 * bool(config)), "truncate_backward.default"]
