"""A quantized model that threads share gives each of them what it gives one alone, values and gradients."""

import sys
import threading

import torch
from torch import nn

import quantops as Q

torch.set_num_threads(1)
METHODS = {
    "msq": lambda **o: Q.MSQConfig(bits=4, **o),
    "truncquant": lambda **o: Q.TruncQuantConfig(bits=(8, 4), **o),
    "cpq": lambda **o: Q.CPQConfig(bits=3, **o),
}


def make(rng):
    """A model, and what threads do with it at once."""
    return {
        "method": rng.choice(sorted(METHODS)),
        "fuse": rng.choice(["model", "layer"]),
        "cache": rng.random() < 0.3,
        "threads": rng.choice([2, 4, 8]),
        "train": rng.random() < 0.5,
        "penalty": rng.random() < 0.3,
        "activations": rng.random() < 0.4,
        "joint": rng.random() < 0.3,
        "interval": rng.choice([1e-6, 1e-5, 1e-3]),
        "rounds": rng.randrange(3, 20),
        "seed": rng.randrange(2**31),
    }


def _once(model, x, case):
    """What one pass gives: outputs, and gradients where the case trains."""
    if not case["train"]:
        with torch.no_grad():
            return [model(x)]
    if case["joint"] and case["method"] == "truncquant":
        loss = Q.joint_loss(model, lambda out: out.square().sum(), x).loss
    else:
        loss = model(x).square().sum()
    if case["penalty"] and case["method"] == "msq":
        loss = loss + 1e-3 * Q.penalty(model)
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


def check(case):
    """Runs the threads. A process that dies is noticed by the runner."""
    torch.manual_seed(case["seed"])
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 5))
    options = {"fuse": case["fuse"], "cache": case["cache"]}
    if case["activations"]:
        options["act_bits"] = "weights" if case["method"] == "truncquant" else 4
    Q.quantize_(model, METHODS[case["method"]](**options))
    if case["activations"]:  # they start with the first batch of each width
        for bits in (4, 8) if case["method"] == "truncquant" else (None,):
            if bits:
                Q.set_bits(model, bits)
            model(torch.randn(8, 24))
    model.eval()
    inputs = [torch.randn(8, 24) for _ in range(case["threads"])]
    want = [_once(model, x, case) for x in inputs]
    wrong, interval = [], sys.getswitchinterval()

    def work(i):
        try:
            for _ in range(case["rounds"]):
                for got, expected in zip(_once(model, inputs[i], case), want[i]):
                    if not torch.equal(got, expected):
                        wrong.append(f"thread {i}: another result, by up to {float((got - expected).abs().max())}")
        except Exception as error:
            wrong.append(f"thread {i}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(case["threads"])]
    sys.setswitchinterval(case["interval"])
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong, f"{len(wrong)} times: {wrong[0]}"
    return case["threads"] * case["rounds"]
