"""What ``python -m bench kept`` counts."""

import json

import pytest
import torch

from bench.__main__ import main
from bench.training import kept


def test_relus_that_are_replaced_keep_a_bit_or_a_byte_more_than_floats():
    device = torch.device("cpu")
    found = {
        way: kept.measured("resnet20", way, device)["kept"]
        for way in ("float", "quantops, PACT for each ReLU", "quantops, LSQ for each ReLU", "eager LSQ")
    }
    batch = kept.NETWORKS["resnet20"].cpu[0]
    elements = batch * (7 * 16 * 32 * 32 + 6 * 32 * 16 * 16 + 6 * 64 * 8 * 8)  # of all ReLUs
    last = 4 * batch * 64 * 8 * 8  # the result of the last ReLU, which the mean behind it does not need
    for way, size in (
        ("quantops, PACT for each ReLU", elements // 8),
        ("quantops, LSQ for each ReLU", elements - last),
    ):
        assert abs(found[way] - found["float"] - size) < 0.01 * size, way
    assert found["eager LSQ"] > 2 * found["float"]


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kept, "WAYS", {"float": kept.WAYS["float"]})
    page, out = tmp_path / "page.md", tmp_path / "kept.json"
    page.write_text(f"before\n{kept.BEGIN}\nold\n{kept.END}\nafter\n")
    command = ["kept", "--device", "cpu", "--networks", "resnet20", "--out", str(out), "--into", str(page)]
    assert main(command) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["way"] == "float" and row["peak"] > row["kept"] > 1e7
    assert "| resnet20, 32 | float |" in page.read_text() and "old" not in page.read_text()
    with pytest.raises(SystemExit, match="networks: expected some of"):
        main([*command[:4], "vgg", *command[5:]])


def test_the_table_is_beside_float():
    rows = [
        {"network": "n", "way": way, "sizes": [2], "kept": kept_, "peak": peak}
        for way, kept_, peak in (("float", 2e6, 4e6), ("x", 3e6, 5e6))
    ]
    assert "| n, 2 | x | 3.0 | 1.50x | 5.0 | 1.25x |" in kept.markdown({"rows": rows})
