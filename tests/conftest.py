"""Fixtures that several test files share."""

import pytest
import torch


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def dtype(request):
    """Every storage dtype of a weight."""
    return request.param
