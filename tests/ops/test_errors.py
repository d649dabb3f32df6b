"""Bad input: each error names the argument, what was expected and what came, before any work is done."""

import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

import quantops as Q

W = torch.randn(4, 6)
LONG = torch.randn(30)
MIXED = [W, torch.randn(3).double()]

BAD = {
    "integer weight": (lambda: Q.round_clamp(torch.ones(3, dtype=torch.int64), 1.0, 4), TypeError, r"w: .*int64"),
    "weight is no tensor": (lambda: Q.msq([1.0], 1.0, 4), TypeError, r"w: expected a tensor, got list"),
    "empty list": (lambda: Q.foreach.msq([], None, 4), TypeError, r"w: expected a non-empty list"),
    "mixed dtypes": (lambda: Q.foreach.msq(MIXED, None, 4), TypeError, r"w: expected one dtype, got .* in entry 1"),
    "mixed devices": (lambda: Q.foreach.msq([W, W.to("meta")], None, 4), ValueError, r"w: expected one device"),
    "bits above 16": (lambda: Q.round_clamp(W, 1.0, 17), ValueError, r"bits: expected 0\.\.16, got 17"),
    "bits below 0": (lambda: Q.round_clamp(W, 1.0, -1), ValueError, r"bits: expected 0\.\.16, got -1"),
    "bits above 16, tensor": (lambda: Q.round_clamp(W, 1.0, torch.tensor(17)), ValueError, r"bits.*0\.\.16, got 17"),
    "bits float": (lambda: Q.round_clamp(W, 1.0, 4.0), TypeError, r"bits: expected an integer .*float"),
    "bits float tensor": (lambda: Q.round_clamp(W, 1.0, torch.tensor(4.0)), TypeError, r"bits: expected an integer"),
    "bits bool": (lambda: Q.round_clamp(W, 1.0, True), TypeError, r"bits: .*bool"),
    "bits count": (lambda: Q.foreach.round_clamp([W, W], None, torch.tensor([3])), ValueError, r"bits: .*\(2\)"),
    "bits device": (
        lambda: Q.round_clamp(W, 1.0, torch.empty((), dtype=torch.int32, device="meta")),
        ValueError,
        r"bits: expected device cpu",
    ),
    "k equals bits": (lambda: Q.msq(W, 1.0, 4, 4), ValueError, r"k: expected 1 <= k < bits = 4 .* got 4"),
    "k equals bits, tensor": (lambda: Q.msq(W, 1.0, 4, torch.tensor(4)), ValueError, r"k.*1 <= k < bits = 4 .*got 4"),
    "k negative": (lambda: Q.lsb(W, 1.0, 4, -1), ValueError, r"k: "),
    "scale negative": (lambda: Q.round_clamp(W, -1.0, 4), ValueError, r"scale: expected a finite value >= 0 .*got -1"),
    "scale NaN": (lambda: Q.round_clamp(W, float("nan"), 4), ValueError, r"scale: .*nan"),
    "scale negative, tensor": (lambda: Q.round_clamp(W, torch.tensor(-1.0), 4), ValueError, r"scale.*>= 0, got.*-1"),
    "scale NaN in a row": (lambda: Q.round_clamp(W, torch.tensor([1, 1, torch.nan, 1]), 4), ValueError, r"scale.*nan"),
    "scale infinite": (lambda: Q.msq(W, torch.tensor(torch.inf), 4), ValueError, r"scale.*inf"),
    "scale length": (lambda: Q.round_clamp(W, torch.ones(3), 4), ValueError, r"scale: .*per row \(4\).*shape \(3,\)"),
    "scale per element": (lambda: Q.round_clamp(W, torch.ones(4, 6), 4), ValueError, r"scale: .*shape \(4, 6\)"),
    "scale along dim 1": (lambda: Q.round_clamp(torch.ones(4, 4), torch.ones(1, 4), 4), ValueError, r"scale: "),
    "scale integers": (lambda: Q.round_clamp(W, torch.ones((), dtype=torch.int32), 4), TypeError, r"scale: .*int32"),
    "scale count": (lambda: Q.foreach.round_clamp([W, W], [torch.ones(())], 4), ValueError, r"scale: .*\(2\), got 1"),
    "scale is a tensor for a list": (lambda: Q.foreach.msq([W, W], torch.ones(2), 4), ValueError, r"scale: .*list"),
    "grid": (
        lambda: Q.round_clamp(W, 1.0, 4, grid="half"),
        ValueError,
        r"grid: expected one of 'dyadic', 'full', 'sign'",
    ),
    "rule": (lambda: Q.encode(W, 1.0, 4, rule="ceil"), ValueError, r"rule: expected one of .*'ceil'"),
    "out_dtype": (lambda: Q.round_clamp(W, 1.0, 4, out_dtype=torch.int8), TypeError, r"out_dtype: .*int8"),
    "out requires grad": (
        lambda: Q.round_clamp(W, 1.0, 4, out=torch.empty(4, 6, requires_grad=True)),
        ValueError,
        r"out: .*requires grad",
    ),
    "w requires grad with out": (
        lambda: Q.msq(W.clone().requires_grad_(), 1.0, 4, out=torch.empty(4, 6)),
        ValueError,
        r"out: .*requires grad",
    ),
    "out shape": (lambda: Q.round_clamp(W, 1.0, 4, out=torch.empty(6, 4)), ValueError, r"out: expected shape \(4, 6\)"),
    "out strides": (lambda: Q.round_clamp(W, 1.0, 4, out=torch.empty(6, 4).t()), ValueError, r"out: .*strides"),
    "out dtype": (
        lambda: Q.round_clamp(W, 1.0, 4, out_dtype=torch.float16, out=torch.empty(4, 6)),
        TypeError,
        r"out: expected torch.float16",
    ),
    "out is w": (lambda: Q.round_clamp(W, 1.0, 4, out=W), ValueError, r"out: .*memory of its own"),
    "out overlaps w": (lambda: Q.round_clamp(LONG[:-1], 1.0, 4, out=LONG[1:]), ValueError, r"out: .*memory of its own"),
    "out is another weight": (
        lambda: Q.foreach.round_clamp([W, W + 1], None, 4, out=[torch.empty(4, 6), W]),
        ValueError,
        r"out\[1\]: .*memory of its own",
    ),
    "out twice": (
        lambda: Q.foreach.round_clamp([W + 1, W + 2], None, 4, out=[W, W]),
        ValueError,
        r"out\[0\]: .*its own",
    ),
    "bits 2^32 + 4": (lambda: Q.round_clamp(W, 1.0, torch.tensor(2**32 + 4)), ValueError, r"bits.*0\.\.16"),
    "codes 2^32 + 3": (lambda: Q.decode(torch.tensor([2**32 + 3]), 1.0, 4), ValueError, r"codes.*0\.\.2\^4"),
    "k in a list": (lambda: Q.foreach.lsb([W, W], None, [4, 2], [1, 2]), ValueError, r"k: .* bits = 2 .* got 2"),
    "scale above float32": (lambda: Q.round_clamp(W, 1e39, 4), ValueError, r"scale: .*1e\+39"),
    "sparse weight": (lambda: Q.round_clamp(W.to_sparse(), 1.0, 4), TypeError, r"w: .*sparse"),
    "signed": (lambda: Q.round_clamp(W, 1.0, 4, signed=None), ValueError, r"signed: "),
    "empty grid": (lambda: Q.round_clamp(W, 1.0, 4, grid=""), ValueError, r"grid: "),
    "sign bits": (lambda: Q.round_clamp(W, 1.0, 16, grid="sign"), ValueError, r"bits: expected 0..15, got 16"),
    "sign unsigned": (
        lambda: Q.round_clamp(W, 1.0, 4, grid="sign", signed=False),
        ValueError,
        r"grid: expected 'dyadic' or 'full' for unsigned values",
    ),
    "sign rule": (
        lambda: Q.encode(W, 1.0, 4, grid="sign", rule="floor"),
        ValueError,
        r"rule: expected 'round_clamp' on the sign grid, got 'floor'",
    ),
    "strength": (lambda: Q.foreach.add_lsb_grad_([W.clone()], [W], None, 4, 1, "x"), TypeError, r"strength: .*str"),
    "strength count": (
        lambda: Q.foreach.add_lsb_grad_([W.clone()], [W], None, 4, 1, torch.ones(2)),
        ValueError,
        r"strength: .*per weight \(1\).*\(2,\)",
    ),
    "strength negative": (
        lambda: Q.foreach.add_lsb_grad_([W.clone()], [W], None, 4, 1, -1.0),
        ValueError,
        r"strength: ",
    ),
    "codes float": (lambda: Q.decode(W, 1.0, 4), TypeError, r"codes: .*float32"),
    "codes too large": (lambda: Q.decode(torch.tensor([0, 16]), 1.0, 4), ValueError, r"codes.*0\.\.2\^4"),
    "codes negative": (lambda: Q.decode(torch.tensor([-1, 1]), 1.0, 4), ValueError, r"codes.*0\.\.2\^4"),
    "0-dim per row": (lambda: Q.absmax(torch.ones(()), per_row=True), ValueError, r"w.*dimension"),
    "gradient shape": (
        lambda: Q.foreach.add_lsb_grad_([torch.ones(3)], [W], None, 4, 1, 0.1),
        ValueError,
        r"grad\[0\]",
    ),
    "alpha negative": (lambda: cat(alpha=-1.0), ValueError, r"alpha: expected a finite value > 0 .*got -1"),
    "alpha zero": (lambda: cat(alpha=0), ValueError, r"alpha: .*> 0.*got 0"),
    "alpha without an inverse": (lambda: cat(alpha=1e-39), ValueError, r"alpha: .*got 1e-39"),
    "alpha zero, tensor": (lambda: cat(alpha=torch.zeros(1)), ValueError, r"alpha.*> 0.*got.*0"),
    "alpha NaN in a row": (lambda: cat(alpha=torch.tensor([1, torch.nan, 1, 1])), ValueError, r"alpha.*nan"),
    "alpha without an inverse, tensor": (lambda: cat(alpha=torch.tensor(1e-39)), ValueError, r"alpha.*inverse"),
    "alpha is a string": (lambda: cat(alpha="1"), TypeError, r"alpha: expected a number or a tensor, got str"),
    "alpha length": (lambda: cat(alpha=torch.ones(3)), ValueError, r"alpha: .*per row \(4\).*shape \(3,\)"),
    "alpha count": (lambda: Q.foreach.categorical([W, W], [1.0], [1.0, 1.0], 3), ValueError, r"alpha: .*\(2\), got 1"),
    "sigma negative": (lambda: cat(sigma=-0.1), ValueError, r"sigma: expected a finite value > 0 .*got -0\.1"),
    "sigma infinite": (lambda: cat(sigma=torch.tensor(torch.inf)), ValueError, r"sigma.*inf"),
    "sigma zero, tensor": (lambda: cat(sigma=torch.zeros(4)), ValueError, r"sigma.*> 0.*got.*0"),
    "sigma integers": (lambda: cat(sigma=torch.ones(1, dtype=torch.int32)), TypeError, r"sigma: .*int32"),
    "gates above 1": (lambda: cat(gates=torch.tensor([1, 1.5, 1])), ValueError, r"gates.*\[0, 1\].*1\.5"),
    "gates below 0": (lambda: cat(gates=torch.tensor([1, -0.5, 1])), ValueError, r"gates.*\[0, 1\].*-0\.5"),
    "gates NaN": (lambda: cat(gates=torch.tensor([1, torch.nan, 1])), ValueError, r"gates.*\[0, 1\].*nan"),
    "gates length": (lambda: cat(gates=torch.ones(4)), ValueError, r"gates: expected shape \(3,\).*got \(4,\)"),
    "gates length, bits a tensor": (
        lambda: cat(bits=torch.tensor(3), gates=torch.ones(4)),
        ValueError,
        r"gates.*per bit \(3\)",
    ),
    "gates shape": (lambda: cat(gates=torch.ones(1, 3)), ValueError, r"gates: expected shape \(3,\)"),
    "gates integers": (lambda: cat(gates=torch.ones(3, dtype=torch.int64)), TypeError, r"gates: .*int64"),
    "gates are a list": (lambda: cat(gates=[1.0, 1.0, 1.0]), TypeError, r"gates: expected a tensor.*got list"),
    "gates device": (lambda: cat(gates=torch.ones(3, device="meta")), ValueError, r"gates: expected device cpu"),
    "gates count": (
        lambda: Q.foreach.categorical([W, W], [1.0] * 2, [1.0] * 2, 3, gates=[torch.ones(3)]),
        ValueError,
        r"gates: .*\(2\), got 1",
    ),
    "seed missing": (lambda: cat(mode="sample"), ValueError, r"seed: expected an integer .*'sample', got NoneType"),
    "seed float": (lambda: cat(mode="sample", seed=1.0), TypeError, r"seed: .*got float"),
    "seed bool": (lambda: cat(mode="sample", seed=True), TypeError, r"seed: .*got bool"),
    "seed float tensor": (lambda: cat(mode="sample", seed=torch.ones(1)), TypeError, r"seed: .*float32"),
    "seed is a generator": (lambda: cat(mode="sample", seed=torch.Generator()), TypeError, r"seed: .*Generator"),
    "seed shape": (
        lambda: cat(mode="sample", seed=torch.ones(2, dtype=torch.int64)),
        ValueError,
        r"seed: .*one element.*\(2,\)",
    ),
    "seed of 65 bits": (lambda: cat(mode="sample", seed=2**64), ValueError, r"seed: .*64 bits"),
    "seed device": (
        lambda: cat(mode="sample", seed=torch.empty((), dtype=torch.int64, device="meta")),
        ValueError,
        r"seed: .*on cpu",
    ),
    "mode": (lambda: cat(mode="argmax"), ValueError, r"mode: expected one of 'hard', 'soft', 'sample', got 'argmax'"),
    "grad": (lambda: cat(grad="ste"), ValueError, r"grad: expected one of 'winner', 'soft', got 'ste'"),
    "soft at 9 bits": (lambda: cat(bits=9, mode="soft"), ValueError, r"bits: expected 0\.\.8, got 9"),
    "soft at 9 bits, tensor": (
        lambda: cat(bits=torch.tensor(9), mode="soft"),
        ValueError,
        r"bits.*0\.\.8 .*soft.*got 9",
    ),
    "soft gradient at 9 bits": (lambda: cat(bits=9, grad="soft"), ValueError, r"bits: expected 0\.\.8, got 9"),
    "categorical at 17 bits": (lambda: cat(bits=17), ValueError, r"bits: expected 0\.\.16, got 17"),
    "categorical of integers": (
        lambda: Q.categorical(torch.ones(3, dtype=torch.int64), 1.0, 1.0, 3),
        TypeError,
        r"x: .*int64",
    ),
    "bits of numpy": (lambda: Q.round_clamp(W, 1.0, numpy.int64(4)), TypeError, r"bits: .*got numpy\.int64"),
    "k of numpy": (lambda: Q.msq(W, 1.0, 4, numpy.int64(1)), TypeError, r"k: .*got numpy\.int64"),
    "widths of numpy": (lambda: Q.truncate(W, 1.0, [numpy.uint8(4)]), TypeError, r"bits.*got numpy\.uint8"),
    "bits of a config of numpy": (lambda: Q.MSQConfig(bits=numpy.int64(4)), ValueError, r"bits: expected an integer"),
    "categorical signed": (lambda: cat(signed=None), ValueError, r"signed: "),
    "categorical out_dtype": (lambda: cat(out_dtype=torch.int8), TypeError, r"out_dtype: .*int8"),
}


