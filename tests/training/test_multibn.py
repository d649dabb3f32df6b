"""MultiBatchNorm: a row is the batch norm of torch, of any kind; update_bn."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from networks import close, data, state
from quantops import MultiBatchNorm, TruncQuantConfig, joint_loss, joint_step, plain_model, quantize_, set_bits


class BatchNormAct(nn.BatchNorm2d):
    """As timm has it: the activation is in it, and the forward is its own."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.drop, self.act = nn.Identity(), nn.PReLU(init=0.1)

    def forward(self, x):
        self._check_input_dim(x)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        batch = self.training or self.running_mean is None
        statistics = self.running_mean, self.running_var
        x = F.batch_norm(x, *statistics, self.weight, self.bias, batch, self.momentum, self.eps)
        return self.act(self.drop(x))


@pytest.mark.parametrize(
    "norm, shape",
    [
        (nn.BatchNorm1d(3), (5, 3)),
        (nn.BatchNorm1d(3, affine=False), (5, 3, 4)),
        (nn.BatchNorm2d(3, eps=0.1), (5, 3, 4, 2)),
        (nn.BatchNorm3d(3, momentum=0.5), (2, 3, 4, 2, 2)),
        (nn.BatchNorm2d(3, track_running_stats=False), (5, 3, 4, 2)),
        (nn.BatchNorm1d(3, momentum=None), (5, 3)),
        (nn.SyncBatchNorm(3), (5, 3, 4)),
        (nn.SyncBatchNorm(3, momentum=None, affine=False), (5, 3, 4)),
        (BatchNormAct(3), (5, 3, 4, 2)),
        (BatchNormAct(3, track_running_stats=False), (5, 3, 4, 2)),
    ],
)
def test_a_row_is_the_batch_norm_of_torch_bit_for_bit(norm, shape):
    torch.manual_seed(0)
    if norm.affine:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    plain, parameters = copy.deepcopy(norm), dict(norm.named_parameters())
    multi = MultiBatchNorm(norm, (8, 2))
    found = {name.removeprefix("norm."): p for name, p in multi.named_parameters()}
    assert found.keys() == parameters.keys() and all(found[name] is p for name, p in parameters.items())
    multi.select(1)
    for train in (True, True, False):
        x = torch.randn(shape)
        multi.train(train), plain.train(train)
        assert torch.equal(multi(x), plain(x))
        for k, v in plain.state_dict().items():
            if not k.startswith("act."):
                assert torch.equal(multi.state_dict()[k][1], v)
            assert torch.equal(multi.plain(1).state_dict()[k], v)
        assert type(multi.plain(1)) is type(plain) and torch.equal(multi.plain(1).eval()(x), plain.eval()(x))
    with pytest.raises(ValueError, match="expected .*D input"):
        multi(torch.randn(4))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_network_of_other_batch_norms_trains(compiled, fresh_compiler):
    def start():
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 3, 3, bias=False), BatchNormAct(3), nn.Flatten(), nn.Linear(48, 4), nn.SyncBatchNorm(4)
        return quantize_(nn.Sequential(*layers), TruncQuantConfig(bits=(6, 2)))

    model, twin = start(), start()
    x, y = torch.randn(5, 1, 6, 6), torch.randint(0, 4, (5,))
    run = torch.compile(model, backend="aot_eager") if compiled else model
    for _ in range(2):
        joint_loss(run, lambda out: F.cross_entropy(out, y), x).loss.backward()
        for m in (6, 2):
            set_bits(twin, m)
            F.cross_entropy(twin(x), y).backward()
    set_bits(twin, 6)
    assert {n for n, _ in twin.named_parameters() if "act" in n} == {"1.norm.act.weight"}
    for (n, p), q in zip(model.named_parameters(), twin.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-6) and q.grad.abs().sum() > 0, n
    assert close(model.state_dict(), twin.state_dict())
    assert twin[1].num_batches_tracked.tolist() == twin[4].num_batches_tracked.tolist() == [2, 2]
    plain = plain_model(model, 2)
    set_bits(model, 2)
    assert type(plain[1]) is BatchNormAct and torch.equal(plain.eval()(x), model.eval()(x))
    assert plain.state_dict().keys() == nn.Sequential(*plain).state_dict().keys() >= {"1.running_mean", "4.weight"}
    with pytest.raises(AttributeError, match="before quantops.quantize_"):
        nn.SyncBatchNorm.convert_sync_batchnorm(twin)


def test_update_bn_computes_the_statistics_of_the_selected_width():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
    model = nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 9), nn.BatchNorm1d(9))
    quantize_(model, TruncQuantConfig())
    batches = [data(seed=i)[0] for i in range(3)]
    joint_step(model, lambda out: out.square().mean(), data()[0])
    before = state(model)
    set_bits(model, 2)
    plain = plain_model(model, 2).train()
    for layer in (1, 5):
        plain[layer].momentum = None
        plain[layer].reset_running_stats()
    with torch.no_grad():
        for x in batches:
            plain(x)
    torch.optim.swa_utils.update_bn(batches, model)
    row = model[1].widths.index(2)
    for layer in (1, 5):
        norm, expected = model[layer], plain[layer]
        assert norm.momentum is not None and norm.num_batches_tracked[row] == 3
        for part in ("running_mean", "running_var"):
            new, old = getattr(norm, part), before[f"{layer}.{part}"]
            assert torch.equal(new[row], getattr(expected, part)) and not torch.equal(new[row], old[row])
            others = [i for i in range(len(norm.widths)) if i != row]
            assert torch.equal(new[others], old[others])
