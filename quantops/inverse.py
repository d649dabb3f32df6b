"""Float weights of which a quantizer makes given integers, bit for bit: what training goes on from without the old.

The integers say in which cell of the grid each weight lay, and what the scale was. Points are tried within the cells
until the quantizer itself, asked by its ``to_int``, gives the integers and the scale.
"""

import itertools

import torch

from quantops.layers import from_rows, to_rows
from quantops.scales import ABSMAX, weight_scales

MOST_BEYOND = 2.0**20  # half cells, beyond the ends of the grid
SPREAD = 0.25  # half cells, between points of equal levels
HALVINGS = 200


def float_weight(quantizer, v, device):
    """Such a weight on ``device`` for an IntWeight, or None where no point that is tried will do."""
    for w in itertools.chain(_at_the_maximum(v), _at_the_mean(quantizer, v, device)):
        w = from_rows(w, v.rows, v.shape).to(v.dtype).to(device)
        if not w.isfinite().all():  # atanh of points that are not of this grid
            continue
        found = quantizer.to_int(quantizer.rows(w))
        same = found.bits == v.bits and torch.equal(found.scale.cpu(), v.scale.cpu())
        if same and torch.equal(found.codes.cpu(), quantizer.rows(v.codes).cpu()):
            return w
    return None


class _Cells:
    """Levels and scales of an IntWeight with its rows in front, and points of its cells as parts of the scale."""

    def __init__(self, v):
        self.levels, self.scale, step = to_rows(v.levels, v.rows).to(v.scale.dtype), v.scale, v.step
        if self.scale.numel() > 1:
            self.scale, step = (t.reshape(-1, *[1] * (self.levels.dim() - 1)) for t in (self.scale, step))
        lowest, highest = v.level_range
        self.lowest, self.highest = self.levels == lowest, self.levels == highest
        codes = (self.levels - lowest) / (2 if v.grid == "full" else 1)
        self.points = (
            self.levels * step / self.scale.clamp(min=torch.finfo(self.scale.dtype).tiny),  # the value
            2 * codes / 2**v.bits - 1,  # the middle of a cell of round_clamp
            2 * (codes + 0.5) / 2**v.bits - 1,  # and of floor
        )
        self.half = 0.49 * 2.0 ** -(v.bits - (v.grid != "sign"))  # of a cell, of which a little is left


def _at_the_maximum(v):
    """The values; then points of the cells, as they are and as tanh of the weights, with +-scale at the ends of the
    grid, where the weight lay that the scale is the maximum of."""
    cells = _Cells(v)
    yield to_rows(v.dequantize(), v.rows)
    for part in cells.points:
        for w in (part * cells.scale, torch.atanh(part * torch.tanh(cells.scale))):
            yield torch.where(cells.highest, cells.scale, torch.where(cells.lowest, -cells.scale, w))


def _at_the_mean(quantizer, v, device):
    """For a scale or an out_scale that is a multiple of mean|w|: points that move until the mean is the right one, by
    halving, for the mean grows with the way. Where the scale is mean|w| too, they move outwards or inwards within
    their cells, and at the ends of the grid beyond; where it is max|w|, that moves, and all points with it."""
    factor, tanh = getattr(quantizer, "scale", ABSMAX), getattr(quantizer, "tanh", False)
    factor_of_v = 1.0 if getattr(quantizer, "out_scale", None) else factor  # v.scale over mean|w|
    if factor_of_v == ABSMAX or not v.shape.numel():
        return
    cells, per_row = _Cells(v), v.scale.numel() > 1
    ends, target = cells.lowest | cells.highest, cells.scale.double()
    # Lest all round alike:
    apart = torch.linspace(-SPREAD, SPREAD, ends.numel(), dtype=torch.float64).reshape(ends.shape)
    if factor == ABSMAX:
        low_way, high_way = target, target * (ends.numel() // target.numel())  # the mean, if one weight were not 0
        rows = ends.reshape(target.numel(), -1)
        top = torch.zeros_like(rows).scatter_(1, rows.int().argmax(1, keepdim=True), True).reshape(ends.shape)
    else:
        low_way, high_way = torch.full_like(target, -1.0), torch.full_like(target, MOST_BEYOND)
        scale = (cells.scale if factor_of_v == factor else cells.scale * factor).double()
    for part in cells.points:
        size, sign, low, high = part.abs().double(), torch.where(part < 0, -1.0, 1.0), low_way, high_way
        for _ in range(HALVINGS):
            way = (low + high) / 2
            if factor == ABSMAX:
                moved, scale = torch.where(top, 1.0, (size + cells.half * apart).clamp(0, 1)), way
            else:
                way_of_each = (way + apart).clamp(min=-1.0)
                way_of_each = torch.where(ends, way_of_each, way_of_each.clamp(max=1.0))
                moved = (size + cells.half * way_of_each).clamp(min=0)
            w = moved * scale
            if tanh:
                w = torch.where(moved < 1, torch.atanh(moved.clamp(max=1.0) * torch.tanh(scale)), w)
            w = (sign * w).to(v.dtype).to(device)
            made = weight_scales([w], factor_of_v, per_row)[0].reshape(target.shape).cpu().double()
            low, high = torch.where(made <= target, way, low), torch.where(made >= target, way, high)
            if torch.equal(made, target):
                yield w.cpu()
                break
