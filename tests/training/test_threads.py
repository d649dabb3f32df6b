"""Threads that share a quantized model: what a pass leaves is its thread's."""

import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quantops import CPQConfig, MSQConfig, TruncQuantConfig, calibrate, joint_loss, joint_step, penalty, quantize_
from quantops.nn import quantized

pytestmark = pytest.mark.usefixtures("one_thread")
FUSES = pytest.mark.parametrize("fuse", ["model", "layer"])
CACHES = pytest.mark.parametrize("cache", [False, True])
CONFIGS = [
    lambda **options: MSQConfig(bits=3, **options),
    lambda **options: MSQConfig(bits=3, scale=2.8, **options),
    lambda **options: TruncQuantConfig(companding="tanh", **options),
    lambda **options: CPQConfig(bits=3, **options),
]


class Net(nn.Module):
    def __init__(self, widths=8):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(widths, widths), nn.LayerNorm(widths)) for _ in range(6)))

    def forward(self, x):
        return self.layers(x)


@pytest.fixture
def short_switches():
    """Threads that give way to each other all the time."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def share(count, turns, work):
    """``work(i)`` by each of ``count`` threads, ``turns`` times: equal results always, those of one thread."""
    expected, wrong = [work(i) for i in range(count)], []

    def run(i):
        try:
            for _ in range(turns):
                if not all(torch.equal(a, b) for a, b in zip(work(i), expected[i], strict=True)):
                    wrong.append("other values")
        except Exception as e:
            wrong.append(repr(e))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, (len(wrong), wrong[:3])


@FUSES
@CACHES
@pytest.mark.parametrize("config", CONFIGS)
def test_threads_train_and_evaluate_one_model(config, fuse, cache, short_switches):
    torch.manual_seed(0)
    model = quantize_(Net(), config(fuse=fuse, cache=cache))
    parameters, x = list(model.parameters()), torch.randn(4, 5, 8)
    regular = isinstance(config(), MSQConfig)

    def work(i):
        if i == 3:
            with torch.no_grad():
                return [model(x[i])]
        loss = model(x[i]).square().sum()
        return torch.autograd.grad(loss + 0.01 * penalty(model) if regular else loss, parameters)

    share(4, 15, work)


def test_many_threads_evaluate_one_model(short_switches):
    torch.manual_seed(0)
    model, x = quantize_(Net(), MSQConfig(bits=3)), torch.randn(200, 5, 8)

    def work(i):
        with torch.inference_mode():
            return [model(x[i])]

    share(200, 2, work)


def test_threads_that_evaluate_keep_no_weights():
    model, x = quantize_(Net(), MSQConfig(bits=3)), torch.randn(5, 8)
    with torch.no_grad():
        model(x)
    assert all(p.slot.result[0].value.q is None for _, _, p in quantized(model))
    model(x)
    assert all(p.slot.result[0].value.q is not None for _, _, p in quantized(model))


def test_a_thread_that_evaluates_leaves_joint_steps_of_another_their_widths(short_switches):
    """And sees the width that is selected."""
    torch.manual_seed(0)
    model = quantize_(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), TruncQuantConfig()).eval()
    parameters, x, y = list(model.parameters()), torch.randn(4, 6, 8), torch.arange(6) % 3

    def work(i):
        if i:
            with torch.no_grad():
                return [model(x[i])]
        model.zero_grad()
        joint_step(model, lambda out: F.cross_entropy(out, y), x[i])
        return [p.grad.clone() for p in parameters]

    share(3, 15, work)


@pytest.mark.parametrize("act_shared", [False, True])
def test_joint_steps_have_widths_of_their_own(act_shared, short_switches):
    """Each thread's; one that evaluates sees the width that is selected."""
    torch.manual_seed(0)
    scale = "tracked" if act_shared else "step"
    config = TruncQuantConfig(act_bits="weights", act_scale=scale, act_shared=act_shared)
    model = quantize_(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), config)
    parameters, x, y = list(model.parameters()), torch.randn(4, 6, 8), torch.arange(6) % 3
    calibrate(model, x)
    model.eval()

    def work(i):
        if i == 3:
            with torch.no_grad():
                return [model(x[i])]
        loss = joint_loss(model, lambda out: F.cross_entropy(out, y), x[i]).loss
        return torch.autograd.grad(loss, parameters)

    share(4, 15, work)
    assert [int(t) for t in (model[2].bits, model[1].index)] == [8, 0]


def test_replicas_of_data_parallel_use_weights_of_their_own():
    """As torch.nn.parallel.replicate makes them, which needs GPUs to be called."""
    model = quantize_(nn.Sequential(nn.Linear(8, 8)), MSQConfig(bits=3))
    x = torch.randn(5, 8)
    model(x)
    copies = {m: m._replicate_for_data_parallel() for m in model.modules()}
    for m, copy in copies.items():
        for name, child in m._modules.items():
            copy._modules[name] = copies[child]
        for name, p in m._parameters.items():
            setattr(copy, name, 2 * p)  # another tensor, with a graph of its own
    replica = copies[model]
    assert torch.equal(replica[0].weight, 2 * model[0].weight)
    replica(x).sum().backward()
    twin = quantize_(nn.Sequential(nn.Linear(8, 8)), MSQConfig(bits=3))
    twin.load_state_dict(model.state_dict())
    twin(x).sum().backward()
    grad, half = (m[0].parametrizations.weight.original.grad for m in (model, twin))
    assert torch.equal(grad, 2 * half)


def test_a_thread_evaluates_while_another_calibrates():
    """Once it got float activations, and its inputs were counted."""
    torch.manual_seed(0)
    model = quantize_(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), MSQConfig(act_bits=2)).eval()
    x, seen = torch.randn(4, 5, 8), []
    scales = calibrate(model, x)
    expected = model(x[0])

    def batches():
        yield x[0]
        thread = threading.Thread(target=lambda: seen.extend([model(x[0]), model(100 * x[1])]))
        thread.start()
        thread.join()
        yield from x[1:]

    assert all(torch.equal(s, scales[name]) for name, s in calibrate(model, batches()).items())
    assert torch.equal(seen[0], expected)
