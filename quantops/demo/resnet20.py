"""ResNet-20, in plain torch."""

from torch import nn


def conv(below, width, kernel, stride=1):
    """A convolution without a bias, which a batch norm follows."""
    return nn.Conv2d(below, width, kernel, stride, kernel // 2, bias=False)


class _Basic(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, below, width, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(below, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        project = nn.Sequential(conv(below, width, 1, stride), nn.BatchNorm2d(width)) if stride > 1 else nn.Identity()
        self.down, self.relu1, self.relu2 = project, nn.ReLU(), nn.ReLU()

    def forward(self, x):
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.down(x))


class ResNet20(nn.Module):
    """ResNet-20 for 32 x 32 images (He et al. 2015), projection shortcuts."""

    def __init__(self, classes=10):
        super().__init__()
        self.conv, self.bn, self.relu = conv(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
        blocks, below = [], 16
        for width in (16, 32, 64):
            for i in range(3):
                blocks.append(_Basic(below, width, 2 if i == 0 and width > 16 else 1))
                below = width
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(64, classes)

    def forward(self, x):
        x = self.blocks(self.relu(self.bn(self.conv(x))))
        return self.fc(x.mean((2, 3)))
