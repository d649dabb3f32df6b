"""Sharded weights (FSDP2, tensor parallel) on two processes: what one process has of the whole, bit for bit."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from processes import PROCESSES, run_on_all
from quantops import (
    CategoricalActivation,
    CPQConfig,
    MSQConfig,
    MSQController,
    TruncQuantConfig,
    UniformActivation,
    add_penalty_grad_,
    bit_report,
    hessian_trace,
    joint_loss,
    joint_step,
    penalty,
    quantize_,
    quantize_activation,
    set_bits,
    to_int,
    unquantize_,
)
from quantops.nn import quantized
from quantops.scales import each_measured
from quantops.sharded import is_sharded

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
MSQ = [  # a maximum is the same in any order, a mean is not
    {"scale": "absmax", **config}
    for config in (
        {},
        {"per_row": True},
        {"penalty": "decoupled", "grid": "sign"},
        {"penalty_unit": "code", "grid": "full"},
        {"penalty": "decoupled", "penalty_unit": "gradient"},
    )
]


class Net(nn.Module):
    """Rows that two processes cannot share evenly, and one of a single row, of which one process has nothing."""

    def __init__(self, wide=33):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(16, wide), nn.Linear(wide, 6), nn.Linear(6, 1), nn.Linear(1, 4)

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x).relu()).relu()))


def make(config, exact=True, wide=33):
    """``exact``: weights of few bits, whose sums are the same in any order."""
    torch.manual_seed(0)
    model = Net(wide)
    if exact:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_((p * 256).round() / 256)
                p.view(-1)[-1] = 0.75  # the scale, in the part of the last process
    return quantize_(model, config)


def fsdp(model):
    sharded = copy.deepcopy(model)
    for layer in sharded.children():
        fully_shard(layer)
    return fully_shard(sharded)


def data(rank=None):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 16, generator=g), torch.randint(0, 4, (8,), generator=g)
    return (x, y) if rank is None else (x.chunk(PROCESSES)[rank], y.chunk(PROCESSES)[rank])


def whole(t):
    return t.full_tensor() if is_sharded(t) else t


def weights(model):
    return {name: owner.original for name, owner, _ in quantized(model)}


def same_ints(a, b):
    a, b = to_int(a), to_int(b)
    assert a.keys() == b.keys()
    for name, v in a.items():
        assert torch.equal(v.codes, b[name].codes) and torch.equal(v.scale, b[name].scale), name


def _fsdp_msq(rank):
    for config in MSQ:
        expected = make(MSQConfig(bits=6, **config))
        model = fsdp(expected)
        assert all(map(is_sharded, weights(model).values()))
        assert str(bit_report(model)) == str(bit_report(expected))
        same_ints(model, expected)
        assert torch.equal(penalty(model), penalty(expected))
        penalty(model).backward(), penalty(expected).backward()
        for name, w in weights(model).items():
            assert (
                torch.equal(whole(w.grad), weights(expected)[name].grad) and w.grad.to_local().shape[1:] == w.shape[1:]
            )
        add_penalty_grad_(model, 0.5), add_penalty_grad_(expected, 0.5)
        for name, w in weights(model).items():
            assert torch.equal(whole(w.grad), weights(expected)[name].grad)
        controls = [MSQController(m, 8, threshold=0.99, strength=1.0, hessian=False) for m in (model, expected)]
        entries = [c.step() for c in controls]
        for row, one in zip(*(entry["layers"] for entry in entries)):
            assert row.pop("sq_error") == pytest.approx(one.pop("sq_error"), rel=1e-6) and row == one
        assert any(row["pruned"] for row in entries[0]["layers"])
        assert penalty(model) == penalty(expected)
    loss = model(data()[0]).sum()
    with pytest.raises(ValueError, match="FSDP2 makes of them, .*MSQController of the model"):
        hessian_trace(loss, list(weights(model).values()))


class Smooth(Net):
    """Without kinks, at which differences of gradients see more curvature than second derivatives do."""

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x).tanh()).tanh()).tanh())


def _traces(rank):
    """By differences of gradients of local batches; by them and by second derivatives, of the whole batch at once."""
    for config in ({}, {"scale": 2.5, "per_row": True, "grid": "sign"}):
        torch.manual_seed(0)
        expected = quantize_(Smooth(), MSQConfig(bits=4, **config))
        model = fsdp(expected)
        for m, batch in ((model, data(rank)), (expected, data())):
            F.cross_entropy(m(batch[0]), batch[1]).backward()
        before = [(w.detach().clone(), w.grad.clone()) for w in weights(model).values()]
        x, y = data(rank)
        with torch.no_grad():
            out = model(x)

        def broken():
            raise ZeroDivisionError(model(x).sum())  # its whole weights are those that were moved

        control = MSQController(model, 12, threshold=0.99, strength=1.0, samples=3)
        with pytest.raises(ZeroDivisionError):
            control.step(broken)
        assert torch.equal(model(x), out)  # which leaves the weights of the root whole
        entry = control.step(lambda: F.cross_entropy(model(x), y))
        for (w, grad), now in zip(before, weights(model).values()):
            assert torch.equal(whole(w), whole(now)) and torch.equal(whole(grad), whole(now.grad))
        assert any(row["pruned"] for row in entry["layers"])
        x, y = data()
        for hessian, tolerance in (("differences", 1e-3), (True, 1e-2)):
            one = copy.deepcopy(expected)
            control = MSQController(one, 12, threshold=0.99, strength=1.0, samples=3, hessian=hessian)
            rows = control.step(lambda: F.cross_entropy(one(x), y))["layers"]
            size = max(abs(row["trace"]) for row in rows)
            for row, other in zip(entry["layers"], rows):
                assert row["trace"] == pytest.approx(other["trace"], rel=tolerance, abs=tolerance * size)
                assert (row["k"], row["beta"], row["bits_after"]) == (other["k"], other["beta"], other["bits_after"])


def _fsdp_steps(rank):
    """Whole steps, on local batches, of weights as they come."""
    for config in ({}, {"scale": 2.5, "scale_grad": True}, {"penalty": "decoupled"}):
        expected = make(MSQConfig(bits=5, **config), exact=False)
        model = fsdp(expected)
        for _ in range(2):
            for m, batch in ((model, data(rank)), (expected, data())):
                m.zero_grad()
                (F.cross_entropy(m(batch[0]), batch[1]) + 0.01 * penalty(m)).backward()
                if config.get("penalty"):
                    add_penalty_grad_(m, 0.01)
        for (name, p), q in zip(model.named_parameters(), expected.parameters()):
            torch.testing.assert_close(whole(p.grad), q.grad, msg=lambda m: f"{name}: {m}")
        rows = zip(bit_report(model).rows, bit_report(expected).rows)
        for row, one in rows:
            assert row.beta == pytest.approx(one.beta, abs=0 if not config.get("scale") else 0.02)
            assert row.sq_error == pytest.approx(one.sq_error, rel=1e-5)
        same_ints(model, expected)


def _fsdp_other_methods(rank):
    for config in (
        TruncQuantConfig(bits=(6, 3), scale=2.5, out_scale="absmean"),
        CPQConfig(bits=4, dropbits="learned"),
        CPQConfig(bits=3, per_row=True),
    ):
        expected = make(config)
        model = fsdp(expected)
        for row, one in zip(bit_report(model).rows, bit_report(expected).rows):
            assert row[:6] == one[:6] and row.sq_error == pytest.approx(one.sq_error, rel=1e-5)
            assert row.scale == pytest.approx(one.scale, rel=1e-6)
        same_ints(model, expected)
        assert penalty(model) == penalty(expected) and type(penalty(model)) is torch.Tensor
        if penalty(expected).requires_grad:
            penalty(model).backward(), penalty(expected).backward()
            for (name, p), q in zip(model.named_parameters(), expected.parameters()):
                assert (p.grad is None) == (q.grad is None) and (
                    p.grad is None or torch.equal(whole(p.grad), q.grad)
                ), name


def _without_a_part(rank):
    """A weight of one row: the last process has none of it."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for rows in (False, True):
        for mean in (False, True):
            whole_w = torch.tensor([[0.5, -2.0, 1.0]], requires_grad=True)
            w = distribute_tensor(whole_w.detach(), mesh, [Shard(0)]).requires_grad_()
            (3 * each_measured([whole_w], rows, mean, grad=True)[0]).sum().backward()
            # The gradient of a scale is the sum of what the processes have of it.
            (3 / (1 if rows else PROCESSES) * each_measured([w], rows, mean, grad=True)[0]).sum().backward()
            assert torch.equal(w.grad.full_tensor(), whole_w.grad), (rows, mean)


