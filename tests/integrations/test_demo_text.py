"""The example of the demo that trains GPT-2 in the Trainer of transformers, in small."""

import math

import pytest
import torch

import quantops
from quantops.demo import gpt2_truncquant

pytestmark = pytest.mark.filterwarnings("ignore")


def test_gpt2_by_truncquant_from_a_text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("abcdefgh" * 300)
    torch.manual_seed(0)
    small = {"n_layer": 1, "n_head": 2, "n_embd": 32}
    losses = gpt2_truncquant.main(file, str(tmp_path / "out"), length=16, steps=60, batch=8, **small)
    assert set(losses) == {8, 4, 2} and losses[8] < math.log(256)  # less than of equal odds for all bytes
    found = quantops.load_int(tmp_path / "out" / "gpt2.safetensors")
    assert {v.bits for v in found.values()} == {8} and len(found) >= 4
