"""Networks for the training steps, in plain torch: the shapes that people train, with no data and no schedules."""

import torch
import torch.nn.functional as F
from torch import nn

from quantops.demo.resnet20 import conv


class _Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut."""

    def __init__(self, below, width, stride, project):
        super().__init__()
        self.conv1, self.bn1 = conv(below, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.down = nn.Sequential(conv(below, 4 * width, 1, stride), nn.BatchNorm2d(4 * width)) if project else None
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()

    def forward(self, x):
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(y)))))
        return self.relu3(y + (x if self.down is None else self.down(x)))


class ResNet50(nn.Module):
    """ResNet-50."""

    def __init__(self, classes=1000):
        super().__init__()
        self.conv, self.bn, self.relu = conv(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU()
        blocks, below = [], 64
        for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
            for i in range(count):
                blocks.append(_Bottleneck(below, width, 2 if i == 0 and width > 64 else 1, i == 0))
                below = 4 * width
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(2048, classes)

    def forward(self, x):
        x = F.max_pool2d(self.relu(self.bn(self.conv(x))), 3, 2, 1)
        return self.fc(self.blocks(x).mean((2, 3)))


class Block(nn.Module):
    """A transformer block: attention and MLP, normalised in front."""

    def __init__(self, width, heads, mlp, causal=False, bias=True):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)
        self.up, self.down = nn.Linear(width, mlp, bias), nn.Linear(mlp, width, bias)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class DeiTSmall(nn.Module):
    """DeiT-S: 12 blocks of width 384 on 16 x 16 patches."""

    def __init__(self, classes=1000, size=224, width=384, depth=12, patch=16):
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) * 0.02)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(*(Block(width, width // 64, 4 * width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def small_vit(classes=10):
    """DeiT for 32 x 32 images: 6 blocks of width 128 on 4 x 4 patches, 1.2 million weights."""
    return DeiTSmall(classes, size=32, width=128, depth=6, patch=4)


class Blocks(nn.Module):
    """The blocks of a language model, on hidden states; embeddings are not quantized and left out."""

    def __init__(self, width=2048, depth=20, mlp=8192):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width, width // 128, mlp, causal=True, bias=False) for _ in range(depth)))

    def forward(self, x):
        return self.blocks(x)
