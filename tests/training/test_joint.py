"""joint_loss and joint_step on models of all kinds: keyword arguments, outputs by name, distillation of one's own."""

import collections

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from networks import grads, same
from quantops import TruncQuantConfig, joint_loss, joint_step, quantize_

Output = collections.namedtuple("Output", "loss logits")


class Model(nn.Module):
    """As those of transformers: a loss where there are labels."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, *, labels=None, gain=1.0):
        logits = self.b(self.a(x).relu()) * gain
        if self.kind == "tensor":
            return logits
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if self.kind == "dict" else Output(loss, logits)


def make(kind):
    torch.manual_seed(0)
    return quantize_(Model(kind), TruncQuantConfig(bits=(6, 3, 1)))


def data():
    g = torch.Generator().manual_seed(1)
    return torch.randn(5, 6, generator=g), torch.randint(0, 3, (5,), generator=g)


def train(joint, model, *args, **options):
    result = joint(model, *args, **options)
    if joint is joint_loss:
        result.loss.backward()
    return grads(model), result


@pytest.mark.parametrize("joint", [joint_loss, joint_step])
@pytest.mark.parametrize("distill", [{}, {"distill": 0.5, "distill_from": "wider"}, {"distill": 1.0}])
def test_outputs_by_name_are_those_of_a_plain_tensor(joint, distill):
    x, y = data()
    options = {"kwargs": {"gain": 2.0}, **distill}
    expected, of_tensor = train(joint, make("tensor"), lambda out: F.cross_entropy(out, y), x, **options)
    for kind, positional, named in (("dict", (x,), {}), ("object", (), {"x": x})):
        kwargs = {"labels": y, "gain": 2.0, **named}
        found, result = train(joint, make(kind), None, *positional, kwargs=kwargs, **distill)
        assert same(found, expected) and result.losses == of_tensor.losses and result.losses.keys() == {6, 3, 1}


@pytest.mark.parametrize("joint", [joint_loss, joint_step])
def test_a_distillation_of_ones_own(joint):
    x, y = data()
    seen = []

    def squares(out, teacher):
        seen.append((out["logits"].detach(), teacher["logits"]))
        assert not teacher["logits"].requires_grad and out["logits"].requires_grad
        return F.mse_loss(out["logits"], teacher["logits"])

    model, teacher = make("dict"), {"logits": torch.ones(5, 3), "loss": None}
    options = {"kwargs": {"labels": y}, "distill": 0.25, "distill_fn": squares}
    found, result = train(joint, model, None, x, teacher=teacher, **options)
    assert len(seen) == 3 and seen[0][1] is not teacher["logits"] and bool((seen[0][1] == 1).all())
    assert seen[1][1] is not seen[0][0] and torch.equal(seen[1][1], seen[0][0]) and torch.equal(seen[2][1], seen[0][0])
    for (own, of_teacher), value in zip(seen, result.losses.values()):
        expected = 0.25 * F.mse_loss(own, of_teacher) + 0.75 * F.cross_entropy(own, y)
        assert torch.allclose(value, expected)
    assert all(g.abs().sum() > 0 for g in found.values())


@pytest.mark.parametrize(
    "args, options, error, text",
    [
        ((3,), {}, TypeError, "loss_fn: expected a function"),
        ((None,), {}, TypeError, "loss_fn: expected a function of the output, since that of the model, Tensor"),
        ((torch.sum,), {"kwargs": [1]}, TypeError, "kwargs: expected a dict of .*, got list"),
        ((torch.sum,), {"distill_fn": 3, "distill": 1.0}, TypeError, "distill_fn: expected a function of two outputs"),
        ((torch.sum,), {"distill_fn": F.mse_loss}, ValueError, "distill_fn: expected distill > 0"),
        ((torch.sum,), {"teacher": {"loss": 1}, "distill": 1.0}, TypeError, "teacher: expected a tensor of logits"),
    ],
)
@pytest.mark.parametrize("joint", [joint_loss, joint_step])
def test_errors_name_the_argument(joint, args, options, error, text):
    with pytest.raises(error, match=text):
        joint(make("tensor"), *args, data()[0], **options)
