"""The ops as citizens of torch: opcheck, torch.compile, autocast, checkpointing, and what autograd keeps."""

import os
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import quantops as Q

CALLS = {
    "absmax": lambda w, s, n, k: (w, True),
    "absmean": lambda w, s, n, k: (w, False),
    "round_clamp": lambda w, s, n, k: (w, s, n, 0, True, False, torch.bfloat16),
    "round_clamp_out": lambda w, s, n, k: ([t.detach() for t in w], _detached(s), n, 1, False, _like(w)),
    "msq": lambda w, s, n, k: (w, s, n, k, 2, False, w[0].dtype),
    "msq_out": lambda w, s, n, k: (
        [t.detach() for t in w],
        _detached(s),
        n,
        k,
        0,
        _like(w),
        torch.empty(len(w)),
        torch.empty(len(w), dtype=torch.int64),
        torch.empty(len(w)),
    ),
    "lsb": lambda w, s, n, k: (w, s, n, k, 2),
    "lsb_stats": lambda w, s, n, k: (w, s, n, k, 0, False),
    "uniform_backward": lambda w, s, n, k: (
        [torch.randn_like(t).requires_grad_() for t in w],
        torch.rand(len(w)).requires_grad_(),
        _detached(w),
        _detached(s),
        n,
        k,
        0,
        True,
        True,
    ),
    "add_lsb_grad_": lambda w, s, n, k: (_like(w), _detached(w), _detached(s), n, k, 0, torch.full((2,), 0.5)),
    "encode": lambda w, s, n, k: (w, s, n, 0, 2, True),
    "decode": lambda w, s, n, k: (
        [torch.zeros(t.shape, dtype=torch.int32) for t in w],
        _detached(s),
        n,
        1,
        True,
        torch.float16,
    ),
    "truncate": lambda w, s, n, k: (w, s, [], torch.stack([n, k]), n, 1, False, False, False, w[0].dtype),
    "truncate_backward": lambda w, s, n, k: (
        [torch.randn_like(t).requires_grad_() for t in w + w[:1]] + [torch.empty(0)],
        _detached(w),
        _detached(s),
        _detached(s),
        torch.stack([n, k]),
        n,
        1,
        True,
        False,
        True,
    ),
    "pack": lambda w, s, n, k: (_codes(w), n.tolist(), 0),
    "unpack": lambda w, s, n, k: (*_packed(w, n), n - k, 0),
    "decode_packed": lambda w, s, n, k: (*_packed(w, n), _detached(s), n - k, 0, 1, True, torch.float16),
    "own_scale": lambda w, s, n, k: (w, True, False),
    "own_scale_backward": lambda w, s, n, k: (
        _detached(w),
        _detached(s),
        [torch.ones_like(v).requires_grad_() for v in s],
        True,
    ),
    "categorical": lambda w, s, n, k: (w, s, s, n, _gates(n), torch.tensor(3), 2, 1, True, torch.bfloat16),
    "categorical_backward": lambda w, s, n, k: (  # second derivatives raise
        [torch.randn_like(t) for t in w],
        _detached(w),
        _detached(s),
        _detached(s),
        n,
        _detached(_gates(n)),
        None,
        0,
        0,
        True,
        True,
        True,
    ),
    "activation": lambda w, s, n, k: (
        w[0],
        s[0].reshape(1),
        torch.zeros(1, requires_grad=True),
        n[:1],
        0,
        True,
        0,
        1,
        1,
        torch.bfloat16,
    ),
    "activation_backward": lambda w, s, n, k: (
        torch.randn(w[1].shape).requires_grad_(),
        None,
        None,
        torch.full((7,), 77, dtype=torch.uint8),
        s[1].detach()[:1],
        None,
        n[:1],
        0,
        True,
        0,
        1,
        0,
        torch.float32,
    ),
    "categorical_activation": lambda w, s, n, k: (w[0], s[0], _detached(s)[0] / 2, n[:1], 1, torch.bfloat16),
    "categorical_activation_backward": lambda w, s, n, k: (  # second derivatives raise
        torch.randn(w[1].shape),
        w[1].abs(),
        torch.zeros(14, dtype=torch.uint8),
        s[0].detach(),
        s[0].detach() / 2,
        n[:1],
        0,
        True,
        torch.float32,
    ),
}


def _codes(w):
    return [torch.ones_like(t, dtype=torch.int32) for t in w]


