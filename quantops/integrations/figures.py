"""What callbacks tell the logger of a trainer."""


def figures(controller, layers):
    """{name: number}: compression, average bits and strength now, and with ``layers`` bits and beta of each layer, the
    latter as of the last decision."""
    found = {
        "quantops/compression": controller.compression,
        "quantops/average_bits": 32 / controller.compression if controller.compression else 0.0,
        "quantops/strength": controller.strength,
    }
    if layers and controller.log:
        for row in controller.log[-1]["layers"]:
            found[f"quantops/bits/{row['name']}"] = row["bits_after"]
            found[f"quantops/beta/{row['name']}"] = row["beta"]
    return found
