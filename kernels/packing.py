"""Family ``packing`` in Triton: the ops of quantops/library.py, each a single launch over a list of any tensors.

A program has BLOCK codes of one tensor, as octets: rows of eight codes, which take whole bytes in every layout. Bit
planes are taken four at a time, so that they fill 16 bytes per thread: four bits of a code are spread to the four bytes
of a word by one multiplication, and gathered from them by another. Dense bits go byte by byte.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from quantops.kernels import math, memory
from quantops.kernels.launch import TYPES, all_aligned, block_of, ints, launch, on_device_of, owners, starts
from quantops.kernels.table import on_device
from quantops.reference.packing import LAYOUTS, data_shape, plane_bytes, split_shapes
from quantops.reference.uniform import GRIDS, code_bits
from quantops.values import check_codes, check_stored, check_values

# Columns of the table: one row of int64 per tensor.
FIELDS = tl.constexpr(9)
CODES = tl.constexpr(0)  # addresses: codes, or the values made of them,
DATA = tl.constexpr(1)  # packed data,
SCALE = tl.constexpr(2)  # scales
NUMEL = tl.constexpr(3)
INNER = tl.constexpr(4)  # codes per scale
STORED = tl.constexpr(5)  # bits per code
STRIDE = tl.constexpr(6)  # bytes per plane
FIRST = tl.constexpr(7)  # the tensor's first program
ALIGNED = tl.constexpr(8)  # 1 where the addresses are multiples of 16

SUB = tl.constexpr(1024)  # codes at a time off the main path
SPREAD = tl.constexpr(0x00204081)  # times four bits: bit k at place 8k, among others
GATHER = tl.constexpr(0x08040201)  # times bits at the places 8k: bit k at place 27 - k, among others
BYTES = tl.constexpr(0x01010101)


@triton.jit
def _load_codes(ptr, left, OCTETS: tl.constexpr, WHOLE: tl.constexpr):
    i = tl.arange(0, OCTETS)[:, None] * 8 + tl.arange(0, 8)[None, :]
    if WHOLE:
        return tl.load(ptr + i).to(tl.uint32, bitcast=True)
    else:
        return tl.load(ptr + i, mask=i < left, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _pack_planes(codes, data, n, stride, left, OCTETS: tl.constexpr):
    """Writes the bytes of octets to all planes, up to ``left`` bytes from ``data`` on in each."""
    element = tl.arange(0, 8)[None, :]
    plane = tl.arange(0, 4)[:, None]
    byte = tl.arange(0, OCTETS)[None, :]
    for p in range(0, n, 4):
        bits = (((codes >> p) & 15) * SPREAD) & BYTES
        word = tl.sum(bits << element, axis=1)  # byte k: bit p + k of the octet
        value = (word[None, :] >> (8 * plane)).to(tl.uint8)
        row = n - 1 - p - plane
        tl.store(data + row * stride + byte, value, mask=(row >= 0) & (byte < left))


@triton.jit
def _pack_dense(codes, data, n, left, OCTETS: tl.constexpr):
    element = tl.arange(0, 8)[None, :]
    bits = (codes & ((1 << n) - 1).to(tl.uint32)).to(tl.uint64) << (n * (element % 4)).to(tl.uint64)
    half = tl.full([], 2, tl.uint64) * n.to(tl.uint64)
    second = tl.sum(tl.where(element < 4, 0, bits), axis=1)
    low = tl.sum(tl.where(element < 4, bits, 0), axis=1) | ((second << half) << half)
    high = (second >> (32 - half)) >> (32 - half)
    byte = tl.arange(0, 16)[None, :]
    value = tl.where(byte < 8, low[:, None], high[:, None]) >> (8 * (byte % 8)).to(tl.uint64)
    at = tl.arange(0, OCTETS)[:, None] * n + byte
    tl.store(data + at, value.to(tl.uint8), mask=(byte < n) & (at < left))


@triton.jit
def pack_codes(table, chunks, DENSE: tl.constexpr, BLOCK: tl.constexpr):
    """One program per run of BLOCK codes of one tensor."""
    pid = tl.program_id(0)
    entry = table + memory.owner(chunks, pid).to(tl.int64) * FIELDS
    start = (pid - tl.load(entry + FIRST)) * BLOCK
    left = tl.load(entry + NUMEL) - start
    n = tl.load(entry + STORED).to(tl.int32)
    stride = tl.multiple_of(tl.load(entry + STRIDE), 16)
    codes = tl.load(entry + CODES).to(tl.pointer_type(tl.int32))
    data = tl.load(entry + DATA).to(tl.pointer_type(tl.uint8))
    octets: tl.constexpr = BLOCK // 8
    if (tl.load(entry + ALIGNED) != 0) & (left >= BLOCK):
        # The promise sticks to the sum it is made on: this path has sums of its own.
        c = _load_codes(tl.multiple_of(codes + start, 16), left, octets, True)
        if DENSE:
            _pack_dense(c, data + start // 8 * n, n, octets * n, octets)
        else:
            _pack_planes(c, tl.multiple_of(data + start // 8, 16), n, stride, octets, octets)
    else:
        c = _load_codes(codes + start, left, octets, False)
        if DENSE:
            _pack_dense(c, data + start // 8 * n, n, (left * n + 7) // 8, octets)
        else:
            _pack_planes(c, data + start // 8, n, stride, stride - start // 8, octets)


@triton.jit
def _unpack_planes(data, m, stride, left, OCTETS: tl.constexpr, WHOLE: tl.constexpr):
    """The codes of octets, [OCTETS, 8], from the first m planes."""
    element = tl.arange(0, 8)[None, :]
    plane = tl.arange(0, 4)[:, None]
    byte = tl.arange(0, OCTETS)[None, :]
    codes = tl.zeros([OCTETS, 8], tl.uint32)
    for p in range(0, m, 4):
        there = p + plane < m
        if not WHOLE:
            there = there & (byte < left)
        value = tl.load(data + plane * stride + byte, mask=there, other=0)
        data += 4 * stride  # a pointer that moves: with one computed from p, ptxas wants a stack
        word = tl.sum(value.to(tl.uint32) << (8 * plane).to(tl.uint32), axis=0)  # byte k: plane p + k
        bits = ((((word[:, None] >> element) & BYTES) * GATHER) >> 24) & 15
        codes = (codes << 4) | bits
    return codes >> (-m & 3).to(tl.uint32)


@triton.jit
def _unpack_dense(data, n, m, left, OCTETS: tl.constexpr):
    """The codes of octets, [OCTETS, 8]: each from the up to three bytes that have bits of it."""
    bit = (tl.arange(0, OCTETS)[:, None] * 8 + tl.arange(0, 8)[None, :]) * n
    at, shift = bit // 8, bit % 8
    window = tl.zeros([OCTETS, 8], tl.uint32)
    for j in tl.static_range(3):
        there = (8 * j < shift + n) & (at + j < left)
        window |= tl.load(data + at + j, mask=there, other=0).to(tl.uint32) << (8 * j)
    codes = (window >> shift.to(tl.uint32)) & ((1 << n) - 1).to(tl.uint32)
    return codes >> (n - m).to(tl.uint32)


@triton.jit
def _result(codes, s, m, A: tl.constexpr, OUT_T: tl.constexpr, VALUES: tl.constexpr, GRID: tl.constexpr,
            SIGNED: tl.constexpr):
    """What is written for codes; m is -1 where the bits that were asked for are out of range."""
    if VALUES:
        n = m
        if GRID == math.SIGN:
            n = m - (m > 0).to(tl.int32)  # the first bit is the sign
        p = math.make_quantizer(s, n, m * 0, GRID, SIGNED)
        return math.narrow(math.level(math.code_of_stored(codes.to(A), p), p) * p.step, OUT_T)
    else:
        return tl.where(m >= 0, codes.to(tl.int32, bitcast=True), math.INVALID)


@triton.jit
def unpack_codes(table, chunks, bits, A: tl.constexpr, OUT_T: tl.constexpr, DENSE: tl.constexpr, VALUES: tl.constexpr,
                 GRID: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """One program per run of BLOCK codes of one tensor; VALUES: writes the weights that they stand for."""
    pid = tl.program_id(0)
    t = memory.owner(chunks, pid)
    entry = table + t.to(tl.int64) * FIELDS
    numel, inner = tl.load(entry + NUMEL), tl.load(entry + INNER)
    stride = tl.multiple_of(tl.load(entry + STRIDE), 16)
    start = (pid - tl.load(entry + FIRST)) * BLOCK
    n = tl.load(entry + STORED).to(tl.int32)
    asked = math.code_bits(tl.load(bits + t), GRID)
    valid = (asked >= 0) & (asked <= n)
    m = tl.where(valid, asked, 0)
    data = tl.load(entry + DATA).to(tl.pointer_type(tl.uint8))
    out = tl.load(entry + CODES).to(tl.pointer_type(OUT_T))
    total = (numel * n + 7) // 8  # bytes of dense data
    row, left = memory.first_row(start, numel, inner)
    s_ptr = tl.load(entry + SCALE).to(tl.pointer_type(A)) + row
    if (tl.load(entry + ALIGNED) != 0) & (numel - start >= BLOCK) & (left >= BLOCK):
        # The main path: one scale, nothing masked, 128 bits at a time. The promises stick to the sums they are made on.
        if DENSE:
            codes = _unpack_dense(data + start // 8 * n, n, m, total - start // 8 * n, BLOCK // 8)
        else:
            codes = _unpack_planes(tl.multiple_of(data + start // 8, 16), m, stride, 0, BLOCK // 8, True)
        s = tl.zeros([], A)
        if VALUES:
            s = tl.load(s_ptr)
        i = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
        value = _result(codes, s, tl.where(valid, m, -1), A, OUT_T, VALUES, GRID, SIGNED)
        tl.store(tl.multiple_of(out + start, 16) + i, value)
    else:  # a tail, an odd address, or several rows: a scale per element
        for j in range(0, tl.minimum(numel - start, BLOCK).to(tl.int32), SUB):
            at = (start + j) // 8  # octets
            if DENSE:
                codes = _unpack_dense(data + at * n, n, m, total - at * n, SUB // 8)
            else:
                codes = _unpack_planes(data + at, m, stride, stride - at, SUB // 8, False)
            i = j + tl.arange(0, SUB // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
            mask = i < numel - start
            s = tl.zeros([], A)
            if VALUES:
                s = tl.load(s_ptr + memory.rows_from(i, inner, left, BLOCK), mask=mask, other=1.0)
            value = _result(codes, s, tl.where(valid, m, -1), A, OUT_T, VALUES, GRID, SIGNED)
            tl.store(out + start + i, value, mask=mask)


# Host side: lists of tensors into tables and launches.


def _table(codes, data, stored, block, scale=None):
    """(table, programs per tensor) of a list."""
    numel = [c.numel() for c in codes]
    table = np.zeros((len(data), FIELDS.value), np.int64)
    table[:, CODES.value] = [t.data_ptr() for t in codes]
    table[:, DATA.value] = [t.data_ptr() for t in data]
    table[:, NUMEL.value] = table[:, INNER.value] = numel
    table[:, STORED.value] = stored
    table[:, STRIDE.value] = [plane_bytes(n) for n in numel]
    table[:, ALIGNED.value] = all_aligned(table[:, CODES.value], table[:, DATA.value])
    if scale:
        table[:, SCALE.value] = [s.data_ptr() for s in scale]
        table[:, INNER.value] //= np.maximum([s.numel() for s in scale], 1)
    programs = -(-table[:, NUMEL.value] // block)
    table[:, FIRST.value] = starts(programs)
    return table, programs


def pack(codes, bits, layout):
    check_codes(codes, bits)
    codes = [c.contiguous() for c in codes]
    data = [c.new_empty(data_shape(c.numel(), n, LAYOUTS[layout]), dtype=torch.uint8) for c, n in zip(codes, bits)]
    block = block_of(torch.float32, codes)
    table, programs = _table(codes, data, bits, block)
    with on_device_of(codes):
        device = codes[0].device
        launch(pack_codes, int(programs.sum()), on_device(table, device), owners(programs, device),
               DENSE=LAYOUTS[layout] == "dense", BLOCK=block)
    return data


def _unpack(data, sizes, dims, stored, bits, layout, dtype, scale=None, grid=0, signed=True):
    check_stored(code_bits(bits, GRIDS[grid]), stored)
    acc = scale[0].dtype if scale else torch.float32
    out = [d.new_empty(shape, dtype=dtype) for d, shape in zip(data, split_shapes(sizes, dims))]
    block = block_of(acc, out)
    table, programs = _table(out, data, stored, block, scale)
    with on_device_of(data):
        device = data[0].device
        launch(unpack_codes, int(programs.sum()), on_device(table, device), owners(programs, device), ints(bits),
               A=TYPES[acc], OUT_T=TYPES[dtype], DENSE=LAYOUTS[layout] == "dense", VALUES=scale is not None, GRID=grid,
               SIGNED=signed, BLOCK=block)
    return out


def unpack(data, sizes, dims, stored, bits, layout):
    return _unpack(data, sizes, dims, stored, bits, layout, torch.int32)


def decode_packed(data, sizes, dims, stored, scale, bits, layout, grid, signed, dtype):
    check_values(scale, bits, grid=grid)
    return _unpack(data, sizes, dims, stored, bits, layout, dtype, scale, grid, signed)
