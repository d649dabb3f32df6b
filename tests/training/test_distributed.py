"""DDP and FSDP2 on two processes: gradients equal those of one process with the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from processes import PROCESSES, run_on_all
from quantops import (
    CPQConfig,
    MSQConfig,
    MSQController,
    TruncQuantConfig,
    add_penalty_grad_,
    joint_loss,
    joint_step,
    penalty,
    quantize_,
    set_bits,
)

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
STRENGTH = 0.1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


def make(config):
    torch.manual_seed(0)
    return quantize_(Net(), config)


def data(rank=None):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 16, generator=generator), torch.randint(0, 4, (8,), generator=generator)
    return (x, y) if rank is None else (x.chunk(PROCESSES)[rank], y.chunk(PROCESSES)[rank])


def cross_entropy(model, x, y):
    F.cross_entropy(model(x), y).backward()


def with_penalty(model, x, y):
    (F.cross_entropy(model(x), y) + STRENGTH * penalty(model)).backward()


def decoupled(model, x, y):
    F.cross_entropy(model(x), y).backward()
    add_penalty_grad_(model, STRENGTH)


def joint(model, x, y):
    joint_loss(model, lambda out: F.cross_entropy(out, y), x).loss.backward()


def stepwise(model, x, y):
    joint_step(model, lambda out: F.cross_entropy(out, y), x)


def at_three_bits(model, x, y):
    set_bits(model.module if isinstance(model, DistributedDataParallel) else model, 3)
    cross_entropy(model, x, y)


STEPS = {
    "plain": (MSQConfig, {"bits": 5}, cross_entropy),
    "penalty": (MSQConfig, {"bits": 5}, with_penalty),
    "decoupled": (MSQConfig, {"bits": 5, "penalty": "decoupled"}, decoupled),
    "joint": (TruncQuantConfig, {"bits": (6, 3, 1)}, joint),
    "joint step": (TruncQuantConfig, {"bits": (6, 3, 1)}, stepwise),
    "one width": (TruncQuantConfig, {"bits": (6, 3, 1)}, at_three_bits),
    "categorical": (CPQConfig, {"bits": 3}, cross_entropy),
}


def _ddp(rank, step, fuse):
    kind, options, run = STEPS[step]
    expected, model = (make(kind(fuse=fuse, **options)) for _ in range(2))
    run(expected, *data())
    wrapped = DistributedDataParallel(model)
    for _ in range(2):  # the second finds the buckets rebuilt in the order of the gradients
        wrapped.zero_grad()
        run(wrapped, *data(rank))
    for (name, p), q in zip(model.named_parameters(), expected.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m: f"{name}: {m}")


def _fsdp(rank, step, fuse):
    kind, options, run = STEPS[step]
    expected = make(kind(fuse=fuse, **options))
    model = copy.deepcopy(expected)
    run(expected, *data())
    for layer in (model.a, model.b, model.c):
        fully_shard(layer)
    fully_shard(model)
    for _ in range(2):
        model.zero_grad()
        run(model, *data(rank))
    for (name, p), q in zip(model.named_parameters(), expected.parameters()):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, msg=lambda m: f"{name}: {m}")


def _all_ddp(rank):
    for step in STEPS:
        for fuse in ("model", "layer"):
            _ddp(rank, step, fuse)


def _all_fsdp(rank):
    for step in ("plain", "joint", "joint step", "one width", "categorical"):
        for fuse in ("model", "layer"):
            _fsdp(rank, step, fuse)


@pytest.mark.parametrize("task", [_all_ddp, _all_fsdp])
def test_gradients_are_those_of_one_process(task):
    run_on_all(task)


def _controller(rank):
    """Each process has a batch of its own, and all take the decisions of one process with the whole batch."""
    options = dict(target=8.0, threshold=0.6, strength=1e-3, samples=2, interval=2, fall_back=False)
    for wrapped in (True, False):  # whether the controller knows of DDP; loss_fn calls the model in it
        expected, model = (make(MSQConfig(bits=8)) for _ in range(2))
        ddp = DistributedDataParallel(model)
        control, single = MSQController(ddp if wrapped else model, **options), MSQController(expected, **options)
        optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (expected, model)]
        for _ in range(6):
            run_penalized(expected, *data(), single.strength)
            run_penalized(ddp, *data(rank), control.strength)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            x, y = data()
            single.step(lambda: F.cross_entropy(expected(x), y))
            x, y = data(rank)
            control.step(lambda: F.cross_entropy(ddp(x), y))
        assert any(row["pruned"] for entry in control.log for row in entry["layers"])
        assert len({row["k"] for row in control.log[0]["layers"]}) == 2
        for entry, other in zip(control.log, single.log):
            for row, one in zip(entry["layers"], other["layers"]):
                assert (row["k"], row["bits_after"]) == (one["k"], one["bits_after"])
                assert row["trace"] == pytest.approx(one["trace"], rel=1e-3, abs=1e-3)
        logs = [None] * PROCESSES
        dist.all_gather_object(logs, control.log)
        assert logs[0] == logs[1]

    def breaks_in_one():
        loss = F.cross_entropy(ddp(x), y)  # DDP itself talks there: one that raised before would leave others waiting
        if rank:
            raise ZeroDivisionError("here")
        return loss

    control = MSQController(ddp, 12.0, threshold=0.6, strength=1e-3, samples=2)
    kind, text = (ZeroDivisionError, "here") if rank else (RuntimeError, "1 of 2 processes raised")
    with pytest.raises(kind, match=text):
        control.step(breaks_in_one)


def run_penalized(model, x, y, strength):
    (F.cross_entropy(model(x), y) + strength * penalty(model)).backward()


def test_the_controllers_of_all_processes_decide_as_one():
    run_on_all(_controller)
