"""Small images of three classes, as the training study reads them."""

import io

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
CLASSES = 3


def pictures(count, seed=0, size=32):
    """(count, size, size, 3) bytes, and labels in order of class."""
    generator = np.random.default_rng(seed)
    labels = np.sort(np.arange(count) % CLASSES).astype(np.uint8)
    noise = generator.integers(0, 100, (count, size, size, 3))
    return (noise + 60 * labels[:, None, None, None]).astype(np.uint8), labels


def jpeg(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    return file.getvalue()


def arrays(train_count=24, test_count=9):
    """What a good file has."""
    found = {}
    for part, count, seed in (("train", train_count, 0), ("test", test_count, 1)):
        images, labels = pictures(count, seed)
        files = [jpeg(image) for image in images]
        found[f"{part}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        found[f"{part}_offsets"] = np.cumsum([0, *map(len, files)])
        found[f"{part}_labels"] = labels
    return found
