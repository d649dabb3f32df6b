"""What the weights of a quantized model are now: bits, errors and compression, layer by layer."""

import math
from typing import NamedTuple

import torch

from quantops.calibration import activations
from quantops.coverage import left_in_float
from quantops.nn import batches, quantized, rows_of
from quantops.sharded import any_sharded, gathered, shards, whole


class LayerBits(NamedTuple):
    """One row of a :class:`BitReport`."""

    name: str
    shape: tuple
    numel: int
    bits: int
    k: int
    beta: float  # fraction of weights with B_k != 0; 0 without k
    sq_error: float  # E = sum (q - w)^2
    scale: float  # the largest of several; with CPQ the end of the grid, alpha 2^(bits-1)
    stored: int  # bits per weight in memory and in files: a sign is one more


class ActivationBits(NamedTuple):
    """One quantizer of activations in a :class:`BitReport`."""

    name: str
    bits: int
    signed: bool
    scale: float  # the end of the grid, the largest of several; NaN before there is one
    negative: float  # part below 0 of the values that its scale started from


class BitReport(NamedTuple):
    """Bits per layer; str() is a table."""

    rows: tuple
    average_bits: float
    compression: float  # 32 * sum(numel) / sum(numel * bits), as papers count it, on the sign grid without the signs
    stored: float  # 32 * sum(numel) / sum(numel * stored): the same with them
    activations: tuple = ()
    left: tuple = ()  # quantops.coverage.LeftFloat of each parameter that stays in float
    whole_compression: float = math.nan  # of all parameters, 32 bits for each of those

    def __str__(self) -> str:
        head = ("layer", "shape", "weights", "bits", "k", "beta", "sq_error", "scale")
        table = [head] + [
            (
                r.name,
                "x".join(map(str, r.shape)),
                str(r.numel),
                str(r.bits),
                str(r.k),
                f"{r.beta:.4f}",
                f"{r.sq_error:.4g}",
                f"{r.scale:.4g}",
            )
            for r in self.rows
        ]
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = [
            "  ".join(v.ljust(n) if i < 2 else v.rjust(n) for i, (v, n) in enumerate(zip(row, widths))) for row in table
        ]
        lines.insert(1, "-" * len(lines[0]))
        stored = "" if self.stored == self.compression else f", {self.stored:.2f}x as stored"
        lines.append(f"average {self.average_bits:.3f} bits, compression {self.compression:.2f}x of 32{stored}")
        lines += [
            f"activations {a.name}: {a.bits} bits, {'signed' if a.signed else 'unsigned'}, up to {a.scale:.4g}"
            + (f", {a.negative:.1%} of what comes in is negative" if a.negative and not a.signed else "")
            for a in self.activations
        ]
        matrices = [v for v in self.left if v.matrix]
        lines += [f"in float {v.name}: {'x'.join(map(str, v.shape))}, {v.why}" for v in matrices]
        rest = sum(v.numel for v in self.left) - sum(v.numel for v in matrices)
        lines.append(
            f"of the whole model, with {rest} parameters in float that are no matrices: compression "
            f"{self.whole_compression:.2f}x of 32"
        )
        return "\n".join(lines)


def compression(sizes, bits):
    """32 * sum(sizes) / sum(sizes * bits), as the papers count it: weights of ``bits`` against float32 ones."""
    used = sum(n * b for n, b in zip(sizes, bits))
    return 32 * sum(sizes) / used if used else math.inf


@torch.no_grad()
def bit_report(model: torch.nn.Module) -> BitReport:
    """Bits, k, beta, E and scale of each layer from its weights now, the average bits and the compression.

    In these only weights quantized by quantops count, those with fixed bits among them; with TruncQuant their bits are
    the width that is selected, with CPQ those that stay in evaluation, and k is 0. ``left`` has the parameters that
    stay in float, each with a reason, and ``whole_compression`` counts them too, with 32 bits. One list call; reads the
    values back. The quantizers of activations follow as ``activations``. Raises ValueError for a model without
    quantized weights, and for weights with NaN or inf, naming the layer.
    """
    layers = quantized(model)
    if not layers:
        raise ValueError(f"model: expected weights quantized by quantops.quantize_, {type(model).__name__} has none")
    measured = measure([(p, owner.original) for _, owner, p in layers])
    rows = [
        LayerBits(  # type: ignore[call-arg]
            name or "model",
            tuple(owner.original.shape),
            owner.original.numel(),
            *measured[p],
            p.stored_bits(measured[p][0]),
        )
        for name, owner, p in layers
    ]
    sizes, bits = [r.numel for r in rows], [r.bits for r in rows]
    average = sum(n * b for n, b in zip(sizes, bits)) / max(sum(sizes), 1)
    acts = tuple(ActivationBits(name or "model", *m.report()) for name, m in activations(model))
    left = tuple(left_in_float(model))
    stored = [r.stored for r in rows]
    whole = compression([*sizes, *(v.numel for v in left)], [*stored, *[32] * len(left)])
    return BitReport(tuple(rows), average, compression(sizes, bits), compression(sizes, stored), acts, left, whole)


def _rows(quantizers, w):
    w = rows_of(quantizers, w)
    own = [v for p in quantizers for v in p._parameters.values() if v is not None]
    if quantizers[0].by_shards or not any_sharded([*w, *own]):
        return quantizers[0].measure(quantizers, w)
    rows = []
    for p, t in zip(quantizers, w):  # one whole weight at a time
        with gathered(p):
            rows += p.measure([p], [whole(t)])
    return rows


def measure(pairs):
    """{quantizer: (bits, k, beta, sq_error, scale)} as Python numbers, of pairs (quantizer, weight)."""
    found = {}
    for quantizers, w in batches(pairs):
        try:
            rows = _rows(quantizers, w)
        except ValueError:  # of the scale of such a weight, by its place in the list
            for p, t, part in zip(quantizers, w, shards(w)):
                if not part.isfinite().all():
                    raise _not_finite(p, t) from None
            raise
        for p, t, row in zip(quantizers, w, rows):
            if not math.isfinite(row[3]):
                raise _not_finite(p, t)
            found[p] = row
    return found


def _not_finite(quantizer, w):
    return ValueError(
        f"{quantizer.layer}: expected finite values in its weight of shape {tuple(w.shape)}, got NaN or infinity"
    )