def cat(alpha=1.0, sigma=0.5, bits=3, **options):
    return Q.categorical(W, alpha, sigma, bits, **options)


@pytest.mark.parametrize("name", BAD)
def test_error(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()


def test_failed_calls_leave_out_untouched():
    out = torch.full((4, 6), 7.0)
    for scale, bits in ((torch.tensor(-1.0), 4), (torch.tensor(1.0), torch.tensor(17))):
        with pytest.raises(ValueError):
            Q.round_clamp(W, scale, bits, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize(
    "args",
    [
        ([W], [], torch.tensor([4], dtype=torch.int32)),
        ([W], [torch.ones(3)], torch.tensor([4], dtype=torch.int32)),
        ([W], [torch.ones((), dtype=torch.float64)], torch.tensor([4], dtype=torch.int32)),
        ([W], [torch.ones(())], torch.tensor([4])),
        ([W], [torch.ones(())], torch.tensor([4, 4], dtype=torch.int32)),
        ([W, MIXED[1]], [torch.ones(()), torch.ones(())], torch.tensor([4, 4], dtype=torch.int32)),
    ],
)
def test_the_ops_themselves_read_nothing_out_of_bounds(args):
    """Called past the Python checks, a compiled op checks shapes and dtypes on its own."""
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        torch.ops.quantops.round_clamp(*args, 0, True, False, torch.float32)
        raise AssertionError("the op took arguments that do not fit")


ONE, THREE = torch.ones(1), torch.tensor([3], dtype=torch.int32)


@pytest.mark.parametrize(
    "change",
    [
        dict(alpha=[]),
        dict(alpha=[torch.ones(3)]),
        dict(sigma=[ONE.double()]),
        dict(sigma=[torch.ones(4)]),
        dict(bits=THREE.long()),
        dict(gates=[torch.ones(2)]),
        dict(gates=[torch.ones(3).double()]),
        dict(seed=ONE),
        dict(seed=None),
        dict(seed=torch.ones(2, dtype=torch.int64)),
        dict(grad=[torch.ones(5)]),
        dict(grad=[]),
    ],
)
def test_the_categorical_ops_themselves_read_nothing_out_of_bounds(change):
    good = dict(grad=[W], x=[W], alpha=[ONE], sigma=[ONE], bits=THREE, gates=[torch.ones(3)], seed=torch.tensor(1))
    forward = lambda v: torch.ops.quantops.categorical(*list(v.values())[1:], 2, 0, True, torch.float32)  # noqa: E731
    backward = lambda v: torch.ops.quantops.categorical_backward(*v.values(), 2, 0, True, True, True)  # noqa: E731
    forward(good), backward(good)
    for call in (backward,) if "grad" in change else (forward, backward):
        with pytest.raises((ValueError, RuntimeError, TypeError)):
            call(good | change)
            raise AssertionError("the op took arguments that do not fit")


INTEGERS = [torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64]
CODES = torch.arange(24, dtype=torch.int32).reshape(4, 6)
PACKED = Q.pack(CODES, 5)
OF_INTEGERS = {  # of an integer tensor function, n(value): bits, k, codes or a seed of the dtype that is tried
    "round_clamp": lambda n: Q.round_clamp(W, 1.0, n(5)),
    "msq": lambda n: Q.msq(W, 1.0, n(5), n(2)).penalty,
    "lsb": lambda n: Q.lsb(W, 1.0, n(5), n(2)),
    "lsb_penalty": lambda n: Q.lsb_penalty(W, 1.0, n(5), n(2)),
    "add_lsb_grad_": lambda n: Q.foreach.add_lsb_grad_([torch.ones(4, 6)], [W], None, n(5), n(1), 0.1)[0],
    "encode": lambda n: Q.encode(W, 1.0, n(5)),
    "decode": lambda n: Q.decode(n(CODES), 1.0, n(5)),
    "decode packed": lambda n: Q.decode(PACKED, 1.0, n(4)),
    "pack": lambda n: Q.pack(n(CODES), 5).data,
    "unpack": lambda n: Q.unpack(PACKED, n(4)),
    "truncate": lambda n: torch.stack(Q.truncate(W, 1.0, (n(5), n(2)), base_bits=n(7))),
    "truncate, widths in a tensor": lambda n: torch.stack(Q.truncate(W, 1.0, n(torch.tensor([5, 2])), base_bits=7)),
    "categorical": lambda n: Q.categorical(W, 0.2, 0.1, n(5)),
    "sample": lambda n: Q.categorical(W, 0.2, 0.1, n(3), gates=torch.tensor([1, 0.5, 0.5]), mode="sample", seed=n(77)),
}


@pytest.mark.parametrize("name", OF_INTEGERS)
def test_integers_of_every_dtype(name):
    call = OF_INTEGERS[name]
    expected = call(torch.as_tensor)
    for dtype in INTEGERS:
        assert torch.equal(call(lambda v: torch.as_tensor(v).to(dtype)), expected), dtype


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_out_of_range_stay_so(dtype):
    wrong = [200, 255] if dtype == torch.uint8 else [torch.iinfo(dtype).max, torch.iinfo(dtype).min or 17]
    if torch.iinfo(dtype).bits == 64:
        wrong += [2**32 + 4, 2**63 - 2**32 + 4]
    for value in wrong:
        with pytest.raises(ValueError, match=r"bits.*0\.\.16"):
            Q.round_clamp(W, 1.0, torch.tensor(value, dtype=dtype))


def test_integers_of_every_dtype_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(lambda w, n, k: Q.lsb(w, 1.0, n, k), fullgraph=True, backend="aot_eager")
    expected = Q.lsb(W, 1.0, 5, 2)
    for dtype in (torch.uint8, torch.int64, torch.uint32):
        assert torch.equal(compiled(W, torch.tensor(5, dtype=dtype), torch.tensor(2, dtype=dtype)), expected)


def test_the_folder_kernels_is_no_package_of_that_name():
    """Libraries that look for the package `kernels` from the source tree's root find nothing, and no error."""
    code = (
        "import kernels\n"
        "assert getattr(kernels, '__version__', None) is None\n"
        "for line in ('from kernels import uniform', 'import kernels.uniform', 'kernels.uniform'):\n"
        "    try: exec(line)\n"
        "    except ImportError as error: assert 'kernels' in str(error), error\n"
        "    else: raise AssertionError(line)\n"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
