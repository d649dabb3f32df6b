"""The models that tests of exports export."""

import torch
from torch import nn

import quantops as Q


class Net(nn.Module):
    """Every kind of layer whose weight is read in a way of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.norm, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.up, self.fc = nn.Conv2d(8, 16, 3, groups=4), nn.ConvTranspose2d(16, 4, 2), nn.Linear(100, 10)

    def forward(self, x):
        x = self.up(self.conv2(self.act(self.norm(self.conv1(x)))))
        return self.fc(x.flatten(1))


class Kinds(nn.Module):
    """Weights with other names and rows, and one that two layers share."""

    names = ["embed.weight", "head.weight", "attention.in_proj_weight", "attention.out_proj.weight", "up.weight"]

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight
        self.attention, self.up = nn.MultiheadAttention(8, 2, batch_first=True), nn.ConvTranspose1d(8, 8, 3, groups=2)

    def forward(self, ids):
        x = self.embed(ids)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.up(x.transpose(1, 2)).transpose(1, 2))


class Experts(nn.Module):
    """A scale for each expert and row."""

    num_experts = 3

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 8))

    def forward(self, x):
        return torch.einsum("bi,eoi->beo", x, self.up)


def weighted(name, module):
    return hasattr(module, "weight") and not isinstance(module, nn.BatchNorm2d)


CONFIGS = {
    "msq 4": Q.MSQConfig(bits=4),
    "msq 8": Q.MSQConfig(bits=8, scale="absmax"),
    "msq 2 per row": Q.MSQConfig(bits=2, scale="absmax", per_row=True),
    "msq 16": Q.MSQConfig(bits=16),
    "msq 0": Q.MSQConfig(bits=0, k=0),
    "msq 4 full": Q.MSQConfig(bits=4, grid="full", per_row=True),
    "msq 3 sign": Q.MSQConfig(bits=3, grid="sign", scale=2.8),
    "truncquant": Q.TruncQuantConfig(bits=(8, 4, 2, 1), per_row=True),
    "truncquant tanh": Q.TruncQuantConfig(bits=(8, 3), scale="absmax", companding="tanh", out_scale="absmean"),
    "truncquant tanh only": Q.TruncQuantConfig(bits=(8, 3), scale="absmax", companding="tanh"),
    "cpq, activations": Q.CPQConfig(bits=4, act_bits=4),
    "cpq per row": Q.CPQConfig(bits=3, per_row=True),
    "dropbits": Q.CPQConfig(bits=4, dropbits="learned"),
}


def made(config, dtype=torch.float32):
    model, x = Net().to(dtype), torch.randn(2, 3, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))
    Q.quantize_(model, config, weighted)
    model(x)  # activations start from a batch
    return model.eval(), x


def run(proto, x):
    """What onnxruntime makes of x, a tensor for each output."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float32
    session = ort.InferenceSession(proto.SerializeToString(), options)
    return [torch.from_numpy(v) for v in session.run(None, {session.get_inputs()[0].name: x.numpy()})]
