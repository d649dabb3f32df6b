"""One process for the checks of a file."""

import pytest


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """What the process of the file's checks has found."""
    return request.module.program.results(tmp_path_factory.mktemp("cuda_on_cpu"))
