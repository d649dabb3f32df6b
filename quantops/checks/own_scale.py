"""Family ``own_scale``: what its ops take."""

from quantops.checks.arguments import tensors
from quantops.checks.scaling import ready_scales
from quantops.reference.uniform import acc_dtype


def structure(arguments):
    """See quantops/checks/__init__.py."""
    w = tensors("w", arguments["w"])
    acc = acc_dtype(w[0].dtype)
    for name in ("scale", "grad_scale"):
        if name in arguments:
            ready_scales(name, arguments[name], w, acc)
    if [s.numel() for s in arguments.get("scale", [])] != [g.numel() for g in arguments.get("grad_scale", [])]:
        raise ValueError("grad_scale: expected as many elements as in scale")
