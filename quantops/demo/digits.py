"""What the demos share: scikit-learn's digits, a small CNN, a training loop, and what a training step costs."""

import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

BATCH = 64


class Net(nn.Module):
    """Three convolutions and a linear layer, 56,224 weights, for 8 x 8 images."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.conv3, self.bn3 = nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, 10)
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()

    def forward(self, x):
        """(batch, 1, 8, 8) images to (batch, 10) logits."""
        x = self.relu1(self.bn1(self.conv1(x)))
        x = F.max_pool2d(self.relu2(self.bn2(self.conv2(x))), 2)
        x = self.relu3(self.bn3(self.conv3(x)))
        return self.fc(x.mean((2, 3)))


class Digits:
    """1,797 real scans of handwritten digits, a fixed quarter of them held out."""

    def __init__(self):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        split = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
        self.x, self.x_test = (torch.tensor(v, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1 for v in split[:2])
        self.y, self.y_test = (torch.tensor(v) for v in split[2:])

    def batches(self, generator):
        """One epoch of shuffled training batches."""
        for i in torch.randperm(len(self.x), generator=generator).split(BATCH):
            if len(i) == BATCH:
                yield self.x[i], self.y[i]

    def accuracy(self, model):
        """Fraction of the held-out images that the model gets right, in percent."""
        model.eval()
        with torch.no_grad():
            right = (model(self.x_test).argmax(1) == self.y_test).float().mean()
        model.train()
        return 100 * right.item()


def train(model, data, epochs, seed, bar, after_step=None, penalty=None, backward=None, parameters=None):
    """Adam with a cosine schedule; ``penalty()`` is added to the loss, ``after_step(x, y)`` follows every step.

    ``backward(x, y)`` takes the place of the loss and its backward pass. ``parameters``: what Adam gets, default all.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(parameters or model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(data.x) // BATCH))
    for _ in range(epochs):
        for x, y in data.batches(generator):
            optimizer.zero_grad()
            if backward:
                backward(x, y)
            else:
                loss = F.cross_entropy(model(x), y)
                (loss if penalty is None else loss + penalty()).backward()
            optimizer.step()
            schedule.step()
            if after_step:
                after_step(x, y)
        bar.update()
    return data.accuracy(model)


def step_costs(steps, rounds=120):
    """{name: (milliseconds a step, most bytes kept for backward at a time)} of {name: (model, its step)}.

    A step: a function that runs a forward and a backward pass.
    """
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=1e-3) for name, (model, _) in steps.items()}
    times = {name: [] for name in steps}
    for i in range(rounds):  # in turn, so that what disturbs the machine disturbs all of them
        for name, (_, step) in steps.items():
            start = time.perf_counter()
            optimizers[name].zero_grad()
            step()
            optimizers[name].step()
            if i >= rounds // 6:
                times[name].append(time.perf_counter() - start)
    return {
        name: (1e3 * statistics.median(times[name]), kept_for_backward(model, step))
        for name, (model, step) in steps.items()
    }


class _Kept:
    """A tensor saved for backward, counted for as long as autograd holds it."""

    def __init__(self, tensor, account):
        self.tensor, self.account, storage = tensor, account, tensor.untyped_storage()
        self.key, self.size = storage.data_ptr(), storage.nbytes()
        account.add(self, 1)

    def __del__(self):
        self.account.add(self, -1)


class _Account:
    """Bytes of the storages that are kept, each counted once, and the most there ever were."""

    def __init__(self):
        self.count, self.now, self.most = {}, 0, 0

    def add(self, kept, by):
        before = self.count.get(kept.key, 0)
        self.count[kept.key] = before + by
        if before == 0 or before + by == 0:
            self.now += by * kept.size
            self.most = max(self.most, self.now)


def kept_for_backward(model, step):
    """The most bytes, parameters apart, that one step keeps for backward at a time."""
    account, parameters = _Account(), {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        return t if t.untyped_storage().data_ptr() in parameters else _Kept(t, account)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.tensor if isinstance(t, _Kept) else t):
        step()
    return account.most
