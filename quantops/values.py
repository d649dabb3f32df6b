"""What the kernels check of values in tensors: on CPU, where reading them costs nothing, those out of range raise
before any work is done. On other devices they are not read back and give NaN."""

import torch

from quantops.computed import PLAIN
from quantops.reference.activation import LEAST_SCALE, MOST_SCALE
from quantops.reference.categorical import GRADS, MAX_SOFT_BITS, MODES
from quantops.reference.uniform import GRIDS, MAX_BITS, most_bits


def _readable(t):
    """Whether reading costs nothing: a tensor with values, on the CPU, and not one that is being traced."""
    return t.device.type == "cpu" and type(t) in PLAIN


def check_values(scale, bits, k=None, grid=0):
    """Bit-widths, numbers of LSBs and scales."""
    most = most_bits(GRIDS[grid])
    if not _readable(bits):
        return
    n = bits.reshape(-1).tolist()
    for i, v in enumerate(n):
        if not 0 <= v <= most:
            raise ValueError(f"bits[{i}]: expected 0..{most}, got {v}")
    for i, v in enumerate([] if k is None else k.reshape(-1).tolist()):
        if v and not 1 <= v < n[i]:
            raise ValueError(f"k[{i}]: expected 1 <= k < bits = {n[i]} (or 0 for no LSBs), got {v}")
    for i, s in enumerate(scale):
        if not bool(((s >= 0) & (s < torch.inf)).all()):
            raise ValueError(f"scale[{i}]: expected finite values >= 0, got {s.reshape(-1)[:8].tolist()}")


def check_codes(codes, bits):
    """Codes of ``bits`` bits."""
    for i, (c, n) in enumerate(zip(codes, bits)):
        if _readable(c) and c.numel() and not 0 <= int(c.min()) <= int(c.max()) < 2 ** int(n):
            raise ValueError(f"codes[{i}]: expected values in 0..2^{int(n)} - 1, got {int(c.min())}..{int(c.max())}")


def check_stored(bits, stored):
    """Bits that are read of those that are stored."""
    if _readable(bits):
        for i, (m, n) in enumerate(zip(bits.reshape(-1).tolist(), stored)):
            if not 0 <= m <= n:
                raise ValueError(f"bits[{i}]: expected 0..{n}, the bits that are stored, got {m}")


def check_truncation(scale, out_scale, bits, base_bits):
    """Widths, base widths and scales of a truncation."""
    if not _readable(bits):
        return
    base = base_bits.reshape(-1).tolist()
    for i, b in enumerate(base):
        if not 1 <= b <= MAX_BITS:
            raise ValueError(f"base_bits[{i}]: expected 1..{MAX_BITS}, got {b}")
        widths = bits[:, i].tolist()
        for j, n in enumerate(widths):
            if not 1 <= n <= b or n in widths[:j]:
                raise ValueError(f"bits[{j}][{i}]: expected distinct widths in 1..base_bits = {b}, got {widths}")
    for name, values in (("scale", scale), ("out_scale", out_scale or ())):
        for i, s in enumerate(values):
            if not bool(((s >= 0) & (s < torch.inf)).all()):
                raise ValueError(f"{name}[{i}]: expected finite values >= 0, got {s.reshape(-1)[:8].tolist()}")


def check_categorical(alpha, sigma, bits, gates, seed, mode, grad_of):
    """Bit-widths, gates, alpha and sigma; that there is a seed to draw by."""
    if MODES[mode] == "sample" and seed is None:
        raise ValueError("seed: expected an int64 tensor of one element for mode sample, got none")
    if not _readable(bits):
        return
    soft = "soft" in (MODES[mode], GRADS[grad_of])
    most = MAX_SOFT_BITS if soft else MAX_BITS
    for i, n in enumerate(bits.reshape(-1).tolist()):
        if not 0 <= n <= most:
            raise ValueError(f"bits[{i}]: expected 0..{most}{' where soft sums are taken' if soft else ''}, got {n}")
        if gates and gates[i].numel() != n:
            raise ValueError(f"gates[{i}]: expected one value per bit ({n}), got shape {tuple(gates[i].shape)}")
        if gates and not bool(((gates[i] >= 0) & (gates[i] <= 1)).all()):
            raise ValueError(f"gates[{i}]: expected values in [0, 1], got {gates[i].tolist()}")
    for name, values in (("alpha", alpha), ("sigma", sigma)):
        for i, v in enumerate(values):
            if not bool(((v > 0) & (v < torch.inf) & ((1 / v < torch.inf) | (name == "sigma"))).all()):
                inverse = " whose inverse is finite" if name == "alpha" else ""
                raise ValueError(f"{name}[{i}]: expected finite values > 0{inverse}, got {v.reshape(-1)[:8].tolist()}")


def check_activation(scale, offset, bits):
    """One bit-width, positive scales, finite offsets."""
    if bits.device.type != "cpu":
        return
    if not 0 <= int(bits) <= MAX_BITS:
        raise ValueError(f"bits: expected 0..{MAX_BITS}, got {int(bits)}")
    if not bool(((scale >= LEAST_SCALE) & (scale <= MOST_SCALE)).all()):
        raise ValueError(f"scale: expected values in 2^-100..2^100, got {scale.reshape(-1)[:8].tolist()}")
    if offset is not None and not bool(offset.isfinite().all()):
        raise ValueError(f"offset: expected finite values, got {offset.reshape(-1)[:8].tolist()}")


def check_categorical_activation(alpha, sigma, bits):
    """The same of activations."""
    check_categorical([alpha], [sigma], bits, [], None, MODES.index("hard"), GRADS.index("soft"))
