"""The images of the training study: files, folders, subsets, augmentation, batches."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.training import data
from images import CLASSES, Image, arrays, pictures


def test_npz_holds_the_decoded_images(file, tmp_path):
    found, raw = data.load(file, cache=tmp_path / "cache"), arrays()
    assert found.classes == CLASSES and found.train.x.shape == (24, 3, 32, 32) and found.train.x.dtype == torch.uint8
    blob, ends = raw["test_jpeg"], raw["test_offsets"]
    expected = np.asarray(Image.open(io.BytesIO(blob[ends[4] : ends[5]].tobytes())))
    assert torch.equal(found.test.x[4], torch.tensor(expected).permute(2, 0, 1))
    assert found.test.y.tolist() == raw["test_labels"].tolist()
    assert len(list((tmp_path / "cache").iterdir())) == 1
    again = data.load(file, cache=tmp_path / "cache")
    assert torch.equal(again.train.x, found.train.x) and torch.equal(again.test.y, found.test.y)


def test_folders(tmp_path):
    images, labels = pictures(60, size=20)
    for i, (image, label) in enumerate(zip(images, labels)):
        folder = tmp_path / "all" / f"class {label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02}.png")
    found = data.load(tmp_path / "all", size=20)
    assert (len(found.train.y), len(found.test.y), found.classes) == (54, 6, CLASSES)
    assert torch.equal(found.test.x[0], torch.tensor(images[0]).permute(2, 0, 1))
    assert data.load(tmp_path / "all").train.x.shape == (54, 3, 32, 32)
    (tmp_path / "two").mkdir()
    for part in ("train", "test"):
        (tmp_path / "two" / part).symlink_to(tmp_path / "all")
    found = data.load(tmp_path / "two", size=20)
    assert len(found.train.y) == len(found.test.y) == 60 and torch.equal(found.train.x, found.test.x)


def test_subset_is_balanced_and_fixed(file):
    images = data.load(file).train
    part = images.subset(13)
    assert sorted(torch.bincount(part.y).tolist()) == [4, 4, 5]
    assert torch.equal(part.x, images.subset(13).x) and not torch.equal(part.x, images.subset(13, seed=1).x)


def test_augmentation_crops_and_flips():
    x = torch.randint(256, (40, 3, 6, 6), dtype=torch.uint8)
    made = data.augment(x, torch.Generator().manual_seed(0), pad=2)
    flipped = set()
    for image, got in zip(F.pad(x, (2,) * 4), made):
        crops = [
            (flip, image[:, i : i + 6, j : j + 6].flip(2) if flip else image[:, i : i + 6, j : j + 6])
            for i in range(5)
            for j in range(5)
            for flip in (False, True)
        ]
        found = [flip for flip, crop in crops if torch.equal(crop, got)]
        assert found
        flipped.add(found[0])
    assert flipped == {False, True}
    assert torch.equal(made, data.augment(x, torch.Generator().manual_seed(0), pad=2))


def test_batches_are_every_image_once(file):
    images = data.load(file).train
    order = torch.randperm(24, generator=torch.Generator().manual_seed(5))
    labels = [y for _, y in data.batches(images, 5, torch.Generator().manual_seed(5))]
    assert torch.equal(torch.cat(labels), images.y[order[:20]])
    x = data.normalise(images.x)
    assert torch.allclose(x[3, 1, 4, 7] * data.STD[1] + data.MEAN[1], images.x[3, 1, 4, 7] / 255)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"train_labels": None}, "no array train_labels"),
        ({"train_jpeg": np.zeros(9, np.float32)}, "train_jpeg: expected a row of uint8"),
        ({"test_offsets": np.arange(10)}, "test_offsets: expected increasing integers from 0 to the"),
        ({"test_offsets": np.zeros(0, np.int64)}, "test_offsets"),
        ({"test_labels": np.zeros(4, np.int64)}, "test_labels: expected 9 integers"),
        ({"test_labels": np.zeros(9)}, "test_labels: expected 9 integers"),
        (
            {
                "test_jpeg": np.arange(100, dtype=np.uint8),
                "test_offsets": np.array([0, 100]),
                "test_labels": np.zeros(1, np.int64),
            },
            "image 0 is none that Pillow can read",
        ),
    ],
)
def test_bad_files(tmp_path, change, words):
    found = {**arrays(), **change}
    np.savez(tmp_path / "bad.npz", **{k: v for k, v in found.items() if v is not None})
    with pytest.raises(ValueError, match=words):
        data.load(tmp_path / "bad.npz")


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="no file or folder"):
        data.load(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match="is not an .npz file"):
        data.load(tmp_path / "text.npz")
    with pytest.raises(ValueError, match="folders of images, one per class, found 0"):
        data.load(tmp_path)
