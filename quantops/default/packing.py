"""Family ``packing`` by the reference, weight by weight."""

from quantops import reference
from quantops.reference.packing import LAYOUTS, split_shapes
from quantops.reference.uniform import GRIDS, code_bits
from quantops.values import check_codes, check_stored, check_values


def pack(codes, bits, layout):
    check_codes(codes, bits)
    return [reference.pack(c, n, layout=LAYOUTS[layout]) for c, n in zip(codes, bits)]


def unpack(data, sizes, dims, stored, bits, layout):
    shapes, layout = split_shapes(sizes, dims), LAYOUTS[layout]
    check_stored(bits, stored)
    return [
        reference.unpack(d, shape, n, m, layout=layout)
        for d, shape, n, m in zip(data, shapes, stored, bits.reshape(-1))
    ]


def decode_packed(data, sizes, dims, stored, scale, bits, layout, grid, signed, dtype):
    check_values(scale, bits, grid=grid)
    read = code_bits(bits, GRIDS[grid])
    return [
        reference.decode(c, s, m, grid=GRIDS[grid], signed=signed, dtype=dtype)
        for c, s, m in zip(unpack(data, sizes, dims, stored, read, layout), scale, bits.reshape(-1))
    ]
