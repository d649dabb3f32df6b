"""Images and labels, held on the device as bytes: read from an .npz of JPEG files or a folder of class folders."""

import functools
import hashlib
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from bench.store import read_states
from quantops.files import write_whole

ARRAYS = tuple(f"{part}_{kind}" for part in ("train", "test") for kind in ("jpeg", "offsets", "labels"))
SUFFIXES = (".jpg", ".jpeg", ".png")
HELD_OUT = 10  # of a folder without train and test parts every tenth image of a class is for testing
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # as CIFAR-10 is usually normalised


class Images(NamedTuple):
    """x: uint8 (images, 3, size, size); y: int64."""

    x: torch.Tensor
    y: torch.Tensor

    def to(self, device):
        return Images(self.x.to(device), self.y.to(device))

    def subset(self, count, seed=0):
        """``count`` images, as many of each class as of every other, always the same for a seed."""
        if not 1 <= count <= len(self.y):
            raise ValueError(f"subset: expected 1..{len(self.y)} images, got {count}")
        order = torch.randperm(len(self.y), generator=torch.Generator().manual_seed(seed))
        rank = torch.zeros(len(self.y), dtype=torch.int64)  # the how-manieth of its class
        for c in self.y.unique():
            of_class = order[self.y[order] == c]
            rank[of_class] = torch.arange(len(of_class))
        chosen = order[torch.argsort(rank[order], stable=True)[:count]]
        return Images(self.x[chosen], self.y[chosen])


class Data(NamedTuple):
    """What a network is trained and tested on."""

    train: Images
    test: Images
    classes: int


def load(path, size=32, cache=None):
    """The :class:`Data` of a file or folder.

    path: an .npz with {train,test}_jpeg (uint8, all files in a row), _offsets (where each begins, and the end) and
        _labels; or a folder with a folder of images (.jpg, .png) per class, or with two such folders, train and test.
    size: side of the images; those of another size are resized.
    cache: a folder for the decoded images.

    Raises ValueError, naming what is wrong, for what cannot be read as that.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"data: no file or folder {path}")
    kept = None
    if cache is not None:
        key = f"{path.resolve()} {path.stat().st_mtime_ns} {path.stat().st_size} {size}"
        kept = Path(cache) / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
        if kept.exists():
            return _data(*(Images(*part) for part in read_states("cache", kept)))
    train, test = _folder(path, size) if path.is_dir() else _npz(path, size)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, lambda file: torch.save([tuple(train), tuple(test)], file))
    return _data(train, test)


def _data(train, test):
    return Data(train, test, int(max(train.y.max(), test.y.max())) + 1)


def _decode(files, size):
    """uint8 (n, 3, size, size) of file objects or paths."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError:
        raise SystemExit("bench: reading images needs Pillow: pip install pillow") from None
    images = []
    for file in files:
        try:
            image = Image.open(file).convert("RGB")
        except UnidentifiedImageError:
            raise ValueError(f"data: image {len(images)} is none that Pillow can read") from None
        images.append(np.asarray(image if image.size == (size, size) else image.resize((size, size))))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _npz(path, size):
    try:
        arrays = np.load(path, allow_pickle=False)
        missing = [name for name in ARRAYS if name not in arrays]
    except (ValueError, TypeError, OSError):
        raise ValueError(f"data: {path} is not an .npz file") from None
    if missing:
        raise ValueError(f"data: {path} has no array {', '.join(missing)}")
    return [
        _part(part, *(arrays[f"{part}_{kind}"] for kind in ("jpeg", "offsets", "labels")), size)
        for part in ("train", "test")
    ]


def _part(part, blob, offsets, labels, size):
    if blob.dtype != np.uint8 or blob.ndim != 1:
        raise ValueError(f"data: {part}_jpeg: expected a row of uint8, got {blob.dtype} of shape {blob.shape}")
    ends = offsets.astype(np.int64) if offsets.ndim == 1 and offsets.dtype.kind in "iu" else np.zeros(0, np.int64)
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != len(blob) or (np.diff(ends) <= 0).any():
        raise ValueError(
            f"data: {part}_offsets: expected increasing integers from 0 to the {len(blob)} bytes of {part}_jpeg"
        )
    if labels.shape != (len(ends) - 1,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"data: {part}_labels: expected {len(ends) - 1} integers, one per image, got {labels.dtype} "
            f"of shape {labels.shape}"
        )
    files = (io.BytesIO(blob[a:b].tobytes()) for a, b in zip(ends, ends[1:]))
    return Images(_decode(files, size), torch.from_numpy(labels.astype(np.int64)))


def _folder(path, size):
    if (path / "train").is_dir() and (path / "test").is_dir():
        found = [_classes(path / part) for part in ("train", "test")]
        if list(found[0]) != list(found[1]):
            raise ValueError(f"data: {path}: train has the classes {list(found[0])}, test {list(found[1])}")
    else:
        found = [
            {
                name: [f for i, f in enumerate(files) if (i % HELD_OUT == 0) == test]
                for name, files in _classes(path).items()
            }
            for test in (False, True)
        ]
    made = []
    for classes in found:
        files = [(file, i) for i, files in enumerate(classes.values()) for file in files]
        if not files:
            raise ValueError(f"data: {path}: too few images to train and to test on")
        made.append(Images(_decode((file for file, _ in files), size), torch.tensor([i for _, i in files])))
    return made


def _classes(path):
    """{class: image files}."""
    found = {
        folder.name: sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES)
        for folder in sorted(path.iterdir())
        if folder.is_dir()
    }
    found = {name: files for name, files in found.items() if files}
    if len(found) < 2:
        raise ValueError(f"data: {path}: expected folders of images, one per class, found {len(found)}")
    return found


# On the device.


def batches(images, size, generator):
    """Shuffled, augmented and normalised training batches of one epoch; what is left of the last one is dropped."""
    order = torch.randperm(len(images.y), generator=generator, device=images.x.device)
    for i in order[: len(order) // size * size].split(size):
        yield normalise(augment(images.x[i], generator)), images.y[i]


def augment(x, generator, pad=4):
    """Random crops of the padded images and random flips, without leaving the device."""
    n, _, height, width = x.shape

    def draw(high):
        return torch.randint(high, (n, 1, 1), generator=generator, device=x.device)

    rows = draw(2 * pad + 1) + torch.arange(height, device=x.device).view(1, -1, 1)
    columns = torch.arange(width, device=x.device).view(1, 1, -1)
    columns = draw(2 * pad + 1) + torch.where(draw(2) == 1, width - 1 - columns, columns)
    each = torch.arange(n, device=x.device).view(-1, 1, 1)
    padded = F.pad(x, (pad,) * 4).permute(0, 2, 3, 1)
    return padded[each, rows, columns].permute(0, 3, 1, 2)  # channels_last


@functools.cache
def _statistics(device):
    """Mean and deviation, once on each device: a copy to a GPU waits for it."""
    return [torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD)]


def normalise(x):
    """float32 in channels_last."""
    mean, std = _statistics(x.device)
    return x.float().div_(255).sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)
