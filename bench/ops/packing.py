"""Family ``packing``: integer weights of 4 bits, stored as bit planes and read back."""

import functools

import torch

from bench.ops.peers import op_peers
from bench.ops.registry import Case
from bench.ops.uniform import Inputs, equal
from quantops import foreach, reference

BITS = 4


class PackInputs(Inputs):
    """Codes to pack, and packed ones to read. The copy moves weights, of as many bytes as codes."""

    n = BITS

    @functools.cached_property
    def codes(self):
        return foreach.encode(self.w, self.scale, BITS)

    @functools.cached_property
    def packed(self):
        return foreach.pack(self.codes, BITS)


def _bits_of(codes, bits):
    """Planes by shifts, as eager code packs them; for weights of whole bytes."""
    places = 2 ** torch.arange(8, device=codes.device)
    planes = [(codes.reshape(-1, 8) >> (bits - 1 - i)) & 1 for i in range(bits)]
    return torch.stack([(p * places).sum(1).to(torch.uint8) for p in planes])


def _codes_of(data, shape, bits):
    places = torch.arange(8, device=data.device)
    codes = sum((((data[i, :, None] >> places) & 1).int() << (bits - 1 - i)) for i in range(bits))
    return codes.reshape(-1)[: shape.numel()].reshape(shape)


CASES = [
    Case(
        "pack 4 bits",
        PackInputs,
        lambda s: 4,
        lambda s: BITS / 8,
        lambda x: [p.data for p in foreach.pack(x.codes, BITS)],
        lambda got, x: equal(got, (reference.pack(c, BITS) for c in x.codes)),
        op_peers(lambda x, i, bits: _bits_of(x.codes[i], bits)),
        dtypes=(torch.float32,),
        turns=True,
    ),
    Case(
        "unpack 4 bits",
        PackInputs,
        lambda s: BITS / 8,
        lambda s: 4,
        lambda x: foreach.unpack(x.packed),
        lambda got, x: equal(got, x.codes),
        op_peers(lambda x, i, bits: _codes_of(x.packed[i].data, x.codes[i].shape, bits)),
        dtypes=(torch.float32,),
        turns=True,
    ),
    Case(
        "unpack 2 of 4 bits",
        PackInputs,
        lambda s: 2 / 8,
        lambda s: 4,
        lambda x: foreach.unpack(x.packed, 2),
        lambda got, x: equal(got, (c >> 2 for c in x.codes)),
        dtypes=(torch.float32,),
        turns=True,
    ),
    Case(
        "decode packed 4 bits",
        PackInputs,
        lambda s: BITS / 8,
        lambda s: s,
        lambda x: foreach.decode(x.packed, x.scale, out_dtype=x.w[0].dtype),
        lambda got, x: equal(got, (reference.decode(c, s, BITS, dtype=x.w[0].dtype) for c, s in zip(x.codes, x.scale))),
        op_peers(
            lambda x, i, bits: reference.decode(
                _codes_of(x.packed[i].data, x.codes[i].shape, bits), x.scale[i], bits, dtype=x.w[0].dtype
            )
        ),
        turns=True,
    ),
]
