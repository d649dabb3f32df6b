"""The example of the demo that trains on folders of images, on a few of them. No accuracy."""

import numpy as np
import pytest
import torch

import quantops

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
pytest.importorskip("safetensors")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_resnet20_by_msq_from_a_folder(tmp_path, capsys):
    from quantops.demo import cifar10_msq
    from quantops.demo.resnet20 import ResNet20

    generator = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 4)):
        for name in ("cat", "dog"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    x, y = cifar10_msq.images(tmp_path / "test")
    assert x.shape == (8, 3, 32, 32) and y.tolist() == [0] * 4 + [1] * 4 and -1 <= x.min() and x.max() <= 1

    torch.manual_seed(0)
    out = tmp_path / "resnet20.safetensors"
    accuracy, report = cifar10_msq.main(tmp_path, epochs=3, batch=8, out=out)
    assert 0 <= accuracy <= 100 and "step 0 of 6" in capsys.readouterr().out
    found = quantops.load_int(out)
    assert {row.name + ".weight": row.bits for row in report.rows} == {name: v.bits for name, v in found.items()}
    assert len(found) == len([m for m in ResNet20().modules() if quantops.is_linear_or_conv("", m)])
