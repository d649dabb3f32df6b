"""The machine code of every Triton kernel, compiled without a GPU for sm_80 and sm_90 and read back; of a few for what
consumer GPUs have, sm_86, sm_89 and sm_120.

What is compiled is what the ops launch: the launches of real calls are recorded, then compiled instead of run.
"""

import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

if triton.knobs.runtime.interpret:
    pytest.skip(
        "TRITON_INTERPRET is set, which replaces the compiler: unset it to run these tests", allow_module_level=True
    )

from bench.machine_code import sass  # noqa: E402
from quantops.kernels import (  # noqa: E402
    activation,
    categorical,
    categorical_activation,
    categorical_record,
    own_scale,
    packing,
    truncate,
    uniform,
)
from quantops.kernels.launch import launch  # noqa: E402

if sass.tool("cuobjdump") is None:
    pytest.skip(
        "cuobjdump was not found: install the CUDA toolkit's, or the CUDA build of Triton, which has one",
        allow_module_level=True,
    )

THREADS = 128
SMALL = (  # read and write little
    "prepare",
    "finish_stats",
    "finish_rows",
    "finish_scales",
    "finish_gates",
    "fill_table",
    "finish_sums",
    "finish",
    "channel_sums",
)
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def _inputs(dtype):
    acc = uniform.acc_dtype(dtype)
    # A long row, short rows, and a tensor in several pieces, so that every kernel has work.
    w = [torch.ones(2, 9000, dtype=dtype), torch.ones(64, 9, dtype=dtype)]
    n = torch.full((2,), 8, dtype=torch.int32)
    return w, [torch.ones(t.shape[0], dtype=acc) for t in w], n, torch.ones_like(n), torch.ones(2, dtype=acc)


def _round_clamp(dtype, out):
    w, s, n, *_ = _inputs(dtype)
    uniform.round_clamp(w, s, n, 0, True, False, out)


def _msq(dtype, out):
    w, s, n, k, _ = _inputs(dtype)
    uniform.msq(w, s, n, k, 0, False, out)


def _lsb_stats(dtype, grid):
    w, s, n, k, _ = _inputs(dtype)
    uniform.lsb_stats(w, s, n, k, grid, False)


def _own_scale(dtype):
    w, s, *_ = _inputs(dtype)
    own_scale.own_scale_backward(w, s, s, True)


def _carriers(dtype):
    w, s, *_ = _inputs(dtype)
    uniform.reduce_rows(uniform.CARRIERS, w, [torch.empty_like(t) for t in s], s)


def _lsb(dtype):
    w, s, n, k, _ = _inputs(dtype)
    uniform.lsb(w, s, n, k, 0)


def _backward(dtype, grad_dtype, penalty, scale_grad):
    w, s, n, k, r = _inputs(dtype)
    grad = [torch.ones_like(t, dtype=grad_dtype) for t in w]
    uniform.uniform_backward(grad, r if penalty else None, w, s, n, k, 1, True, scale_grad)


def _add_lsb_grad(dtype):
    w, s, n, k, r = _inputs(dtype)
    uniform.add_lsb_grad_([torch.ones_like(t) for t in w], w, s, n, k, 0, r[0])


def _encode(dtype, rule):
    w, s, n, *_ = _inputs(dtype)
    uniform.encode(w, s, n, rule, 0, False)


def _decode(out):
    w, s, n, *_ = _inputs(out)
    uniform.decode([t.to(torch.int32) for t in w], s, n, 1, True, out)


def _absmax(dtype):
    uniform.absmax(_inputs(dtype)[0], True)


def _absmean(dtype):
    uniform.absmean(_inputs(dtype)[0], False)


