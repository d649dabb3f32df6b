"""The network that tests of MSQ's and CPQ's training share, and what they ask of a quantized model."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from quantops import CPQConfig, MSQConfig, penalty, quantize_
from quantops.methods.gates import SHIFT
from quantops.nn import quantized
from quantops.positive import positive

# P(z != 0) of the gates of each layer: 4, 2, 1 and 3 bits stay
LEARNED = [[0.9, 0.8, 0.7], [0.9, 0.2, 0.9], [0.3, 0.9, 0.9], [0.6, 0.51, 0.49]]


class Net(nn.Module):
    """reentrant: None, or how the features are checkpointed."""

    reentrant = None

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.mid = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 12))
        self.relu, self.head = nn.ReLU(), nn.Linear(12, 5)

    def features(self, x):
        return self.relu(self.mid(self.conv(x).relu().flatten(1)))

    def forward(self, x):
        if self.reentrant is None:
            return self.head(self.features(x))
        return self.head(checkpoint(self.features, x, use_reentrant=self.reentrant))


def layered(dtype=torch.float32):
    """Layers of all kinds whose weights are quantized, and others, under numbers for names."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.Flatten(),
        nn.Linear(6 * 16, 8),
        nn.Linear(8, 3),
    ).to(dtype)


def make_msq(dtype=torch.float32, **config):
    """With max|w|: by a scale that is a mean, weights that clamp would be in the way of what is compared."""
    torch.manual_seed(0)
    return quantize_(Net().to(dtype), MSQConfig(**{"bits": 5, "scale": "absmax", **config}))


def make_cpq(dtype=torch.float32, **config):
    torch.manual_seed(0)
    model = quantize_(Net().to(dtype), CPQConfig(**{"bits": 4, "min_bits": 1, **config}))
    with torch.no_grad():  # away from where all start
        for name, p in model.named_parameters():
            if ".log_" in name:
                p.add_(torch.linspace(0.1, 0.3, p.numel()))
    return model


def data(dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 6, 6, generator=g).to(dtype), torch.randint(0, 5, (8,), generator=g)


def objective(model, x, y, strength=0.0):
    loss = F.cross_entropy(model(x), y)
    return loss + strength * penalty(model) if strength else loss


def loss_of(model, strength=0.0, seed=1, dtype=torch.float32):
    return objective(model, *data(dtype, seed), strength)


def one_step(model, strength=0.0, **options):
    """The gradients of a step, with the same draws every time."""
    torch.manual_seed(7)
    model.zero_grad()
    loss_of(model, strength, **options).backward()
    return grads(model)


def grads(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def originals(model):
    return {name: owner.original for name, owner, _ in quantized(model)}


def quantizers(model):
    return {name: p for name, _, p in quantized(model)}


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


def close(a, b, tolerance=1e-6):
    assert a.keys() == b.keys()
    return all(
        torch.allclose(a[k].double(), b[k].double(), rtol=0, atol=tolerance * (1 + float(b[k].abs().max())))
        if b[k].is_floating_point()
        else torch.equal(a[k], b[k])
        for k in a
    )


def set_precision(model, bits, k=1):
    for _, _, p in quantized(model):
        p.set_precision(bits, k)


def scales(p):
    """(alpha, sigma) of a layer."""
    return positive(p.alpha_start, p.log_alpha), positive(p.sigma_start, p.log_sigma)


def set_gates(model, values):
    """Sets P(z != 0) of the gates of each layer."""
    with torch.no_grad():
        for p, v in zip(quantizers(model).values(), values):
            p.log_a.copy_(torch.logit(torch.tensor(v)) + SHIFT)


def separable():
    """A problem of four classes that a small network learns: (x, y)."""
    x = torch.randn(128, 1, 6, 6)
    return x, (x[:, 0, :3].sum((1, 2)) > 0).long() + 2 * (x[:, 0, 3:].sum((1, 2)) > 0).long()


def noting(found):
    """A compiler of aot_autograd that appends the names of quantops' ops in a graph, and runs the graph as it is."""

    def compiler(graph, inputs):
        from functorch.compile import make_boxed_func

        found.append([n.target.__name__ for n in graph.graph.nodes if str(n.target).startswith("quantops")])
        return make_boxed_func(graph)

    return compiler