def _tensor_parallel(rank):
    _without_a_part(rank)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    plan = {"a": ColwiseParallel(), "b": RowwiseParallel()}

    def parallel(config):
        expected, model = make(config, wide=32), Net(32)
        model.load_state_dict(unquantize_(copy.deepcopy(expected)).state_dict())
        return expected, quantize_(parallelize_module(model, mesh, plan), config)

    for config in MSQ:
        expected, model = parallel(MSQConfig(bits=6, **config))
        assert [is_sharded(w) for w in weights(model).values()] == [True, True, False, False]
        for layer in ("a", "b", "c", "d"):
            assert torch.equal(whole(getattr(model, layer).weight), getattr(expected, layer).weight)
        assert str(bit_report(model)) == str(bit_report(expected))
        same_ints(model, expected)
        assert torch.equal(penalty(model), penalty(expected))
        x, y = data()
        for m in (model, expected):
            (F.cross_entropy(m(x), y) + 0.01 * penalty(m)).backward()
            add_penalty_grad_(m, 0.01)
        for (name, p), q in zip(model.named_parameters(), expected.parameters()):
            torch.testing.assert_close(whole(p.grad), q.grad, msg=lambda m: f"{name}: {m}")
        controls = [MSQController(m, 8, threshold=0.99, strength=1.0, samples=2) for m in (model, expected)]
        entries = [c.step(lambda: F.cross_entropy(m(x), y)) for c, m in zip(controls, (model, expected))]
        for row, one in zip(entries[0]["layers"], entries[1]["layers"]):
            assert row["trace"] == pytest.approx(one["trace"], rel=1e-3, abs=1e-5)
            assert (row["k"], row["beta"], row["bits_after"]) == (one["k"], one["beta"], one["bits_after"])
        assert any(row["pruned"] for row in entries[0]["layers"])
    for joint in (joint_loss, joint_step):
        expected, model = parallel(
            TruncQuantConfig(bits=(6, 2), scale="absmax", companding="tanh", slope="exact", out_scale="absmean")
        )
        losses = []
        for m in (model, expected):
            result = joint(m, lambda out: F.cross_entropy(out, y), x)
            if joint is joint_loss:
                result.loss.backward()
            losses.append(torch.stack(list(result.losses.values())))
        torch.testing.assert_close(*losses)
        for (name, p), q in zip(model.named_parameters(), expected.parameters()):
            torch.testing.assert_close(whole(p.grad), q.grad, rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")
        set_bits(model, 2), set_bits(expected, 2)
        torch.testing.assert_close(model(x), expected(x))
        same_ints(model, expected)
    for config in (
        MSQConfig(bits=3, k=0, scale="absmax", scale_grad=True),
        MSQConfig(bits=3, k=0, scale="absmax", scale_grad=True, per_row=True),
        MSQConfig(bits=3, k=0, scale=2.5, scale_grad=True),
        MSQConfig(bits=3, k=0, scale=2.5, scale_grad=True, per_row=True),
        TruncQuantConfig(bits=(3,), companding="tanh", out_scale="absmean", scale_grad=True),
    ):
        for ties in (False, True):  # maxima that several processes have
            expected, model = parallel(config)
            for m in (model, expected):
                for w in weights(m).values() if ties else ():
                    with torch.no_grad():
                        w.copy_(w.clamp(-0.1, 0.1))
                F.cross_entropy(m(x), y).backward()
            for (name, p), q in zip(model.named_parameters(), expected.parameters()):
                torch.testing.assert_close(whole(p.grad), q.grad, msg=lambda m: f"{config}: {name}: {m}")


def _fsdp(rank):
    _fsdp_msq(rank)
    _traces(rank)
    _fsdp_steps(rank)
    _fsdp_other_methods(rank)


def _activations(rank):
    mesh = init_device_mesh("cpu", (PROCESSES,))
    torch.manual_seed(0)
    x = torch.randn(6, 10).relu() + 0.1 * torch.randn(6, 10)
    makes = (
        lambda: UniformActivation(4, scale="step"),
        lambda: UniformActivation(3, scale="clip", signed=True),
        lambda: UniformActivation(4, scale="tracked"),
        lambda: UniformActivation(4, scale="clip", offset=True),
        lambda: UniformActivation(4, front="gelu"),
        lambda: CategoricalActivation(3),
    )
    for make_act, placement in itertools.product(makes, (Shard(0), Shard(1), Replicate())):
        acts, inputs = (make_act(), make_act()), (distribute_tensor(x, mesh, [placement]), x.clone())
        outs = []
        for act, v in zip(acts, inputs):
            q = act(v.requires_grad_())
            (q * q).sum().backward()
            outs.append(q)
        assert outs[0].placements == (placement,) and torch.equal(whole(outs[0]), outs[1])
        assert torch.equal(whole(inputs[0].grad), inputs[1].grad)
        for (name, p), q in zip(acts[0].named_parameters(), acts[1].parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: {m}")
    q = quantize_activation(distribute_tensor(x, mesh, [Shard(0)]), 1.0, 4, front="relu")
    assert torch.equal(whole(q), quantize_activation(x, 1.0, 4, front="relu"))
    with pytest.raises(ValueError, match="scale: expected one element for activations that are sharded"):
        quantize_activation(distribute_tensor(x, mesh, [Shard(0)]), torch.rand(10) + 0.5, 4)


def _parallel(rank):
    _tensor_parallel(rank)
    _activations(rank)


@pytest.mark.parametrize("task", [_fsdp, _parallel])
def test_two_processes_have_what_one_has(task):
    run_on_all(task)
