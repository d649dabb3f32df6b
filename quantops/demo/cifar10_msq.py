"""ResNet-20 by MSQ, on folders of images: ``python -m quantops.demo.cifar10_msq FOLDER``, of FOLDER/train/CLASS/*.png
and FOLDER/test/CLASS/*.png, as CIFAR-10 is often unpacked."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import quantops as Q
from quantops.demo.resnet20 import ResNet20


def images(folder):
    """(images, labels) of a folder with a folder for each class."""
    files = sorted(folder.glob("*/*.*"))
    classes = sorted({f.parent.name for f in files})
    x = np.stack([np.asarray(Image.open(f).convert("RGB").resize((32, 32))) for f in files])
    return torch.tensor(x).movedim(3, 1) / 127.5 - 1, torch.tensor([classes.index(f.parent.name) for f in files])


def main(folder, epochs=30, batch=128, out="resnet20.safetensors"):
    """Accuracy in percent, with the report of bits."""
    (x, y), (x_test, y_test) = (images(Path(folder) / part) for part in ("train", "test"))
    model = ResNet20(classes=int(y.max()) + 1)
    Q.quantize_(model, Q.MSQConfig(bits=8, penalty="decoupled", penalty_unit="gradient"))
    steps = epochs * (len(x) // batch)
    controller = Q.MSQController(model, target=12.8, interval=max(1, steps // 40), threshold=0.5, samples=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        i = torch.randint(len(x), (batch,))
        flipped = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, x[i], x[i].flip(3))
        loss = F.cross_entropy(model(flipped), y[i])
        optimizer.zero_grad()
        loss.backward()
        Q.add_penalty_grad_(model, controller.strength)
        optimizer.step()
        schedule.step()
        controller.step(lambda x=flipped, y=y[i]: F.cross_entropy(model(x), y))
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {loss:.3f}, {controller.compression:.2f}x")
    Q.save_int(model.eval(), out)
    with torch.no_grad():
        right = torch.cat([model(part).argmax(1) for part in x_test.split(500)]) == y_test
    return 100 * right.float().mean().item(), Q.bit_report(model)


if __name__ == "__main__":
    print(*main(sys.argv[1]), sep=" % right\n")