def _truncate(dtype, out, tanh):
    w, s, n, *_ = _inputs(dtype)
    truncate.truncate(w, s, s, torch.stack([n, n // 2, n // 4]), n, 1, tanh, False, False, out)


def _truncate_backward(dtype, grad_dtype, tanh, covered, scale_grad):
    w, s, n, *_ = _inputs(dtype)
    grad = [torch.ones_like(t, dtype=grad_dtype) for t in w * 3]
    truncate.truncate_backward(grad, w, s, s, torch.stack([n, n // 2, n // 4]), n, 1, tanh, covered, scale_grad)


def _packed(bits, layout, dtype=None):
    """pack; unpack where there is a dtype int32, decode_packed where it is a float."""
    codes = [torch.ones(9000, dtype=torch.int32), torch.ones(100, dtype=torch.int32)]
    if dtype is None:
        return packing.pack(codes, [bits] * 2, layout)
    data = [torch.zeros(packing.data_shape(len(c), bits, packing.LAYOUTS[layout]), dtype=torch.uint8) for c in codes]
    shared = data, [9000, 100], [1, 1], [bits] * 2
    n = torch.full((2,), bits, dtype=torch.int32)
    if dtype == torch.int32:
        return packing.unpack(*shared, n, layout)
    scale = [torch.ones(1, dtype=uniform.acc_dtype(dtype))] * 2
    return packing.decode_packed(*shared, scale, n, layout, 1, True, dtype)


def _categorical_inputs(dtype, gates):
    x, s, n, *_ = _inputs(dtype)
    listed = [torch.ones(gates, dtype=s[0].dtype)] * 2 if gates else []
    return x, s, s, n * 0 + (gates or 4), listed, torch.tensor(1)


def _categorical(dtype, out, mode, gates):
    """``mode``: 0 hard, 1 soft, 2 sample; ``gates``: their number, 0 for none."""
    categorical.categorical(*_categorical_inputs(dtype, gates), mode, 0, True, out)


def _categorical_backward(dtype, grad_dtype, mode, gates):
    x, *rest = _categorical_inputs(dtype, gates)
    grad = [torch.ones_like(t, dtype=grad_dtype) for t in x]
    categorical.categorical_backward(grad, x, *rest, mode, 0, False, True, gates > 0)


def _activation(dtype, out, keep, learn, channels=1, front=0):
    x, n = torch.ones(3, channels, 3001, dtype=dtype), torch.tensor([4], dtype=torch.int32)
    activation.activation(
        x, torch.ones(channels, dtype=uniform.acc_dtype(dtype)), None, n, 0, True, front, keep, learn, out
    )


def _activation_backward(dtype, q_dtype, keep, learn, channels=1, front=0):
    grad, n = torch.ones(3, channels, 3001, dtype=q_dtype), torch.tensor([4], dtype=torch.int32)
    kept = torch.zeros((0, -(-grad.numel() // 8), grad.numel())[keep], dtype=torch.uint8)
    scale = torch.ones(channels, dtype=uniform.acc_dtype(dtype))
    activation.activation_backward(grad, grad.to(dtype), grad, kept, scale, None, n, 0, True, front, keep, learn, dtype)


def _categorical_activation(dtype, out):
    categorical_activation.categorical_activation(torch.ones(9001, dtype=dtype), *_activation_widths(dtype), 1, out)


def _categorical_activation_backward(dtype, q_dtype, grad_of):
    grad, q = torch.ones(2, 9001, dtype=q_dtype)
    quarters = torch.zeros(2251, dtype=torch.uint8)
    categorical_activation.categorical_activation_backward(
        grad, q, quarters, *_activation_widths(dtype), grad_of, True, dtype
    )


def _activation_widths(dtype):
    width = torch.ones(1, dtype=uniform.acc_dtype(dtype))
    return width, width, torch.tensor([4], dtype=torch.int32)


# A call, and the vectors per thread that its main path moves: (loads, stores) of each width in bits.
CALLS = {
    "round_clamp-fp32": ((_round_clamp, FP32, FP32), {128: (8, 8)}),
    "round_clamp-bf16": ((_round_clamp, BF16, BF16), {128: (8, 8)}),
    "round_clamp-fp32-bf16": ((_round_clamp, FP32, BF16), {128: (8, 0), 64: (0, 8)}),
    "msq-fp32": ((_msq, FP32, FP32), {128: (8, 8)}),
    "msq-bf16": ((_msq, BF16, BF16), {128: (4, 4)}),
    "msq-fp16": ((_msq, FP16, FP16), {128: (4, 4)}),
    "msq-fp64": ((_msq, FP64, FP64), {128: (8, 8)}),
    "lsb_stats-fp32": ((_lsb_stats, FP32, 1), {128: (8, 0)}),
    "lsb_stats-sign-fp32": ((_lsb_stats, FP32, 2), {128: (8, 0)}),
    "own_scale-fp32": ((_own_scale, FP32), {128: (8, 8)}),
    "own_scale-bf16": ((_own_scale, BF16), {128: (8, 8)}),
    "own_scale-carriers-fp32": ((_carriers, FP32), {128: (8, 0)}),
    "lsb-fp32": ((_lsb, FP32), {128: (8, 8)}),
    "backward-fp32": ((_backward, FP32, FP32, True, False), {128: (8, 4)}),
    "backward-bf16": ((_backward, BF16, BF16, True, False), {128: (8, 4)}),
    "backward-fp32-bf16": ((_backward, FP32, BF16, False, False), {128: (4, 4), 64: (4, 0)}),
    "backward-fp64": ((_backward, FP64, FP64, True, False), {128: (8, 4)}),
    "scale_grad-fp32": ((_backward, FP32, FP32, True, True), {128: (8, 4)}),
    "scale_grad-bf16": ((_backward, BF16, BF16, True, True), {128: (8, 4)}),
    "scale_grad-fp64": ((_backward, FP64, FP64, True, True), {128: (8, 4)}),
    "add_lsb_grad-fp32": ((_add_lsb_grad, FP32), {128: (8, 4)}),
    "add_lsb_grad-bf16": ((_add_lsb_grad, BF16), {128: (8, 4)}),
    "encode-fp32": ((_encode, FP32, 0), {128: (8, 8)}),
    "encode-bf16-floor": ((_encode, BF16, 1), {64: (16, 0), 128: (0, 16)}),
    "decode-fp32": ((_decode, FP32), {128: (8, 8)}),
    "decode-bf16": ((_decode, BF16), {128: (8, 0), 64: (0, 8)}),
    # The loop over the widths is a loop: its loads and stores are there once.
    "truncate-fp32": ((_truncate, FP32, FP32, False), {128: (8, 8)}),
    "truncate-bf16": ((_truncate, BF16, BF16, False), {128: (8, 8)}),
    "truncate-fp32-bf16": ((_truncate, FP32, BF16, False), {128: (8, 0), 64: (0, 8)}),
    "truncate-fp32-tanh": ((_truncate, FP32, FP32, True), {128: (8, 8)}),
    "truncate-fp64-tanh": ((_truncate, FP64, FP64, True), {128: (8, 8)}),
    "truncate_backward-fp32": ((_truncate_backward, FP32, FP32, False, False, False), {128: (8, 4)}),
    "truncate_backward-bf16": ((_truncate_backward, BF16, BF16, False, False, False), {128: (8, 4)}),
    "truncate_backward-fp32-covered": ((_truncate_backward, FP32, FP32, False, True, False), {128: (4, 4)}),
    "truncate_backward-bf16-fp32-tanh": (
        (_truncate_backward, BF16, FP32, True, False, False),
        {128: (4, 0), 64: (4, 4)},
    ),
    "truncate_scale_grad-fp32": ((_truncate_backward, FP32, FP32, False, False, True), {128: (4, 2)}),
    "truncate_scale_grad-fp32-tanh": ((_truncate_backward, FP32, FP32, True, False, True), {128: (4, 2)}),
    "truncate_scale_grad-fp64": ((_truncate_backward, FP64, FP64, False, False, True), {128: (4, 2)}),
    "categorical-fp32": ((_categorical, FP32, FP32, 0, 0), {128: (8, 8)}),
    "categorical-bf16": ((_categorical, BF16, BF16, 0, 0), {128: (8, 8)}),
    "categorical-fp64": ((_categorical, FP64, FP64, 0, 0), {128: (8, 8)}),
    "categorical-fp32-bf16": ((_categorical, FP32, BF16, 0, 0), {128: (8, 0), 64: (0, 8)}),
    "categorical-fp32-gates": ((_categorical, FP32, FP32, 0, 8), {128: (4, 4)}),
    "categorical-bf16-gates": ((_categorical, BF16, BF16, 0, 16), {128: (2, 2)}),
    "categorical-fp32-soft": ((_categorical, FP32, FP32, 1, 0), {128: (1, 1)}),
    "categorical-fp32-soft-gates": ((_categorical, FP32, FP32, 1, 8), {128: (1, 1)}),
    "categorical-fp32-sample": ((_categorical, FP32, FP32, 2, 4), {128: (1, 1)}),
    "categorical_backward-fp32": ((_categorical_backward, FP32, FP32, 0, 0), {128: (2, 1)}),
    "categorical_backward-bf16": ((_categorical_backward, BF16, BF16, 0, 0), {128: (2, 1)}),
    "categorical_backward-fp64": ((_categorical_backward, FP64, FP64, 0, 0), {128: (2, 1)}),
    "categorical_backward-fp32-gates": ((_categorical_backward, FP32, FP32, 0, 8), {128: (2, 1)}),
    "categorical_backward-fp32-soft": ((_categorical_backward, FP32, FP32, 1, 0), {128: (2, 1)}),
    "categorical_backward-bf16-soft": ((_categorical_backward, BF16, BF16, 1, 0), {64: (2, 1)}),  # four to a thread
    "categorical_backward-fp64-soft": ((_categorical_backward, FP64, FP64, 1, 0), {128: (2, 1)}),
    "categorical_backward-fp32-soft-gates": ((_categorical_backward, FP32, FP32, 1, 8), {128: (2, 1)}),
    "categorical_backward-fp64-soft-gates": ((_categorical_backward, FP64, FP64, 1, 4), {128: (2, 1)}),
    "categorical_backward-fp32-sample": ((_categorical_backward, FP32, FP32, 2, 0), {128: (2, 1)}),
    "activation-fp32": ((_activation, FP32, FP32, 1, 1), {128: (4, 4)}),
    "activation-bf16": ((_activation, BF16, BF16, 1, 1), {128: (2, 2)}),
    "activation-fp32-bf16": ((_activation, FP32, BF16, 2, 2), {128: (4, 2)}),
    "activation-fp64": ((_activation, FP64, FP64, 1, 1), {128: (4, 4)}),
    "activation-fp32-channels": ((_activation, FP32, FP32, 1, 1, 3), {128: (4, 4)}),
    "activation_backward-fp32": ((_activation_backward, FP32, FP32, 1, 0), {128: (2, 2)}),
    "activation_backward-fp32-clip": ((_activation_backward, FP32, FP32, 1, 1), {128: (4, 2)}),
    "activation_backward-fp32-step": ((_activation_backward, FP32, FP32, 2, 2), {128: (2, 2)}),
    "activation_backward-fp32-input": ((_activation_backward, FP32, FP32, 0, 2), {128: (4, 2)}),
    "activation_backward-bf16": ((_activation_backward, BF16, BF16, 1, 0), {128: (1, 1)}),
    "activation_backward-fp64-step": ((_activation_backward, FP64, FP64, 2, 2), {128: (2, 2)}),
    "activation_backward-fp32-channels": ((_activation_backward, FP32, FP32, 2, 2, 3), {128: (2, 2)}),
    "activation-fp32-gelu": ((_activation, FP32, FP32, 0, 0, 1, 2), {128: (4, 4)}),
    "activation-bf16-silu": ((_activation, BF16, BF16, 0, 0, 1, 4), {128: (2, 2)}),
    "activation-fp64-gelu": ((_activation, FP64, FP64, 0, 0, 1, 2), {128: (4, 4)}),
    "activation_backward-fp32-gelu": ((_activation_backward, FP32, FP32, 0, 2, 1, 2), {128: (4, 2)}),
    "activation_backward-bf16-gelu_tanh": ((_activation_backward, BF16, BF16, 0, 0, 1, 3), {128: (2, 1)}),
    "categorical_activation-fp32": ((_categorical_activation, FP32, FP32), {128: (4, 4)}),
    "categorical_activation-bf16": ((_categorical_activation, BF16, BF16), {128: (2, 2)}),
    "categorical_activation-fp32-bf16": ((_categorical_activation, FP32, BF16), {128: (4, 2)}),
    "categorical_activation-fp64": ((_categorical_activation, FP64, FP64), {128: (4, 4)}),
    "categorical_activation_backward-fp32": ((_categorical_activation_backward, FP32, FP32, 1), {128: (4, 2)}),
    "categorical_activation_backward-fp32-winner": ((_categorical_activation_backward, FP32, FP32, 0), {128: (4, 2)}),
    "categorical_activation_backward-bf16": ((_categorical_activation_backward, BF16, BF16, 1), {128: (2, 1)}),
    "categorical_activation_backward-fp32-bf16": ((_categorical_activation_backward, FP32, BF16, 1), {128: (2, 2)}),
    "categorical_activation_backward-fp64": ((_categorical_activation_backward, FP64, FP64, 1), {128: (4, 2)}),
    "absmax-fp32": ((_absmax, FP32), {128: (8, 0)}),
    "absmax-bf16": ((_absmax, BF16), {128: (8, 0)}),
    "absmax-fp64": ((_absmax, FP64), {128: (8, 0)}),
    "absmean-fp32": ((_absmean, FP32), {128: (8, 0)}),
    # Of bit planes, 128 bits hold four of them.
    "pack-planes": ((_packed, 4, 0), {128: (8, 1)}),
    "pack-dense": ((_packed, 4, 1), {128: (8, 0)}),
    "unpack-planes": ((_packed, 4, 0, torch.int32), {128: (1, 8)}),
    "unpack-dense": ((_packed, 4, 1, torch.int32), {128: (0, 8)}),
    "decode_packed-fp32": ((_packed, 4, 0, FP32), {128: (1, 8)}),
    "decode_packed-bf16": ((_packed, 4, 0, BF16), {128: (1, 8)}),
    "decode_packed-fp16": ((_packed, 4, 0, FP16), {128: (1, 8)}),
    "decode_packed-fp64": ((_packed, 4, 0, FP64), {128: (0, 8)}),
    "decode_packed-dense": ((_packed, 4, 1, FP32), {128: (0, 8)}),
}


def _recorded(call):
    return sass.triton_launches(lambda: call[0](*call[1:]))


CASES = [(name, arch) for name in CALLS for arch in (80, 90)] + [
    ("msq-fp32", 120),
    ("scale_grad-bf16", 120),
    ("truncate-bf16", 89),
    ("categorical_backward-fp32", 89),
    ("unpack-planes", 86),
    ("activation-fp32", 86),
]


@pytest.mark.parametrize("name, arch", CASES)
def test_machine_code(name, arch):
    call, widths = CALLS[name]
    for recorded in _recorded(call):
        name = recorded.kernel.__name__
        kernel = sass.triton_kernel(sass.triton_binary(recorded, arch))
        code = kernel.opcodes()
        print(f"{name}: {kernel.registers} registers, {len(kernel.code)} instructions")
        assert kernel.stack == 0 and kernel.spills == 0, f"{name} uses the stack: {kernel.stack, kernel.spills}"
        spills = {op: c for op, c in code.items() if op.startswith(("LDL", "STL"))}
        assert not spills, f"{name} spills registers: {spills}"
        # In float64 the kernels of these families call exp and log of CUDA's libdevice, which have fma, rcp and
        # abs.ftz; powers of two in gradients, ex2.approx, are of exponents from -125 on.
        libdevice = [m.__name__ for m in (categorical, categorical_activation, categorical_record)]
        kinds = "32" if recorded.kernel.__module__ in libdevice else "(32|64)"
        assert not re.search(rf"(?<!\babs)(?<!\bex2\.approx)\.ftz\.f{kinds}", kernel.ptx), (
            "denormals would be flushed to zero"
        )
        assert not re.search(r"div\.(full|approx)", kernel.ptx), "division must round as IEEE says"
        loose = kernel.loosely_rounded()
        assert not loose, f"the assembler may join products and sums: {loose}"
        if recorded.kernel.__name__ not in SMALL:
            for width, (loads, stores) in widths.items():
                got = _count(code, "LDG", width), _count(code, "STG", width)
                assert got[0] >= loads and got[1] >= stores, f"{width}-bit loads, stores: {loads, stores}, got {got}"


def _count(code, op, width):
    return sum(c for name, c in code.items() if name.startswith(op) and name.endswith(f".{width}"))


def test_contraction_is_off():
    """The assembler may contract too: it does when it is allowed to, and the launches do not allow it."""
    (launch,) = _recorded((_round_clamp, FP32, FP32))
    plain, fused = (sass.triton_kernel(sass.triton_binary(launch, 80, fusion)) for fusion in (False, True))
    # What is left are the steps inside IEEE divisions, and what is written as fused.
    assert fused.opcodes()["FFMA"] >= plain.opcodes()["FFMA"] + 32
    assert fused.loosely_rounded() and not plain.loosely_rounded()


def test_launches_forbid_contraction():
    options = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: options.update(kwargs)

    launch(Kernel(), 1)
    assert options["enable_fp_fusion"] is False and options["num_warps"] == THREADS // 32


def test_division_rounds_as_ieee_says():
    (launch,) = _recorded((_round_clamp, FP32, FP32))
    assert "div.rn.f32" in sass.triton_binary(launch, 80).asm["ptx"]