def _packed(w, n):
    data = torch.ops.quantops.pack(_codes(w), n.tolist(), 0)
    return data, [size for t in w for size in t.shape], [t.dim() for t in w], n.tolist()


def _gates(n):
    return [torch.rand(int(v)).requires_grad_() for v in n]


def _detached(tensors):
    return [t.detach() for t in tensors]


def _like(tensors):
    return [torch.zeros_like(t).detach() for t in tensors]


def _arguments():
    torch.manual_seed(0)
    w = [torch.randn(4, 3, requires_grad=True), torch.randn(2, 3, 3, 3).to(memory_format=torch.channels_last)]
    s = [torch.tensor(2.0, requires_grad=True), torch.rand(2).add(1)]
    return w, s, torch.tensor([4, 7], dtype=torch.int32), torch.tensor([1, 2], dtype=torch.int32)


def test_every_op_is_checked():
    assert set(CALLS) == {name for family in Q.library.OPS.values() for name in family}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    result = torch.library.opcheck(getattr(torch.ops.quantops, name).default, CALLS[name](*_arguments()))
    assert set(result.values()) == {"SUCCESS"}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(12, 20), torch.nn.Linear(20, 3)

    def forward(self, x, bits, k):
        q, penalty, _, _ = Q.foreach.msq([self.a.weight, self.b.weight], None, bits, k)
        h = torch.relu(torch.nn.functional.linear(x, q[0], self.a.bias))
        return torch.nn.functional.linear(h, q[1], self.b.bias).square().mean() + 0.01 * penalty.sum()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_is_one_graph_while_bits_change(backend):
    torch.manual_seed(0)
    torch._dynamo.reset()
    net, x = Net(), torch.randn(8, 12)
    frames = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(net, fullgraph=True, backend=frames)
    for n in range(8, 1, -1):
        bits, k = torch.tensor([n, n - 1 or 1], dtype=torch.int32), torch.tensor([1, int(n > 2)], dtype=torch.int32)
        losses, grads = [], []
        for f in (net, compiled):
            net.zero_grad()
            loss = f(x, bits, k)
            loss.backward()
            losses.append(loss.detach())
            grads.append([p.grad.clone() for p in net.parameters()])
        torch.testing.assert_close(losses[0], losses[1])
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b)
    assert frames.frame_count == 1


def test_compile_with_dynamic_shapes():
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=frames)
    def f(w, bits):
        r = Q.msq(w, None, bits, 1)
        return r.q.sum() * 2 + r.penalty

    for rows in (5, 9, 14):
        w = torch.randn(rows, 7, requires_grad=True)
        f(w, torch.tensor(4)).backward()
        want = 2 + Q.lsb(w.detach(), None, 4).sign()
        assert torch.equal(w.grad, want)
    assert frames.frame_count == 1


