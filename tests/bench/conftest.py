"""Fixtures of the training study."""

import numpy as np
import pytest

from images import arrays


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, **arrays())
    return path
