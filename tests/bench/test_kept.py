"""What ``python -m bench kept`` counts."""

import torch

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


def test_the_table_is_beside_float():
    rows = [{"network": "n", "way": way, "sizes": [2], "kept": size} for way, size in (("float", 2e6), ("x", 3e6))]
    assert "| n, 2 | x | 3.0 | 1.50x |" in kept.markdown({"rows": rows})