def test_compile_of_single_ops_with_python_bits():
    torch._dynamo.reset()
    w = torch.randn(30, 4)
    for f in (
        lambda w: Q.round_clamp(w, 1.5, 4, signed=False, grid="full"),
        lambda w: Q.lsb(w, Q.absmax(w), 4, 2),
        lambda w: Q.decode(Q.encode(w, 2.0, 3), 2.0, 3),
        lambda w: Q.absmean(w, per_row=True),
    ):
        assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(w), f(w))


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_is_saved_for_backward_but_the_inputs(compiled):
    torch._dynamo.reset()
    w = [torch.randn(64, 32, requires_grad=True), torch.randn(1000, requires_grad=True)]
    known = {t.data_ptr() for t in w}
    kept = []

    def pack(t):
        if t.data_ptr() not in known:
            kept.append(t.numel() * t.element_size())
        return t

    def forward(w, bits):
        r = Q.foreach.msq(w, None, bits, 1)
        return torch.cat([q.flatten() for q in r.q]).sum() + r.penalty.sum()

    if compiled:
        forward = torch.compile(forward, fullgraph=True, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = forward(w, torch.tensor([4, 5], dtype=torch.int32))
    loss.backward()
    assert sum(kept) <= 2 * (4 + 4 + 4), kept  # per weight: its scale, bits and k


class CategoricalNet(torch.nn.Module):
    """Learned alpha, sigma and gates; a seed that is data."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(12, 20)
        self.alpha, self.sigma = torch.nn.Parameter(torch.full((1,), 0.1)), torch.nn.Parameter(torch.full((20,), 0.05))
        self.gates = torch.nn.Parameter(torch.tensor([1.0, 0.9, 0.8]))

    def forward(self, x, seed):
        q = sum(
            Q.categorical(
                self.layer.weight, self.alpha, self.sigma, 3, gates=self.gates, mode=mode, grad=grad, seed=seed
            )
            for mode, grad in (("hard", "winner"), ("sample", "soft"), ("soft", "winner"))
        )
        h = Q.categorical(torch.relu(torch.nn.functional.linear(x, q)), 0.5, self.alpha, 2, signed=False)
        return h.square().mean()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_categorical_compiles_to_one_graph(backend):
    torch.manual_seed(0)
    torch._dynamo.reset()
    net, x = CategoricalNet(), torch.randn(8, 12)
    frames = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(net, fullgraph=True, backend=frames)
    for seed in (1, 2):
        results = []
        for f in (net, compiled):
            net.zero_grad()
            loss = f(x, torch.tensor(seed))
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert len(results[0]) == 5 and frames.frame_count == 1


def test_categorical_saves_its_inputs_alone():
    x = [torch.randn(64, 32, requires_grad=True), torch.randn(1000, requires_grad=True)]
    known, kept = {t.data_ptr() for t in x}, []

    def pack(t):
        if t.data_ptr() not in known:
            kept.append(t.numel() * t.element_size())
        return t

    for mode in ("hard", "soft", "sample"):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            q = Q.foreach.categorical(x, [0.1, 0.2], [0.1, 0.1], 3, mode=mode, gates=[torch.ones(3)] * 2, seed=1)
        assert sum(kept) <= 2 * (4 + 4 + 4 + 12) + 8, kept  # per tensor: alpha, sigma, bits and gates; and the seed
        del q


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_emits_its_dtype_directly(dtype):
    w = torch.randn(20, 10, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        r = Q.msq(w, None, 4)
    assert r.q.dtype == dtype and r.penalty.dtype == torch.float32
    assert torch.equal(r.q, Q.round_clamp(w, None, 4).to(dtype))
    (r.q.float().sum() + r.penalty).backward()
    assert w.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=dtype):
        assert Q.round_clamp(w.double(), None, 4).dtype == torch.float64


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    torch.manual_seed(0)
    w, x = torch.randn(6, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)

    def block(x, w):
        r = Q.msq(w, None, 3, 1)
        return torch.tanh(x @ r.q.t()).sum() + r.penalty

    want = torch.autograd.grad(block(x, w), (w, x))
    checkpoint(block, x, w, use_reentrant=reentrant).backward()
    assert torch.equal(w.grad, want[0]) and torch.equal(x.grad, want[1])


def test_meta_tensors_have_shapes():
    w = torch.empty(4, 3, device="meta")
    q = torch.ops.quantops.round_clamp(
        [w],
        [torch.empty((), device="meta")],
        torch.empty(1, dtype=torch.int32, device="meta"),
        0,
        True,
        False,
        torch.float16,
    )[0]
    assert q.shape == w.shape and q.dtype == torch.float16 and q.device.type == "meta"


def _calls_in_quantops(fn):
    """How often functions of the package are called while ``fn`` runs."""
    found, folder = [], os.path.dirname(Q.__file__)
    sys.setprofile(
        lambda frame, event, _: (
            event == "call" and frame.f_code.co_filename.startswith(folder) and found.append(frame.f_code.co_name)
        )
    )
    try:
        fn()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.skipif(
    Q.info()["devices"]["cpu"]["implementation"] != "cpp", reason="Python kernels walk over their lists"
)
def test_list_calls_run_no_python_per_tensor(scaled):
    """A list of many small weights is bound by the host: what is checked of each tensor, C++ checks."""
    calls = []
    for count in (2, 30):
        w = [torch.randn(3, 2, requires_grad=True) for _ in range(count)]
        scale = [torch.ones(()) for _ in w] if scaled else None

        def step():
            q, penalty, _, _ = Q.foreach.msq(w, scale, 4)
            torch.autograd.backward([*q, penalty], [*(torch.ones_like(t) for t in q), torch.ones_like(penalty)])

        step()
        calls.append(_calls_in_quantops(step))
    assert calls[0] and calls[0] == calls[1]
